"""One perturbation for all images, made on the training images, see ``attack.universal_perturbation``."""

import numpy as np
import torch

from attack import grey_model, last, universal_perturbation, vote_goal_at
from dataset import in_batches, rescale, to_input
from eval import predict_batches
from support import distributed
from support.checkpoints import load_file, write_tensors
from support.command import progress


def find_perturbation(file, attack, model, data, targets, batch_size, device, epsilon, steps, seed, grey):
    """The perturbation (1, C, H, W) of a universal attack, kept in a file.

    Args:
        file: where it is kept; it is not made again.
        attack: a universal row of ``attack.ATTACKS``.
        data, targets: the training images and their common targets, see ``targets.choose_targets``.
        batch_size: images of each step.
        grey: see ``eval.attack_batch``, as are the others.
    """

    def make():
        if not file.exists():
            network, channels = (grey_model(model), 1) if grey else (model, 3)
            batches = training_batches(network, data, targets, device, channels, batch_size, seed)
            iterates = universal_perturbation(attack, network, batches, epsilon, steps)
            _, delta = last(progress(iterates, desc="universal perturbation", total=steps + 1, unit="step"))
            write_tensors(file, {"delta": delta.cpu()})

    distributed.on_main(make)
    return load_file(file)["delta"].to(device)


def training_batches(model, data, targets, device, channels, batch_size, seed):
    """Batches (image, goal) of training images in random order, without end."""
    size = data.images.shape[-2:]
    batches = in_batches(list(range(len(data))), batch_size)
    found = torch.cat([points.cpu() for _, points, _ in predict_batches(model, data.images, batches, device, True)])
    aims = rescale(targets.places, data.sizes[:, None], size).float()
    places = torch.where(targets.targeted[..., None], aims, found)
    rng = np.random.default_rng(seed)
    while True:
        for batch in in_batches(rng.permutation(len(data)).tolist(), batch_size):
            aims = (values[batch].to(device, non_blocking=True) for values in (places, targets.targeted))
            goal = vote_goal_at(*aims, size)
            yield to_input(data.images[batch], device)[:, :channels], goal
