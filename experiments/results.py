"""From the records of an attack to a row of its outcome, and how tables name its columns."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from eval import SUCCESS_MM, WORST, exact, interval, is_last, named, read_records, with_worst
from experiments.markdown import fold_intervals, markdown
from experiments.statistics import by_training, verdict
from readers.layouts import index
from readers.points import read_doctors


class Result(NamedTuple):
    """A finished run of test.py."""

    labels: dict  # column of the experiment's table -> value
    folder: Path

    def predictions(self):
        """The run's predictions, see ``eval.record``."""
        return read_records([self.folder / "predictions.csv"])

    def attacked(self):
        """The predictions of an attack, see ``join_clean``."""
        return join_clean(self.predictions())


def join_clean(table):
    """Records of an attack, see ``eval.record_attack``, joined with the clean ones.

    Further columns: x_px0_clean, y_px0_clean; start_mm, distance of the clean prediction from the target, or from the
    truth if a landmark has none.
    """
    keys = ["method", "image", "landmark"]
    clean = table[table["iteration"] == 0][[*keys, "x_px0", "y_px0", "radial_error_mm"]]
    table = table.merge(clean, on=keys, suffixes=("", "_clean"), validate="many_to_one")
    return table.rename(columns={"radial_error_mm_clean": "start_mm"})


def error_from_truth(records):
    """Distances of predictions from the ground truth in mm, whatever a landmark's role."""
    x, y = records["x_px0"] - records["true_x_px0"], records["y_px0"] - records["true_y_px0"]
    return np.hypot(x, y) * records["mm_per_px0"]


def read_marks(data, split, ids):
    """The doctors' marks of a split's images ``ids``, as far as two doctors have marked them: {id: (2, K, 2) px0}."""
    entries = index(data, split) if len(ids) else ()
    entries = [entry for entry in entries if entry.id in ids and len(entry.annotations) == 2]
    return {entry.id: read_doctors(entry, (np.inf, np.inf)) for entry in entries}


def last(records):
    """The rows of each method's last iteration."""
    return records[is_last(records)]


def clean_and_last(records):
    """The clean records, and those of each method's last iteration."""
    return pd.concat([records[records["iteration"] == 0], last(records)])


def of_role(records, role):
    return records[records["role"] == role]


def rate(rows, success, columns="landmark"):
    """(value, low, high): percentage of rows for which ``success`` (a bool each) holds, see ``by_training``."""
    if not len(rows):
        return (np.nan,) * 3
    percentages = by_training(rows, 100.0 * success, columns)
    return exact(*interval(percentages, np.nanmean, axes=2), len(percentages))


def outcome(records, labels):
    """A row for each method: ``labels``, then what its last iteration has achieved, rates with intervals.

    ``clean_mre_mm`` is the detector's MRE before the attack. ``half_way_%`` is the rate of targeted landmarks whose
    distance from the target is below half of the initial one: a success that is comparable for near and far targets.
    ``complete_%`` is that of images, see ``with_worst``.
    """
    rows = []
    clean = records[records["iteration"] == 0]
    clean_mre = error_from_truth(clean).groupby(clean["method"]).mean()
    for method, found in last(records.assign(seed=records.get("seed", 0))).groupby("method", sort=False):
        targeted, stationary = of_role(found, "targeted"), of_role(found, "stationary")
        error = targeted["radial_error_mm"]
        row = {**labels, "method": method, "images": found["image"].nunique(), "clean_mre_mm": clean_mre[method]}
        row |= {"targeted": len(targeted), "start_mm": targeted["start_mm"].mean(), "targeted_mre_mm": error.mean()}
        row |= {"targeted_median_mm": error.median(), "stationary_mre_mm": stationary["radial_error_mm"].mean()}
        row |= named("within_4mm_%", *rate(targeted, error <= SUCCESS_MM))
        row |= named("half_way_%", *rate(targeted, error < targeted["start_mm"] / 2))
        row |= named("stationary_within_4mm_%", *rate(stationary, stationary["radial_error_mm"] <= SUCCESS_MM))
        worst = of_role(with_worst(found, ("iteration", "seed")), WORST)
        row |= named("complete_%", *rate(worst, worst["radial_error_mm"] <= SUCCESS_MM))
        rows.append(row)
    return pd.DataFrame(rows)


def outcomes(results):
    """``outcome`` of each result."""
    return pd.concat([outcome(result.attacked(), result.labels) for result in results])


HEADINGS = {
    "clean_mre_mm": "detector MRE (mm)",
    "targeted": "landmarks",
    "start_mm": "initial distance to target (mm)",
    "targeted_mre_mm": "targeted MRE (mm)",
    "targeted_median_mm": "median (mm)",
    "within_4mm_%": f"within {SUCCESS_MM} mm (%)",
    "half_way_%": "more than halfway (%)",
    "stationary_mre_mm": "stationary MRE (mm)",
    "stationary_within_4mm_%": f"within {SUCCESS_MM} mm of truth (%)",
    "complete_%": "images with all in place (%)",
}


def render_outcomes(table):
    """``outcome`` as Markdown."""
    return markdown(fold_intervals(table).rename(columns=HEADINGS))


def render_differences(table):
    """``statistics.paired_difference`` of each row as Markdown: differences with intervals, and what they support."""
    shown = fold_intervals(table, "+.1f")
    for name in ("within_4mm_points", "mre_mm"):
        ends = zip(table[f"{name}_low"], table[f"{name}_high"], table["images"], strict=True)
        shown[name] = [f"{text} ({verdict(*end)})" for text, end in zip(shown[name], ends, strict=True)]
    names = {"within_4mm_points": f"within {SUCCESS_MM} mm (points)", "mre_mm": "MRE (mm)"}
    return markdown(shown.rename(columns=names))
