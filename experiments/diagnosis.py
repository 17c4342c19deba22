"""Diagnoses.

Each patient is attacked for each of the eight clinical measures of the ISBI 2015 challenge: the targets are the least
movement of landmarks that changes the class by this measure and none of the seven others. *Intended* is the share of
patients whose class by this measure then differs from that on the clean image (or is that of ``--to``); *only
intended*, of those whose seven other classes are the same; *any*, of patients with any other class. Noise is uniform,
of the same epsilon. Patients for whom no such movement is found are left out. The yardstick is how often two doctors,
who marked the same radiographs, disagree. *Driven*: landmarks are moved where a measure rises or falls most, by a
distance that is the root of the sum of squares over landmarks; the change is a median, *apart* the mean difference of
the two doctors for the same patients, *beyond* the share of patients whose change is larger; classes are wrong against
the mean of both. *Delivered*: intended changes that are left in the attacked images, stored as files and read again.
"""

import numpy as np
import pandas as pd
import torch

from attack import ATTACKS
from beyond.diagnosis import DIRECTIONS, MEASURE_NAMES, changed_diagnoses, classes, diagnose, measures, turned_right
from eval import interval, named, read_records
from experiments.markdown import fold_intervals, markdown
from experiments.results import Result, clean_and_last, last, of_role, rate, read_marks
from readers.images import read_image
from readers.layouts import index
from readers.points import LANDMARKS
from support.errors import InputError
from support.figures import bars, by_method, line_with_band, panels, save, tick_values
from support.files import read_config, write_table

SHARES = {"intended": "intended diagnosis changed", "only intended": "... and no other", "any": "any diagnosis changed"}
POOLED = "all"  # measures that any of the runs attacks
MOVEMENTS = {"0 to 1.5": 0, "1.5 to 3": 1.5, "3 to 5": 3, "over 5": 5}  # in mm: name -> from
FAR_MM = 2
# polylines of landmarks, counted from 1
TRACING = (1, 2), (4, 3), (17, 18, 5, 12), (11, 6, 7, 9, 8, 10, 19), (15, 13, 14, 16)
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
    driven = [result for result in results if result.labels.get("to") in DIRECTIONS]
    intended = [result for result in results if result.labels.get("to") not in DIRECTIONS]
    text, runs = "", collect([result for result in intended if not result.labels.get("delivered")])
    if runs:
        records, changed = (pd.concat(tables) for tables in zip(*runs, strict=True))
        table, doctors = pd.DataFrame(compute(changed)), compute_doctors(records, changed, data)
        movements, patient = pd.DataFrame(compute_movements(changed)), find_patient(runs)
        write_table(out / "diagnosis.csv", table)
        write_table(out / "diagnosis_doctors.csv", doctors)
        write_table(out / "diagnosis_movements.csv", movements)
        write_table(out / "diagnosis_landmarks.csv", compute_landmarks(records))
        plot(table, doctors, out / "diagnosis.png")
        plot_patient(*patient, data, out / "diagnosis_patient.png")
        text += render(table, doctors, movements, patient)
    delivered = (row for run in intended for row in compute_delivered(run))
    for name, rows in {"driven": compute_driven(driven, data), "delivered": delivered}.items():
        if len(table := pd.DataFrame(rows)):
            write_table(out / f"diagnosis_{name}.csv", table)
            shown = fold_intervals(table, ".3g").rename(columns=lambda column: column.replace("_", " "))
            text += f"\n{name.capitalize()}:\n\n{markdown(shown, '.3g')}"
    return text


def collect(results):
    """The records of each run, with its epsilon, and whose diagnoses have changed, with its epsilon and measure too.

    Returns:
        list of (records, see ``results.clean_and_last``; ``beyond.diagnosis.changed_diagnoses`` at the last iteration,
        with movement_mm, the root of the sum of squares of the way over landmarks).

    Raises:
        InputError: two runs have the same epsilon, method and measure.
    """
    runs, seen = [], set()
    for result in results:
        epsilon, measure, records = result.labels["epsilon"], result.labels["measure"], result.attacked()
        records = clean_and_last(records).assign(epsilon=epsilon)
        changed = changed_diagnoses(diagnose(records), measure, result.labels.get("to"))
        changed = changed.query("iteration > 0").reset_index().assign(epsilon=epsilon, measure=measure)
        movement = of_role(last(records), "targeted").groupby(["method", "image"])["start_mm"].agg(np.linalg.norm)
        runs.append((records, changed.join(movement.rename("movement_mm"), on=["method", "image"])))
        for method in changed["method"].unique():
            if (epsilon, method, measure) in seen:
                raise InputError(f"{result.folder}: a second run of epsilon {epsilon:g}, {method}, {measure}; omit one")
            seen.add((epsilon, method, measure))
    return runs


def compute(changed):
    """Shares in % with intervals, a row for each measure, and for ``POOLED`` where all of them were attacked."""
    every = changed["measure"].unique()
    for (epsilon, method), attacks in changed.groupby(["epsilon", "method"], sort=False):
        pools = {measure: [measure] for measure in attacks["measure"].unique()}
        for measure, names in (pools | ({POOLED: every} if len(pools) == len(every) else {})).items():
            found = attacks[attacks["measure"].isin(names)]
            row = {"epsilon": epsilon, "grey_levels": epsilon / 2, "method": method, "measure": measure}
            row |= {"iterations": found["iteration"].max(), "patients": found["image"].nunique(), "attacks": len(found)}
            for share in SHARES:
                row |= named(f"{share}_%", *rate(found, found[share], "measure"))
            yield row


def compute_movements(changed):
    """Rows of intended changes in % against the movement that they take."""
    for (epsilon, method), attacks in changed.groupby(["epsilon", "method"], sort=False):
        movements = pd.cut(attacks["movement_mm"], [*MOVEMENTS.values(), np.inf], right=False, labels=list(MOVEMENTS))
        for movement, found in attacks.groupby(movements, observed=True):
            row = {"epsilon": epsilon, "method": method, "movement (mm)": movement}
            row |= {"patients": found["image"].nunique(), "attacks": len(found)}
            yield row | named("intended_%", *rate(found, found["intended"], "measure"))


def compute_landmarks(records):
    """Of each landmark with at least ``FAR_MM`` to go, the median share of the way that it has gone, in %."""
    far = records.query("role == 'targeted' and iteration > 0 and start_mm >= @FAR_MM")
    far = far.assign(share=100 * (1 - far["radial_error_mm"] / far["start_mm"]))
    groups = far.groupby(["epsilon", "method", "landmark", "name"])
    columns = {"attacks": ("share", "size"), "way_mm": ("start_mm", "median"), "gone_%": ("share", "median")}
    return groups.agg(**columns).reset_index()


def compute_driven(results, data):
    """Rows of how far measures were driven, in their units, and what that means for their classes, one a method."""
    runs = [(result.labels, clean_and_last(result.attacked())) for result in results]
    apart, _ = doctors_apart(pd.concat([records for _, records in runs]), data) if runs else (None, None)
    for labels, records in runs:
        table = diagnose(records).query("measure == @labels['measure']")
        for method, rows in table.groupby("method", sort=False):
            before, after = (found.reset_index(drop=True) for _, found in rows.groupby("iteration"))  # same images
            change, usual = after["value"] - before["value"], apart[labels["measure"]].reindex(after["image"])
            row = {**labels, "method": method, "patients": len(change), "unit": rows["unit"].iloc[0]}
            row |= named("change", *interval(change.to_numpy(), np.nanmedian))
            row |= named("class_changed_%", *rate(after, after["class"] != before["class"], "measure"))
            if usual.notna().all():
                beyond = rate(after, change.abs() > usual.mean(), "measure")
                row |= {"doctors_apart": usual.mean()} | named("beyond_doctors_%", *beyond)
            if "true_class" in table:
                for when, found in (("before", before), ("after", after)):
                    row[f"class_wrong_{when}_%"] = 100 * (found["class"] != found["true_class"]).mean()
            yield row


def compute_delivered(result):
    """Rows of intended changes that are left in the stored images, one for each method and way of storing."""
    file = result.folder / "read_back.csv"
    if not file.exists():
        return
    labels = {name: result.labels[name] for name in ("measure", "epsilon")}
    clean, stored = result.predictions().query("iteration == 0"), read_records([file])
    stored = stored[stored["detector"] == stored["detector"].iloc[0]]  # the attacked one, whose clean classes count
    for (method, form), rows in stored.groupby(["method", "stored"], sort=False):
        records = pd.concat([clean[clean["method"] == method], rows])
        changed = changed_diagnoses(diagnose(records), labels["measure"], result.labels.get("to"))
        found = changed.query("iteration > 0").reset_index().assign(**labels)
        row = {**labels, "method": method, "stored": form, "patients": len(found)}
        yield row | named("intended_%", *rate(found, found["intended"], "measure"))


def doctors_apart(records, data):
    """How two doctors' measures of the attacked patients differ: tables of the absolute difference and of whether the
    classes do, with a row for each patient whom two doctors marked, and a column for each measure.

    Raises:
        InputError: the marks in ``data`` are others than those of the records.
    """
    known = records.dropna(subset="true_x_px0").drop_duplicates(["image", "landmark"])  # not of --image
    spacing = known.groupby("image")["mm_per_px0"].first()
    marks = read_marks(data, "test", spacing.index)
    for id, rows in known.groupby("image"):
        if id in marks and not np.allclose(marks[id].mean(0), rows[["true_x_px0", "true_y_px0"]], atol=0.01):
            raise InputError(f"{data}: image {id} has other landmarks than in the results; give --data of their runs")
    points = torch.tensor(np.reshape([*marks.values()], (-1, 2, len(LANDMARKS), 2)))
    mm_per_px0, points = torch.tensor(spacing[[*marks]].to_numpy()), turned_right(points, points.mean(1))
    senior, junior = (measures(marked, mm_per_px0) for marked in points.unbind(1))
    differ = abs(senior - junior), classes(senior) != classes(junior)
    return [pd.DataFrame(values.numpy(), [*marks], MEASURE_NAMES) for values in differ]


def compute_doctors(records, changed, data):
    """How often two doctors' classes differ for the attacked patients, in %: a row for each measure, and their mean.

    No row where not every patient was marked by two doctors.
    """
    rows, (_, differ) = [], doctors_apart(records, data)
    for measure in MEASURE_NAMES:
        images = changed.loc[changed["measure"] == measure, "image"].unique()
        if len(images) and {*differ.index} >= {*images}:
            disagree = 100 * differ.loc[images, measure].mean()
            rows.append({"measure": measure, "patients": len(images), "disagree_%": disagree})
    table = pd.DataFrame(rows, columns=["measure", "patients", "disagree_%"])
    if rows:
        disagree = np.average(table["disagree_%"], weights=table["patients"])  # as attacks are pooled
        table.loc[len(rows)] = [POOLED, records["image"].nunique(), disagree]
    return table


def plot(table, doctors, path):
    """Shares against grey levels, if there are several; each measure at the epsilon nearest to 4."""
    shares = ("intended", "only intended") if table["epsilon"].nunique() > 1 else ()
    figure, (*left, right) = panels(len(shares) + 1, width=5.5, height=4.4)
    measure = table[::-1].groupby("measure", sort=False)["epsilon"].nunique().idxmax()  # all, or that of most epsilons
    pooled = table[table["measure"] == measure].sort_values("grey_levels")
    disagree = doctors.set_index("measure")["disagree_%"]
    for panel, share in zip(left, shares, strict=True):
        for method, rows in by_method(pooled).items():
            line_with_band(panel, rows, "grey_levels", f"{share}_%", method)
        if share == "intended" and measure in disagree:
            panel.axhline(disagree[measure], color="black", linestyle=":", label="two doctors disagree")
        panel.set(title=f"{SHARES[share]} ({measure})", xlabel="perturbation (grey levels of 255)")
        panel.set(ylabel="patients (%)", ylim=(0, 103), xscale="log")
        tick_values(panel, table["grey_levels"])
        panel.legend(fontsize=8)
    chosen = min(table["epsilon"], key=lambda epsilon: abs(epsilon - 4))
    rows = table[(table["epsilon"] == chosen) & (table["measure"] != POOLED)].set_index("measure")
    run = [name for name in MEASURE_NAMES if name in rows.index]
    bars(right, by_method(rows), run, "intended_%")
    if len(disagree):
        right.plot(range(len(run)), disagree.reindex(run), "k_", markersize=22, label="two doctors disagree")
    right.set(title=f"{SHARES['intended']}, {chosen / 2} grey levels", ylabel="patients (%)", ylim=(0, 118))
    right.legend(fontsize=8, loc="upper right", ncols=3)
    save(figure, path)


# --- one patient -----------------------------------------------------------------------------------------------------


def find_patient(runs):
    """Of the patients whose intended diagnosis alone has changed, the one whose measure has changed most.

    Of the first measure, at the epsilon nearest to 4, by the method that changes most diagnoses. Without such a patient
    the first.

    Returns:
        (records before, records after, measure, title, texts).
    """
    measure = runs[0][1]["measure"].iloc[0]
    candidates = [run for run in runs if run[1]["measure"].iloc[0] == measure]
    records, changed = min(candidates, key=lambda run: abs(run[1]["epsilon"].iloc[0] - 4))
    alone = changed.set_index(["method", "image"])["only intended"]
    method = alone.groupby("method", sort=False).mean().idxmax()
    chosen = records[records["method"] == method].sort_values("landmark")
    values = diagnose(chosen).query("measure == @measure").set_index("image")
    image = (alone[method] * values.groupby("image")["value"].agg(np.ptp)).fillna(0).idxmax()
    texts = [f"{measure} {f'{r.value:.3g} {r.unit}'.strip()}, {r.meaning}" for r in values.loc[image].itertuples()]
    title = f"image {image}, {method}, at most {records['epsilon'].iloc[0] / 2} grey levels"
    return *(rows for _, rows in chosen[chosen["image"] == image].groupby("iteration")), measure, title, texts


def plot_patient(before, after, measure, title, texts, data, path):
    """Both tracings over the radiograph of ``data``, the lines of the measure thicker."""
    figure, (panel,) = panels(1, width=6.5, height=7)
    panel.invert_yaxis()
    for entry in index(data, "test") if before["true_x_px0"].notna().all() else ():  # not of --image
        if entry.id == before["image"].iloc[0]:
            panel.imshow(read_image(entry.image, None)[0], cmap="gray", vmin=0, vmax=255, alpha=0.5)
    styles = ("before", before, "tab:blue", "o-"), ("after", after, "tab:red", "x--")
    for (when, records, color, style), text in zip(styles, texts, strict=True):
        points = records[["x_px0", "y_px0"]].to_numpy()
        panel.plot(*points.T, style[0], color=color, markersize=4)
        for lines, width in ((TRACING, 0.8), (LINES[measure], 2.0)):
            for line in lines:
                panel.plot(*points[np.array(line) - 1].T, style[1:], color=color, linewidth=width)
        panel.plot([], [], style[1:], color=color, label=f"{when}: {text}")
    panel.set(title=title, xlabel="x (px0)", ylabel="y (px0)", aspect="equal")
    panel.grid(alpha=0.3)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=9)
    save(figure, path)


def render(table, doctors, movements, patient):
    *_, title, (before, after) = patient
    shown = table.sort_values(["measure", "epsilon"], kind="stable")
    text = f"\n{markdown(with_headings(shown))}\n![changed diagnoses against grey levels](diagnosis.png)\n"
    if len(doctors):
        text += f"\nTwo doctors disagree about these patients (%):\n\n{markdown(doctors, '.1f')}"
    return (
        f"{text}\nIntended changes against the movement that they take (the root of its sum of squares over landmarks):"
        f"\n\n{markdown(with_headings(movements))}\nThe tracing of {title}: {before} before, {after} after.\n\n"
        "![tracings](diagnosis_patient.png)\n"
    )


def with_headings(table):
    return fold_intervals(table).rename(columns={f"{share}_%": f"{share} (%)" for share in SHARES})


# --- finished runs ---------------------------------------------------------------------------------------------------


def check(results):
    """Finished runs with the labels that ``publish`` needs.

    Raises:
        InputError: one is not an attack on a diagnosis, or two of a method differ in detector, steps or decoding.
    """
    labelled, seen = [], {}
    for _, folder in results:
        config = read_config(folder / "config.json")
        if not config.get("measure"):
            raise InputError(f"{folder}: not an attack on a diagnosis; give folders of test.py --targets diagnosis")
        for method in config["attack"]:
            made = [config.get(name) or False for name in ("checkpoint_sha256", "batch_statistics", "subpixel")]
            made.append(ATTACKS[method].steps or config["steps"])
            if seen.setdefault((method, config["to"] in DIRECTIONS), made) != made:
                raise InputError(f"{folder}: {method} has another detector, --steps or --subpixel than in the others")
        labelled.append(Result({name: config[name] for name in ("measure", "epsilon", "to", "shift_mm")}, folder))
    return labelled
