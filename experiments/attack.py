"""The attacks compared.

All methods on the same images and targets. Errors of targeted landmarks are distances from the target, those of
stationary landmarks from the truth.
"""

from itertools import combinations

import pandas as pd

from eval import LABELS, ROLES, WORST, is_last, summarize, with_worst
from experiments.markdown import fold_intervals, markdown
from experiments.results import last, of_role, render_differences
from experiments.statistics import paired_difference
from support.errors import InputError
from support.figures import by_method, plot_attack
from support.files import write_table


def publish(results, data, out):
    """Write tables and charts to ``out``; return the section of the report. Runs of one description are compared."""
    text, groups = "", {}
    for result in results:
        groups.setdefault(result.labels["description"], []).append(result)
    for description, runs in groups.items():
        name, records = f"attack_{runs[0].folder.name}", pd.concat(map(attacked, runs))
        table, paired = summarize(records), compare(last(records))
        write_table(out / f"{name}.csv", table)
        write_table(out / f"{name}_differences.csv", paired)
        charts = {column: f"{name}_{column.removesuffix('_%')}.png" for column in LABELS}
        for column, chart in charts.items():
            plot_attack(table, column, LABELS[column], out / chart)
        text += f"\n### {description}\n\n{render(table, paired, charts)}"
    return text


def attacked(run):
    """The records of a run, its methods with the prefix that they have in the comparison."""
    records = run.attacked()
    return records.assign(method=run.labels.get("prefix", "") + records["method"])


def compare(records):
    """Differences in each role of each method from those before it in ``METHODS``, paired by image."""
    rows = []
    for (a, first), (b, second) in combinations(by_method(with_worst(records)).items(), 2):
        for role in (*ROLES[:2], WORST):
            pair = of_role(second, role), of_role(first, role)
            if all(map(len, pair)):  # not with an untargeted attack
                rows.append({"methods": f"{b} minus {a}", "landmarks": role} | paired_difference(*pair))
    return pd.DataFrame(rows)


def render(table, paired, charts):
    """First and last iteration, differences, charts ({column: file})."""
    shown = fold_intervals(table[(table["iteration"] == 0) | is_last(table)])
    shown = shown[["role", "method", "iteration", "landmarks", *LABELS, "largest_change"]]
    text = markdown(shown.rename(columns=LABELS | {"largest_change": "largest change (of 255)"}))
    if len(paired):
        text += f"\nDifferences at the last iteration:\n\n{render_differences(paired)}"
    return text + "".join(f"\n![{LABELS[column]}]({chart})\n" for column, chart in charts.items())


# --- finished runs ---------------------------------------------------------------------------------------------------


def check(results):
    """Finished runs as those of one comparison; methods that several of them have are named with their run.

    Raises:
        InputError: one is not the result of an attack, or has other images or targets.
    """
    tables = []
    for result in results:
        tables.append(result.predictions().assign(run=str(result.folder)))
        if "method" not in tables[-1]:
            raise InputError(f"{result.folder}: not the results of an attack; give output folders of test.py --attack")
        if {*tables[-1]["image"]} != {*tables[0]["image"]}:
            raise InputError(f"{result.folder}: other images than in {results[0].folder}; give runs on the same")
    records, landmark = pd.concat(tables), ["image", "landmark"]
    targets = records[records["role"] != "untargeted"]
    targets = targets.drop_duplicates([*landmark, "role", "target_x_px0", "target_y_px0"])
    if len(other := targets[targets.duplicated(landmark)]):
        same = "give runs of one --targets, --neighbours, --seed"
        raise InputError(f"{other['run'].iloc[0]}: other targets than in {results[0].folder}; {same}")
    several = (records.groupby("method")["run"].nunique() > 1).any()
    prefixes = [f"{result.labels['run']} " if several else "" for result in results]
    labels = [{"description": "Finished runs", "prefix": prefix} for prefix in prefixes]
    return [result._replace(labels=label) for result, label in zip(results, labels, strict=True)]
