"""Targeted adversarial attacks on a landmark detector: their loops, and a table with a row for each attack.

A white-box attacker moves chosen ("targeted") landmarks of the detector's output to target positions and keeps the
others ("stationary") where they are, by a perturbation of L-infinity norm at most epsilon/256 of an image in [-1, 1]
(epsilon = 8: 4 of 255 grey levels). After "Miss the Point: Targeted Adversarial Attack on Multiple Landmark Detection"
(MICCAI 2020), called "the paper" below.

    for iteration, adversarial, outputs in run(ATTACKS["ATI-FGSM"], detector, image, targets, targeted):
        ...                                # iteration 0 is the clean image; outputs are the detector's of `adversarial`

A new attack is a row of ROWS, with its loss: the command line, tables, charts and tests take it from there.
"""

import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from detectors import Detector, VotingGoal, check_places, voting
from model import radius_of
from support.errors import check_tensors, describe

STEP_SIZE = 0.05  # in units of epsilon; the paper's eta
TOLERANCE = 1 / 3  # in units of R, 4 mm in the ISBI 2015 images: up to it, a goal position counts as reached
VOTE_WIDTH = (0.1, 0.33)  # limits of the width of a landmark's kernel in ``vote_loss``, in units of R
EVASION_WEIGHT = 0.3  # of the scores by which attacks are told, in ``evasive_loss``


# --- one door for all attacks ----------------------------------------------------------------------------------------


class Attack(NamedTuple):
    """An attack, as data for ``run``."""

    name: str
    loss: Callable | None  # (outputs, aim) -> (B,), which is minimised; None: the loop needs none
    steps: int | None = None  # None: as many as the caller says
    options: dict = {}  # noqa: RUF012 never changed; of the loop; its seed is that of ``run``
    score: Callable | None = None  # (outputs, aim) -> (B,): of each image the best iterate so far counts, not the last
    targeted: bool = True  # False: all landmarks shall leave their places
    universal: bool = False  # one perturbation for all images,
    delta: torch.Tensor | None = None  # (1, C, H, W), if it is known
    loop: Callable | None = None  # (network, image, loss, epsilon, steps, **options) -> iterates; None: ``pgd``
    votes: bool = False  # only on detectors by voting

    @property
    def blind(self):
        """Whether it has no adaptive form: a defence in front of the detector does not change its perturbation."""
        return self.universal or self.loss is self.score is None

    @property
    def descends(self):
        """Whether its iterates follow the gradient towards targets."""
        return self.loss is not None and self.targeted and not self.universal and "seed" not in self.options

    def counting(self, iterate):
        """The attack, of which the "last" or the "best" iterate counts, with most landmarks in place; None: its own."""
        return self._replace(score={"best": landmarks_in_place, "last": None, None: self.score}[iterate])


class Aim(NamedTuple):
    """What an attack on some images aims at; losses and scores compare outputs with it."""

    detector: Detector
    places: torch.Tensor  # (B, K, 2) x, y in px: targets, and the clean predictions of the others
    targeted: torch.Tensor  # (B, K) bool
    held: torch.Tensor  # (B, K) bool: False for landmarks that may go anywhere, whose losses and distances are 0
    tolerance: float  # px, up to which a place counts as reached
    goal: Any  # the detector's

    def losses(self, outputs):
        """The detector's loss of each landmark: (B, K)."""
        return self.detector.loss(outputs, self.goal) * self.held

    def distances(self, outputs):
        """Distances (B, K) of the landmarks from their places, in tolerances."""
        return (self.detector.landmarks(outputs) - self.places).norm(dim=-1) * self.held / self.tolerance


@torch.no_grad()
def aim_at(detector, image, targets, targeted, untargeted=False, free=None):
    """The ``Aim`` of an attack, from the outputs on the clean image; arguments as in ``run``.

    Args:
        untargeted: the goal is that all landmarks are where they are, which the loss then raises. At the detector's own
            clean outputs its gradient would be zero.
    """
    clean = detector.network(image)
    if not torch.is_tensor(clean):
        text = "the network must return one tensor: attack one that does, such as lambda image: network(image)[0]"
        raise ValueError(f"{text}; it returns {describe(clean)}")
    found = detector.landmarks(clean)
    check_tensors(landmarks=(found, "BK2", "float"), targeted=(targeted, "BK", "bool"))
    places = torch.where(targeted[..., None] & (not untargeted), targets, found)
    goal = detector.goal(clean, places, targeted | untargeted)
    held = torch.ones_like(targeted) if free is None or untargeted else ~free.to(targeted.device)
    return Aim(detector, places, targeted, held, TOLERANCE * radius_of(image.shape[-2:]), goal)


def run(attack, detector, image, targets, targeted, epsilon=8, steps=300, seed=0, free=None):
    """Attack a batch of images.

    Args:
        attack: a row of ``ATTACKS``.
        detector: detectors.Detector; or the network of a voting one, (B, C, H, W) -> (B, 3, K, H, W), see
            ``model.UNet``. Freeze its weights, so that only the gradient of the image is computed.
        image: (B, C, H, W) float32 clean images in [-1, 1]; C = 3, or 1 with ``grey_detector``.
        targets: (B, K, 2) x, y in px of the input; those of stationary landmarks are ignored.
        targeted: (B, K) bool.
        epsilon: L-infinity norm of the perturbation in half grey levels (1/256 of the [-1, 1] scale).
        steps: iterations, unless the attack has its own number.
        seed: of random perturbations and squares.
        free: (B, K) bool, landmarks that are neither targeted nor stationary (default: none).

    Yields:
        (iteration, adversarial, outputs) for iteration 0 .. steps: int, like ``image``, the network's, without
        gradient. 0 is the clean image. With a score, they are of the best iterate so far.

    Raises:
        ValueError: shapes or types that do not fit together, an image outside [-1, 1], a target that is nan or outside
            the input, an image without a targeted landmark, a negative epsilon, no step, a network without a gradient
            or in training mode.
    """
    detector = detector if isinstance(detector, Detector) else voting(detector)
    roles = {"targeted": (targeted, "BK", "bool"), "free": (targeted if free is None else free, "BK", "bool")}
    check_tensors(image=(image, "BCHW", "float"), **roles, targets=(targets, "BK2", "number"))
    check_budget(image, epsilon, steps)
    network, steps = detector.network, attack.steps or steps
    check_network(network, image)
    targets, targeted = targets.to(image), targeted.to(image.device)
    if attack.targeted:
        check_places(targets, targeted, image.shape[-2:])
    if attack.delta is not None:
        return replay(network, image, (image + attack.delta).clamp(-1, 1), steps)
    aim = aim_at(detector, image, targets, targeted, not attack.targeted, free)
    if attack.votes and not isinstance(aim.goal, VotingGoal):
        raise ValueError(f"{attack.name} is an attack on detectors by voting")
    loss = attack.loss and partial(attack.loss, aim=aim)
    options = attack.options | ({"seed": seed} if "seed" in attack.options else {})
    iterates = (attack.loop or pgd)(network, image, loss, epsilon, steps, **options)
    return keep_best(iterates, partial(attack.score, aim=aim)) if attack.score else iterates


def check_budget(image, epsilon, steps):
    """Raise ValueError unless these are as ``run`` says."""
    if not (image.abs() <= 1.001).all():
        raise ValueError(f"image must lie in [-1, 1]: its values are {image.min():g} to {image.max():g}")
    if not 0 <= epsilon < math.inf or steps < 1 or steps % 1:
        raise ValueError(f"epsilon must be a number from 0, steps whole and above 0: they are {epsilon}, {steps}")


def check_network(network, image):
    """Raise ValueError where a module is on another device than the image, or trains its batch norms or dropout."""
    if not isinstance(network, nn.Module):
        return
    depends = nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd
    if any(module.training for module in network.modules() if isinstance(module, depends)):
        raise ValueError("the network is in training mode, in which its outputs depend on the batch: call .eval()")
    devices = {tensor.device for tensor in itertools.chain(network.parameters(), network.buffers())}
    if others := devices - {image.device}:
        raise ValueError(f"the network is on {min(map(str, others))}, the image on {image.device}: move one of them")


# --- loops -----------------------------------------------------------------------------------------------------------


def pgd(network, image, loss, epsilon, steps, step_size=STEP_SIZE, momentum=0.0, start=None, last_outputs=True):
    """Projected gradient descent in an L-infinity ball: gradient, step, project, clip, as in most attacks here.

    Args:
        network: (B, C, H, W) -> a tensor of any form.
        image, epsilon, steps: see ``run``.
        loss: callable, outputs -> (B,), which is minimised.
        step_size: of a sign step, in units of epsilon; a number, or a callable of the progress, iteration / steps.
        momentum: of the gradients, each divided by its mean magnitude.
        start: perturbation to start from, like ``image`` (default: none).
        last_outputs: False saves the forward pass of the last iterate, whose outputs are then None.

    Yields:
        see ``run``; iteration 0 is the ``start``, if there is one.
    """
    bound = epsilon / 256
    delta, velocity = torch.zeros_like(image) if start is None else start, torch.zeros_like(image)
    for iteration in range(steps):
        adversarial, outputs = tracked(network, image, delta)
        yield iteration, adversarial.detach(), outputs.detach()
        _, gradient = descent(loss, outputs, adversarial)
        magnitude = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        velocity = momentum * velocity + gradient / magnitude
        size = step_size(iteration / steps) if callable(step_size) else step_size
        delta = (delta - size * bound * velocity.sign()).clamp(-bound, bound)
    yield steps, *perturbed(network if last_outputs else lambda _: None, image, delta)


def tracked(network, image, delta):
    """``perturbed``, with what a gradient in the images needs."""
    adversarial = (image + delta).clamp(-1, 1).requires_grad_()
    with torch.enable_grad():
        return adversarial, network(adversarial)


def descent(loss, outputs, image):
    """The losses (B,) of outputs, and their gradient in the image.

    Raises:
        ValueError: there is none.
    """
    with torch.enable_grad():
        losses = loss(outputs)
        total = losses.sum()
    gradient = torch.autograd.grad(total, image, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        raise ValueError("the loss has no gradient in the image: network or loss runs under no_grad, or detaches")
    return losses.detach(), gradient.nan_to_num(0, 0, 0)  # of one pixel, nan would end the sum of all


def falling(progress):
    """Step size in units of epsilon: from 0.25 to 0.005 along a half cosine."""
    return 0.005 + 0.245 * (1 + math.cos(math.pi * progress)) / 2


def apgd(network, image, loss, epsilon, steps):
    """APGD (Croce and Hein, arXiv 2003.01690, algorithm 1): the step of each image starts at 2 epsilon and is halved,
    from its best iterate on, where less than 0.75 of the steps lowered the loss or the best stayed as it was. The new
    step has a weight of 0.75, the last one is made again with the rest.

    Args:
        network, image, loss, epsilon, steps: see ``pgd``.

    Yields:
        see ``run``.
    """
    bound, each = epsilon / 256, (len(image), 1, 1, 1)
    delta = before = torch.zeros_like(image)
    size, fell = image.new_full(each, 2.0), image.new_zeros(each)
    best = checked = previous = image.new_full(each, math.inf)
    best_delta, best_gradient, halved, since = delta, delta, torch.zeros_like(fell, dtype=torch.bool), 0
    for iteration in range(steps):
        adversarial, outputs = tracked(network, image, delta)
        yield iteration, adversarial.detach(), outputs.detach()
        value, gradient = descent(loss, outputs, adversarial)
        value = value.view(each)
        fell, since, previous = fell + (value < previous), since + 1, value
        better = value < best
        best = torch.where(better, value, best)
        best_delta, best_gradient = torch.where(better, delta, best_delta), torch.where(better, gradient, best_gradient)
        if iteration in apgd_checks(steps):
            halved = (fell < 0.75 * since) | (~halved & (best == checked))
            size = torch.where(halved, size / 2, size)
            delta, gradient = torch.where(halved, best_delta, delta), torch.where(halved, best_gradient, gradient)
            before = torch.where(halved, best_delta, before)
            checked, fell, since = best, torch.zeros_like(fell), 0
        stepped = (delta - size * bound * gradient.sign()).clamp(-bound, bound)
        weight = 0.75 if iteration else 1
        moved = delta + weight * (stepped - delta) + (1 - weight) * (delta - before)
        delta, before = moved.clamp(-bound, bound), delta
    yield steps, *perturbed(network, image, delta)


def apgd_checks(steps):
    """The iterations at which APGD checks its progress: 22 % of the steps, then after ever fewer, at least 6 %."""
    checks = [0, 0.22]
    while checks[-1] < 1:
        checks.append(checks[-1] + max(checks[-1] - checks[-2] - 0.03, 0.06))
    return {math.ceil(round(part * steps, 6)) for part in checks[1:]}


@torch.no_grad()
def square_search(network, image, loss, epsilon, steps, seed):
    """The Square attack (Andriushchenko et al., arXiv 1912.00049), which sees the loss only: no gradient.

    The first step tries vertical stripes, each further one another corner of the ball in a random square; what does not
    raise the loss is kept. The first squares cover 0.8 of the image, later ones half as much, nine times. All images of
    a batch get the same squares, so that results do not depend on how images are batched.

    Args:
        network, image, loss, epsilon, steps: see ``pgd``; a step is a query of the network.
        seed: of the squares.

    Yields:
        see ``run``.
    """
    bound, (channels, height, width) = epsilon / 256, image.shape[1:]
    generator, places = torch.Generator().manual_seed(seed), random.Random(seed)

    def corner(*shape):
        signs = torch.randint(2, shape, generator=generator) * 2 - 1
        return signs.to(image, non_blocking=True) * bound

    outputs, delta = network(image), torch.zeros_like(image)
    best = loss(outputs).view(-1, 1, 1, 1)
    yield 0, image, outputs
    for iteration in range(1, steps + 1):
        halvings = sum(iteration * 10_000 > at * steps for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = min(max(1, round((0.8 / 2**halvings * height * width) ** 0.5)), height, width)
        y, x = (places.randrange(n - side + 1) for n in (height, width))
        trial = delta.clone()
        trial[..., y : y + side, x : x + side] = corner(channels, 1, 1)
        if iteration == 1:
            trial = corner(1, channels, 1, width).expand_as(image)
        adversarial, outputs = perturbed(network, image, trial)
        value = loss(outputs).view(-1, 1, 1, 1)
        delta, best = torch.where(value <= best, trial, delta), torch.minimum(value, best)
        yield iteration, adversarial, outputs


def common_pgd(network, image, loss, epsilon, steps, **options):
    """``pgd`` of one perturbation for all images of the batch."""

    def shown(delta):
        return network((image + delta).clamp(-1, 1))

    for iteration, delta, outputs in pgd(shown, torch.zeros_like(image[:1]), loss, epsilon, steps, **options):
        yield iteration, (image + delta).clamp(-1, 1), outputs


@torch.no_grad()
def random_perturbations(network, image, loss, epsilon, steps, seed):
    """Perturbations uniform in the ball, a control: see ``run``. All images of a batch get the same ones.

    Results thus do not depend on how images are batched. Bit 31 of the seed is flipped, so that a random defence of the
    same seed draws other numbers (torch uses the lower 32 bits only).
    """
    generator = torch.Generator().manual_seed(seed ^ (1 << 31))
    yield 0, image, network(image)
    for iteration in range(1, steps + 1):
        noise = torch.rand(image.shape[1:], generator=generator, dtype=image.dtype, pin_memory=image.is_cuda)
        delta = (2 * noise.to(image.device, non_blocking=True) - 1) * epsilon / 256
        yield iteration, *perturbed(network, image, delta)


def replay(network, image, adversarial, steps):
    """What an attack would yield whose result is known: the clean image, and the attacked one as the last."""
    yield 0, *perturbed(network, image, 0)
    yield steps, *perturbed(network, adversarial, 0)


@torch.no_grad()
def perturbed(network, image, delta):
    """The images with a perturbation, and the outputs on them."""
    adversarial = (image + delta).clamp(-1, 1)
    return adversarial, network(adversarial)


def keep_best(iterates, score):
    """The iterates, but of each image the one with the highest score so far, the latest among equals.

    Args:
        iterates: iterable of (iteration, adversarial, outputs).
        score: callable, outputs -> (B,).
    """
    best = None
    for iteration, *found in iterates:
        found = [score(found[1]), *found]
        best = best or found
        better = found[0] >= best[0]
        best = [  # copies: the network may overwrite its outputs, as with CUDA graphs
            torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old) for new, old in zip(found, best, strict=True)
        ]
        yield iteration, *best[1:]


def last(iterates):
    """The last (iteration, adversarial, outputs) of an attack; none of the others is kept in memory."""
    return deque(iterates, maxlen=1).pop()


def grey_detector(detector):
    """The detector as one of grey images (B, 1, H, W), so that all three channels get the same perturbation."""
    return detector._replace(network=lambda image: detector.network(image[:, :1].expand(-1, 3, -1, -1)))


# --- the paper's losses ----------------------------------------------------------------------------------------------


def paper_loss(outputs, aim):
    """sum_k L_k of each image: (B,). I-FGSM (paper, section 2; Kurakin et al., arXiv 1607.02533)."""
    return aim.losses(outputs).sum(-1)


def adaptive_loss(outputs, aim):
    """sum_k a_k L_k of each image: (B,). ATI-FGSM (paper, section 2).

    The weights a_k = L_k / mean_j L_j of each image are constant in the gradient: landmarks that are hard to move get
    more weight.
    """
    losses = aim.losses(outputs)
    return (adaptive_weights(losses.detach()) * losses).sum(-1)


def adaptive_weights(losses):
    """a_k = L_k / mean_j L_j of losses (B, K), for each image separately."""
    return losses / losses.mean(-1, keepdim=True).clamp(min=torch.finfo(losses.dtype).tiny)


# --- Vote-PGD: the loss follows what the decoder finds ---------------------------------------------------------------


def vote_loss(outputs, aim, targeted_weight=(1.0, 2.5, 1.5), stationary_weight=(0.1, 1.0, 1.0), width=VOTE_WIDTH):
    """Weighted sum over landmarks of -log(fraction of the votes at its place): (B,).

    Source: this implementation. As in APGD (Croce and Hein, arXiv 2003.01690), steps become shorter and the best
    iterate counts. Weights and widths follow the decoded landmark's distance from its place and are constant in the
    gradient. The weight of a targeted landmark falls as it approaches its target, that of a stationary one is small
    until it drifts. A kernel wider than the distance would hardly pull at the votes; a narrow one pulls in proportion
    to 1 / width, hence the factor of the width, without which near landmarks prevail over far ones.

    Of a detector without ``pull``, its own loss takes the place of the logarithm.

    Args:
        outputs: of the network.
        aim: Aim.
        targeted_weight, stationary_weight: minimum, maximum, and slope per tolerance of distance.
        width: limits of the kernel's width, which is the distance, in units of R.
    """
    distance = aim.distances(outputs.detach())
    by_role = ((slope * distance).clamp(low, high) for low, high, slope in (targeted_weight, stationary_weight))
    weights = torch.where(aim.targeted, *by_role) * aim.held
    if aim.detector.pull is None:
        return (weights * aim.losses(outputs)).sum(-1)
    widths = (TOLERANCE * distance).clamp(*width)
    return (weights * widths / width[1] * aim.detector.pull(outputs, aim.goal, widths)).sum(-1)


def cosine_loss(outputs, aim):
    """sum_k (1 - c_k) L_k of each image: (B,). CosPGD (Agnihotri et al., arXiv 2302.02213), by landmarks.

    c_k is the cosine between a heatmap and its goal, constant in the gradient.
    """
    heatmap = outputs[:, 0].detach().sigmoid()
    cosine = F.cosine_similarity(heatmap.flatten(-2), aim.goal.maps.heatmap.flatten(-2), dim=-1)
    return ((1 - cosine) * aim.losses(outputs)).sum(-1)


def distance_loss(outputs, aim):
    """Sum over landmarks of the logarithm of the distance from its place, in tolerances, at least 1: (B,)."""
    return aim.distances(outputs).clamp(min=1).log().sum(-1)


def negative(loss):
    """The loss that is raised instead; or the score by which the lowest loss is best."""
    return lambda outputs, aim: -loss(outputs, aim)


def landmarks_in_place(outputs, aim):
    """Number of landmarks that the decoder finds within the tolerance of their places: (B,)."""
    return (aim.distances(outputs) <= 1).sum(-1)


def evasive_loss(outputs, aim):
    """``vote_loss`` against a detector of attacks that looks at the maps: landmarks shall be found with confidence.

    The loss is also on what ``model.confidence`` measures: the negative logarithms of each heatmap's peak and of the
    share of votes very near each place. For detectors by voting.
    """
    nearest = torch.full_like(aim.places[..., 0], VOTE_WIDTH[0])
    confidence = F.logsigmoid(outputs[:, 0].amax((-2, -1))) - aim.detector.pull(outputs, aim.goal, nearest)
    return vote_loss(outputs, aim) - EVASION_WEIGHT * (confidence * aim.held).sum(-1)


# --- the table -------------------------------------------------------------------------------------------------------

ONE_STEP = {"step_size": 1.0}
VOTE_PGD = {"step_size": falling, "momentum": 0.75}

ROWS = (  # the first five have the numbers 0 to 4 on the command line
    Attack("I-FGSM", paper_loss),
    Attack("ATI-FGSM", adaptive_loss),
    Attack("FGSM", paper_loss, 1, ONE_STEP),
    Attack("untargeted-FGSM", negative(paper_loss), 1, ONE_STEP, targeted=False, votes=True),
    Attack("Vote-PGD", vote_loss, None, VOTE_PGD, landmarks_in_place),
    Attack("I-PGD", paper_loss, None, VOTE_PGD, landmarks_in_place),  # the paper's losses, Vote-PGD's schedule,
    Attack("ATI-PGD", adaptive_loss, None, VOTE_PGD, landmarks_in_place),
    Attack("Vote-FGSM", vote_loss),  # and the reverse
    Attack("MI-FGSM", paper_loss, None, {"momentum": 1.0}),  # Dong et al., arXiv 1710.06081
    Attack("APGD", paper_loss, score=negative(paper_loss), loop=apgd),
    Attack("CosPGD", cosine_loss, votes=True),
    Attack("Square", distance_loss, None, {"seed": 0}, negative(distance_loss), loop=square_search),
    Attack("universal-Vote-PGD", vote_loss, None, VOTE_PGD, universal=True, loop=common_pgd),
    Attack("noise", None, 1, {"seed": 0}, loop=random_perturbations),
    Attack("evasive-Vote-PGD", evasive_loss, None, VOTE_PGD, landmarks_in_place, votes=True),
    Attack("random-search", None, None, {"seed": 0}, landmarks_in_place, loop=random_perturbations),
)
ATTACKS = {attack.name: attack for attack in ROWS}
