"""What the commands of an experiment would take: images that pass the network, and from these time, memory and disk."""

from typing import NamedTuple

from attack import ATTACKS
from beyond.defences import DRAWS
from readers.layouts import parts_of

COLUMNS = ["experiment", "commands", "images trained", "image-iterations", "hours", "memory (GiB)", "disk (GiB)"]
STATES = 3  # resume.pth holds the weights and two moments of each


class Step(NamedTuple):
    """What one image of ``size`` takes on a machine, see ``benchmark.time_steps``."""

    size: tuple  # (H, W) px
    training: float  # seconds of a step of a training,
    attack: float  # and of an attack
    fixed_bytes: int  # weights, gradients and moments
    image_bytes: int  # each further image of a batch in training


def training_cost(args, step, count):
    """``COLUMNS`` of train.py with parsed arguments on ``count`` images."""
    scale = args.size[0] * args.size[1] / (step.size[0] * step.size[1])
    images = args.epochs * count
    passes = 1 + (args.attack_steps * step.attack / step.training if args.adversarial else 0)
    checkpoints = -(-args.epochs // args.checkpoint_every)
    hours = images * passes * scale * step.training / 3600
    memory = (step.fixed_bytes + args.batch_size * scale * step.image_bytes) / 2**30
    disk = (checkpoints + STATES) * step.fixed_bytes / 4 / 2**30
    return {"images trained": images, "hours": hours, "memory (GiB)": memory, "disk (GiB)": disk}


def attack_cost(args, size, step, counts):
    """``COLUMNS`` of test.py with parsed arguments on a detector of ``size``; counts: {split: number of images}."""
    scale = size[0] * size[1] / (step.size[0] * step.size[1])
    images = len(args.images or ()) or sum(counts[part] for part in parts_of(args.split))
    images = min(images, args.limit or images)
    attacks = [ATTACKS[name] for name in args.attack or ()]
    draws = [DRAWS if attacks and name.startswith("noise") else 1 for name in args.defence or ()]
    iterations = sum((attack.steps or args.steps) * (1 + sum(draws) * (not attack.blind)) for attack in attacks)
    # a test is a forward pass, a third of a step
    hours = images * (iterations or (1 + len(draws)) / 3) * scale * step.attack / 3600
    memory = (step.fixed_bytes / 4 + args.batch_size * max(draws, default=1) * scale * step.image_bytes) / 2**30
    return {"image-iterations": images * iterations, "hours": hours, "memory (GiB)": memory}
