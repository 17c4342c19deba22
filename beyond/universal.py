"""One perturbation for all images, made on the training images, each step with the gradient of another batch.

Source of the idea: Moosavi-Dezfooli et al., "Universal adversarial perturbations" (arXiv 1610.08401).
"""

import numpy as np
import torch

from attack import aim_at, grey_detector, last, pgd
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
    file, blank = out / "universal_perturbation.pth", torch.zeros(1, 1 if grey else 3, *data.images.shape[-2:])

    def make():
        if not file.exists():
            attacked = grey_detector(detector) if grey else detector
            batches = training_batches(attacked, data, targets, device, len(blank[0]), batch_size, seed)
            iterates = on_batches(attack, attacked.network, batches, blank.to(device), epsilon, steps)
            _, delta, _ = last(progress(iterates, desc="universal perturbation", total=steps + 1, unit="step"))
            write_tensors(file, {"delta": delta.cpu()})
        return checked(file, load_tensors(file), {"delta": blank})["delta"]

    return distributed.on_main(make).to(device)


def on_batches(attack, network, batches, blank, epsilon, steps):
    """``attack.pgd`` of a perturbation, from none at all, ``blank`` (1, C, H, W); each pass is on the next batch."""
    aim = None

    def shown(delta):
        nonlocal aim
        image, aim = next(batches)
        return network((image + delta).clamp(-1, 1))

    def loss(outputs):
        return attack.loss(outputs, aim)

    return pgd(shown, blank, loss, epsilon, steps, last_outputs=False, **attack.options)


def training_batches(detector, data, targets, device, channels, batch_size, seed):
    """Batches (image, attack.Aim) of training images in random order, without end."""
    rng, places = np.random.default_rng(seed), rescale(targets.places, data.sizes[:, None], data.images.shape[-2:])
    while True:
        for batch in in_batches(rng.permutation(len(data)).tolist(), batch_size):
            image = to_input(data.images[batch], device)[:, :channels]
            aims = (values[batch].to(device, non_blocking=True) for values in (places.float(), targets.targeted))
            yield image, aim_at(detector, image, *aims)
