"""Clinical measures of the 19 landmarks, their classes, and the least movement of landmarks that changes a class.

The ISBI 2015 challenge reads eight angles, ratios and distances off the landmarks, and classifies the patient by each
(Wang et al., "A benchmark for comparison of dental radiography analysis algorithms", 2016). Formulas and classes are
those of its evaluation code: FMA is measured from the line sella-nasion, not from the Frankfort plane, and MW has class
3 for everything from 0 to 2 mm too.

    values = measures(landmarks_px0, mm_per_px0)  # (N, 8), in the order of MEASURES
    found = classes(values)                       # (N, 8)
    print(MEASURES[0].words[found[0, 0].item()])  # skeletal class II
"""

import math
from typing import NamedTuple

import torch

MARGIN_MM = 1.0  # of ``least_movement``: how far beyond a threshold, as a movement of landmarks
MOVED_MM = 0.1  # a landmark that moves less stays
PENALTY = 1e3  # weight of violated bounds in ``least_movement``


class Measure(NamedTuple):
    """A clinical measure.

    Attributes:
        unit: "deg", "mm" or "" for a ratio.
        normal: (low, high), the values of class 1, both included.
        below, above: the classes beyond.
        words: {class: its meaning}.
    """

    name: str
    unit: str
    normal: tuple
    below: int
    above: int
    words: dict


MEASURES = (
    Measure("ANB", "deg", (3.2, 5.7), 3, 2, {1: "skeletal class I", 2: "skeletal class II", 3: "skeletal class III"}),
    Measure("SNB", "deg", (74.6, 78.7), 2, 3, {1: "normal", 2: "retrognathic mandible", 3: "prognathic mandible"}),
    Measure("SNA", "deg", (79.4, 83.2), 3, 2, {1: "normal", 2: "prognathic maxilla", 3: "retrognathic maxilla"}),
    Measure("ODI", "deg", (68.4, 80.5), 3, 2, {1: "normal", 2: "deep bite tendency", 3: "open bite tendency"}),
    Measure("APDI", "deg", (77.6, 85.2), 2, 3, {1: "normal", 2: "class II tendency", 3: "class III tendency"}),
    Measure("FHI", "", (0.65, 0.75), 3, 2, {1: "normal", 2: "short face tendency", 3: "long face tendency"}),
    Measure("FMA", "deg", (26.8, 31.4), 3, 2, {1: "normal", 2: "high angle tendency", 3: "low angle tendency"}),
    Measure("MW", "mm", (2.0, 4.5), 3, 4, {1: "normal", 2: "edge to edge", 3: "anterior cross bite", 4: "overjet"}),
)
NAMES = tuple(measure.name for measure in MEASURES)


# --- measures and classes --------------------------------------------------------------------------------------------


def measures(points_px0, mm_per_px0):
    """The eight measures, differentiable.

    Args:
        points_px0: (N, 19, 2) float x, y in px0, in the order of ``dataset.LANDMARKS``.
        mm_per_px0: (N,) or a number.

    Returns:
        (N, 8) in degrees, mm, or a ratio, see ``MEASURES``.
    """

    def vector(a, b):  # landmarks are counted from 1, as in the challenge
        return points_px0[..., b - 1, :] - points_px0[..., a - 1, :]

    sna = angle(vector(2, 1), vector(2, 5))
    snb = angle(vector(2, 1), vector(2, 6))
    palate = signed_angle(vector(4, 3), vector(17, 18))
    profile = -signed_angle(vector(2, 7), vector(5, 6))
    odi = angle(vector(8, 10), vector(6, 5)) + palate
    apdi = angle(vector(3, 4), vector(2, 7)) + profile + palate
    fhi = vector(1, 10).norm(dim=-1) / vector(2, 8).norm(dim=-1)
    fma = angle(vector(1, 2), vector(10, 9))
    overjet = vector(11, 12)
    mw = torch.where(overjet[..., 0] < 0, -1, 1) * overjet.norm(dim=-1) * mm_per_px0
    return torch.stack([sna - snb, snb, sna, odi, apdi, fhi, fma, mw], dim=-1)


def signed_angle(u, v):
    """Angle in degrees of vectors (..., 2), of the sign of u_x v_y - u_y v_x."""
    cross = u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
    return torch.rad2deg(torch.atan2(cross, (u * v).sum(-1)))


def angle(u, v):
    """Unsigned angle in degrees of vectors (..., 2)."""
    return signed_angle(u, v).abs()


def classes(values):
    """The challenge's classes (N, 8) int64 of ``measures`` (N, 8); 0 where landmarks that coincide leave it nan."""
    low, high = torch.tensor([measure.normal for measure in MEASURES], dtype=values.dtype, device=values.device).T
    below, above = torch.tensor([(measure.below, measure.above) for measure in MEASURES], device=values.device).T
    found = torch.where(values < low, below, torch.where(values > high, above, 1))
    edge_to_edge = torch.tensor([name == "MW" for name in NAMES], device=values.device) & (values == 0)
    return torch.where(edge_to_edge, 2, torch.where(values.isnan(), 0, found))


def challenge_score(truth, found):
    """The challenge's score of a measure: the mean over the true classes of the share that is found, in %.

    Args:
        truth, found: (N,) classes.
    """
    return 100 * sum((found[truth == c] == c).double().mean().item() for c in truth.unique()) / len(truth.unique())


# --- the least movement that changes a class -------------------------------------------------------------------------


def reachable_classes(name):
    """{class: meaning} of a measure, without MW's class 2, which is a single value."""
    measure = MEASURES[NAMES.index(name)]
    return {number: measure.words[number] for number in sorted((1, measure.below, measure.above))}


def least_movement(points_px0, mm_per_px0, measure, to=None, margin_mm=MARGIN_MM):
    """The least movement of landmarks, by its sum of squares, that changes a patient's class by one measure alone.

    The measure ends a margin beyond the threshold: the change that a movement by ``margin_mm`` makes at most (in a
    class too narrow for that, the middle). The others keep their class, and that margin or what they have of it.
    Margins that contradict each other give way; where that would lose a class, there is no result. The minimum is
    local, from the given landmarks; those that would move less than ``MOVED_MM`` stay.

    Args:
        points_px0: (N, 19, 2) float x, y in px0.
        mm_per_px0: (N,).
        measure: index in ``MEASURES``.
        to: the class that it should have afterwards; None: the nearest other one.
        margin_mm: see above.

    Returns:
        (N, 19, 2) float64 x, y in px0 of the landmarks that move, nan for those that stay, and for all landmarks of
        patients that have the class already, or for whom no such movement was found.
    """
    start, mm_per_px0 = points_px0.double(), mm_per_px0.to(points_px0.device).double()
    found, cost = torch.full_like(start, math.nan), torch.full_like(start[:, 0, 0], math.inf)
    gradients = torch.func.vmap(torch.func.jacrev(measures))(start, mm_per_px0)  # (N, 8, 19, 2) per px0
    steepness = gradients.flatten(-2).norm(dim=-1) / mm_per_px0[:, None]  # per mm
    defined = (steepness > 0).all(-1) & steepness.isfinite().all(-1)  # not where landmarks coincide
    clean = classes(measures(start, mm_per_px0))
    kind = MEASURES[measure]
    for c in (1, kind.below, kind.above):
        (patients,) = torch.where(defined & (clean[:, measure] != c) & (to in (None, c)))
        if len(patients):
            wanted = clean[patients].clone()
            wanted[:, measure] = c
            movement = move(start[patients], mm_per_px0[patients], wanted, measure, steepness[patients], margin_mm)
            movement[movement.norm(dim=-1) < MOVED_MM] = 0
            places = start[patients] + movement / mm_per_px0[patients, None, None]
            reached = (classes(measures(places, mm_per_px0[patients])) == wanted).all(-1)
            size = movement.square().sum((1, 2))
            better = reached & (size < cost[patients])
            stay = (movement == 0).all(-1, keepdim=True)
            found[patients[better]] = places.masked_fill(stay, math.nan)[better]
            cost[patients[better]] = size[better]
    return found


def move(start, mm_per_px0, wanted, measure, steepness, margin_mm):
    """The least movement (N, 19, 2) in mm to the classes ``wanted`` (N, 8), by a penalty method.

    ``steepness`` (N, 8) is the largest change of a measure by a movement of 1 mm.
    """
    clean = measures(start, mm_per_px0)
    low, high = bounds(wanted, margin_mm * steepness)
    others = torch.arange(len(MEASURES), device=start.device) != measure  # may be nearer to a threshold than the margin
    low, high = torch.where(others, low.minimum(clean), low), torch.where(others, high.maximum(clean), high)
    movement = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.LBFGS([movement], max_iter=1000, history_size=20, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        values = measures(start + movement / mm_per_px0[:, None, None], mm_per_px0)
        excess = ((low - values).clamp(min=0) + (values - high).clamp(min=0)) / steepness  # in mm
        loss = movement.square().sum() + PENALTY * excess.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return movement.detach()


def bounds(wanted, margin):
    """The lowest and the highest value of each measure (N, 8) in the classes ``wanted``, by a margin (N, 8) inside."""
    limits = torch.tensor([[-math.inf, *measure.normal, math.inf] for measure in MEASURES], dtype=torch.float64)
    limits = limits.to(margin)
    below = wanted == torch.tensor([measure.below for measure in MEASURES], device=margin.device)
    place = torch.where(below, 0, torch.where(wanted == 1, 1, 2))
    low, high = (limits.expand(len(wanted), -1, -1).gather(-1, (place + end)[..., None])[..., 0] for end in (0, 1))
    margin = margin.minimum((high - low) / 2)
    return low + margin, high - margin
