"""Statistics of records: paired differences, with intervals by ``eval.interval``."""

import numpy as np

from eval import SUCCESS_MM, interval, named

ENOUGH = 20  # images for a finding; bootstrap intervals of fewer are too narrow


def by_image(rows, values, columns="landmark"):
    """Numbers of ``rows`` as an array (images, values of the column ``columns``), nan where there is no row."""
    return rows.assign(value=values).pivot(index="image", columns=columns, values="value").to_numpy(float)


def by_training(rows, values, columns="landmark"):
    """``by_image`` of each training, told by the column ``seed`` if there is one: (images, trainings, values)."""
    trainings = rows.assign(value=values, seed=rows.get("seed", 0)).groupby("seed")
    return np.stack([by_image(found, found["value"], columns) for _, found in trainings], axis=1)


def paired_difference(a, b):
    """Rows ``a`` of records minus rows ``b``, on the images that both have; of as many trainings each.

    Returns:
        dict: images, and within_4mm_points (percentage points) and mre_mm with their intervals, see ``named``.
    """
    common = sorted(set(a["image"]) & set(b["image"]))
    both = [rows[rows["image"].isin(common)] for rows in (a, b)]
    errors = np.stack([by_training(rows, rows["radial_error_mm"]) for rows in both], axis=2)
    success = np.where(np.isnan(errors), np.nan, 100 * (errors <= SUCCESS_MM))

    def difference(pairs):
        return np.nanmean(pairs[:, :, 0]) - np.nanmean(pairs[:, :, 1])  # of (images, trainings, 2, landmarks)

    row = {"images": len(common)} | named("within_4mm_points", *interval(success, difference, axes=2))
    return row | named("mre_mm", *interval(errors, difference, axes=2))


def verdict(low, high, images):
    """What the interval of a difference supports, in words."""
    if images < ENOUGH:
        return f"pilot, n = {images}"
    return "interval contains 0" if low <= 0 <= high else "higher" if low > 0 else "lower"
