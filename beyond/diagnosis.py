"""Clinical measures of the 19 landmarks, their classes, and the least movement of landmarks that changes a class.

The ISBI 2015 challenge reads eight angles, ratios and distances off the landmarks, and classifies the patient by each
(Wang et al., "A benchmark for comparison of dental radiography analysis algorithms", 2016). Formulas and classes are
those of its evaluation code: FMA is measured from the line sella-nasion, not from the Frankfort plane, and MW has class
3 for everything from 0 to 2 mm too.

Formulas are those of a head that faces right: others are mirrored first (``turned_right``).

    values = measures(landmarks_px0, mm_per_px0)  # (N, 8), in the order of MEASURES
    found = classes(values)                       # (N, 8)
    print(MEASURES[0].words[found[0, 0].item()])  # skeletal class II
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from eval import SEEN, is_last, listed
from readers.plausibility import faces_left
from readers.points import LANDMARKS
from support.errors import InputError
from support.files import write_table
from targets import Targets, outside

MARGIN_MM = 1.0  # of ``least_movement``: how far beyond a threshold, as a movement of landmarks
MOVED_MM = 0.1  # a landmark that moves less stays
DIRECTIONS = {"up": 1, "down": -1}  # in which a measure is driven
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
MEASURE_NAMES = tuple(measure.name for measure in MEASURES)


# --- measures and classes --------------------------------------------------------------------------------------------


def turned_right(points_px0, reference_px0):
    """Landmarks of heads that face right: those of heads that face left, mirrored. Mirrors them back, too.

    Args:
        points_px0: (N, 19, 2) or (N, D, 19, 2) float x, y in px0.
        reference_px0: (N, 19, 2), by which it is decided where the head of an image faces: its truth or, without, its
            clean prediction, so that no attacked landmark turns it.
    """
    left = torch.from_numpy(faces_left(reference_px0.cpu().numpy())).to(points_px0.device)
    left = left.reshape(-1, *[1] * (points_px0.dim() - 1))
    return torch.where(left, points_px0 * points_px0.new_tensor([-1, 1]), points_px0)


def measures(points_px0, mm_per_px0):
    """The eight measures, differentiable.

    Args:
        points_px0: (N, 19, 2) float x, y in px0, of heads that face right, in the order of
            ``readers.points.LANDMARKS``.
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
    edge_to_edge = torch.tensor([name == "MW" for name in MEASURE_NAMES], device=values.device) & (values == 0)
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
    measure = MEASURES[MEASURE_NAMES.index(name)]
    return {number: measure.words[number] for number in sorted((1, measure.below, measure.above))}


def least_movement(points_px0, mm_per_px0, measure, to=None):
    """The least movement of landmarks, by its sum of squares, that changes a patient's class by one measure alone.

    The measure ends a margin beyond the threshold: the change that a movement by ``MARGIN_MM`` makes at most (in a
    class too narrow for that, the middle). The others keep their class, and that margin or what they have of it.
    Margins that contradict each other give way; where that would lose a class, there is no result. The minimum is
    local, from the given landmarks; those that would move less than ``MOVED_MM`` stay.

    Args:
        points_px0: (N, 19, 2) float x, y in px0, of heads that face right.
        mm_per_px0: (N,).
        measure: index in ``MEASURES``.
        to: the class that it should have afterwards; None: the nearest other one.

    Returns:
        targets.Targets: where the landmarks are afterwards, and which of them have moved: none of patients that have
        the class already, or for whom no such movement was found.
    """
    start, mm_per_px0 = points_px0.double(), mm_per_px0.to(points_px0.device).double()
    found = Targets(start.clone(), torch.zeros_like(start[..., 0], dtype=torch.bool))
    cost = torch.full_like(start[:, 0, 0], math.inf)
    gradients = torch.func.vmap(torch.func.jacrev(measures))(start, mm_per_px0)  # (N, 8, 19, 2) per px0
    steepness = gradients.flatten(-2).norm(dim=-1) / mm_per_px0[:, None]  # per mm
    defined = (steepness > 0).all(-1) & steepness.isfinite().all(-1)  # not where landmarks coincide
    clean = classes(measures(start, mm_per_px0))
    for c in reachable_classes(MEASURE_NAMES[measure]):
        (patients,) = torch.where(defined & (clean[:, measure] != c) & (to in (None, c)))
        if len(patients):
            wanted = clean[patients].clone()
            wanted[:, measure] = c
            movement = move(start[patients], mm_per_px0[patients], wanted, measure, steepness[patients])
            movement[movement.norm(dim=-1) < MOVED_MM] = 0
            places = start[patients] + movement / mm_per_px0[patients, None, None]
            reached = (classes(measures(places, mm_per_px0[patients])) == wanted).all(-1)
            size = movement.square().sum((1, 2))
            better = reached & (size < cost[patients])
            found.places[patients[better]] = places[better]
            found.targeted[patients[better]] = (movement != 0).any(-1)[better]
            cost[patients[better]] = size[better]
    return found


def steepest_movement(points_px0, mm_per_px0, measure, direction, distance_mm):
    """The movement of landmarks that changes a measure most: along its gradient, all together by ``distance_mm``.

    Args:
        points_px0, mm_per_px0, measure: see ``least_movement``.
        direction: of ``DIRECTIONS``.
        distance_mm: root of the sum of squares over landmarks; those that would move less than ``MOVED_MM`` stay.

    Returns:
        as ``least_movement``: none moves where landmarks that coincide leave no gradient.
    """
    start, mm_per_px0 = points_px0.double(), mm_per_px0.to(points_px0.device).double()
    gradient = torch.func.vmap(torch.func.jacrev(measures))(start, mm_per_px0)[:, measure]
    movement = DIRECTIONS[direction] * distance_mm * F.normalize(gradient.flatten(1), eps=0).view_as(start).nan_to_num()
    movement[movement.norm(dim=-1) < MOVED_MM] = 0
    return Targets(start + movement / mm_per_px0[:, None, None], (movement != 0).any(-1))


def move(start, mm_per_px0, wanted, measure, steepness):
    """The least movement (N, 19, 2) in mm to the classes ``wanted`` (N, 8), by a penalty method.

    ``steepness`` (N, 8) is the largest change of a measure by a movement of 1 mm.
    """
    clean = measures(start, mm_per_px0)
    low, high = bounds(wanted, MARGIN_MM * steepness)
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


def diagnosis_targets(clean, data, measure, to, distance_mm):
    """The patients whose class by a measure can be changed, or who can be driven by it, and the targets that do it.

    Args:
        clean: (N, 19, 2) px0, the predictions on the clean images.
        data: dataset.Cephalograms of N images.
        measure, to: see ``least_movement``; the measure by its name. Or a direction, see ``steepest_movement``.
        distance_mm: of a movement in a direction.

    Returns:
        their ids, and targets.Targets.

    Raises:
        InputError: there are none.
    """
    facing = turned_right(clean, data.reference_px0)
    number, driven = MEASURE_NAMES.index(measure), to in DIRECTIONS
    if driven:
        found = steepest_movement(facing, data.mm_per_px0, number, to, distance_mm)
    else:
        found = least_movement(facing, data.mm_per_px0, number, to)
    places = turned_right(found.places, data.reference_px0).round(decimals=4)  # as stored
    possible = found.targeted.any(-1) & ~(outside(places, data.sizes) & found.targeted).any(-1)
    ids = [id for id, attacked in zip(data.ids, possible.tolist(), strict=True) if attacked]
    wanted = f"to {'another class' if to is None else f'class {to}'}, by a margin, while the other classes stay"
    wanted = f"drives {measure} {to} inside the image" if driven else f"takes {measure} {wanted}"
    if not ids:
        raise InputError(f"--targets diagnosis: for no patient a movement of landmarks is found that {wanted}")
    if len(ids) < len(data):
        already = "" if driven else "they have the class already, or "
        warnings.warn(
            f"{len(data) - len(ids)} of {len(data)} patients are not attacked: {already}no movement of landmarks is "
            f"found that {wanted}",
            stacklevel=2,
        )
    return ids, found._replace(places=places).of(possible)


# --- diagnoses of records ---------------------------------------------------------------------------------------------


def diagnose(records):
    """The clinical measures of all predictions, see ``measures``.

    Returns:
        DataFrame with a row for each measure of each image (and method and iteration): value, class and meaning; where
        there is a ground truth also its value and class; and what was seen in the clean image.
    """
    keys = [name for name in ("method", "iteration", "image") if name in records]
    records = records.sort_values([*keys, "landmark"], kind="stable")
    heads = records.iloc[:: len(LANDMARKS)]
    mm_per_px0 = torch.tensor(heads["mm_per_px0"].to_numpy())
    found, truth = (
        torch.tensor(records[[*columns]].to_numpy(float)).unflatten(0, (-1, len(LANDMARKS)))
        for columns in (("x_px0", "y_px0"), ("true_x_px0", "true_y_px0"))
    )
    known = not truth.isnan().any()
    # the first row of an image, of the first iteration
    _, first, image = np.unique(heads["image"].to_numpy(str), return_index=True, return_inverse=True)
    reference = (truth if known else found)[first][image]

    def read(points):
        values = measures(turned_right(points, reference), mm_per_px0)
        return values.flatten().numpy(), classes(values).flatten().numpy()

    table = pd.DataFrame({name: np.repeat(heads[name].to_numpy(), len(MEASURES)) for name in keys})
    table["measure"] = [*MEASURE_NAMES] * len(heads)
    table["unit"] = [measure.unit for measure in MEASURES] * len(heads)
    table["value"], table["class"] = read(found)
    table["meaning"] = [MEASURES[i % len(MEASURES)].words.get(c, "undefined") for i, c in enumerate(table["class"])]
    if known:
        table["true_value"], table["true_class"] = read(truth)
    if "seen" in heads:
        table["seen"] = np.repeat(heads["seen"].fillna("").to_numpy(), len(MEASURES))
    return table


def summarize_diagnoses(table, doctors_px0, mm_per_px0):
    """How far the measures of ``diagnose`` are from the truth, and two doctors' from each other.

    Args:
        table: of a test, with truth.
        doctors_px0: (N, D, 19, 2) marks of each doctor; without effect unless there are two.
        mm_per_px0: (N,).

    Returns:
        DataFrame with a row for each measure: mean absolute difference in its unit, agreement of the classes in %, the
        challenge's score in %; the last row has the means of the percentages. The truth of the detector is the mean of
        the doctors, that of the doctors (the junior one) is the senior one.
    """
    columns = (table[name].to_numpy() for name in ("true_value", "true_class", "value", "class"))
    pairs = {"": tuple(torch.tensor(column).unflatten(0, (-1, len(MEASURES))) for column in columns)}
    if doctors_px0.shape[1] == 2:
        marks = turned_right(doctors_px0, doctors_px0.mean(1))
        values = [measures(points, mm_per_px0) for points in marks.unbind(1)]
        pairs["doctors_"] = tuple(v for value in values for v in (value, classes(value)))
    units = [measure.unit for measure in MEASURES]
    summary = pd.DataFrame({"measure": MEASURE_NAMES, "unit": units, "patients": len(doctors_px0)})
    for of, (true_value, true_class, value, one_class) in pairs.items():
        scores = [challenge_score(*both) for both in zip(true_class.T, one_class.T, strict=True)]
        summary[f"{of}mean_difference"] = (value - true_value).abs().mean(0)
        summary[f"{of}agreement_%"] = 100 * (true_class == one_class).double().mean(0)
        summary[f"{of}challenge_score_%"] = scores
    means = summary[[name for name in summary if name.endswith("_%")]].mean()
    return pd.concat([summary, pd.DataFrame([{"measure": "all", "patients": len(doctors_px0), **means}])])


def changed_diagnoses(table, measure=None, to=None):
    """Which patients' diagnoses an attack changes, against the detector's output on the clean image.

    Args:
        table: ``diagnose`` of an attack.
        measure: name of the measure that the attack is meant to change.
        to: the class that it should have (None, or a direction: any other than before).

    Returns:
        DataFrame with a row for each method, iteration and image: a bool for each measure, whether its class differs;
        ``any`` of them; and for an intended one ``intended``, whether it is as wanted, and ``only intended``, whether
        the seven others are also as before.
    """
    found = table.pivot(index=["method", "iteration", "image"], columns="measure", values="class")
    clean = found.xs(0, level="iteration").reindex(found.index.droplevel("iteration"))
    changed = (found != clean.to_numpy())[[*MEASURE_NAMES]]
    others = changed.drop(columns=measure) if measure else changed
    changed = changed.assign(any=changed.any(axis=1))
    if measure:
        wanted = found[measure] == to if isinstance(to, int) else changed[measure]
        changed = changed.assign(**{"intended": wanted, "only intended": wanted & ~others.any(axis=1)})
    return changed


def summarize_changes(changed):
    """``changed_diagnoses`` as percentages of patients: a row for each method, iteration and kind of change."""
    groups = changed.groupby(["method", "iteration"], sort=False)
    table = (100 * groups.mean()).reset_index()
    table = table.melt(["method", "iteration"], var_name="measure", value_name="changed_%")
    table.insert(3, "patients", changed.index.unique("image").size)
    return table.sort_values(["method", "iteration"], kind="stable")


def warn_of_images(records):
    """Name the images of records in which the detector sees something else than a head, see ``eval.what_is_seen``."""
    records = records.reindex(columns=["image", "seen", "vote_share"])  # not all have votes
    for seen, words in SEEN.items():
        share = records[records["seen"] == seen].groupby("image")["vote_share"].median()
        if len(share):
            warnings.warn(
                f"{listed([*share.index])}: {words} (median vote share at most {share.max():.2f}); do not trust "
                "landmarks and diagnoses there",
                stacklevel=2,
            )


def report_accuracy(records, data, out):
    """measures.csv of a test, and where there is a ground truth, diagnoses.csv."""
    warn_of_images(records)
    table = diagnose(records)
    write_table(out / "measures.csv", table)
    if "true_class" in table:
        table = summarize_diagnoses(table, data.doctors_px0, data.mm_per_px0)
        write_table(out / "diagnoses.csv", table)
    print(f"\n{table.to_string(index=False, float_format='%.2f', na_rep='')}")


def report_changes(records, measure, to, out):
    """measures.csv and diagnoses.csv of an attack, see ``changed_diagnoses``."""
    warn_of_images(records)
    table = diagnose(records)
    changes = summarize_changes(changed_diagnoses(table, measure, to))
    write_table(out / "measures.csv", table)
    write_table(out / "diagnoses.csv", changes)
    if records["image"].nunique() == 1:
        ends = table[(table["iteration"] == 0) | is_last(table)]
        wide = ends.pivot(index=["method", "measure"], columns="iteration", values="meaning")
        title = "Diagnoses at the first and at the last iteration"
    else:
        final = changes[is_last(changes)]
        names = final["measure"].unique()
        wide = final.pivot(index=["method", "patients"], columns="measure", values="changed_%")[names]
        title = "Patients with another class than on the clean image (%)"
    print(f"\n{title}\n\n{wide.to_string(float_format='%.1f')}")
