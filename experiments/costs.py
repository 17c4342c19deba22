"""What the commands of an experiment would take: images that pass the network, and from these time, memory and disk."""

from typing import NamedTuple

from attack import ATTACKS
from readers.layouts import IDS, parts_of

STATES = 3  # resume.pth holds the weights and two moments of each
OFFICIAL = {split: len(ids) for split, ids in IDS.items()}  # images


class Step(NamedTuple):
    """What one image of ``size`` takes on a machine, see ``benchmark.time_steps``."""

    size: tuple  # (H, W) px
    training: float  # seconds of a step of a training,
    attack: float  # and of an attack
    fixed_bytes: int  # weights, gradients and moments
    image_bytes: int  # each further image of a batch in training


class Cost(NamedTuple):
    """Of a command."""

    trained: int = 0  # images in all epochs
    attacked: int = 0  # images x iterations
    seconds: float = 0.0
    memory: float = 0.0  # bytes
    disk: float = 0.0


def training_cost(args, step, count):
    """Cost of train.py with parsed arguments on ``count`` images."""
    scale = args.size[0] * args.size[1] / (step.size[0] * step.size[1])
    images = args.epochs * count
    passes = 1 + (args.attack_steps * step.attack / step.training if args.adversarial else 0)
    checkpoints = -(-args.epochs // args.checkpoint_every)
    return Cost(
        images,
        0,
        images * passes * scale * step.training,
        step.fixed_bytes + args.batch_size * scale * step.image_bytes,
        (checkpoints + STATES) * step.fixed_bytes / 4,
    )


def attack_cost(args, size, step, counts):
    """Cost of test.py with parsed arguments on a detector of ``size``; counts: {split: number of images}."""
    scale = size[0] * size[1] / (step.size[0] * step.size[1])
    images = len(args.images or ()) or sum(counts[part] for part in parts_of(args.split))
    images = min(images, args.limit or images)
    iterations = 0
    for attack in (ATTACKS[name] for name in args.attack or ()):
        iterations += (attack.steps or args.steps) * (1 if attack.blind else 1 + len(args.defence or ()))
    # a test is a forward pass, a third of a step
    seconds = images * (iterations or 1 / 3) * scale * step.attack
    memory = step.fixed_bytes / 4 + args.batch_size * scale * step.image_bytes
    return Cost(0, images * iterations, seconds, memory)


def total(costs):
    """Sums, but of memory the largest."""
    rows = list(zip(*costs, strict=True)) or [(0,)] * len(Cost._fields)
    trained, attacked, seconds, memory, disk = rows
    return Cost(sum(trained), sum(attacked), sum(seconds), max(memory), sum(disk))
