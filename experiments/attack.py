"""Experiment 2: the attacks against each other, on the same images and targets."""

from itertools import combinations

import pandas as pd

from eval import LABELS, is_last, summarize
from experiments.markdown import fold_intervals, markdown
from experiments.results import last, of_role, outcome, render_differences, render_outcomes
from experiments.statistics import paired_difference
from support.errors import InputError
from support.figures import plot_attack
from support.files import write_table

TITLE = "The attacks compared"
TEXT = (
    "All methods on the same images and targets. Errors of targeted landmarks are distances from the target, those of "
    "stationary landmarks from the truth."
)


def publish(results, data, out):
    """Write tables and charts to ``out``; return the section of the report. Runs of one description are compared."""
    text, groups = "", {}
    for result in results:
        groups.setdefault(result.labels["description"], []).append(result)
    for description, runs in groups.items():
        name, records = f"attack_{runs[0].folder.name}", pd.concat([run.attacked() for run in runs])
        table = summarize(records)
        attacks = {method: rows for method, rows in last(records).groupby("method", sort=False)}
        paired = compare(combinations(attacks.items(), 2), "methods")
        write_table(out / f"{name}.csv", table)
        write_table(out / f"{name}_differences.csv", paired)
        charts = {column: f"{name}_{column.removesuffix('_%')}.png" for column in LABELS}
        for column, chart in charts.items():
            plot_attack(table, column, LABELS[column], out / chart)
        text += f"\n### {description}\n\n{render(table, paired, charts)}"
    return text


def compare(pairs, label):
    """Differences in each role, the second of each pair of (name, records) minus the first, paired by image."""
    rows = []
    for (a, first), (b, second) in pairs:
        for role in ("targeted", "stationary"):
            labels = {label: f"{b} minus {a}", "landmarks": role}
            rows.append(labels | paired_difference(of_role(second, role), of_role(first, role)))
    return pd.DataFrame(rows)


def render(table, paired, charts):
    """First and last iteration, differences, charts ({column: file})."""
    shown = fold_intervals(table[(table["iteration"] == 0) | is_last(table)])
    shown = shown[["role", "method", "iteration", "landmarks", *LABELS, "largest_change"]]
    text = markdown(shown.rename(columns=LABELS | {"largest_change": "largest change (of 255)"}))
    text += f"\nDifferences at the last iteration:\n\n{render_differences(paired)}"
    return text + "".join(f"\n![{LABELS[column]}]({chart})\n" for column, chart in charts.items())


# --- finished runs ---------------------------------------------------------------------------------------------------


def print_tables(results):
    """Outcomes of finished attacks with intervals, and the difference of each from the first, as Markdown.

    Args:
        results: list of results.Result, each with the label "run".

    Raises:
        InputError: one is not the result of an attack, or has other targets for the same images.
    """
    attacks = {}  # "run method" -> records of the last iteration
    for result in check(results):
        for method, records in result.attacked().groupby("method", sort=False):
            attacks[f"{result.labels['run']} {method}"] = result.labels, records
    check_targets(attacks)
    print(render_outcomes(pd.concat([outcome(records, labels) for labels, records in attacks.values()])))
    first, *others = [(name, last(records)) for name, (_, records) in attacks.items()]
    if others:
        print(render_differences(compare([(first, other) for other in others], "attacks")))


def check(results):
    """The runs, unless one is not the result of an attack."""
    for result in results:
        if "method" not in result.predictions():
            raise InputError(f"{result.folder}: not the results of an attack; give output folders of test.py --attack")
    return results


def check_targets(attacks):
    """Refuse targeted attacks with other targets than the first has for the same images."""
    targets = []
    for labels, records in attacks.values():
        found = last(records).set_index(["image", "landmark"])
        if (found["role"] != "untargeted").any():
            targets.append((labels["run"], found[["target_x_px0", "target_y_px0"]]))
    for run, found in targets[1:]:
        first, wanted = targets[0]
        common = found.index.intersection(wanted.index)
        if not found.loc[common].equals(wanted.loc[common]):
            raise InputError(f"{run}: other targets than in {first}; give runs with the same --targets, --seed")
