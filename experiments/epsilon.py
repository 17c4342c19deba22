"""Epsilon.

Success against the L-infinity budget of the perturbation, for random targets and for displacements from the truth.
Targets less than 4 mm away may be within 4 mm of the clean prediction already; *more than halfway* therefore counts
the landmarks whose distance from the target is below half of the initial one.
"""

from eval import SUCCESS_MM
from experiments.results import outcomes, render_outcomes
from support.figures import by_method, line_with_band, panels, save, tick_values
from support.files import write_table

RATES = {  # column -> title of a panel
    "within_4mm_%": f"targeted, within {SUCCESS_MM} mm of target",
    "half_way_%": "targeted, more than halfway",
    "stationary_within_4mm_%": f"stationary, within {SUCCESS_MM} mm of truth",
}
EPSILON = "epsilon (half grey levels of 255)"


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


def publish(results, data, out):
    table, text = outcomes(results), ""
    write_table(out / "epsilon.csv", table)
    for method, rows in table.groupby("method", sort=False):
        chart = f"epsilon_{method}.png"
        plot(rows, "epsilon", "targets", EPSILON, out / chart, xscale="log")
        shown = render_outcomes(rows.drop(columns="method"))
        text += f"\n{method}:\n\n{shown}\n![success against epsilon]({chart})\n"
    return text
