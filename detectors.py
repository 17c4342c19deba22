"""A landmark detector as attacks see it: a network, what its outputs say, and a loss that pulls them elsewhere.

Three forms, of which the first is the paper's; docs/detectors.md shows how to write another.

    detector = voting(model)                     # maps (B, 3, K, H, W): a heatmap and two offsets a landmark
    detector = heatmap(network, size=(256, 256)) # maps (B, K, h, w), of any resolution
    detector = coordinates(network, size)        # (B, K, 2) px
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import (
    LARGEST,
    Goal,
    UNet,
    centres,
    confidence,
    decode,
    encode,
    expected_pixel,
    freeze,
    highest_pixel,
    landmark_loss,
    load_weights,
    log_distribution,
    loss_terms,
    mean_weights,
    offsets_at,
    pixel_positions,
    place,
    radius_of,
    read_architecture,
)
from readers.points import LANDMARKS
from support.errors import InputError, check_tensors

SIGMA = 0.25  # in units of R: the standard deviation of a heatmap's goal


class Detector(NamedTuple):
    """What an attack needs to know of a landmark detector."""

    network: Callable  # (B, C, H, W) float images in [-1, 1] -> outputs of any form
    landmarks: Callable  # outputs -> (B, K, 2) float x, y in px of the input
    goal: Callable  # (clean outputs, places (B, K, 2), targeted (B, K) bool) -> goal of any form
    loss: Callable  # (outputs, goal) -> (B, K), differentiable: falls as the outputs come near the goal
    size: tuple | None = None  # (H, W) px of the input
    names: tuple = LANDMARKS
    pull: Callable | None = None  # (outputs, goal, widths (B, K) in units of R) -> (B, K): see ``attack.vote_loss``
    confidence: Callable = lambda outputs, points: {}  # (outputs, points (B, K, 2) px) -> {column of records: (B, K)}
    fingerprint: str | None = None  # of an own one

    def predict(self, image):
        """Landmarks (B, K, 2) x, y in px of images (B, C, H, W)."""
        with torch.no_grad():
            return self.landmarks(self.network(image))


def load_detector(checkpoint, device="cpu", precision="fp32", batch_statistics=False, subpixel=False):
    """The detector of a checkpoint of train.py, ready for test and attack.

    Args:
        checkpoint: path of a model_epoch_<e>.pth beside its config.json, or beside the config.yaml of the 2020 code.
        device, precision: see ``model.place``.
        batch_statistics: see ``model.freeze``.
        subpixel: see ``model.decode``; of heatmaps, the expectation.

    Returns:
        Detector, of which ``network`` is a ``model.UNet``.

    Raises:
        InputError: see ``model.load_weights``; or the configuration is missing or not one of train.py.
    """
    size, encoder_batch_norm, output = read_architecture(Path(checkpoint).parent)
    with torch.device("meta"):  # no initial weights: the checkpoint has them all
        model = UNet(encoder_batch_norm=encoder_batch_norm, output=output)
    model.to_empty(device="cpu")
    load_weights(model, checkpoint)
    freeze(place(model, device, precision), batch_statistics)
    outputs = model(torch.linspace(-1, 1, 3 * 64 * 64, device=device).view(1, 3, 64, 64))
    if not outputs.abs().amax() < LARGEST or (outputs.amax((-2, -1)) == outputs.amin((-2, -1))).all():
        raise InputError(f"{checkpoint}: weights that compute nothing: outputs that are nan, huge or constant")
    return detector_of(model, size, subpixel)


def load_own(source, device):
    """The detector that a user's function makes.

    Args:
        source: "FILE.py:NAME"; the function NAME takes no arguments and returns a Detector with its size, and as names
            those of its landmarks, or their number.
        device: of what the function makes; a network that is a module is moved there, in evaluation mode.

    Raises:
        InputError: there is no such function, it fails, or what it returns is no detector.
    """
    path, _, name = source.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location("own_detector", path)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        sys.path.append(str(Path(path).parent))  # for modules beside it
        spec.loader.exec_module(module)
        with torch.device(device):  # for the networks and tensors that functions hold
            detector = getattr(module, name)()
        if isinstance(detector.names, int):
            detector = detector._replace(names=tuple(f"landmark {k + 1}" for k in range(detector.names)))
        if isinstance(detector.network, nn.Module):
            detector.network.to(device).eval().requires_grad_(False)
        found = detector.predict(torch.zeros(1, 3, *detector.size, device=device))
        check_tensors(landmarks=(found, "BK2", "float"))
        if not found.isfinite().all():
            raise ValueError("of a grey image it finds a landmark at nan or inf")
        detector = detector._replace(names=tuple(detector.names), fingerprint=fingerprint(detector, device))
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"--detector {source}: {type(error).__name__}: {error} (docs/detectors.md)") from None
    if found.shape[1] != len(detector.names):
        raise InputError(f"--detector {source}: finds {found.shape[1]} landmarks, but has {len(detector.names)} names")
    return detector


@torch.no_grad()
def fingerprint(detector, device):
    """A text of what a detector computes of two drawn images: another one for other weights.

    Raises:
        ValueError: outputs depend on the batch or on chance.
    """
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(0))
    images = (draw(2, 3, *detector.size) * torch.tensor([2, 0.2]).view(2, 1, 1, 1) - 1).to(device)  # two unlike ones
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # the same in each process and call
        points = detector.landmarks(outputs := detector.network(images))
        values, compute = (outputs, detector.network) if torch.is_tensor(outputs) else (points, detector.predict)
        alone = compute(images[:1])
    if (alone - values[:1]).abs().amax() > 0.01 * values.abs().amax():
        raise ValueError("its outputs depend on the batch or on chance: is the network in training mode? .eval()")
    return " ".join(f"{(part.cpu().double() * draw(part.shape)).mean():.4g}" for part in (values, points))


def detector_of(model, size, subpixel=False):
    """The ``Detector`` of a ``model.UNet``, by its output."""
    if model.output == "coordinates":
        return coordinates(model, size)
    return heatmap(model, size, subpixel) if model.output == "heatmap" else voting(model, subpixel, size=size)


def training_terms(detector, outputs, landmarks):
    """The terms of the loss in training, whose ``total`` is the detector's loss with all landmarks at their places.

    Args:
        outputs: of the network.
        landmarks: (B, K, 2) float x, y in px, the truth.

    Returns:
        (3, B, K) of maps for voting, see ``model.loss_terms``; else (1, B, K).
    """
    if outputs.dim() == 5:
        return loss_terms(outputs, encode(landmarks, detector.size))
    every = torch.ones_like(landmarks[..., 0], dtype=torch.bool)
    return detector.loss(outputs, detector.goal(outputs.detach(), landmarks, every))[None]


# --- voting: the paper's ---------------------------------------------------------------------------------------------


class VotingGoal(NamedTuple):
    """What maps are compared with: goal maps, and the places at which the decoder should find the landmarks."""

    maps: Goal
    places: torch.Tensor  # (B, K, 2) x, y in px
    pixels: torch.Tensor  # (B, K, P) int64, y W + x of the pixels of the disc around each place, padded with others
    inside: torch.Tensor  # (B, K, P) bool, False for the padding


def voting(network, subpixel=False, **options):
    """A detector whose outputs are maps (B, 3, K, H, W), see ``model.UNet``.

    Args:
        subpixel: see ``model.decode``.
        options: size and names, see ``Detector``.
    """
    return Detector(
        network,
        partial(decode, subpixel=subpixel),
        voting_goal,
        lambda maps, goal: landmark_loss(maps, goal.maps),
        pull=lambda maps, goal, widths: -log_vote_share(maps, goal, widths),
        confidence=confidence,
        **options,
    )


def voting_goal(clean, places, targeted):
    """Goal maps, and the pixels that may vote for the places; arguments as in ``goal_maps``."""
    disc = encode(places, clean.shape[-2:])
    return VotingGoal(goal_maps(clean, places, targeted), places, disc.pixels, disc.weight > 0)


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
    check_tensors(maps=(clean, "B3KHW", "float"), targeted=(targeted, "BK", "bool"), targets=(targets, "BK2", "float"))
    check_places(targets, targeted, clean.shape[-2:])
    size = clean.shape[-2:]
    heatmap = torch.where(targeted[..., None, None], encode(targets, size).heatmap, clean[:, 0].sigmoid())
    # a target's disc is above exp(-1/2) > 0.5 as well
    count = (heatmap > 0.5).sum((-2, -1)).max()
    values, pixels = heatmap.flatten(-2).topk(max(1, int(count)), sorted=False)
    places = pixel_positions(pixels, size[1])
    towards = (targets.movedim(-1, 1)[..., None] - places) / radius_of(size)
    own = offsets_at(pixels, clean[:, 1:].flatten(-2))
    return Goal(heatmap, pixels, torch.where(targeted[:, None, :, None], towards, own), mean_weights(values > 0.5))


def check_places(targets, targeted, size):
    """Raise ValueError unless each image has a targeted landmark, and all targets lie in maps of a size (H, W)."""
    edges = torch.tensor(size[::-1], device=targets.device) - 0.5
    outside = targeted & ~((targets >= -0.5) & (targets <= edges)).all(-1)
    for b, k in outside.nonzero()[:1].tolist():
        where = f"of {size[1]} x {size[0]} px: {targets[b, k].tolist()}, landmark {k + 1}"
        raise ValueError(f"targets lie outside the input {where}; dataset.rescale takes px0 to px")
    if not targeted.any(-1).all():
        raise ValueError(f"targeted must have a landmark of each image: it has {targeted.sum(-1).tolist()}")


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
    counted = torch.cat([torch.ones_like(voters).bool(), goal.inside & ~is_voter.gather(-1, goal.pixels)], dim=-1)
    logits = heatmap[:, 0].gather(-1, pixels) - highest[..., -1:]
    weight = F.logsigmoid(logits).masked_fill(~counted, -math.inf)
    votes = pixel_positions(pixels, size[1]) / radius + offsets_at(pixels, offset)
    difference = votes - goal.places.movedim(-1, 1)[..., None] / radius
    at_place = weight + log_near(difference.movedim(1, -1), widths[..., None])
    return torch.logsumexp(at_place, -1) - torch.logsumexp(weight, -1)


def log_near(difference, width):
    """Logarithm of what counts of a vote that lies (..., 2) off: 1 / (1 + (distance / width)^2)."""
    return -torch.log1p(difference.square().sum(-1) / width**2)


# --- a heatmap for each landmark -------------------------------------------------------------------------------------


def heatmap(network, size, expectation=False, **options):
    """A detector whose outputs are heatmaps (B, K, h, w), logits of a distribution over the pixels.

    Args:
        size: (H, W) px of the input; the maps may be of another resolution.
        expectation: a landmark is the mean of the distribution ("soft-argmax"), instead of its highest pixel.
        options: names, see ``Detector``.
    """
    find = partial(expected_pixel if expectation else highest_pixel, size=size)
    radius = radius_of(size)

    def pull(maps, goal, widths):
        if expectation:
            return -log_near(find(maps) - goal.places, widths * radius)
        near = log_near(centres(maps, size) - goal.places[..., None, :], widths[..., None] * radius)
        return -(log_distribution(maps) + near).logsumexp(-1)

    def loss(maps, goal):
        return -(goal.heatmap * log_distribution(maps)).sum(-1)

    return Detector(network, find, partial(heatmap_goal, size=size), loss, size, pull=pull, **options)


class HeatmapGoal(NamedTuple):
    heatmap: torch.Tensor  # (B, K, h w), a distribution
    places: torch.Tensor  # (B, K, 2) x, y in px


def heatmap_goal(clean, places, targeted, size):
    """A Gaussian around the target of a targeted landmark, and the clean distribution of a stationary one."""
    squared = (centres(clean, size) - places[..., None, :]).square().sum(-1)
    around = (squared / (-2 * (SIGMA * radius_of(size)) ** 2)).softmax(-1)
    return HeatmapGoal(torch.where(targeted[..., None], around, log_distribution(clean).exp()), places)


# --- coordinates -----------------------------------------------------------------------------------------------------


def coordinates(network, size, **options):
    """A detector whose outputs are the landmarks themselves, (B, K, 2) x, y in px of its input of ``size`` (H, W)."""
    radius = radius_of(size)
    return Detector(
        network,
        lambda points: points,
        lambda clean, places, targeted: places,
        lambda points, goal: ((points - goal) / radius).abs().sum(-1),
        size,
        pull=lambda points, goal, widths: -log_near(points - goal, widths * radius),
        **options,
    )
