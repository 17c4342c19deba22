"""Statistics of records: paired differences and correlations, with intervals by ``eval.interval``."""

import numpy as np

from eval import SUCCESS_MM, interval, named

ENOUGH = 20  # images for a finding; bootstrap intervals of fewer are too narrow


def by_image(rows, values, columns="landmark"):
    """Numbers of ``rows`` as an array (images, values of the column ``columns``), nan where there is no row."""
    return rows.assign(value=values).pivot(index="image", columns=columns, values="value").to_numpy(float)


# --- paired differences ----------------------------------------------------------------------------------------------


def paired_difference(a, b):
    """Rows ``a`` of records minus rows ``b``, on the images that both have.

    Returns:
        dict: images, and within_4mm_points (percentage points) and mre_mm with their intervals, see ``named``.
    """
    common = sorted(set(a["image"]) & set(b["image"]))
    both = [rows[rows["image"].isin(common)] for rows in (a, b)]
    errors = np.stack([by_image(rows, rows["radial_error_mm"]) for rows in both], axis=1)  # (images, 2, landmarks)
    success = np.where(np.isnan(errors), np.nan, 100 * (errors <= SUCCESS_MM))

    def difference(pairs):
        return np.nanmean(pairs[:, 0]) - np.nanmean(pairs[:, 1])

    row = {"images": len(common)} | named("within_4mm_points", *interval(success, difference))
    return row | named("mre_mm", *interval(errors, difference))


def verdict(low, high, images):
    """What the interval of a difference supports, in words."""
    if images < ENOUGH:
        return f"pilot, n = {images}"
    return "interval contains 0" if low <= 0 <= high else "higher" if low > 0 else "lower"


# --- correlations ----------------------------------------------------------------------------------------------------


def correlation(x, y):
    """Pearson's r."""
    return np.corrcoef(x, y)[0, 1]


def residual(y, *others):
    """Residual of the linear regression of y on the others."""
    design = np.stack([np.ones_like(y), *others], axis=-1)
    return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]


def partial_correlation(x, y, other):
    """Pearson's r of x and y with ``other`` held constant."""
    return correlation(residual(x, other), residual(y, other))


def correlation_interval(rows, x, y, other=None):
    """(value, low, high) of the correlation of two columns, partial if there is a third; bootstrap over images."""
    groups = [part[[x, y, *([other] if other else [])]].to_numpy() for _, part in rows.groupby("image")]
    values = np.empty(len(groups), dtype=object)  # images have different numbers of rows
    values[:] = groups
    statistic = partial_correlation if other else correlation
    return interval(values, lambda chosen: statistic(*np.concatenate(list(chosen)).T))


def permutation_p(x, y, draws=10000, seed=0):
    """Two-sided p of Pearson's r: how often a random assignment of y to x gives an |r| at least as large."""
    rng = np.random.default_rng(seed)
    if not x.std() or not y.std():
        return np.nan
    x, y = ((v - v.mean()) / v.std() for v in (x, y))
    found = np.abs(rng.permuted(np.tile(y, (draws, 1)), axis=1) @ x) / len(x)
    return (1 + (found >= abs(x @ y) / len(x) - 1e-12).sum()) / (1 + draws)
