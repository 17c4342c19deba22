"""Statistics of records: intervals by a bootstrap over images, paired differences, correlations.

Landmarks of one image are not independent, hence images are resampled.
"""

import warnings

import numpy as np
import pandas as pd

from eval import SUCCESS_MM, summarize_attack

ENOUGH = 20  # images for a finding; bootstrap intervals of fewer are too narrow


# --- bootstrap -------------------------------------------------------------------------------------------------------


def resample(count, draws=1000, seed=0):
    """A bootstrap's draws from ``count`` images: indices (draws, count)."""
    return np.random.default_rng(seed).integers(count, size=(draws, count))


def interval(values, statistic, draws=1000, seed=0):
    """A statistic with its 95 % confidence interval: percentiles of a bootstrap over images.

    Args:
        values: array (images, ...).
        statistic: function of such an array to a number or an array of numbers; nan where it is undefined.

    Returns:
        (value, low, high), each of the statistic's shape.
    """
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # means of nothing are nan
        found = [statistic(values[chosen]) for chosen in resample(len(values), draws, seed)]
        return statistic(values), *np.nanpercentile(found, [2.5, 97.5], axis=0)


def by_image(rows, values):
    """Numbers of ``rows`` of records as an array (images, landmarks), nan where there is no row."""
    return rows.assign(value=values).pivot(index="image", columns="landmark", values="value").to_numpy(float)


def named(name, value, low, high):
    """An interval as columns of a table: <name>, <name>_low, <name>_high."""
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def summarize_with_confidence(records, by="iteration", draws=1000, seed=0):
    """``eval.summarize_attack`` with 95 % confidence intervals: columns <measure>_low and <measure>_high.

    The same draws serve all rows.
    """
    table = summarize_attack(records, by)
    keys = ["role", "method", by]
    errors = records.pivot(index=[*keys, "image"], columns="landmark", values="radial_error_mm")
    images = errors.index.unique("image")
    groups = table[keys].itertuples(index=False, name=None)
    values = np.stack([errors.loc[group].reindex(images) for group in groups], axis=1)  # (images, groups, landmarks)

    def measures(values):
        values = values.swapaxes(0, 1).reshape(len(table), -1)  # nan where a landmark has another role
        success = 100 * (values <= SUCCESS_MM).sum(1) / (~np.isnan(values)).sum(1)
        return np.stack([np.nanmean(values, axis=1), np.nanmedian(values, axis=1), success])

    _, low, high = interval(values, measures, draws, seed)
    for i, name in enumerate(("mre_mm", "median_mm", "within_4mm_%")):
        table[f"{name}_low"], table[f"{name}_high"] = low[i], high[i]
    return table


# --- paired differences ----------------------------------------------------------------------------------------------


def paired_difference(a, b):
    """Rows ``a`` of records minus rows ``b``, on the images that both have.

    Returns:
        dict: images, and within_4mm_points (percentage points) and mre_mm with their intervals, see ``named``.
    """
    common = sorted(set(a["image"]) & set(b["image"]))
    a, b = (rows[rows["image"].isin(common)] for rows in (a, b))
    measures = {
        "within_4mm_points": lambda rows: 100.0 * (rows["radial_error_mm"] <= SUCCESS_MM),
        "mre_mm": lambda rows: rows["radial_error_mm"],
    }
    row = {"images": len(common)}
    for name, measure in measures.items():
        pairs = np.stack([by_image(rows, measure(rows)) for rows in (a, b)], axis=1)  # (images, 2, landmarks)
        row |= named(name, *interval(pairs, lambda pairs: np.nanmean(pairs[:, 0]) - np.nanmean(pairs[:, 1])))
    return row


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


def differences(pairs):
    """A table with a row for each pair: its labels and ``paired_difference``.

    Args:
        pairs: list of (labels, rows a, rows b).
    """
    return pd.DataFrame([labels | paired_difference(a, b) for labels, a, b in pairs])
