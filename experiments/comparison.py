"""Experiment 2: the attacks against each other, on the same images and targets."""

from itertools import combinations

from eval import SUCCESS_MM, plot_attack
from experiments.markdown import fold_intervals, markdown
from experiments.measures import last, of_role, render_differences
from experiments.statistics import differences, summarize_with_confidence
from support.files import atomic, write_table

TITLE = "The attacks compared"
TEXT = (
    "All methods on the same images and targets. Errors of targeted landmarks are distances from the target, those of "
    "stationary landmarks from the truth."
)
MEASURES = {
    "mre_mm": "MRE (mm)",
    "median_mm": "median radial error (mm)",
    "within_4mm_%": f"within {SUCCESS_MM} mm (%)",
}


def publish(results, data, out):
    """Write tables and charts to ``out``; return the section of the report."""
    text = ""
    for result in results:
        name, records = f"attack_{result.folder.name}", result.attacked()
        table, paired = compute(records), compute_differences(records)
        write_table(out / f"{name}.csv", table)
        write_table(out / f"{name}_differences.csv", paired)
        charts = {column: f"{name}_{column.removesuffix('_%')}.png" for column in MEASURES}
        for column, chart in charts.items():
            plot(table, column, out / chart)
        text += f"\n### {result.labels['description']}\n\n{render(table, paired, charts)}"
    return text


def compute(records):
    """Measures by role, method and iteration, with intervals."""
    return summarize_with_confidence(records)


def compute_differences(records):
    """Later methods minus earlier ones at the last iteration, paired by image."""
    found = last(records)
    pairs = []
    for one, other in combinations(found["method"].unique(), 2):
        for role in ("targeted", "stationary"):
            rows = of_role(found, role)
            labels = {"methods": f"{other} minus {one}", "landmarks": role}
            pairs.append((labels, *(rows[rows["method"] == method] for method in (other, one))))
    return differences(pairs)


def plot(table, column, path):
    """A measure against iterations."""
    with atomic(path) as temporary:
        plot_attack(table, column, MEASURES[column], temporary)


def render(table, paired, charts):
    """First and last iteration, differences, charts ({column: file})."""
    shown = fold_intervals(table[table["iteration"].isin([0, table["iteration"].max()])])
    shown = shown[["role", "method", "iteration", "landmarks", *MEASURES, "largest_change"]]
    text = markdown(shown.rename(columns=MEASURES | {"largest_change": "largest change (of 255)"}))
    text += f"\nDifferences at the last iteration:\n\n{render_differences(paired)}"
    return text + "".join(f"\n![{MEASURES[column]}]({chart})\n" for column, chart in charts.items())
