"""Experiment 9: diagnoses that an attack changes, by clinical measure, epsilon and method, against uniform noise."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from beyond.diagnosis import MEASURE_NAMES, changed_diagnoses, classes, diagnose, measures
from eval import interval, named
from experiments.markdown import fold_intervals, markdown
from experiments.results import Result, last, of_role, read_marks
from support.errors import InputError
from support.figures import bars, line_with_band, panels, save, tick_values
from support.files import read_config, write_table

TITLE = "Diagnoses"
TEXT = (
    "Each patient is attacked for each of the eight clinical measures of the ISBI 2015 challenge: the targets are the "
    "least movement of landmarks that changes the class by this measure and none of the seven others. *Intended* is "
    "the share of patients whose class by this measure then differs from that on the clean image; *only intended*, of "
    "those whose seven other classes are the same; *any*, of patients with any other class. Noise is uniform, of the "
    "same epsilon. Patients for whom no such movement is found are left out. The yardstick is how often two doctors, "
    "who marked the same radiographs, disagree."
)
SHARES = {"intended": "intended diagnosis changed", "only intended": "... and no other", "any": "any diagnosis changed"}
POOLED = "all"
MOVEMENTS = (0, 1.5, 3, 5, np.inf)
FAR_MM = 2
LEGEND = {"noise": "uniform noise"}
LEVELS = "perturbation (grey levels of 255)"
TRACING = (  # polylines of landmarks, counted from 1
    (1, 2),
    (4, 3),
    (17, 18, 5, 12),
    (11, 6, 7, 9, 8, 10, 19),
    (15, 13, 14, 16),
)
LINES = {  # of each measure
    "ANB": ((1, 2, 5), (2, 6)),
    "SNB": ((1, 2, 6),),
    "SNA": ((1, 2, 5),),
    "ODI": ((8, 10), (6, 5), (4, 3), (17, 18)),
    "APDI": ((3, 4), (2, 7), (5, 6), (17, 18)),
    "FHI": ((1, 10), (2, 8)),
    "FMA": ((1, 2), (10, 9)),
    "MW": ((11, 12),),
}


def publish(results, data, out):
    """Write tables and charts to ``out``; return the section of the report."""
    runs = [Attacked(result, *read_attacked(result)) for result in results]
    changed = collect(runs)
    table = compute(changed)
    doctors = compute_doctors(runs, changed, data)
    write_table(out / "diagnosis.csv", table)
    write_table(out / "diagnosis_doctors.csv", doctors)
    ways = collect_ways(runs)
    movements, landmarks = compute_movements(ways), compute_landmarks(ways)
    write_table(out / "diagnosis_movements.csv", movements)
    write_table(out / "diagnosis_landmarks.csv", landmarks)
    plot(table, compared(changed), doctors, out / "diagnosis.png")
    patient = find_patient(runs)
    plot_patient(*patient, out / "diagnosis_patient.png")
    return render(table, doctors, movements, patient)


class Attacked(NamedTuple):
    """A run of test.py, read once."""

    result: Result
    records: pd.DataFrame  # of the clean images and of the last iteration
    table: pd.DataFrame  # ``eval.diagnose`` of them
    changed: pd.DataFrame  # ``eval.changed_diagnoses`` at the last iteration: method, image


def read_attacked(result):
    """The records, table and changes of ``Attacked``."""
    records = result.predictions()
    ends = pd.concat([records[records["iteration"] == 0], last(records)])
    table = diagnose(ends)
    changed = changed_diagnoses(table, result.labels["measure"], result.labels.get("to"))
    return ends, table, changed[changed.index.get_level_values("iteration") > 0].droplevel("iteration")


def collect(runs):
    """{(epsilon, method, measure): DataFrame with a row for each image, a bool for each of ``SHARES``, iterations}.

    Raises:
        InputError: two runs have the same epsilon, method and measure.
    """
    found = {}
    for result, records, _, changed in runs:
        for method in changed.index.unique("method"):
            key = result.labels["epsilon"], method, result.labels["measure"]
            if key in found:
                raise InputError(f"{result.folder}: a second run of epsilon {key[0]:g}, {method}, {key[2]}; omit one")
            iterations = records.loc[records["method"] == method, "iteration"].max()
            found[key] = changed.loc[method][[*SHARES]].assign(iterations=iterations)
    return found


def compared(changed):
    """The measures that all methods have attacked at all their epsilons."""
    found = {}
    for epsilon, method, measure in changed:
        found.setdefault((epsilon, method), set()).add(measure)
    common = set.intersection(*found.values())
    return [name for name in MEASURE_NAMES if name in common]


def pooled_name(names):
    return POOLED if len(names) == len(MEASURE_NAMES) else ", ".join(names)


def compute(changed):
    """Shares in % with intervals, for each measure, pooled over all where all have been attacked, and ``compared``."""
    rows, attacks, groups, common = [], {}, {}, compared(changed)
    for (epsilon, method, measure), frame in changed.items():
        attacks.setdefault((epsilon, method), {})[measure] = frame
    for (epsilon, method), frames in attacks.items():
        groups |= {(epsilon, method, measure): {measure: frame} for measure, frame in frames.items()}
        for names in (MEASURE_NAMES, common):
            if names and frames.keys() >= {*names}:
                groups[epsilon, method, pooled_name(names)] = {name: frames[name] for name in names}
    for (epsilon, method, measure), frames in groups.items():
        images = sorted({image for frame in frames.values() for image in frame.index})
        row = {"epsilon": epsilon, "grey_levels": grey(epsilon), "method": method, "measure": measure}
        iterations = max(frame["iterations"].max() for frame in frames.values())
        row |= {"iterations": iterations, "patients": len(images), "attacks": sum(map(len, frames.values()))}
        for share in SHARES:
            values = np.stack([100.0 * frame[share].reindex(images).astype(float) for frame in frames.values()], axis=1)
            row |= named(f"{share}_%", *interval(values, np.nanmean))
        rows.append(row)
    return pd.DataFrame(rows)


def grey(epsilon):
    """Half grey levels as grey levels."""
    return epsilon / 2


def collect_ways(runs):
    """The targeted landmarks at the last iteration, see ``Result.attacked``, with epsilon, measure and ``intended``."""
    tables = []
    for result, _, _, changed in runs:
        rows = of_role(last(result.attacked()), "targeted")
        rows = rows.join(changed["intended"], on=["method", "image"])
        tables.append(rows.assign(epsilon=result.labels["epsilon"], measure=result.labels["measure"]))
    return pd.concat(tables)


def compute_movements(ways):
    """Intended changes in % against the movement that they take: the root of its sum of squares over landmarks."""
    keys = ["epsilon", "method", "measure", "image"]
    attacks = ways.groupby(keys, sort=False).agg(
        movement_mm=("start_mm", lambda way: np.sqrt((way**2).sum())), intended=("intended", "first")
    )
    rows = []
    for (epsilon, method), found in attacks.groupby(["epsilon", "method"], sort=False):
        for low, high in pairwise(MOVEMENTS):
            part = found[found["movement_mm"].between(low, high, inclusive="left")].reset_index()
            if len(part):
                values = 100.0 * part.pivot(index="image", columns="measure", values="intended").astype(float)
                row = {
                    "epsilon": epsilon,
                    "method": method,
                    "movement (mm)": f"{low:g} to {high:g}" if high < np.inf else f"over {low:g}",
                }
                row |= {"patients": len(values), "attacks": len(part)}
                rows.append(row | named("intended_%", *interval(values.to_numpy(), np.nanmean)))
    return pd.DataFrame(rows)


def compute_landmarks(ways):
    """Of each landmark with at least ``FAR_MM`` to go, the median share of the way that it has gone, in %."""
    far = ways[ways["start_mm"] >= FAR_MM]
    far = far.assign(share=100 * (1 - far["radial_error_mm"] / far["start_mm"]))
    groups = far.groupby(["epsilon", "method", "landmark", "name"])
    return groups.agg(
        attacks=("share", "size"), way_mm=("start_mm", "median"), **{"gone_%": ("share", "median")}
    ).reset_index()


def compute_doctors(runs, changed, data):
    """How often two doctors' classes differ for the attacked patients, in %: a row for each measure, and their mean.

    No row where not every patient was marked by two doctors.
    """
    records = pd.concat([run.records for run in runs])
    spacing = records.groupby("image")["mm_per_px0"].first()
    marks = read_marks(data, "test", spacing.index)
    rows = []
    for measure in MEASURE_NAMES:
        images = sorted({image for (*_, name), frame in changed.items() if name == measure for image in frame.index})
        if images and marks.keys() >= {*images}:
            points = torch.tensor(np.stack([marks[image] for image in images]))
            mm_per_px0 = torch.tensor(spacing[images].to_numpy())
            senior, junior = (
                classes(measures(one, mm_per_px0))[:, MEASURE_NAMES.index(measure)] for one in points.unbind(1)
            )
            share = 100 * (senior != junior).double().mean().item()
            rows.append({"measure": measure, "patients": len(images), "disagree_%": share})
    if rows:
        mean = {"measure": POOLED, "patients": len(spacing), "disagree_%": np.mean([row["disagree_%"] for row in rows])}
        rows.append(mean)
    return pd.DataFrame(rows, columns=["measure", "patients", "disagree_%"])


def plot(table, names, doctors, path):
    """Shares against grey levels, pooled over ``names``, if any; each measure at the epsilon nearest to 4."""
    shares = ("intended", "only intended") if names else ()
    figure, (*left, right) = panels(len(shares) + 1, width=5.5, height=4.4)
    pooled = table[table["measure"] == pooled_name(names)].sort_values("grey_levels")
    disagree = dict(zip(doctors["measure"], doctors["disagree_%"], strict=True))
    for panel, share in zip(left, shares, strict=True):
        for method, rows in pooled.groupby("method", sort=False):
            line_with_band(panel, rows, "grey_levels", f"{share}_%", LEGEND.get(method, method))
        if share == "intended" and disagree.keys() >= {*names}:
            height = np.mean([disagree[name] for name in names])
            panel.axhline(height, color="black", linestyle=":", label="two doctors disagree")
        panel.set(
            title=f"{SHARES[share]} ({pooled_name(names)})",
            xlabel=LEVELS,
            ylabel="patients (%)",
            ylim=(0, 103),
            xscale="log",
        )
        tick_values(panel, table["grey_levels"])
        panel.legend(fontsize=8)
    chosen = min(table["epsilon"].unique(), key=lambda epsilon: abs(epsilon - 4))
    rows = table[(table["epsilon"] == chosen) & (table["measure"] != POOLED)].set_index("measure")
    groups = {LEGEND.get(method, method): part for method, part in rows.groupby("method", sort=False)}
    bars(right, groups, MEASURE_NAMES, "intended_%")
    if disagree:
        heights = [disagree.get(name, np.nan) for name in MEASURE_NAMES]
        right.plot(range(len(MEASURE_NAMES)), heights, "k_", markersize=22, label="two doctors disagree")
    right.set(title=f"{SHARES['intended']}, {grey(chosen)} grey levels", ylabel="patients (%)", ylim=(0, 118))
    right.legend(fontsize=8, loc="upper right", ncols=3)
    save(figure, path)


# --- one patient -----------------------------------------------------------------------------------------------------


def find_patient(runs):
    """A patient whose intended diagnosis alone has changed, else the first: (before, after, measure, title, texts).

    Of the first measure, at the epsilon nearest to 4, by the method that changes most diagnoses.
    """
    measure = runs[0].result.labels["measure"]
    candidates = [run for run in runs if run.result.labels["measure"] == measure]
    result, records, table, changed = min(candidates, key=lambda run: abs(run.result.labels["epsilon"] - 4))
    method = changed.groupby("method", sort=False)["only intended"].mean().idxmax()
    image = changed.loc[method, "only intended"].idxmax()
    chosen = records[(records["method"] == method) & (records["image"] == image)]
    before, after = (rows.sort_values("landmark") for _, rows in chosen.groupby("iteration"))
    values = table[(table["method"] == method) & (table["image"] == image) & (table["measure"] == measure)]
    texts = [
        f"{f'{measure} {value:.3g} {unit}'.strip()}, {text}"
        for value, unit, text in values[["value", "unit", "meaning"]].values
    ]
    title = f"image {image}, {method}, at most {grey(result.labels['epsilon'])} grey levels"
    return before, after, measure, title, texts


def plot_patient(before, after, measure, title, texts, path):
    """Both tracings, the lines of the measure thicker."""
    figure, (panel,) = panels(1, width=6.5, height=7)
    styles = ("before", before, "tab:blue", "o-"), ("after", after, "tab:red", "x--")
    for (when, records, color, style), text in zip(styles, texts, strict=True):
        points = records[["x_px0", "y_px0"]].to_numpy()
        panel.plot(*points.T, style[0], color=color, markersize=4)
        for lines, width in ((TRACING, 0.8), (LINES[measure], 2.0)):
            for line in lines:
                panel.plot(*points[np.array(line) - 1].T, style[1:], color=color, linewidth=width)
        panel.plot([], [], style[1:], color=color, label=f"{when}: {text}")
    panel.invert_yaxis()
    panel.set(title=title, xlabel="x (px0)", ylabel="y (px0)", aspect="equal")
    panel.grid(alpha=0.3)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=9)
    save(figure, path)


def render(table, doctors, movements, patient):
    *_, title, texts = patient

    def order(value):
        return [POOLED, *MEASURE_NAMES, value].index(value) if isinstance(value, str) else value

    shown = table.sort_values(["measure", "epsilon"], key=lambda column: column.map(order), kind="stable")
    shown = fold_intervals(shown).rename(columns={f"{share}_%": f"{share} (%)" for share in SHARES})
    text = f"\n{markdown(shown)}\n![changed diagnoses against grey levels](diagnosis.png)\n"
    if len(doctors):
        text += f"\nTwo doctors disagree about these patients (%):\n\n{markdown(doctors, '.1f')}"
    text += (
        "\nIntended changes against the movement that they take (the root of its sum of squares over landmarks):\n\n"
    )
    text += markdown(fold_intervals(movements).rename(columns={"intended_%": "intended (%)"}))
    before, after = texts
    return text + f"\nThe tracing of {title}: {before} before, {after} after.\n\n![tracings](diagnosis_patient.png)\n"


# --- finished runs ---------------------------------------------------------------------------------------------------


def check(results):
    """Finished runs with the labels that ``publish`` needs.

    Raises:
        InputError: one is not an attack on a diagnosis.
    """
    labelled = []
    for _, folder in results:
        config = read_config(folder / "config.json")
        if not config.get("measure"):
            raise InputError(
                f"{folder}: not an attack on a diagnosis; give output folders of test.py --targets diagnosis"
            )
        labelled.append(Result({name: config[name] for name in ("measure", "epsilon", "to")}, folder))
    return labelled
