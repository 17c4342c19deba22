"""Targeted adversarial attacks on a landmark detector: FGSM, I-FGSM, ATI-FGSM, Vote-PGD, and the choice of targets.

A white-box attacker moves chosen ("targeted") landmarks of the detector's output to target positions and keeps the
others ("stationary") where they are, by a perturbation of L-infinity norm at most epsilon/256 of an image in [-1, 1]
(epsilon = 8: 4 of 255 grey levels). After "Miss the Point: Targeted Adversarial Attack on Multiple Landmark Detection"
(MICCAI 2020), called "the paper" below.

    goal = goal_maps(model(image), targets, targeted)
    for iteration, adversarial, maps in ati_fgsm(model, image, goal):
        ...                                # iteration 0 is the clean image; maps are the model's maps of `adversarial`
"""

import math
import zlib
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dataset import read_targets, rescale
from model import Goal, decode, encode, landmark_loss, mean_weights, offsets_at, pixel_positions, radius_of
from support.errors import InputError

STEP_SIZE = 0.05  # in units of epsilon; the paper's eta
MOMENTUM = 0.75  # of Vote-PGD, as are the constants down to STATIONARY_WEIGHT
VOTE_WIDTH = (0.1, 0.33)  # of a landmark's kernel in units of R: its distance from the goal position, so limited
TOLERANCE = 1 / 3  # in units of R, 4 mm in the ISBI 2015 images: up to it, a goal position counts as reached
TARGETED_WEIGHT = (1.0, 2.5, 1.5)  # of a landmark's loss: minimum, maximum, slope per tolerance of distance
STATIONARY_WEIGHT = (0.1, 1.0, 1.0)
EVASION_WEIGHT = 0.3  # of the scores by which attacks are told, in the evasive attack
RANDOM_SIZE = (800, 640)  # (H, W) px of the image for which the paper states its random targets,
RANDOM_X = (100, 600)  # the range of x
RANDOM_Y = (250, 750)  # and of y


# --- attacks ---------------------------------------------------------------------------------------------------------


def pgd(model, image, loss, epsilon=8, steps=300, step_size=STEP_SIZE, momentum=0.0, start=None, last_maps=True):
    """Projected gradient descent in an L-infinity ball: gradient, step, project, clip, as in every attack here.

    Args:
        model: callable, image -> maps; freeze its weights, so that only the gradient of the image is computed.
        image: (B, C, H, W) float in [-1, 1].
        loss: callable, maps -> (B,), which the attack minimises.
        epsilon: L-infinity norm of the perturbation in half grey levels (1/256 of the [-1, 1] scale).
        steps: number of iterations.
        step_size: of a sign step, in units of epsilon; a number, or a callable of the progress, iteration / steps.
        momentum: of the gradients, each divided by its mean magnitude.
        start: perturbation to start from, like ``image`` (default: none).
        last_maps: False saves the forward pass of the last iterate, whose maps are then None.

    Yields:
        (iteration, adversarial, maps) for iteration 0 .. steps, 0 being the clean image unless there is a ``start``;
        adversarial like ``image``, maps as the model returns them, both without gradient.
    """
    bound = epsilon / 256
    delta, velocity = torch.zeros_like(image) if start is None else start, torch.zeros_like(image)
    for iteration in range(steps + 1):
        adversarial = (image + delta).clamp(-1, 1).requires_grad_(iteration < steps)
        if iteration == steps and not last_maps:
            yield iteration, adversarial, None
            return
        with torch.set_grad_enabled(iteration < steps):
            maps = model(adversarial)
        yield iteration, adversarial.detach(), maps.detach()
        if iteration < steps:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(maps).sum(), adversarial)
            if momentum:
                magnitude = gradient.abs().mean((1, 2, 3), keepdim=True)
                velocity = momentum * velocity + gradient / magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny)
            else:
                velocity = gradient
            step = step_size(iteration / steps) if callable(step_size) else step_size
            delta = (delta - step * bound * velocity.sign()).clamp(-bound, bound)


def keep_best(iterates, score):
    """What ``pgd`` yields, but of each image the iterate with the highest score so far, the latest among equals.

    Args:
        iterates: iterable of (iteration, adversarial, maps).
        score: callable, maps -> (B,).
    """
    best = None
    for iteration, *found in iterates:
        found = [score(found[1]), *found]
        if best is None:
            best = [new.clone() for new in found]  # with CUDA graphs, the next call of the model overwrites its maps
        else:
            better = found[0] >= best[0]
            best = [
                torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(found, best, strict=True)
            ]
        yield iteration, *best[1:]


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
        >>> for iteration, adversarial, maps in ati_fgsm(model, image, goal, epsilon=4):
        ...     pass
    """
    return pgd(model, image, lambda maps: adaptive_loss(maps, goal), epsilon, steps, step_size)


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


def adaptive_loss(maps, goal):
    """sum_k a_k L_k of each image, see ``ati_fgsm``: (B,)."""
    losses = landmark_loss(maps, goal)
    return (adaptive_weights(losses.detach()) * losses).sum(-1)


def adaptive_weights(losses):
    """a_k = L_k / mean_j L_j of losses (B, K), for each image separately."""
    return losses / losses.mean(-1, keepdim=True)


def grey_model(model):
    """The model as a function of grey images (B, 1, H, W), so that all three channels get the same perturbation."""
    return lambda grey: model(grey.expand(-1, 3, -1, -1))


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
    places = pixel_positions(pixels, size[1])
    towards = (targets.movedim(-1, 1)[..., None] - places) / radius_of(size)
    own = offsets_at(pixels, clean[:, 1:].flatten(-2))
    return Goal(heatmap, pixels, torch.where(targeted[:, None, :, None], towards, own), mean_weights(values > 0.5))


# --- Vote-PGD --------------------------------------------------------------------------------------------------------


class VoteGoal(NamedTuple):
    """The places at which the decoder should find the landmarks."""

    places: torch.Tensor  # (B, K, 2) x, y in px: goal positions
    targeted: torch.Tensor  # (B, K) bool
    pixels: torch.Tensor  # (B, K, P) int64, y W + x of the pixels of the disc around each place, padded with others
    inside: torch.Tensor  # (B, K, P) bool, False for the padding


def vote_goal(clean, targets, targeted):
    """Goal of Vote-PGD: targets, and the clean predictions of stationary landmarks; arguments as in ``goal_maps``."""
    places = torch.where(targeted[..., None], targets, decode(clean, subpixel=True).to(targets.dtype))
    return vote_goal_at(places, targeted, clean.shape[-2:])


def vote_goal_at(places, targeted, size):
    """Goal of Vote-PGD from places (B, K, 2) px of all landmarks in an input of ``size`` (H, W)."""
    disc = encode(places, size)
    return VoteGoal(places, targeted, disc.pixels, disc.weight > 0)


def vote_pgd(model, image, goal, epsilon=8, steps=300, restarts=1, seed=0, loss=None):
    """Vote-PGD: its loss is on the votes that the decoder counts, not on the maps.

    Distance: L-infinity. Source: this implementation; momentum and the best iterate are as in APGD (Croce and Hein,
    arXiv 2003.01690). Minimises ``vote_loss`` with momentum and a falling step size and keeps, for each image, the
    iterate whose decoded landmarks are best, see ``landmarks_in_place``.

    Args:
        model: callable, (B, C, H, W) -> (B, 3, K, H, W): heatmap logits, x- and y-offsets, see ``model.UNet``.
        image: clean images in [-1, 1].
        goal: from ``vote_goal``.
        epsilon: L-infinity norm of the perturbation in half grey levels. Default: 8.
        steps: iterations of each restart; the schedule depends on it. Default: 300.
        restarts: runs, the first from the clean image, the others from random perturbations. Default: 1.
        seed: of these.
        loss: callable, (maps, goal) -> (B,). Default: ``vote_loss``.

    Shape:
        - image: (B, C, H, W) float32, C = 3, or 1 with ``grey_model``.
        - yields (iteration, adversarial, maps) of the best iterate so far: int, 0 .. restarts * steps; (B, C, H, W);
          (B, 3, K, H, W).

    Example:
        >>> goal = vote_goal(model(image), targets, targeted)
        >>> for iteration, adversarial, maps in vote_pgd(model, image, goal, epsilon=8, steps=100):
        ...     pass
    """
    noise = start_generator(seed)
    loss = partial(loss or vote_loss, goal=goal)
    restart = 0

    def iterates():
        nonlocal restart
        for restart in range(restarts):
            start = None if restart == 0 else random_start(image, epsilon, noise)
            run = pgd(model, image, loss, epsilon, steps, falling, MOMENTUM, start)
            for iteration, adversarial, maps in run:
                if restart == 0 or iteration > 0:  # the start of a further run counts as no iteration
                    yield restart * steps + iteration, adversarial, maps

    def score(maps):  # whole numbers, and less than one off: of equal runs the first is kept
        return landmarks_in_place(maps, goal) - restart / restarts

    return keep_best(iterates(), score)


def vote_loss(maps, goal):
    """Weighted sum over landmarks of -log(fraction of the votes at its goal position): (B,).

    Weights and widths follow the decoded landmark's distance from its goal position and are constant in the gradient.
    The weight of a targeted landmark falls as it approaches its target, that of a stationary one is small until it
    drifts. A kernel wider than the distance would hardly pull at the votes; a narrow one pulls in proportion to 1 /
    width, hence the factor of the width, without which near landmarks prevail over far ones.
    """
    distance = distance_in_tolerances(maps.detach(), goal)
    by_role = ((slope * distance).clamp(low, high) for low, high, slope in (TARGETED_WEIGHT, STATIONARY_WEIGHT))
    weights = torch.where(goal.targeted, *by_role)
    widths = (TOLERANCE * distance).clamp(*VOTE_WIDTH)
    return -(weights * widths / VOTE_WIDTH[1] * log_vote_share(maps, goal, widths)).sum(-1)


def log_vote_share(maps, goal, widths):
    """Logarithm of the fraction of votes at each goal position, differentiable in heatmap and offsets: (B, K).

    Votes are those of the decoder's n = int(3.14 R^2) voters, and of the pixels around the goal position that may
    become voters. A pixel has the weight sigmoid(logit - the voters' lowest logit); of its vote, the fraction
    1 / (1 + (d / width)^2) counts as at the goal position, where d is the vote's distance from it. The ``widths`` are
    (B, K), in units of R.
    """
    size = maps.shape[-2:]
    radius = radius_of(size)
    heatmap, offset = maps.flatten(-2).split([1, 2], dim=1)
    highest, voters = heatmap[:, 0].detach().topk(min(int(3.14 * radius**2), size.numel()))
    is_voter = torch.zeros_like(heatmap[:, 0], dtype=torch.bool).scatter_(-1, voters, True)
    pixels = torch.cat([voters, goal.pixels], dim=-1)
    counted = torch.cat(
        [torch.ones_like(voters, dtype=torch.bool), goal.inside & ~is_voter.gather(-1, goal.pixels)], -1
    )
    logits = heatmap[:, 0].gather(-1, pixels) - highest[..., -1:]
    weight = F.logsigmoid(logits).masked_fill(~counted, -math.inf)
    votes = pixel_positions(pixels, size[1]) / radius + offsets_at(pixels, offset)
    squared = (votes - goal.places.movedim(-1, 1)[..., None] / radius).square().sum(1)
    at_place = weight - torch.log1p(squared / widths[..., None] ** 2)
    return torch.logsumexp(at_place, -1) - torch.logsumexp(weight, -1)


def landmarks_in_place(maps, goal):
    """Number of landmarks that the decoder finds within the tolerance of their goal position: (B,)."""
    return (distance_in_tolerances(maps, goal) <= 1).sum(-1)


def distance_in_tolerances(maps, goal):
    """Distance of the decoded landmarks from their goal positions in units of the tolerance, R / 3: (B, K)."""
    return (decode(maps) - goal.places).norm(dim=-1) / (TOLERANCE * radius_of(maps.shape[-2:]))


def evasive_vote_pgd(model, image, goal, epsilon=8, steps=300):
    """Vote-PGD against a detector of attacks that looks at the maps: landmarks shall also be found with confidence.

    The first five arguments, shapes and example as in ``vote_pgd``. The loss is also on what ``defences.confidence``
    measures: the negative logarithms of each heatmap's peak and of the share of votes very near each goal position.
    """
    nearest = torch.full_like(goal.places[..., 0], VOTE_WIDTH[0])

    def loss(maps, goal):
        confidence = F.logsigmoid(maps[:, 0].amax((-2, -1))) + log_vote_share(maps, goal, nearest)
        return vote_loss(maps, goal) - EVASION_WEIGHT * confidence.sum(-1)

    return vote_pgd(model, image, goal, epsilon, steps, loss=loss)


def random_search(model, image, goal, epsilon=8, steps=300, seed=0):
    """The best of many random perturbations, a control: no attack by gradients should do worse.

    Arguments, but for ``restarts`` and ``loss``, shapes and example as in ``vote_pgd``; each of the ``steps`` is a
    perturbation uniform in the ball.
    """
    noise = start_generator(seed)

    @torch.no_grad()
    def iterates():
        for iteration in range(steps + 1):
            delta = random_start(image, epsilon, noise) if iteration else torch.zeros_like(image)
            adversarial = (image + delta).clamp(-1, 1)
            yield iteration, adversarial, model(adversarial)

    return keep_best(iterates(), partial(landmarks_in_place, goal=goal))


def universal_vote_pgd(model, image, batches, epsilon=8, steps=300):
    """Universal Vote-PGD: one perturbation for all images.

    Distance: L-infinity. Source of the idea: Moosavi-Dezfooli et al., "Universal adversarial perturbations" (arXiv
    1610.08401); here it is ``pgd`` on the perturbation itself, each iteration with the gradient of another batch.

    Args:
        model: callable, (B, C, H, W) -> (B, 3, K, H, W), see ``vote_pgd``.
        image: zeros (1, C, H, W), like an image: shape, dtype and device of the perturbation.
        batches: iterator of (image, goal): (B, C, H, W) in [-1, 1], and ``vote_goal_at`` for them; steps + 1 are taken.
        epsilon: L-infinity norm of the perturbation in half grey levels. Default: 8.
        steps: iterations. Default: 300.

    Shape:
        - yields (iteration, perturbation, maps): int, (1, C, H, W), (B, 3, K, H, W) of the batch.

    Example:
        >>> for _, delta, _ in universal_vote_pgd(model, torch.zeros(1, 3, 800, 640), batches, epsilon=8):
        ...     pass
        >>> adversarial = (image + delta).clamp(-1, 1)  # of any image
    """
    goals = []

    def perturbed(delta):
        image, goal = next(batches)
        goals.append(goal)
        return model((image + delta).clamp(-1, 1))

    return pgd(perturbed, image, lambda maps: vote_loss(maps, goals.pop()), epsilon, steps, falling, MOMENTUM)


def falling(progress):
    """Step size in units of epsilon: from 0.25 to 0.005 along a half cosine."""
    return 0.005 + 0.245 * (1 + math.cos(math.pi * progress)) / 2


def start_generator(seed):
    """The generator of random starts. It differs from a random defence's of the same seed in the 32 bits torch uses."""
    return torch.Generator().manual_seed(seed ^ (1 << 31))


def random_start(image, epsilon, generator):
    """A perturbation like ``image``, uniform in the L-infinity ball; the same for all images of the batch.

    Results thus do not depend on how images are batched.
    """
    noise = torch.rand(image.shape[1:], generator=generator, dtype=image.dtype)
    return ((2 * noise - 1) * epsilon / 256).to(image.device).expand_as(image)


def uniform_noise(image, epsilon, generators):
    """The control of an attack: a perturbation like ``image``, uniform in the L-infinity ball.

    Args:
        image: (B, C, H, W).
        epsilon: L-infinity norm in half grey levels.
        generators: a numpy random generator for each image.
    """
    noise = np.stack([rng.uniform(-1, 1, image.shape[1:]) for rng in generators])
    return torch.from_numpy(noise).to(image) * epsilon / 256


# --- by name ---------------------------------------------------------------------------------------------------------

ATTACKS = {
    "I-FGSM": i_fgsm,
    "ATI-FGSM": ati_fgsm,
    "FGSM": fgsm,
    "untargeted-FGSM": untargeted_fgsm,
    "Vote-PGD": vote_pgd,
    "evasive-Vote-PGD": evasive_vote_pgd,
    "random-search": random_search,
}
BY_VOTES = ("Vote-PGD", "evasive-Vote-PGD", "random-search")
ONE_STEP = ("FGSM", "untargeted-FGSM")
UNTARGETED = "untargeted-FGSM"


def make_goal(method, clean, targets):
    """The goal of an attack of ``ATTACKS``.

    Args:
        method: its name.
        clean: (B, 3, K, H, W) maps of the clean images.
        targets: (B, K, 2) float x, y in px, nan for stationary landmarks.
    """
    if method == UNTARGETED:
        return encode(decode(clean), clean.shape[-2:])
    goal = vote_goal if method in BY_VOTES else goal_maps
    return goal(clean, targets.nan_to_num(), ~targets.isnan().any(-1))


# --- targets ---------------------------------------------------------------------------------------------------------
# Targets are (K, 2) float64 x, y in px0, nan for stationary landmarks. Random ones and displacements depend only on the
# seed and the image (its id, size and ground truth), not on model, method, input size or batch. Without a ground truth
# the detector's prediction takes its place.


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


def common_displacement(rng, num_landmarks, count, distance):
    """One displacement for each of ``count`` landmarks, in a random direction: (K, 2) in the unit of ``distance``."""
    chosen = rng.choice(num_landmarks, count, replace=False)
    angles = rng.uniform(0, 2 * np.pi, count)
    displacement = np.full((num_landmarks, 2), np.nan)
    displacement[chosen] = distance * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return displacement


def choose_targets(source, data, seed, count, shift_mm):
    """Targets for a whole split: (N, K, 2) float64 x, y in px0, nan for stationary landmarks.

    Args:
        source: "random"; "shift": displacements drawn for each image; "common": displacements drawn once for all; or
            the path of a file of targets, see ``dataset.read_targets``.
        data: dataset.Cephalograms.
        seed: of what is drawn.
        count: number of landmarks that "shift" and "common" target.
        shift_mm: their displacement in mm, from ``data.reference_px0``.

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
        if source == "common":
            displacement = common_displacement(generator(seed, source), landmarks.shape[1], count, shift_mm)
            rows = landmarks + displacement / data.mm_per_px0.numpy()[:, None, None]
        else:
            rows = read_targets(source, data.ids, landmarks.shape[1])
        for id, targets, (height, width) in zip(data.ids, rows, sizes, strict=True):
            outside = (targets < 0) | (targets > (width - 1, height - 1))  # False for nan
            if outside.any():
                k = outside.any(1).argmax()
                raise InputError(
                    f"--targets {source}: the target ({targets[k, 0]:g}, {targets[k, 1]:g}) of landmark {k + 1} lies "
                    f"outside image {id} of {width} x {height} px"
                )
    return torch.from_numpy(np.stack(rows))
