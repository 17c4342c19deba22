"""Experiment 3: success against epsilon, for random targets and for displacements."""

from experiments.charts import EPSILON, plot_rates
from experiments.measures import measure_each, render_measures
from support.files import write_table

TITLE = "Epsilon"
TEXT = (
    "Success against the L-infinity budget of the perturbation, for random targets and for displacements from the "
    "truth. Targets less than 4 mm away may be within 4 mm of the clean prediction already; *more than halfway* "
    "therefore counts the landmarks whose distance from the target is below half of the initial one."
)


def publish(results, data, out):
    """Write tables and charts to ``out``; return the section of the report."""
    table = compute(results)
    write_table(out / "epsilon.csv", table)
    text = ""
    for method, rows in table.groupby("method", sort=False):
        chart = f"epsilon_{method}.png"
        plot(rows, out / chart)
        text += render(method, rows, chart)
    return text


def compute(results):
    """Measures of each attack."""
    return measure_each(results)


def plot(table, path):
    plot_rates(table, "epsilon", "targets", EPSILON, path, xscale="log")


def render(method, table, chart):
    return f"\n{method}:\n\n{render_measures(table.drop(columns='method'))}\n![success against epsilon]({chart})\n"
