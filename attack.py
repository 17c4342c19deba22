"""Targeted adversarial attacks on a landmark detector: FGSM, I-FGSM, ATI-FGSM, and the choice of their targets.

A white-box attacker moves chosen landmarks of the detector's output to chosen places and keeps the others where they
are, with noise of at most epsilon/256 on an image in [-1, 1] (epsilon = 8: 4 of 255 grey levels). After "Miss the
Point: Targeted Adversarial Attack on Multiple Landmark Detection" (MICCAI 2020), "the paper" below.

    goal = goal_maps(model(image), targets, targeted)
    for iteration, adversarial, maps in ati_fgsm(model, image, goal):
        ...                                # iteration 0 is the clean image; maps are the network's of `adversarial`
"""

import zlib

import numpy as np
import torch

from command import InputError
from dataset import MM_PER_PX0, read_csv, rescale
from model import Goal, encode, highest, landmark_loss, offsets_at, radius_of, share

ETA = 0.05  # step length as a share of epsilon
RANDOM_SIZE = (800, 640)  # (H, W) px of the image on which the paper draws its random targets,
RANDOM_X = (100, 600)  # in this range of x
RANDOM_Y = (250, 750)  # and of y


# --- attacks ---------------------------------------------------------------------------------------------------------
# Each takes a model (any callable from images to maps as model.UNet gives them, its weights frozen so that only the
# input's gradient is computed), and yields (iteration, adversarial images, their maps), beginning with the clean ones.


def iterate(model, image, goal, weigh, epsilon, steps, eta):
    """The loop of every attack here: gradient, step, project, clip. ``weigh`` makes weights of the losses (B, K)."""
    epsilon = epsilon / 256
    noise = torch.zeros_like(image)
    for iteration in range(steps + 1):
        adversarial = (image - noise).clamp(-1, 1).requires_grad_(iteration < steps)
        with torch.set_grad_enabled(iteration < steps):
            maps = model(adversarial)
        yield iteration, adversarial.detach(), maps.detach()
        if iteration < steps:
            with torch.enable_grad():
                losses = landmark_loss(maps, goal)
                (gradient,) = torch.autograd.grad((weigh(losses.detach()) * losses).sum(), adversarial)
            noise = (noise + eta * epsilon * gradient.sign()).clamp(-epsilon, epsilon)


def i_fgsm(model, image, goal, epsilon=8, steps=300, eta=ETA):
    """Targeted iterative FGSM: minimise sum_k L_k.

    Args:
        model: callable, (B, 3, H, W) -> (B, 3, K, H, W).
        image: (B, 3, H, W) float32 in [-1, 1].
        goal: Goal of the same B, K, H, W, from ``goal_maps``.
        epsilon: bound of the noise in 1/256 of the [-1, 1] scale, that is in half grey levels.
        steps: number of iterations.
        eta: step length as a share of epsilon.

    Yields:
        (iteration, adversarial, maps) for iteration 0 (the clean image) .. steps; adversarial like ``image``, maps as
        the model gives them, both without gradient.

    Example:
        >>> for iteration, adversarial, maps in i_fgsm(model, image, goal, epsilon=8, steps=300):
        ...     pass
        >>> decode(maps)  # of the last attacked image
    """
    return iterate(model, image, goal, torch.ones_like, epsilon, steps, eta)


def ati_fgsm(model, image, goal, epsilon=8, steps=300, eta=ETA):
    """Adaptive targeted iterative FGSM (the method that the paper proposes): minimise sum_k a_k L_k.

    The weights a_k = L_k / mean_j L_j of each image are renewed in every iteration and constant in the gradient: hard
    landmarks get more weight. Arguments, yields and use as those of ``i_fgsm``.
    """
    return iterate(model, image, goal, adaptive_weights, epsilon, steps, eta)


def fgsm(model, image, goal, epsilon=8):
    """Targeted FGSM: one step of full length towards the goal. Arguments, yields and use as those of ``i_fgsm``."""
    return iterate(model, image, goal, torch.ones_like, epsilon, steps=1, eta=1.0)


def untargeted_fgsm(model, image, goal, epsilon=8):
    """Untargeted FGSM: one step of full length away from the goal, which are the maps to be destroyed.

    The goal should encode positions (the clean prediction, say): against the model's own clean maps the gradient
    vanishes. Arguments, yields and use as those of ``i_fgsm``.
    """
    return iterate(model, image, goal, lambda losses: -torch.ones_like(losses), epsilon, steps=1, eta=1.0)


def adaptive_weights(losses):
    """a_k = L_k / mean_j L_j of losses (B, K), each image by itself."""
    return losses / losses.mean(-1, keepdim=True)


def grey_model(model):
    """The model as one of grey images (B, 1, H, W): its attacks give all three channels the same noise."""
    return lambda grey: model(grey.expand(-1, 3, -1, -1))


ATTACKS = {"I-FGSM": i_fgsm, "ATI-FGSM": ati_fgsm, "FGSM": fgsm, "untargeted-FGSM": untargeted_fgsm}
ONE_STEP = ("FGSM", "untargeted-FGSM")
UNTARGETED = "untargeted-FGSM"


def goal_maps(clean, targets, targeted):
    """What a targeted attack wants the network to say.

    Targeted landmarks get the maps of their targets; the others keep the network's own clean maps, their offsets
    counting where the clean heatmap is above one half.

    Args:
        clean: (B, 3, K, H, W) maps of the clean images as the network gives them.
        targets: (B, K, 2) float x, y in px; those of stationary landmarks are not used.
        targeted: (B, K) bool.
    """
    size = clean.shape[-2:]
    heatmap = torch.where(targeted[..., None, None], encode(targets, size).heatmap, clean[:, 0].sigmoid())
    count = (heatmap > 0.5).sum((-2, -1)).max()  # in a target's disc, heatmaps are above exp(-1/2) > 1/2, too
    values, pixels = highest(heatmap.flatten(-2), max(1, int(count)))
    places = torch.stack([pixels % size[1], pixels // size[1]], dim=1)
    towards = (targets.movedim(-1, 1)[..., None] - places) / radius_of(size)
    own = offsets_at(pixels, clean[:, 1:].flatten(-2))
    return Goal(heatmap, pixels, torch.where(targeted[:, None, :, None], towards, own), share(values > 0.5))


# --- targets ---------------------------------------------------------------------------------------------------------
# Each returns targets (K, 2) float64 x, y in px0, nan for stationary landmarks. They depend on the seed and the image
# (its id, size and ground truth) alone: on no model, method, input size or batch.


def generator(seed, id):
    """A random generator for one image, the same in whatever order and company images come."""
    return np.random.default_rng([seed, zlib.crc32(id.encode())])


def random_targets(rng, num_landmarks, size0):
    """The paper's random protocol.

    |T| is uniform in 1 .. K - 2, T uniform, and targets are uniform in x of [100, 600] and y of [250, 750] px of a
    640 x 800 image, in proportion on any other.

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


def shift_targets(rng, landmarks, size0, count, shift_mm):
    """Displacements: ``count`` landmarks, each moved by ``shift_mm`` from the truth in a random direction.

    Args:
        rng: numpy random generator.
        landmarks: (K, 2) x, y in px0.
        size0: (H0, W0) of the original image; a direction that leads out of it is drawn again.
        count: number of targeted landmarks.
        shift_mm: distance in mm.

    Raises:
        InputError: a landmark can't be moved so far within the image.
    """
    limits = np.array([size0[1] - 1, size0[0] - 1])
    chosen = rng.choice(len(landmarks), count, replace=False)
    angles = rng.uniform(0, 2 * np.pi, (count, 1000))
    steps = shift_mm / MM_PER_PX0 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    places = landmarks[chosen, None] + steps  # (count, draws, 2)
    inside = ((places >= 0) & (places <= limits)).all(-1)
    if not inside.any(1).all():
        k = chosen[~inside.any(1)][0]
        raise InputError(f"--shift-mm {shift_mm:g}: landmark {k + 1} can't be moved so far inside its image")
    targets = np.full(landmarks.shape, np.nan)
    targets[chosen] = places[np.arange(count), inside.argmax(1)]
    return targets


def read_targets(path, num_landmarks):
    """Targets from a CSV file with the header ``landmark,x,y``: landmarks 1..K, positions in px0, any order.

    Raises:
        InputError: unreadable, or a row is wrong; the message names it.
    """
    targets = np.full((num_landmarks, 2), np.nan)
    for line, (landmark, x, y) in read_csv(path, ["landmark", "x", "y"], "landmark,x,y"):
        if not landmark.strip().isdecimal() or not 1 <= int(landmark) <= num_landmarks:
            raise InputError(f"{path}: line {line}: there is no landmark {landmark!r}, only 1 to {num_landmarks}")
        k = int(landmark) - 1
        if not np.isnan(targets[k]).all():
            raise InputError(f"{path}: line {line}: landmark {k + 1} has a target already")
        try:
            targets[k] = float(x), float(y)
        except ValueError:
            raise InputError(f"{path}: line {line}: '{x},{y}' is not x,y") from None
        if not np.isfinite(targets[k]).all():
            raise InputError(f"{path}: line {line}: '{x},{y}' is no place")
    if np.isnan(targets).all():
        raise InputError(f"{path}: no target; a row of landmark,x,y for each is needed")
    return targets


def choose_targets(kind, data, seed, count, shift_mm):
    """Targets for a whole split: (N, K, 2) float64 x, y in px0, nan for stationary landmarks.

    Args:
        kind: "random", "shift", or the path of a file of targets for every image.
        data: dataset.Cephalograms.
        seed, count, shift_mm: see ``generator`` and ``shift_targets``.

    Raises:
        InputError: a file is wrong, or a target lies outside an image.
    """
    landmarks, sizes = data.landmarks_px0.numpy(), data.sizes.tolist()
    num_landmarks = landmarks.shape[1]
    if kind == "random":
        chosen = [
            random_targets(generator(seed, id), num_landmarks, size0) for id, size0 in zip(data.ids, sizes, strict=True)
        ]
    elif kind == "shift":
        chosen = [
            shift_targets(generator(seed, id), points, size0, count, shift_mm)
            for id, points, size0 in zip(data.ids, landmarks, sizes, strict=True)
        ]
    else:
        targets = read_targets(kind, num_landmarks)
        for id, (height, width) in zip(data.ids, sizes, strict=True):
            outside = (targets < 0) | (targets > (width - 1, height - 1))  # false for nan
            if outside.any():
                k = outside.any(1).argmax()
                raise InputError(
                    f"{kind}: the target ({targets[k, 0]:g}, {targets[k, 1]:g}) of landmark {k + 1} lies outside image "
                    f"{id} of {width} x {height} px"
                )
        chosen = [targets] * len(data)
    return torch.from_numpy(np.stack(chosen))
