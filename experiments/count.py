"""Experiment 4: success against the number |T| of targeted landmarks."""

import pandas as pd

from experiments.charts import plot_rates
from experiments.measures import measure, measure_each, render_measures
from support.files import write_table

TITLE = "Number of targeted landmarks"
TEXT = "Success against the number |T| of landmarks that are targeted at once; all others are stationary."
GROUPS = {"1 to 4": 0, "5 to 8": 4, "9 to 12": 8, "13 to 17": 12}  # of |T| of random targets: name -> above


def publish(results, data, out):
    """Write tables and the chart to ``out``; return the section of the report."""
    table = compute([result for result in results if "|T|" in result.labels])
    (random,) = (result for result in results if "|T|" not in result.labels)
    grouped = compute_random(random)
    write_table(out / "count.csv", table)
    write_table(out / "count_random.csv", grouped)
    plot(table, out / "count.png")
    return render(table, grouped)


def compute(results):
    """Measures of each attack on displacements of |T| landmarks."""
    return measure_each(results)


def compute_random(result):
    """Measures of an attack with random targets, its images grouped by their |T|."""
    found = result.attacked()
    keys = [found["method"], found["iteration"], found["image"]]
    counts = (found["role"] == "targeted").groupby(keys).transform("sum")
    groups = pd.cut(counts, [*GROUPS.values(), 18], labels=list(GROUPS))
    return pd.concat(measure(rows, {"|T|": name}) for name, rows in found.groupby(groups, observed=True))


def plot(table, path):
    plot_rates(table, "|T|", "method", "number of targeted landmarks |T|", path)


def render(table, grouped):
    return (
        f"\n{render_measures(table)}\n![success against |T|](count.png)\n\n"
        f"The images of the attack with random targets (section 2), by their |T|:\n\n{render_measures(grouped)}"
    )
