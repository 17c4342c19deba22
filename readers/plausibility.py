"""Plausibility of annotations: checks of all images that are read, with bounds that real data keep by a wide margin.

All distances are relative, so that neither the images' size nor their spacing matters. Bounds, and what the 300 images
of Train and Test1 reach:

doctors      apart in one landmark by 0.3 of the diagonal of the landmarks' box (0.16); in the mean over an image's
             landmarks by 0.05 (0.030); in the mean over 5 images or more by 0.035 (0.017)
extent       landmarks span less than 0.2 of the image in both axes (0.41 or more in x), or all of them lie in its upper
             left quarter (they reach 0.71 in x and 0.75 in y)
mean shape   after the alignment of ``align``, residuals are relative to the landmarks' root-mean-square distance from
             their centre: a shape with a median below 0.35 (0.17; as a mirror image 0.65 or more) counts as a head; one
             landmark of a head is off by more than 0.75 (0.30)
population   the squared Mahalanobis distance of the shape (``strangeness``): above 200 (57), or above 80 in the mean
             over 5 images or more (17)
order        the logarithm of how much likelier a doctor's landmarks are with two of them exchanged (``check_order``),
             in an image or summed over all: above 16 refused, above 8 warned of (4.8)
"""

import functools
import itertools
import json
import warnings
from pathlib import Path

import numpy as np

from readers.points import LANDMARKS
from support.errors import InputError

SHAPE = Path(__file__).resolve().parent.parent / "assets" / "shape_model.json"
DOCTORS_LANDMARK, DOCTORS_IMAGE, DOCTORS_SPLIT = 0.3, 0.05, 0.035
EXTENT = 0.2
HEAD = 0.35
OUTLIER = 0.75
LEFT = 0.5  # of the variance: heads reach 0.90, points at random 0.39
MARKS = 20  # px0 of the mean shape: standard deviation of marks that the population's modes do not explain
STRANGE, STRANGE_SPLIT = 200, 80
EXCHANGED, SUSPECTED = 16, 8
NO_HEAD = "the landmarks are not those of a head, or not in the order of ISBI 2015"
TURNED = "the head is turned or mirrored: are x and y swapped, or does y count upwards? a line is x,y, y from the top"


def check(entries, doctors, sizes):
    """Raise InputError if the annotations of a split are not plausible; the message names the first such image.

    Args:
        entries: N layouts.Entry.
        doctors: (N, D, K, 2) float64 x, y in px0.
        sizes: N (H0, W0).
    """
    points = doctors.mean(1)

    def refuse(bad, reason, doctor=0, certain=True):
        """Raise InputError, or warn, if any of (N,) bool is true; ``reason``: text, or a function of an index."""
        if bad.any():
            i = int(bad.argmax())
            annotation = entries[i].annotations[doctor]
            where = f"{annotation[0]}: line {annotation[1]}" if isinstance(annotation, tuple) else annotation
            text = f"{where}: {reason(i) if callable(reason) else reason} ({bad.sum()} of {len(bad)} images)"
            if certain:
                raise InputError(f"{text}; correct it, or add --unusual if the data is right (docs/data.md)")
            warnings.warn(f"{text}; compare them with an image (docs/data.md)", stacklevel=2)

    if doctors.shape[1] > 1:
        check_doctors(doctors, refuse)
    check_extent(points, np.array(sizes), refuse)
    check_shape(points, refuse)
    check_order(doctors, refuse)
    strange = strangeness(points)
    refuse(~(strange <= STRANGE), NO_HEAD)
    refuse((strange > STRANGE_SPLIT) & (len(strange) >= 5) & (strange.mean() > STRANGE_SPLIT), NO_HEAD)


def named(k):
    return f"{k + 1} ({LANDMARKS[k]})"


def check_doctors(doctors, refuse):
    """Refuse annotations of two doctors that are not of the same landmarks of the same image."""
    box = np.hypot(*np.ptp(doctors.mean(1), axis=1).T)
    distance = np.hypot(*np.moveaxis(doctors[:, 0] - doctors[:, 1], -1, 0))  # (N, K)
    apart, worst = distance / np.maximum(box, 1)[:, None], distance.argmax(1)
    refuse(
        apart.max(1) > DOCTORS_LANDMARK,
        lambda i: f"the doctors are {distance[i].max():.0f} px apart in landmark {named(worst[i])}",
    )
    mean = apart.mean(1)
    refuse(mean > DOCTORS_IMAGE, "the doctors are far apart in all landmarks: another order, or another image")
    if len(mean) >= 5 and mean.mean() > DOCTORS_SPLIT:
        refuse(mean > DOCTORS_SPLIT, "the doctors are far apart in most images: other images, or another order")


def check_extent(points, sizes, refuse):
    """Refuse positions that are not in pixels of these images."""
    relative = points / sizes[:, None, ::-1]
    units = "are they pixels of this image (not mm, not 0 to 1, not of a smaller copy)?"
    refuse((np.ptp(relative, axis=1) < EXTENT).all(1), f"all landmarks lie in a small part of the image; {units}")
    refuse((relative < 0.5).all((1, 2)), f"all landmarks lie in the upper left quarter of the image; {units}")


def check_shape(points, refuse):
    """Refuse what is no head, heads that are turned, and a landmark that is far off."""
    shape, _ = population()
    places = points @ np.array((1, 1j))
    residuals, turns = zip(*(align(places, mean) for mean in (shape, -shape.conj())), strict=True)
    medians = np.median(residuals, axis=2)  # (2, N): facing right as the mean shape, mirrored
    mirrored, image = medians.argmin(0), np.arange(len(points))
    is_head, turn = medians.min(0) < HEAD, np.array(turns)[mirrored, image]
    refuse(is_head & (turn != 0), TURNED)
    residual = np.array(residuals)[mirrored, image]
    worst = residual.argmax(1)
    refuse(
        is_head & (residual.max(1) > OUTLIER),
        lambda i: f"landmark {named(worst[i])} is far from its position relative to the others",
    )
    refuse(~is_head, NO_HEAD)


def align(places, mean):
    """Align the mean shape with landmarks by a rotation, scale and shift that minimise the sum of the distances.

    Few landmarks that are far off hardly matter, unlike for least squares.

    Args:
        places: (N, K) complex x + iy in px0.
        mean: (K,) complex.

    Returns:
        (N, K) distances relative to the root-mean-square distance from the centre, and (N,) int quarter turns.
    """
    weight = np.ones(places.shape)
    for _ in range(20):  # reweighted least squares
        weight /= weight.sum(1, keepdims=True)
        centred = places - (weight * places).sum(1, keepdims=True)
        model = mean - weight @ mean[:, None]
        factor = (weight * centred * model.conj()).sum(1) / (weight * abs(model) ** 2).sum(1)
        distance = abs(centred - factor[:, None] * model)
        weight = 1 / np.maximum(distance, 1e-3 * distance.max(1, keepdims=True) + 1e-9)
    size = abs(places - places.mean(1, keepdims=True)) ** 2
    turns = np.round(np.angle(factor) / (np.pi / 2)).astype(int) % 4
    return distance / np.maximum(np.sqrt(size.mean(1, keepdims=True)), 1e-9), turns


# --- the population of shapes ----------------------------------------------------------------------------------------


@functools.cache
def population():
    """The mean shape (K,) complex x + iy in px0, around 0, and the inverse (2K, 2K) of the shapes' covariance.

    Position, size and rotation do not count, nor does a stretch along an axis: images may have other proportions.
    """
    content = json.loads(SHAPE.read_text(encoding="utf-8"))
    mean = np.array(content["mean"]) @ (1, 1j)
    mean -= mean.mean()
    modes = np.reshape(content["modes"], (-1, 2 * len(mean)))
    covariance = (modes.T * np.square(content["mode_std"])) @ modes + MARKS**2 * np.eye(2 * len(mean))
    free = np.stack([np.ones_like(mean), mean, mean.conj()])
    free = np.concatenate([free, 1j * free[:2]]).view(float)
    inverse = np.linalg.inv(covariance)
    hidden = inverse @ free.T
    return mean, inverse - hidden @ np.linalg.solve(free @ hidden, hidden.T)


def faces_left(points):
    """Which heads face left, by the variance that the mean shape explains; what is no head does not.

    Args:
        points: (N, K, 2) px0.

    Returns:
        (N,) bool.
    """
    mean, _ = population()
    places = points @ np.array((1, 1j))
    places = places - places.mean(1, keepdims=True)
    right, left = (abs(places @ shape) ** 2 / (abs(mean) ** 2).sum() for shape in (mean.conj(), mean))
    return left > np.maximum(right, LEFT * (abs(places) ** 2).sum(1))


def strangeness(points):
    """Squared Mahalanobis distances (N,) of shapes from the population; points: (N, K, 2) px0, facing either side."""
    mean, inverse = population()
    places = (points * np.where(faces_left(points), -1, 1)[:, None, None] ** (1, 0)) @ np.array((1, 1j))
    places -= places.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):  # landmarks in one place have no shape: nan
        aligned = places * ((abs(mean) ** 2).sum() / (places @ mean.conj()))[:, None]
    deviation = (aligned - mean).view(float)
    return (deviation @ inverse * deviation).sum(1)


def check_order(doctors, refuse):
    """Refuse two landmarks that a doctor exchanged, by one image or by all together; warn where this is only likely."""
    pairs = np.array([*itertools.combinations(range(len(LANDMARKS)), 2)])
    orders = np.tile(np.arange(len(LANDMARKS)), (len(pairs), 1))
    np.put_along_axis(orders, pairs, pairs[:, ::-1], axis=1)
    marks = doctors.reshape(-1, *doctors.shape[2:])
    exchanged = np.stack([strangeness(points[orders]) for points in marks])  # (N * D, pairs)
    ratio = np.where(exchanged <= STRANGE, (strangeness(marks)[:, None] - exchanged) / 2, 0)
    ratio = ratio.reshape(*doctors.shape[:2], -1)
    evidence = np.maximum(ratio.sum(0), ratio.max(0))  # (D, pairs)
    doctor, pair = np.unravel_index(evidence.argmax(), evidence.shape)
    ratio, (one, other) = ratio[:, doctor, pair], map(named, pairs[pair])
    for certain, bound in ((True, EXCHANGED), (False, SUSPECTED)):
        if evidence[doctor, pair] > bound:
            images = ratio > (0 if ratio.sum() > bound else bound)
            refuse(images, f"landmarks {one} and {other} seem to be exchanged", doctor, certain)
