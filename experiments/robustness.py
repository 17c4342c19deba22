"""Robustness.

Attacks with the same number of forward and backward passes, on the same images and targets; FGSM and random search
are controls. The *worst case* takes for each image the attack that brings most of its targets within 4 mm, of several
the one with the smallest mean distance, as AutoAttack does (arXiv 2003.01690): it is the figure that a detector
should be judged by. The curves have intervals at that distance.
"""

import numpy as np
import pandas as pd

from eval import SUCCESS_MM, exact, interval, named
from experiments.results import clean_and_last, last, of_role, outcome, render_outcomes
from experiments.statistics import by_image
from support.errors import InputError
from support.figures import METHODS, by_method, panels, save
from support.files import write_table

WORST_CASE = "worst case"
RADII_MM = np.linspace(0, 2 * SUCCESS_MM, 33)  # of the curves


def publish(results, data, out):
    """Write the table, the curves and their chart to ``out``; return the section of the report."""
    records = [(result.labels, with_worst_case(result.attacked())) for result in results]
    table = pd.concat([outcome(rows, labels) for labels, rows in records])
    curves = pd.concat([curve(rows, labels) for labels, rows in records])
    write_table(out / "robustness.csv", table)
    write_table(out / "robustness_curves.csv", curves)
    plot(curves, list(records[0][0]), out / "robustness.png")
    return f"\n{render_outcomes(table)}\n![share of the targets within a distance, by attack](robustness.png)\n"


def check(results):
    """Finished runs, unless one is not of several attacks."""
    for result in results:
        if "method" not in (table := result.predictions()) or table["method"].nunique() < 2:
            raise InputError(f"{result.folder}: not the results of several attacks; give those of test.py --attack 0 1")
    return results


def with_worst_case(records):
    """Records of several attacks, first and last iterations, with those of the worst case for each image."""
    records = clean_and_last(records)
    targeted = of_role(last(records), "targeted")
    keys = ["image", "method"]
    found = targeted.assign(missed=targeted["radial_error_mm"] > SUCCESS_MM).groupby(keys, sort=False)
    order = found[["missed", "radial_error_mm"]].mean().reset_index().sort_values(["missed", "radial_error_mm"])
    worst = records.merge(order.drop_duplicates("image")[keys], on=keys)
    ends = worst["iteration"].clip(upper=1) * worst["iteration"].max()  # attacks of one step end there too
    return pd.concat([records, worst.assign(method=WORST_CASE, iteration=ends)])


def curve(records, labels):
    """The share of targeted landmarks within each of ``RADII_MM`` of the target, of each attack: a row each."""
    tables = []
    for method, rows in last(of_role(records, "targeted")).groupby("method", sort=False):
        errors = by_image(rows, rows["radial_error_mm"])
        within = np.where(np.isnan(errors), np.nan, 100 * (errors <= RADII_MM[:, None, None])).transpose(1, 0, 2)
        shares = exact(*interval(within, lambda chosen: np.nanmean(chosen, axis=(0, 2))), len(within))
        tables.append(pd.DataFrame({**labels, "method": method, "radius_mm": RADII_MM} | named("within_%", *shares)))
    return pd.concat(tables)


def plot(curves, keys, path):
    """A panel for each kind of targets, a line for each attack."""
    groups = dict(list(curves.groupby(keys, sort=False)))
    figure, axes = panels(len(groups), width=6, height=5)
    for panel, (labels, table) in zip(axes, groups.items(), strict=True):
        for method, rows in by_method(table).items():
            look = {"color": METHODS.get(method, "black"), "linestyle": ":" if method == WORST_CASE else "-"}
            panel.plot(rows["radius_mm"], rows["within_%"], label=method, **look)
            at = rows[rows["radius_mm"] == SUCCESS_MM]
            ends = abs(at[["within_%_low", "within_%_high"]].T.to_numpy() - at["within_%"].to_numpy())
            panel.errorbar(at["radius_mm"], at["within_%"], ends, fmt="o", markersize=3, capsize=2, color=look["color"])
        panel.set(title=", ".join(map(str, labels)), xlabel="distance from the target (mm)", ylim=(0, 103))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("targeted landmarks within it (%)")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)
