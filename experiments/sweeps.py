"""Experiments 3, 4 and 7: success against epsilon, against the number of targets, and of one step of full length."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from eval import SUCCESS_MM, interval, named
from experiments.markdown import fold_intervals, markdown
from experiments.results import error_from_truth, last, outcome, outcomes, render_outcomes
from experiments.statistics import by_image
from support.figures import by_method, line_with_band, panels, save, tick_values
from support.files import write_table

RATES = {  # column -> title of a panel
    "within_4mm_%": f"targeted, within {SUCCESS_MM} mm of target",
    "half_way_%": "targeted, more than halfway",
    "stationary_within_4mm_%": f"stationary, within {SUCCESS_MM} mm of truth",
}
EPSILON = "epsilon (half grey levels of 255)"
GROUPS = {"1 to 4": 0, "5 to 8": 4, "9 to 12": 8, "13 to 17": 12}  # of |T| of random targets: name -> above
HEADINGS = {  # of ``one_step``
    "flown_mm": "mean displacement (mm)",
    "median_flown_mm": "median displacement (mm)",
    "mre_to_truth_mm": "MRE to truth (mm)",
    "further_than_4mm_from_truth_%": f"over {SUCCESS_MM} mm from truth (%)",
    "targets_within_4mm_%": f"within {SUCCESS_MM} mm of target (%)",
}


class Sweep(NamedTuple):
    """An experiment, as the modules of the others are: title, text, and what publishes its results."""

    TITLE: str
    TEXT: str
    publish: object  # (results, data, out) -> section of the report, as of the other experiments


def plot(table, x, group, xlabel, path, ylabel="landmarks (%)", columns=RATES, **axis):
    """Columns of a table against x, a panel for each, a line for each value of ``group``."""
    figure, axes = panels(len(columns))
    for panel, (column, title) in zip(axes, columns.items(), strict=True):
        for name, rows in by_method(table, group).items():
            line_with_band(panel, rows, x, column, name)
        panel.set(title=title, xlabel=xlabel, ylabel=ylabel, **({"ylim": (0, 103)} | axis))
        tick_values(panel, table[x])
    axes[0].legend(fontsize=8)
    save(figure, path)


def publish_epsilon(results, data, out):
    table, text = outcomes(results), ""
    write_table(out / "epsilon.csv", table)
    for method, rows in table.groupby("method", sort=False):
        chart = f"epsilon_{method}.png"
        plot(rows, "epsilon", "targets", EPSILON, out / chart, xscale="log")
        shown = render_outcomes(rows.drop(columns="method"))
        text += f"\n{method}:\n\n{shown}\n![success against epsilon]({chart})\n"
    return text


def publish_count(results, data, out):
    table = outcomes([result for result in results if "|T|" in result.labels])
    (random,) = (result for result in results if "|T|" not in result.labels)
    grouped = by_count(random.attacked())
    write_table(out / "count.csv", table)
    write_table(out / "count_random.csv", grouped)
    plot(table, "|T|", "method", "number of targeted landmarks |T|", out / "count.png")
    return (
        f"\n{render_outcomes(table)}\n![success against |T|](count.png)\n\n"
        f"The images of the attack with random targets (section 2), by their |T|:\n\n{render_outcomes(grouped)}"
    )


def by_count(records):
    """Outcomes of an attack with random targets, its images grouped by their |T|."""
    keys = [records["method"], records["iteration"], records["image"]]
    counts = (records["role"] == "targeted").groupby(keys).transform("sum")
    groups = pd.cut(counts, [*GROUPS.values(), 18], labels=list(GROUPS))
    return pd.concat(outcome(rows, {"|T|": name}) for name, rows in records.groupby(groups, observed=True))


def publish_one_step(results, data, out):
    table = pd.DataFrame([row for result in results for row in one_step(result)])
    write_table(out / "baselines.csv", table)
    lines = table.assign(line=table["method"] + table["role"].map(lambda r: "" if r == "untargeted" else f", {r}"))
    ylabel, columns = "mean distance from the clean prediction (mm)", {"flown_mm": "one step"}
    plot(lines, "epsilon", "line", EPSILON, out / "baselines.png", ylabel, columns, xscale="log", ylim=(0, None))
    shown = fold_intervals(table, ".2f").rename(columns=HEADINGS)
    return f"\n{markdown(shown)}\n![displacement against epsilon](baselines.png)\n"


def one_step(result):
    """A row for each method and role."""
    for (method, role), found in last(result.attacked()).groupby(["method", "role"], sort=False):
        error = error_from_truth(found)
        success = 100 * (found["radial_error_mm"] <= SUCCESS_MM).mean()
        row = {**result.labels, "method": method, "role": role}
        row |= {"images": found["image"].nunique(), "landmarks": len(found)}
        row |= named("flown_mm", *interval(by_image(found, found["flown_mm"]), np.nanmean))
        row |= {"median_flown_mm": found["flown_mm"].median(), "mre_to_truth_mm": error.mean()}
        row |= {"further_than_4mm_from_truth_%": 100 * (error > SUCCESS_MM).mean()}
        yield row | {"targets_within_4mm_%": success if role == "targeted" else np.nan}


epsilon = Sweep(
    "Epsilon",
    "Success against the L-infinity budget of the perturbation, for random targets and for displacements from the "
    "truth. Targets less than 4 mm away may be within 4 mm of the clean prediction already; *more than halfway* "
    "therefore counts the landmarks whose distance from the target is below half of the initial one.",
    publish_epsilon,
)
count = Sweep(
    "Number of targeted landmarks",
    "Success against the number |T| of landmarks that are targeted at once; all others are stationary.",
    publish_count,
)
baselines = Sweep(
    "Untargeted and one-step FGSM",
    "One step of full length: displacement of the predictions from the clean ones. *FGSM* moves the targeted landmarks "
    "towards random targets, the others are stationary; *untargeted-FGSM* moves all of them away from the clean "
    "prediction.",
    publish_one_step,
)
