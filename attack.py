"""Targeted adversarial attacks on a landmark detector: FGSM, I-FGSM, ATI-FGSM, and the choice of targets.

A white-box attacker moves chosen ("targeted") landmarks of the detector's output to target positions and keeps the
others ("stationary") where they are, by a perturbation of L-infinity norm at most epsilon/256 of an image in [-1, 1]
(epsilon = 8: 4 of 255 grey levels). After "Miss the Point: Targeted Adversarial Attack on Multiple Landmark Detection"
(MICCAI 2020), called "the paper" below.

    goal = goal_maps(model(image), targets, targeted)
    for iteration, adversarial, maps in ati_fgsm(model, image, goal):
        ...                                # iteration 0 is the clean image; maps are the model's maps of `adversarial`
"""

import zlib

import numpy as np
import torch

from dataset import read_targets, rescale
from model import Goal, encode, landmark_loss, mean_weights, offsets_at, radius_of
from support.errors import InputError

STEP_SIZE = 0.05  # in units of epsilon; the paper's eta
RANDOM_SIZE = (800, 640)  # (H, W) px of the image for which the paper states its random targets,
RANDOM_X = (100, 600)  # the range of x
RANDOM_Y = (250, 750)  # and of y


# --- attacks ---------------------------------------------------------------------------------------------------------


def pgd(model, image, loss, epsilon=8, steps=300, step_size=STEP_SIZE):
    """Projected gradient descent in an L-infinity ball: gradient, step, project, clip. Every attack here calls it.

    Args:
        model: callable, image -> maps; freeze its weights, so that only the gradient of the image is computed.
        image: (B, C, H, W) float in [-1, 1].
        loss: callable, maps -> (B,), which the attack minimises.
        epsilon: L-infinity norm of the perturbation in half grey levels (1/256 of the [-1, 1] scale).
        steps: number of iterations.
        step_size: of a sign step, in units of epsilon.

    Yields:
        (iteration, adversarial, maps) for iteration 0 (the clean image) .. steps; adversarial like ``image``, maps as
        the model returns them, both without gradient.
    """
    bound = epsilon / 256
    delta = torch.zeros_like(image)
    for iteration in range(steps + 1):
        adversarial = (image + delta).clamp(-1, 1).requires_grad_(iteration < steps)
        with torch.set_grad_enabled(iteration < steps):
            maps = model(adversarial)
        yield iteration, adversarial.detach(), maps.detach()
        if iteration < steps:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(maps).sum(), adversarial)
            delta = (delta - step_size * bound * gradient.sign()).clamp(-bound, bound)


def i_fgsm(model, image, goal, epsilon=8, steps=300, step_size=STEP_SIZE):
    """Targeted I-FGSM in the paper: sign steps that minimise sum_k L_k.

    Distance: L-infinity. Source: Kurakin et al., "Adversarial examples in the physical world" (arXiv 1607.02533); the
    paper, section 2.

    Args:
        model: callable, (B, C, H, W) -> (B, 3, K, H, W): heatmap logits, x- and y-offsets, see ``model.UNet``.
        image: clean images in [-1, 1].
        goal: from ``goal_maps``.
        epsilon: L-infinity norm of the perturbation in half grey levels. Default: 8.
        steps: iterations. Default: 300.
        step_size: in units of epsilon. Default: 0.05.

    Shape:
        - image: (B, C, H, W) float32, C = 3, or 1 with ``grey_model``.
        - yields (iteration, adversarial, maps): int, (B, C, H, W), (B, 3, K, H, W).

    Example:
        >>> goal = goal_maps(model(image), targets, targeted)
        >>> for iteration, adversarial, maps in i_fgsm(model, image, goal, epsilon=8, steps=300):
        ...     pass
        >>> points = decode(maps)  # of the last adversarial images
    """
    return pgd(model, image, lambda maps: landmark_loss(maps, goal).sum(-1), epsilon, steps, step_size)


def ati_fgsm(model, image, goal, epsilon=8, steps=300, step_size=STEP_SIZE):
    """Adaptive targeted I-FGSM, the method that the paper proposes: minimise sum_k a_k L_k.

    Distance: L-infinity. Source: the paper, section 2. The weights a_k = L_k / mean_j L_j of each image are updated in
    every iteration and held constant in the gradient: landmarks that are hard to move get more weight.

    Args:
        model: callable, (B, C, H, W) -> (B, 3, K, H, W): heatmap logits, x- and y-offsets, see ``model.UNet``.
        image: clean images in [-1, 1].
        goal: from ``goal_maps``.
        epsilon: L-infinity norm of the perturbation in half grey levels. Default: 8.
        steps: iterations. Default: 300.
        step_size: in units of epsilon. Default: 0.05.

    Shape:
        - image: (B, C, H, W) float32, C = 3, or 1 with ``grey_model``.
        - yields (iteration, adversarial, maps): int, (B, C, H, W), (B, 3, K, H, W).

    Example:
        >>> goal = goal_maps(model(image), targets, targeted)
        >>> *_, (iteration, adversarial, maps) = ati_fgsm(model, image, goal, epsilon=4)
    """

    def loss(maps):
        losses = landmark_loss(maps, goal)
        return (adaptive_weights(losses.detach()) * losses).sum(-1)

    return pgd(model, image, loss, epsilon, steps, step_size)


def fgsm(model, image, goal, epsilon=8):
    """Targeted FGSM: one sign step of size epsilon that minimises sum_k L_k.

    Distance: L-infinity. Source: Goodfellow et al., "Explaining and harnessing adversarial examples" (arXiv 1412.6572).

    Args:
        model: callable, (B, C, H, W) -> (B, 3, K, H, W): heatmap logits, x- and y-offsets, see ``model.UNet``.
        image: clean images in [-1, 1].
        goal: from ``goal_maps``.
        epsilon: L-infinity norm of the perturbation in half grey levels. Default: 8.

    Shape:
        - image: (B, C, H, W) float32, C = 3, or 1 with ``grey_model``.
        - yields (iteration, adversarial, maps) for iterations 0 and 1: int, (B, C, H, W), (B, 3, K, H, W).

    Example:
        >>> goal = goal_maps(model(image), targets, targeted)
        >>> (_, _, clean), (_, adversarial, maps) = fgsm(model, image, goal)
    """
    return pgd(model, image, lambda maps: landmark_loss(maps, goal).sum(-1), epsilon, steps=1, step_size=1.0)


def untargeted_fgsm(model, image, goal, epsilon=8):
    """Untargeted FGSM: one sign step of size epsilon that maximises sum_k L_k of the maps to be destroyed.

    Distance: L-infinity. Source: Goodfellow et al., "Explaining and harnessing adversarial examples" (arXiv 1412.6572).

    Args:
        model: callable, (B, C, H, W) -> (B, 3, K, H, W): heatmap logits, x- and y-offsets, see ``model.UNet``.
        image: clean images in [-1, 1].
        goal: ``encode`` of the clean predictions; at the model's own clean maps the gradient would be zero.
        epsilon: L-infinity norm of the perturbation in half grey levels. Default: 8.

    Shape:
        - image: (B, C, H, W) float32, C = 3, or 1 with ``grey_model``.
        - yields (iteration, adversarial, maps) for iterations 0 and 1: int, (B, C, H, W), (B, 3, K, H, W).

    Example:
        >>> goal = encode(decode(model(image)), image.shape[-2:])
        >>> (_, _, clean), (_, adversarial, maps) = untargeted_fgsm(model, image, goal)
    """
    return pgd(model, image, lambda maps: -landmark_loss(maps, goal).sum(-1), epsilon, steps=1, step_size=1.0)


def adaptive_weights(losses):
    """a_k = L_k / mean_j L_j of losses (B, K), for each image separately."""
    return losses / losses.mean(-1, keepdim=True)


def grey_model(model):
    """The model as a function of grey images (B, 1, H, W), so that all three channels get the same perturbation."""
    return lambda grey: model(grey.expand(-1, 3, -1, -1))


ATTACKS = {"I-FGSM": i_fgsm, "ATI-FGSM": ati_fgsm, "FGSM": fgsm, "untargeted-FGSM": untargeted_fgsm}
ONE_STEP = ("FGSM", "untargeted-FGSM")
UNTARGETED = "untargeted-FGSM"


def goal_maps(clean, targets, targeted):
    """Goal maps of a targeted attack (paper, section 2).

    A targeted landmark gets the maps of its target position. A stationary one keeps the model's own clean maps, its
    offsets counting where the clean heatmap is above 0.5.

    Args:
        clean: (B, 3, K, H, W) maps of the clean images.
        targets: (B, K, 2) float x, y in px; those of stationary landmarks are ignored.
        targeted: (B, K) bool.
    """
    size = clean.shape[-2:]
    heatmap = torch.where(targeted[..., None, None], encode(targets, size).heatmap, clean[:, 0].sigmoid())
    # a target's disc is above exp(-1/2) > 0.5 as well
    count = (heatmap > 0.5).sum((-2, -1)).max()
    values, pixels = heatmap.flatten(-2).topk(max(1, int(count)), sorted=False)
    places = torch.stack([pixels % size[1], pixels // size[1]], dim=1)
    towards = (targets.movedim(-1, 1)[..., None] - places) / radius_of(size)
    own = offsets_at(pixels, clean[:, 1:].flatten(-2))
    return Goal(heatmap, pixels, torch.where(targeted[:, None, :, None], towards, own), mean_weights(values > 0.5))


# --- targets ---------------------------------------------------------------------------------------------------------
# Each function returns targets (K, 2) float64 x, y in px0, nan for stationary landmarks. They depend only on the seed
# and the image (its id, size and ground truth), not on model, method, input size or batch.


def generator(seed, id):
    """The random generator of one image."""
    return np.random.default_rng([seed, zlib.crc32(id.encode())])


def random_targets(rng, num_landmarks, size0):
    """The paper's random protocol.

    |T| is uniform in 1 .. K - 2, T uniform, and targets are uniform in x of [100, 600] and y of [250, 750] px of a
    640 x 800 image, scaled to the image's size.

    Args:
        rng: numpy random generator.
        num_landmarks: K.
        size0: (H0, W0) of the original image.
    """
    count = rng.integers(1, max(2, num_landmarks - 1))
    chosen = rng.choice(num_landmarks, count, replace=False)
    targets = np.full((num_landmarks, 2), np.nan)
    places = np.stack([rng.uniform(*RANDOM_X, count), rng.uniform(*RANDOM_Y, count)], axis=-1)
    targets[chosen] = rescale(torch.from_numpy(places), RANDOM_SIZE, size0).numpy()
    return targets


def shift_targets(rng, landmarks, size0, count, displacement):
    """Displacements: ``count`` landmarks, each targeted at a fixed distance from its position, in a random direction.

    Args:
        rng: numpy random generator.
        landmarks: (K, 2) x, y in px0.
        size0: (H0, W0) of the original image; a direction that leads out of it is drawn again.
        count: number of targeted landmarks.
        displacement: distance in px0.

    Raises:
        InputError: no direction stays inside the image.
    """
    limits = np.array([size0[1] - 1, size0[0] - 1])
    chosen = rng.choice(len(landmarks), count, replace=False)
    angles = rng.uniform(0, 2 * np.pi, (count, 1000))
    steps = displacement * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    places = landmarks[chosen, None] + steps  # (count, draws, 2)
    inside = ((places >= 0) & (places <= limits)).all(-1)
    if not inside.any(1).all():
        k = chosen[~inside.any(1)][0]
        raise InputError(f"--shift-mm: landmark {k + 1} cannot be displaced by {displacement:g} px inside its image")
    targets = np.full(landmarks.shape, np.nan)
    targets[chosen] = places[np.arange(count), inside.argmax(1)]
    return targets


def choose_targets(source, data, seed, count, shift_mm):
    """Targets for a whole split: (N, K, 2) float64 x, y in px0, nan for stationary landmarks.

    Args:
        source: "random", "shift", or the path of a file of targets, see ``dataset.read_targets``.
        data: dataset.Cephalograms.
        seed: of "random" and "shift".
        count: number of landmarks that "shift" targets.
        shift_mm: displacement of "shift" in mm, from ``data.reference_px0``.

    Raises:
        InputError: the file is wrong, or a target lies outside its image.
    """
    landmarks, sizes = data.reference_px0.numpy(), data.sizes.tolist()
    if source == "random":
        rows = [
            random_targets(generator(seed, id), landmarks.shape[1], size0)
            for id, size0 in zip(data.ids, sizes, strict=True)
        ]
    elif source == "shift":
        displacements = (shift_mm / data.mm_per_px0).tolist()
        rows = [
            shift_targets(generator(seed, id), points, size0, count, displacement)
            for id, points, size0, displacement in zip(data.ids, landmarks, sizes, displacements, strict=True)
        ]
    else:
        rows = read_targets(source, data.ids, landmarks.shape[1])
        for id, targets, (height, width) in zip(data.ids, rows, sizes, strict=True):
            outside = (targets < 0) | (targets > (width - 1, height - 1))  # False for nan
            if outside.any():
                k = outside.any(1).argmax()
                raise InputError(
                    f"{source}: the target ({targets[k, 0]:g}, {targets[k, 1]:g}) of landmark {k + 1} lies outside "
                    f"image {id} of {width} x {height} px"
                )
    return torch.from_numpy(np.stack(rows))
