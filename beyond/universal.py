"""One perturbation for all images, made on the training images, see ``attack.universal_perturbation``."""

import numpy as np
import torch

from attack import aim_at, grey_detector, last, universal_perturbation
from dataset import in_batches, rescale, to_input
from support import distributed
from support.checkpoints import checked, load_tensors, write_tensors
from support.command import progress


def find_perturbation(out, attack, detector, data, targets, batch_size, device, epsilon, steps, seed, grey):
    """The perturbation (1, C, H, W) of a universal attack, kept in a file; it is not made again.

    Args:
        out: folder of the file.
        attack: a universal row of ``attack.ATTACKS``.
        data, targets: the training images and their common targets, see ``targets.choose_targets``.
        batch_size: images of each step.
        grey: see ``eval.attack_batch``, as are the others.

    Raises:
        InputError: the file is damaged.
    """
    file, channels = out / "universal_perturbation.pth", 1 if grey else 3

    def make():
        if not file.exists():
            attacked = grey_detector(detector) if grey else detector
            batches = training_batches(attacked, data, targets, device, channels, batch_size, seed)
            iterates = universal_perturbation(attack, attacked.network, batches, epsilon, steps)
            _, delta = last(progress(iterates, desc="universal perturbation", total=steps + 1, unit="step"))
            write_tensors(file, {"delta": delta.cpu()})
        content = load_tensors(file)
        content.pop("made_from", None)  # of older versions
        return checked(file, content, {"delta": torch.zeros(1, channels, *data.images.shape[-2:])})["delta"]

    return distributed.on_main(make).to(device)


def training_batches(detector, data, targets, device, channels, batch_size, seed):
    """Batches (image, attack.Aim) of training images in random order, without end."""
    rng, places = np.random.default_rng(seed), rescale(targets.places, data.sizes[:, None], data.images.shape[-2:])
    while True:
        for batch in in_batches(rng.permutation(len(data)).tolist(), batch_size):
            image = to_input(data.images[batch], device)[:, :channels]
            aims = (values[batch].to(device, non_blocking=True) for values in (places.float(), targets.targeted))
            yield image, aim_at(detector, image, *aims)
