"""Experiments 3 and 4: success against epsilon, and against the number of targets."""

from typing import NamedTuple

import pandas as pd

from eval import SUCCESS_MM
from experiments.results import outcome, outcomes, render_outcomes
from support.figures import by_method, line_with_band, panels, save, tick_values
from support.files import write_table

RATES = {  # column -> title of a panel
    "within_4mm_%": f"targeted, within {SUCCESS_MM} mm of target",
    "half_way_%": "targeted, more than halfway",
    "stationary_within_4mm_%": f"stationary, within {SUCCESS_MM} mm of truth",
}
EPSILON = "epsilon (half grey levels of 255)"
GROUPS = {"1 to 4": 0, "5 to 8": 4, "9 to 12": 8, "13 to 17": 12}  # of |T| of random targets: name -> above


class Sweep(NamedTuple):
    """An experiment, as the modules of the others are: title, text, and what publishes its results."""

    TITLE: str
    TEXT: str
    publish: object  # (results, data, out) -> section of the report, as of the other experiments


def plot(table, x, group, xlabel, path, **axis):
    """The rates against x, a panel for each, a line for each value of ``group``."""
    figure, axes = panels(len(RATES))
    for panel, (column, title) in zip(axes, RATES.items(), strict=True):
        for name, rows in by_method(table, group).items():
            line_with_band(panel, rows, x, column, name)
        panel.set(title=title, xlabel=xlabel, ylabel="landmarks (%)", ylim=(0, 103), **axis)
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
