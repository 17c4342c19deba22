"""Targeted adversarial attacks on a landmark detector: one loop, and a table with a row for each attack.

A white-box attacker moves chosen ("targeted") landmarks of the detector's output to target positions and keeps the
others ("stationary") where they are, by a perturbation of L-infinity norm at most epsilon/256 of an image in [-1, 1]
(epsilon = 8: 4 of 255 grey levels). After "Miss the Point: Targeted Adversarial Attack on Multiple Landmark Detection"
(MICCAI 2020), called "the paper" below.

    for iteration, adversarial, maps in run(ATTACKS["ATI-FGSM"], model, image, targets, targeted):
        ...                                # iteration 0 is the clean image; maps are the model's maps of `adversarial`

A new attack is a row of ATTACKS, with its loss: the command line, tables, charts and tests take it from there.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import Goal, decode, encode, landmark_loss, mean_weights, offsets_at, pixel_positions, radius_of
from support.errors import check_tensors

STEP_SIZE = 0.05  # in units of epsilon; the paper's eta
TOLERANCE = 1 / 3  # in units of R, 4 mm in the ISBI 2015 images: up to it, a goal position counts as reached
VOTE_WIDTH = (0.1, 0.33)  # limits of the width of a landmark's kernel in ``vote_loss``, in units of R
EVASION_WEIGHT = 0.3  # of the scores by which attacks are told, in ``evasive_loss``


# --- one door for all attacks ----------------------------------------------------------------------------------------


class Attack(NamedTuple):
    """An attack, as data for ``run``."""

    name: str
    goal: Callable | None  # (clean maps, targets, targeted) -> goal, what ``loss`` and ``score`` compare maps with
    loss: Callable | None  # (maps, goal) -> (B,), which is minimised; None: every iterate is a random perturbation
    steps: int | None = None  # None: as many as the caller says
    options: dict = {}  # noqa: RUF012 never changed; of ``pgd``
    score: Callable | None = None  # (maps, goal) -> (B,): of each image the best iterate so far counts, not the last
    targeted: bool = True  # False: all landmarks shall leave their places
    universal: bool = False  # one perturbation for all images, with ``vote_goal`` as goal,
    delta: torch.Tensor | None = None  # (1, C, H, W), if it is known

    @property
    def blind(self):
        """Whether its perturbation is made without the detector and the image that are attacked."""
        return self.goal is None or self.universal


def run(attack, detector, image, targets, targeted, epsilon=8, steps=300, seed=0):
    """Attack a batch of images.

    Args:
        attack: a row of ``ATTACKS``.
        detector: callable, (B, C, H, W) -> (B, 3, K, H, W): heatmap logits, x- and y-offsets, see ``model.UNet``;
            freeze its weights, so that only the gradient of the image is computed.
        image: (B, C, H, W) float32 clean images in [-1, 1]; C = 3, or 1 with ``grey_model``.
        targets: (B, K, 2) x, y in px of the input; those of stationary landmarks are ignored.
        targeted: (B, K) bool.
        epsilon: L-infinity norm of the perturbation in half grey levels (1/256 of the [-1, 1] scale).
        steps: iterations, unless the attack has its own number.
        seed: of random perturbations.

    Yields:
        (iteration, adversarial, maps) for iteration 0 .. steps: int, like ``image``, (B, 3, K, H, W), without gradient.
        0 is the clean image. With a score, they are of the best iterate so far.

    Raises:
        ValueError: shapes or types that do not fit together, an image outside [-1, 1], a target that is nan or outside
            the input, an image without a targeted landmark, a negative epsilon, no step.

    Example:
        >>> for iteration, adversarial, maps in run(ATTACKS["I-FGSM"], model, image, targets, targeted, epsilon=4):
        ...     pass
        >>> points = decode(maps)  # of the last adversarial images
    """
    check_images(image, epsilon, steps)
    check_tensors(image=(image, "BCHW", "float"), targeted=(targeted, "BK", "bool"), targets=(targets, "BK2", "number"))
    if attack.targeted:
        check_places(targets, targeted, image.shape[-2:])
    goal, steps = None, attack.steps or steps
    if attack.delta is not None:
        return replay(detector, image, (image + attack.delta).clamp(-1, 1), steps)
    if attack.goal:
        with torch.no_grad():
            goal = attack.goal(detector(image), targets.masked_fill(~targeted[..., None], 0), targeted)
    if attack.loss is None:
        iterates = random_perturbations(detector, image, epsilon, steps, seed)
    elif attack.universal:
        deltas = universal_perturbation(attack, detector, itertools.repeat((image, goal)), epsilon, steps)
        iterates = ((i, *perturbed(detector, image, delta)) for i, delta in deltas)
    else:
        iterates = pgd(detector, image, partial(attack.loss, goal=goal), epsilon, steps, **attack.options)
    return keep_best(iterates, partial(attack.score, goal=goal)) if attack.score else iterates


def check_images(image, epsilon, steps, values=True):
    """Raise ValueError unless these are as ``run`` says; the image's ``values`` wait for the device."""
    check_tensors(image=(image, "BCHW", "float"))
    if values and not (image.abs() <= 1.001).all():
        raise ValueError(f"image must lie in [-1, 1]: its values are {image.min():g} to {image.max():g}")
    if not 0 <= epsilon < math.inf or steps < 1 or steps % 1:
        raise ValueError(f"epsilon must be a number from 0, steps whole and above 0: they are {epsilon}, {steps}")


def check_places(targets, targeted, size):
    """Raise ValueError unless each image has a targeted landmark, and all targets lie in maps of a size (H, W)."""
    edges = torch.tensor(size[::-1], device=targets.device) - 0.5
    outside = targeted & ~((targets >= -0.5) & (targets <= edges)).all(-1)
    for b, k in outside.nonzero()[:1].tolist():
        where = f"of {size[1]} x {size[0]} px: {targets[b, k].tolist()}, landmark {k + 1}"
        raise ValueError(f"targets lie outside the input {where}; dataset.rescale takes px0 to px")
    if not targeted.any(-1).all():
        raise ValueError(f"targeted must have a landmark of each image: it has {targeted.sum(-1).tolist()}")


def check_goal(clean, targets, targeted):
    """Raise ValueError unless these are as ``goal_maps`` says."""
    check_tensors(maps=(clean, "B3KHW", "float"), targeted=(targeted, "BK", "bool"), targets=(targets, "BK2", "float"))
    check_places(targets, targeted, clean.shape[-2:])


# --- loops -----------------------------------------------------------------------------------------------------------


def pgd(model, image, loss, epsilon=8, steps=300, step_size=STEP_SIZE, momentum=0.0, start=None, last_maps=True):
    """Projected gradient descent in an L-infinity ball: gradient, step, project, clip, as in every attack here.

    Args:
        model, image, epsilon, steps: see ``run``.
        loss: callable, maps -> (B,), which is minimised.
        step_size: of a sign step, in units of epsilon; a number, or a callable of the progress, iteration / steps.
        momentum: of the gradients, each divided by its mean magnitude.
        start: perturbation to start from, like ``image`` (default: none).
        last_maps: False saves the forward pass of the last iterate, whose maps are then None.

    Yields:
        see ``run``; iteration 0 is the ``start``, if there is one.
    """
    check_images(image, epsilon, steps, values=start is None)  # a step of adversarial training shall not wait
    bound = epsilon / 256
    delta, velocity = torch.zeros_like(image) if start is None else start, torch.zeros_like(image)
    for iteration in range(steps):
        adversarial = (image + delta).clamp(-1, 1).requires_grad_()
        with torch.enable_grad():
            maps = model(adversarial)
        if iteration == 0:
            check_tensors(maps=(maps, "*", "number"))
        yield iteration, adversarial.detach(), maps.detach()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(maps).sum(), adversarial)
        delta, velocity = descend(delta, velocity, gradient, bound, iteration / steps, step_size, momentum)
    adversarial = (image + delta).clamp(-1, 1)
    with torch.no_grad():
        maps = model(adversarial) if last_maps else None
    yield steps, adversarial, maps


def descend(delta, velocity, gradient, bound, progress, step_size=STEP_SIZE, momentum=0.0):
    """A step of ``pgd``: the next perturbation, and the direction that led to it."""
    if momentum:
        magnitude = gradient.abs().mean((1, 2, 3), keepdim=True)
        gradient = momentum * velocity + gradient / magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny)
    size = step_size(progress) if callable(step_size) else step_size
    return (delta - size * bound * gradient.sign()).clamp(-bound, bound), gradient


def falling(progress):
    """Step size in units of epsilon: from 0.25 to 0.005 along a half cosine."""
    return 0.005 + 0.245 * (1 + math.cos(math.pi * progress)) / 2


def universal_perturbation(attack, model, batches, epsilon=8, steps=300):
    """One perturbation for all images, each step with the gradient of another batch.

    Source of the idea: Moosavi-Dezfooli et al., "Universal adversarial perturbations" (arXiv 1610.08401).

    Args:
        attack: its loss and options, see ``Attack``.
        model, epsilon, steps: see ``run``.
        batches: iterator of (image (B, C, H, W), goal), of which ``steps`` are taken.

    Yields:
        (iteration, perturbation (1, C, H, W)) for iteration 0, no perturbation, .. steps.
    """
    bound, first = epsilon / 256, next(batches)
    check_images(first[0], epsilon, steps)
    delta, velocity = torch.zeros_like(first[0][:1]), torch.zeros_like(first[0][:1])
    for iteration, (image, goal) in zip(range(steps), itertools.chain([first], batches), strict=False):
        yield iteration, delta
        common = delta.detach().requires_grad_()
        with torch.enable_grad():
            loss = attack.loss(model((image + common).clamp(-1, 1)), goal).sum()
        (gradient,) = torch.autograd.grad(loss, common)
        delta, velocity = descend(delta, velocity, gradient, bound, iteration / steps, **attack.options)
    yield steps, delta


@torch.no_grad()
def random_perturbations(model, image, epsilon, steps, seed):
    """Perturbations uniform in the ball, a control: see ``run``. All images of a batch get the same ones.

    Results thus do not depend on how images are batched. The generator differs from a random defence's of the same seed
    in the 32 bits that torch uses.
    """
    check_images(image, epsilon, steps)
    generator = torch.Generator().manual_seed(seed ^ (1 << 31))
    yield 0, image, model(image)
    for iteration in range(1, steps + 1):
        noise = torch.rand(image.shape[1:], generator=generator, dtype=image.dtype, pin_memory=image.is_cuda)
        delta = (2 * noise.to(image.device, non_blocking=True) - 1) * epsilon / 256
        yield iteration, *perturbed(model, image, delta)


def replay(model, image, adversarial, steps):
    """What an attack would yield whose result is known: the clean image, and the attacked one as the last."""
    yield 0, *perturbed(model, image, 0)
    yield steps, *perturbed(model, adversarial, 0)


@torch.no_grad()
def perturbed(model, image, delta):
    """The images with a perturbation, and their maps."""
    adversarial = (image + delta).clamp(-1, 1)
    return adversarial, model(adversarial)


def keep_best(iterates, score):
    """The iterates, but of each image the one with the highest score so far, the latest among equals.

    Args:
        iterates: iterable of (iteration, adversarial, maps).
        score: callable, maps -> (B,).
    """
    best = None
    for iteration, *found in iterates:
        found = [score(found[1]), *found]
        if best is None:
            best = [new.clone() for new in found]  # the model may overwrite its maps, as with CUDA graphs
        else:
            better = found[0] >= best[0]
            best = [
                torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(found, best, strict=True)
            ]
        yield iteration, *best[1:]


def last(iterates):
    """The last (iteration, adversarial, maps) of an attack; none of the others is kept in memory."""
    return deque(iterates, maxlen=1).pop()


def grey_model(model):
    """The model as a function of grey images (B, 1, H, W), so that all three channels get the same perturbation."""
    return lambda grey: model(grey[:, :1].expand(-1, 3, -1, -1))


# --- the paper's goal and losses -------------------------------------------------------------------------------------


def goal_maps(clean, targets, targeted):
    """Goal maps of a targeted attack (paper, section 2).

    A targeted landmark gets the maps of its target position. A stationary one keeps the model's own clean maps, its
    offsets counting where the clean heatmap is above 0.5.

    Args:
        clean: (B, 3, K, H, W) maps of the clean images.
        targets: (B, K, 2) float x, y in px; those of stationary landmarks are ignored.
        targeted: (B, K) bool.

    Returns:
        model.Goal
    """
    check_goal(clean, targets, targeted)
    size = clean.shape[-2:]
    heatmap = torch.where(targeted[..., None, None], encode(targets, size).heatmap, clean[:, 0].sigmoid())
    # a target's disc is above exp(-1/2) > 0.5 as well
    count = (heatmap > 0.5).sum((-2, -1)).max()
    values, pixels = heatmap.flatten(-2).topk(max(1, int(count)), sorted=False)
    places = pixel_positions(pixels, size[1])
    towards = (targets.movedim(-1, 1)[..., None] - places) / radius_of(size)
    own = offsets_at(pixels, clean[:, 1:].flatten(-2))
    return Goal(heatmap, pixels, torch.where(targeted[:, None, :, None], towards, own), mean_weights(values > 0.5))


def clean_prediction(clean, targets, targeted):
    """The maps of the clean predictions, which an untargeted attack destroys.

    At the detector's own clean maps the gradient would be zero.
    """
    return encode(decode(clean), clean.shape[-2:])


def paper_loss(maps, goal):
    """sum_k L_k of each image: (B,). I-FGSM (paper, section 2; Kurakin et al., arXiv 1607.02533)."""
    return landmark_loss(maps, goal).sum(-1)


def untargeted_loss(maps, goal):
    """The negative of ``paper_loss``: (B,)."""
    return -paper_loss(maps, goal)


def adaptive_loss(maps, goal):
    """sum_k a_k L_k of each image: (B,). ATI-FGSM (paper, section 2).

    The weights a_k = L_k / mean_j L_j of each image are constant in the gradient: landmarks that are hard to move get
    more weight.
    """
    losses = landmark_loss(maps, goal)
    return (adaptive_weights(losses.detach()) * losses).sum(-1)


def adaptive_weights(losses):
    """a_k = L_k / mean_j L_j of losses (B, K), for each image separately."""
    return losses / losses.mean(-1, keepdim=True)


# --- Vote-PGD: the loss is on the votes that the decoder counts, not on the maps -------------------------------------


class VoteGoal(NamedTuple):
    """The places at which the decoder should find the landmarks."""

    places: torch.Tensor  # (B, K, 2) x, y in px: goal positions
    targeted: torch.Tensor  # (B, K) bool
    pixels: torch.Tensor  # (B, K, P) int64, y W + x of the pixels of the disc around each place, padded with others
    inside: torch.Tensor  # (B, K, P) bool, False for the padding


def vote_goal(clean, targets, targeted):
    """Goal of Vote-PGD: targets, and the clean predictions of stationary landmarks; arguments as in ``goal_maps``."""
    check_goal(clean, targets, targeted)
    places = torch.where(targeted[..., None], targets, decode(clean, subpixel=True).to(targets.dtype))
    return vote_goal_at(places, targeted, clean.shape[-2:])


def vote_goal_at(places, targeted, size):
    """Goal of Vote-PGD from places (B, K, 2) px of all landmarks in an input of ``size`` (H, W)."""
    disc = encode(places, size)
    return VoteGoal(places, targeted, disc.pixels, disc.weight > 0)


def vote_loss(maps, goal, targeted_weight=(1.0, 2.5, 1.5), stationary_weight=(0.1, 1.0, 1.0), width=VOTE_WIDTH):
    """Weighted sum over landmarks of -log(fraction of the votes at its goal position): (B,).

    Source: this implementation; its schedule of steps and the best iterate are as in APGD (Croce and Hein, arXiv
    2003.01690). Weights and widths follow the decoded landmark's distance from its goal position and are constant in
    the gradient. The weight of a targeted landmark falls as it approaches its target, that of a stationary one is small
    until it drifts. A kernel wider than the distance would hardly pull at the votes; a narrow one pulls in proportion
    to 1 / width, hence the factor of the width, without which near landmarks prevail over far ones.

    Args:
        maps: (B, 3, K, H, W).
        goal: VoteGoal.
        targeted_weight, stationary_weight: minimum, maximum, and slope per tolerance of distance.
        width: limits of the kernel's width, which is the distance, in units of R.
    """
    distance = distance_in_tolerances(maps.detach(), goal)
    by_role = ((slope * distance).clamp(low, high) for low, high, slope in (targeted_weight, stationary_weight))
    weights = torch.where(goal.targeted, *by_role)
    widths = (TOLERANCE * distance).clamp(*width)
    return -(weights * widths / width[1] * log_vote_share(maps, goal, widths)).sum(-1)


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


def evasive_loss(maps, goal):
    """``vote_loss`` against a detector of attacks that looks at the maps: landmarks shall be found with confidence.

    The loss is also on what ``model.confidence`` measures: the negative logarithms of each heatmap's peak and of the
    share of votes very near each goal position.
    """
    nearest = torch.full_like(goal.places[..., 0], VOTE_WIDTH[0])
    confidence = F.logsigmoid(maps[:, 0].amax((-2, -1))) + log_vote_share(maps, goal, nearest)
    return vote_loss(maps, goal) - EVASION_WEIGHT * confidence.sum(-1)


# --- the table -------------------------------------------------------------------------------------------------------

ONE_STEP = {"step_size": 1.0}
VOTE_PGD = {"step_size": falling, "momentum": 0.75}

ROWS = (  # the first five have the numbers 0 to 4 on the command line
    Attack("I-FGSM", goal_maps, paper_loss),
    Attack("ATI-FGSM", goal_maps, adaptive_loss),
    Attack("FGSM", goal_maps, paper_loss, 1, ONE_STEP),
    Attack("untargeted-FGSM", clean_prediction, untargeted_loss, 1, ONE_STEP, targeted=False),
    Attack("Vote-PGD", vote_goal, vote_loss, None, VOTE_PGD, landmarks_in_place),
    Attack("universal-Vote-PGD", vote_goal, vote_loss, None, VOTE_PGD, universal=True),
    Attack("noise", None, None, 1),
    Attack("evasive-Vote-PGD", vote_goal, evasive_loss, None, VOTE_PGD, landmarks_in_place),
    Attack("random-search", vote_goal, None, score=landmarks_in_place),
)
ATTACKS = {attack.name: attack for attack in ROWS}
