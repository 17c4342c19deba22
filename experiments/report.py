"""What the experiments of reproduce.py have found: tables (CSV), charts (PNG) and, for each, a section of report.md.

Each function takes the folder to write to and the folders of runs of test.py, and returns its section as text. Only the
contact sheet shows images; all other files may be passed on where the radiographs may not.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from adversarial import stored_file
from dataset import LANDMARKS, MM_PER_PX0, index, read_doctors, read_image
from eval import SDR_MM, plot_attack, read_records, resample, summarize, summarize_with_confidence
from runs import write, write_table

MEASURES = {
    "mre_mm": "MRE (mm)",
    "median_mm": "median radial error (mm)",
    "within_4mm_%": "within 4 mm (%)",
}
REFERENCES = {  # published: MRE in mm, SDR in %
    "the 2020 code's results file, Test1 + Test2": {"mre_mm": 1.375},
    "the 2015 challenge's winner, Test1": {"mre_mm": 1.67, "sdr": (73.7, 80.2, 85.2, 91.5)},
}


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(table):
    """A DataFrame as a table of Markdown; numbers get two digits, nan nothing."""

    def cell(value):
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.2f}"
        return str(value).replace("|", "\\|")

    rows = [list(table), ["---"] * table.shape[1], *table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in rows) + "\n"


def with_interval(table, name, digits=1):
    """A measure of ``summarize_with_confidence`` as text: value [low, high]."""
    columns = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
    return [
        "" if np.isnan(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        for value, low, high in columns
    ]


def read(folder):
    """The predictions of a run, with the distance that was to go (start_mm, at iteration 0) and flown from there."""
    table = read_records([folder / "predictions.csv"])
    place = ["method", "image", "landmark"]
    clean = table[table["iteration"] == 0][[*place, "x_px0", "y_px0", "radial_error_mm"]]
    table = table.merge(clean, on=place, suffixes=("", "_clean"), validate="many_to_one")
    table = table.rename(columns={"radial_error_mm_clean": "start_mm"})
    way = table[["x_px0", "y_px0"]].to_numpy() - table[["x_px0_clean", "y_px0_clean"]].to_numpy()
    return table.assign(flown_mm=np.linalg.norm(way, axis=1) * MM_PER_PX0)


def last(records):
    """The rows of each method's last iteration."""
    return records[records["iteration"] == records.groupby("method")["iteration"].transform("max")]


def distance_from_truth(records):
    """In mm, whatever a landmark's role."""
    return np.hypot(records["x_px0"] - records["true_x_px0"], records["y_px0"] - records["true_y_px0"]) * MM_PER_PX0


def of_role(records, role):
    return records[records["role"] == role]


def by_image(rows, values):
    """Numbers of ``rows`` as (images, landmarks), nan where there is none."""
    return rows.assign(value=values).pivot(index="image", columns="landmark", values="value").to_numpy(float)


def interval(values, statistic, draws=1000, seed=0):
    """A statistic of values (images, ...) with its 95 % interval, bootstrapped over images: (value, low, high)."""
    found = [statistic(values[chosen]) for chosen in resample(len(values), draws, seed)]
    return statistic(values), *np.nanpercentile(found, [2.5, 97.5])


def share_with_interval(rows, success):
    """The share of rows in % for which ``success`` (a bool each) holds, with its interval: (value, low, high)."""
    return interval(by_image(rows, 100.0 * success), np.nanmean)


def measures_of(records):
    """The last iteration in one row a method: targeted and stationary landmarks, each share with its interval.

    ``clean_mre_mm`` is the detector's own, before the attack. ``half_way_%`` is the share of targeted landmarks whose
    distance from the target has become less than half of what it was: a success that means the same for near and for
    far targets.
    """
    rows = []
    clean = records[records["iteration"] == 0]
    clean_mre = distance_from_truth(clean).groupby(clean["method"]).mean()
    for method, found in last(records).groupby("method", sort=False):
        targeted, stationary = of_role(found, "targeted"), of_role(found, "stationary")
        row = {
            "method": method,
            "images": found["image"].nunique(),
            "clean_mre_mm": clean_mre[method],
            "targeted": len(targeted),
            "start_mm": targeted["start_mm"].mean(),
            "targeted_mre_mm": targeted["radial_error_mm"].mean(),
            "targeted_median_mm": targeted["radial_error_mm"].median(),
            "stationary_mre_mm": stationary["radial_error_mm"].mean(),
        }
        shares = {
            "within_4mm_%": (targeted, targeted["radial_error_mm"] <= 4),
            "half_way_%": (targeted, targeted["radial_error_mm"] < targeted["start_mm"] / 2),
            "stationary_within_4mm_%": (stationary, stationary["radial_error_mm"] <= 4),
        }
        for name, (part, success) in shares.items():
            found_share = share_with_interval(part, success) if len(part) else (np.nan,) * 3
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), found_share, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def readable(table):
    """``measures_of`` for people."""
    shown = {
        "clean_mre_mm": "MRE of the detector (mm)",
        "targeted_mre_mm": "targeted MRE (mm)",
        "targeted_median_mm": "median (mm)",
        "within_4mm_%": "within 4 mm (%)",
        "half_way_%": "over half way (%)",
        "stationary_mre_mm": "stationary MRE (mm)",
        "stationary_within_4mm_%": "within 4 mm of the truth (%)",
    }
    table = table.drop(columns=[name for name in table if name.endswith(("_low", "_high"))]).assign(
        **{name: with_interval(table, name) for name in table if f"{name}_low" in table}
    )
    return table.rename(columns=shown | {"targeted": "landmarks", "start_mm": "to go (mm)"})


# --- charts ----------------------------------------------------------------------------------------------------------


def save(path, figure):
    write(path, lambda path: figure.savefig(path, dpi=120))


def panels(count, width=5.0, height=4.0):
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def plot_lines(path, table, x, group, columns, xlabel, **axis):
    """Columns (in %, with intervals) of a table against x, a panel each, a line for each value of ``group``."""
    figure, axes = panels(len(columns))
    for panel, (column, title) in zip(axes, columns.items(), strict=True):
        for name, rows in table.groupby(group, sort=False):
            (line,) = panel.plot(rows[x], rows[column], "o-", markersize=3, label=name)
            ends = rows[f"{column}_low"], rows[f"{column}_high"]
            panel.fill_between(rows[x], *ends, color=line.get_color(), alpha=0.12, linewidth=0)
        panel.set(title=title, xlabel=xlabel, ylabel="landmarks (%)", ylim=(0, 103), **axis)
        ticks = sorted(table[x].unique())
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(path, figure)


SHARES = {
    "within_4mm_%": "targeted, within 4 mm of target",
    "half_way_%": "targeted, more than half way",
    "stationary_within_4mm_%": "stationary, within 4 mm of truth",
}


# --- 1. detection ----------------------------------------------------------------------------------------------------


def detection(out, runs, data, decoding):
    """MRE, SD and SDR of all and of each landmark, beside published figures and the doctors' own disagreement.

    Args:
        runs: {(split, decoding): folder of a test}; decoding "voting" or "subpixel".
        data: the folder of the radiographs.
        decoding: the one for the table of each landmark.
    """
    splits = list(dict.fromkeys(split for split, _ in runs))
    groups = [[split] for split in splits] + ([splits] if len(splits) > 1 else [])
    decodings = list(dict.fromkeys(decoding for _, decoding in runs))
    errors = {}
    for group in groups:
        name = " + ".join(group)
        for kind in decodings:
            tables = [read_records([runs[split, kind] / "predictions.csv"]) for split in group]
            errors[name, kind] = np.concatenate([by_image(table, table["radial_error_mm"]) for table in tables])
        disagreement = [doctors_disagreement(data, split) for split in group]
        if all(len(distances) for distances in disagreement):
            errors[name, "the doctors, one from the other"] = np.concatenate(disagreement)

    tables = {key: summarize(values) for key, values in errors.items()}
    rows = [
        {"images": split, "landmarks by": kind, "n": len(errors[split, kind])} | dict(table.loc["all"])
        for (split, kind), table in tables.items()
    ]
    for name, found in REFERENCES.items():
        sdr = {f"sdr_{t}mm_%": value for t, value in zip(SDR_MM, found.get("sdr", ()), strict=False)}
        rows.append({"images": name, "landmarks by": "published", "n": "", "mre_mm": found["mre_mm"]} | sdr)
    overall = pd.DataFrame(rows)
    write_table(out / "detection.csv", overall)
    each = pd.concat(
        table.drop("all")
        .rename_axis("landmark")
        .reset_index()
        .assign(images=split, **{"landmarks by": kind, "name": LANDMARKS})
        for (split, kind), table in tables.items()
    )
    each = each[["images", "landmarks by", "landmark", "name", *(name for name in each if name.endswith(("_mm", "%")))]]
    write_table(out / "detection_landmarks.csv", each)

    widest = " + ".join(groups[-1])
    figure, (panel,) = panels(1, width=9, height=6)
    kinds = [key for key in tables if key[0] == widest]
    for i, key in enumerate(kinds):
        places = np.arange(len(LANDMARKS)) + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
        panel.barh(places, tables[key]["mre_mm"].drop("all"), height=0.8 / len(kinds), label=key[1])
    panel.set_yticks(np.arange(len(LANDMARKS)), [f"{k + 1} {name}" for k, name in enumerate(LANDMARKS)])
    panel.invert_yaxis()
    panel.set(xlabel="MRE (mm)", title=f"detection on {widest}")
    panel.grid(alpha=0.3, axis="x")
    panel.legend()
    save(out / "detection.png", figure)

    names = {"mre_mm": "MRE (mm)", "sd_mm": "SD (mm)", "median_mm": "median (mm)"}
    names |= {f"sdr_{t}mm_%": f"SDR {t:g} mm (%)" for t in SDR_MM}
    chosen = each[(each["images"] == widest) & (each["landmarks by"] == decoding)]
    text = markdown(overall.rename(columns=names))
    if len(decodings) > 1:
        before, after = (errors[widest, kind] for kind in decodings)
        saved, low, high = interval(before - after, np.mean)
        text += (
            f"\nDecoding below a pixel takes {saved:.2f} mm [{low:.2f}, {high:.2f}] off the MRE on {widest} "
            "(95 % interval, bootstrap over images).\n"
        )
    text += f"\n![MRE of each landmark](detection.png)\n\nEach landmark on {widest}, {decoding}:\n\n"
    return text + markdown(chosen.drop(columns=["images", "landmarks by"]).rename(columns=names))


def doctors_disagreement(data, split):
    """Distances (N, K) in mm of the doctors' marks on a split from each other; (0, K) where only one has marked it."""
    marks = []
    for entry in index(data, split):
        if len(entry.annotations) < 2:
            return np.empty((0, len(LANDMARKS)))
        with Image.open(entry.image) as image:
            marks.append(read_doctors(entry, (image.height, image.width)))
    senior, junior = np.stack(marks, axis=1)
    return np.linalg.norm(senior - junior, axis=-1) * MM_PER_PX0


# --- 2. I-FGSM against ATI-FGSM --------------------------------------------------------------------------------------


def attack(out, runs):
    """Both methods by iteration, with confidence intervals, and their difference.

    Args:
        runs: {name: (folder, what it says of the targets and the noise)}.
    """
    text = ""
    for name, (folder, description) in runs.items():
        records = read(folder)
        summary = summarize_with_confidence(records)
        write_table(out / f"attack_{name}.csv", summary)
        for column, label in MEASURES.items():
            path = out / f"attack_{name}_{column.split('_%')[0]}.png"
            write(path, lambda path, column=column, label=label: plot_attack(summary, column, label, path))
        ends = summary["iteration"].isin([0, summary["iteration"].max()])
        table = summary[ends].copy()
        for column in MEASURES:
            table[column] = with_interval(table, column)
        table = table[["role", "method", "iteration", "landmarks", *MEASURES, "largest_change"]]
        text += f"\n### {description}\n\n" + markdown(table.rename(columns=MEASURES))
        text += f"\n{difference(records)}\n"
        text += f"\n![share within 4 mm](attack_{name}_within_4mm.png)\n\n![MRE](attack_{name}_mre_mm.png)\n"
        text += f"\n![median](attack_{name}_median_mm.png)\n"
    return text


def difference(records):
    """ATI-FGSM against I-FGSM: does it bring more landmarks to their targets, and keep fewer in place?"""
    found = last(records)
    text = "ATI-FGSM against I-FGSM:\n\n"
    for role in ("targeted", "stationary"):
        rows = of_role(found, role)
        shown = paired_difference(rows[rows["method"] == "ATI-FGSM"], rows[rows["method"] == "I-FGSM"])
        text += f"* {role}: {shown}\n"
    return text


ENOUGH = 10  # images; from fewer, the bootstrap's intervals are so narrow that chance looks like a finding


def paired_difference(a, b):
    """Rows ``a`` minus rows ``b``, on the images that both have: share within 4 mm, and MRE, as text."""
    common = sorted(set(a["image"]) & set(b["image"]))
    parts = [part_of(rows, common) for rows in (a, b)]
    measures = {
        "points within 4 mm": [by_image(rows, 100.0 * (rows["radial_error_mm"] <= 4)) for rows in parts],
        "mm MRE": [by_image(rows, rows["radial_error_mm"]) for rows in parts],
    }
    shown = []
    for unit, (first, second) in measures.items():
        pairs = np.stack([first, second], axis=1)
        value, low, high = interval(pairs, lambda pairs: np.nanmean(pairs[:, 0]) - np.nanmean(pairs[:, 1]))
        sure = "may be chance" if low <= 0 <= high else "more" if value > 0 else "less"
        sure = sure if len(common) >= ENOUGH else "too few to tell"
        shown.append(f"{value:+.1f} {unit} [{low:+.1f}, {high:+.1f}] ({sure})")
    return f"{', '.join(shown)}, {len(common)} images"


def part_of(rows, images):
    return rows[rows["image"].isin(images)]


# --- 3. epsilon ------------------------------------------------------------------------------------------------------


def epsilon(out, runs):
    """Success against epsilon, for random targets and for displacements.

    Args:
        runs: {(name of the targets, epsilon): folder}.
    """
    tables = [
        measures_of(read(folder)).assign(targets=targets, epsilon=value) for (targets, value), folder in runs.items()
    ]
    table = pd.concat(tables)
    table = table[["targets", "epsilon", *(name for name in table if name not in ("targets", "epsilon"))]]
    write_table(out / "epsilon.csv", table)
    text = ""
    for method, rows in table.groupby("method", sort=False):
        path = f"epsilon_{method}.png"
        plot_lines(out / path, rows, "epsilon", "targets", SHARES, "epsilon (half grey levels of 255)", xscale="log")
        text += (
            f"\n{method}:\n\n{markdown(readable(rows.drop(columns=['method'])))}\n![shares against epsilon]({path})\n"
        )
    return text


# --- 4. number of targeted landmarks ---------------------------------------------------------------------------------


def count(out, runs, random):
    """Success against |T|.

    Args:
        runs: {|T|: folder}, displacements of so many landmarks.
        random: folder of an attack with random targets, whose images are grouped by their |T|.
    """
    table = pd.concat(measures_of(read(folder)).assign(**{"|T|": count}) for count, folder in sorted(runs.items()))
    table = table[["|T|", *(name for name in table if name != "|T|")]]
    write_table(out / "count.csv", table)
    plot_lines(out / "count.png", table, "|T|", "method", SHARES, "number of targeted landmarks |T|")
    text = f"\n{markdown(readable(table))}\n![shares against |T|](count.png)\n"

    found = read(random)
    place = [found["method"], found["iteration"], found["image"]]
    counts = (found["role"] == "targeted").groupby(place).transform("sum")
    groups = pd.cut(counts, [0, 4, 8, 12, 18], labels=["1 to 4", "5 to 8", "9 to 12", "13 to 17"])
    rows = [measures_of(part).assign(**{"|T|": name}) for name, part in found.groupby(groups, sort=True, observed=True)]
    table = pd.concat(rows)[["|T|", *(name for name in rows[0] if name != "|T|")]]
    write_table(out / "count_random.csv", table)
    return (
        text
        + f"\nThe images of the attack with random targets (section 2), by their |T|:\n\n{markdown(readable(table))}"
    )


# --- 5. coupling -----------------------------------------------------------------------------------------------------

NEIGHBOURS = (1, 6)  # the nearest, and the nearest six


def neighbour_distances(points):
    """Mean distance of each point to its nearest and to its nearest six others: (..., K, 2) -> (..., K, 2)."""
    distances = np.sort(np.linalg.norm(points[..., :, None, :] - points[..., None, :, :], axis=-1), axis=-1)[..., 1:]
    return np.stack([distances[..., :n].mean(-1) for n in NEIGHBOURS], axis=-1)


def correlation(x, y):
    """Pearson's r."""
    return np.corrcoef(x, y)[0, 1]


def permutation_p(x, y, draws=10000, seed=0):
    """How often a random assignment of y to x gives an |r| at least as great, two-sided."""
    rng = np.random.default_rng(seed)
    if not x.std() or not y.std():
        return np.nan
    x, y = ((v - v.mean()) / v.std() for v in (x, y))
    found = np.abs(rng.permuted(np.tile(y, (draws, 1)), axis=1) @ x) / len(x)
    return (1 + (found >= abs(x @ y) / len(x) - 1e-12).sum()) / (1 + draws)


def shown_p(p):
    return "" if np.isnan(p) else f"{p:.4f}" if p >= 0.001 else "< 0.001"


def residual(y, *others):
    """What is left of y after the best linear prediction from the others."""
    design = np.stack([np.ones_like(y), *others], axis=-1)
    return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]


def partial_correlation(x, y, other):
    """Correlation of x and y with the other held constant."""
    return correlation(residual(x, other), residual(y, other))


def coupling(out, runs):
    """Are landmarks with close neighbours harder to move, and is it that or the length of their way?

    Args:
        runs: {name: (folder, description)}.
    """
    text = ""
    for name, (folder, description) in runs.items():
        records = last(read(folder))
        truth = records[["image", "landmark", "true_x_px0", "true_y_px0"]].drop_duplicates(["image", "landmark"])
        truth = truth.sort_values(["image", "landmark"])
        points = truth[["true_x_px0", "true_y_px0"]].to_numpy().reshape(-1, len(LANDMARKS), 2)
        near = neighbour_distances(points).reshape(-1, len(NEIGHBOURS)) * MM_PER_PX0
        truth = truth.assign(nearest_mm=near[:, 0], nearest_six_mm=near[:, 1])
        moved = of_role(records, "targeted").merge(
            truth[["image", "landmark", "nearest_mm", "nearest_six_mm"]], on=["image", "landmark"], validate="m:1"
        )
        distances = {"nearest_mm": "its nearest neighbour", "nearest_six_mm": "its nearest six"}

        # as the paper: a point each landmark
        means = moved.groupby(["method", "landmark", "name"], sort=False)[
            ["radial_error_mm", "start_mm", *distances]
        ].mean()
        means["times_targeted"] = moved.groupby(["method", "landmark", "name"], sort=False).size()
        means = means.reset_index().sort_values(["method", "landmark"])
        write_table(out / f"coupling_{name}.csv", means)
        rows = []
        methods = list(moved["method"].unique())
        for method in methods:
            points, each = means[means["method"] == method], moved[moved["method"] == method]
            for column, neighbour in distances.items():
                x, y = points[column].to_numpy(), points["radial_error_mm"].to_numpy()
                rows.append(
                    {
                        "method": method,
                        "error against distance from": neighbour,
                        "r over landmarks": correlation(x, y),
                        "n": len(x),
                        "p": shown_p(permutation_p(x, y)),
                        "r over single targets": over_images(each, column, "radial_error_mm"),
                        "the same at equal way": over_images(each, column, "radial_error_mm", "start_mm"),
                    }
                )
            rows.append(
                {
                    "method": method,
                    "error against distance from": "its target (the way to go)",
                    "r over landmarks": correlation(*points[["start_mm", "radial_error_mm"]].to_numpy().T),
                    "n": len(points),
                    "p": shown_p(permutation_p(*points[["start_mm", "radial_error_mm"]].to_numpy().T)),
                    "r over single targets": over_images(each, "start_mm", "radial_error_mm"),
                    "the same at equal way": "",
                }
            )
        write_table(out / f"coupling_{name}_correlations.csv", pd.DataFrame(rows))

        figure = Figure(figsize=(13, 5 * len(methods)), layout="constrained")
        grid = figure.subplots(len(methods), len(distances), squeeze=False)
        for line, method in zip(grid, methods, strict=True):
            points = means[means["method"] == method]
            for panel, (column, neighbour) in zip(line, distances.items(), strict=True):
                panel.scatter(points[column], points["radial_error_mm"], s=12)
                for i, landmark in enumerate(points.sort_values("radial_error_mm").itertuples()):
                    place = getattr(landmark, column), landmark.radial_error_mm
                    offset, side = ((4, -2), "left") if i % 2 else ((-4, -2), "right")  # neighbours to either side
                    panel.annotate(landmark.name, place, offset, textcoords="offset points", ha=side, fontsize=6)
                panel.set(
                    title=method,
                    xlabel=f"mean distance from {neighbour} (mm)",
                    ylabel="mean distance from target after the attack (mm)",
                )
                panel.margins(x=0.2)
                panel.set_ylim(bottom=0)
                panel.grid(alpha=0.3)
        save(out / f"coupling_{name}.png", figure)
        text += f"\n### {description}\n\n{markdown(pd.DataFrame(rows))}"
        text += f"\n![error against distance from neighbours](coupling_{name}.png)\n"
    return text + (
        "\nr over landmarks: one point for each landmark, its mean error over the images that target it, p by 10,000 "
        "permutations. r over single targets: one point for each targeted landmark of each image, with 95 % intervals "
        "by a bootstrap over images; at equal way: the partial correlation, the distance between target and clean "
        "prediction held constant. A negative r with the neighbours' distance is coupling as the paper describes it.\n"
    )


def over_images(rows, x, y, other=None):
    """Correlation of two columns, at equal ``other`` if there is one, with its interval, as text."""
    groups = [part[[x, y, other or y]].to_numpy() for _, part in rows.groupby("image")]

    def statistic(chosen):
        values = np.concatenate(list(chosen)).T
        return partial_correlation(*values) if other else correlation(*values[:2])

    box = np.empty(len(groups), dtype=object)  # images have different numbers of targets
    box[:] = groups
    value, low, high = interval(box, statistic)
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


# --- 6. the fancy attack ---------------------------------------------------------------------------------------------


def fancy(out, runs, data, method):
    """All landmarks moved onto the strokes of a letter, once for each letter.

    Args:
        runs: list of (letter, id of the image, folder), in the order of the word.
        data: the folder of the radiographs.
        method: name of the attack.
    """
    rows, found = [], []
    for letter, id, folder in runs:
        records = last(read(folder))
        found.append(records)
        rows.append(
            {
                "letter": letter,
                "image": id,
                "to go (mm)": records["start_mm"].mean(),
                "MRE to target (mm)": records["radial_error_mm"].mean(),
                "median (mm)": records["radial_error_mm"].median(),
                "within 4 mm (%)": 100 * (records["radial_error_mm"] <= 4).mean(),
                "largest change (of 255)": records["largest_change"].max(),
            }
        )
    table = pd.DataFrame(rows)
    write_table(out / "fancy.csv", table)
    write_table(out / "fancy_predictions.csv", pd.concat(found))
    figure, axes = panels(len(runs), width=2.4, height=3.4)
    for panel, (letter, _, _), records in zip(axes, runs, found, strict=True):
        target, place, clean = (
            records[[f"{kind}x_px0", f"{kind}y_px0"]].to_numpy().T for kind in ("target_", "", "true_")
        )
        panel.plot(*clean, "+", color="tab:gray", label="truth", markersize=5)
        panel.plot(*np.stack([target, place]).transpose(1, 0, 2), color="tab:blue", linewidth=0.4)
        panel.plot(*target, "x", color="tab:blue", label="target", markersize=5)
        panel.plot(*place, "o", color="tab:red", label="prediction", markersize=3)
        panel.set(title=letter, xlim=(0, 1935), ylim=(2400, 0), aspect="equal", xlabel="x (px0)")
        panel.tick_params(labelsize=6)
    axes[0].set_ylabel("y (px0)")
    axes[0].legend(fontsize=6, loc="upper left")
    save(out / "fancy.png", figure)
    contact_sheet(out / "contact_sheet.png", runs, found, data, method)
    return (
        f"\n{markdown(table)}\n![targets and predictions](fancy.png)\n\n`contact_sheet.png` beside this file shows the "
        "attacked images with the detector's predictions, and the perturbations below them, magnified.\n"
    )


def contact_sheet(path, runs, found, data, method):
    """Attacked images, with predictions, over perturbations."""
    files = {entry.id: entry.image for entry in index(data, "test")}
    figure = Figure(figsize=(2.4 * len(runs), 6.4), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False)
    for (above, below), (letter, id, folder), records in zip(axes.T, runs, found, strict=True):
        attacked, size = read_image(stored_file(folder / "adversarial", method, "input", id), None, "RGB")
        clean, (height0, width0) = read_image(files[id], size)
        # the frame of the original: what is recorded needs no conversion
        frame = {"extent": (-0.5, width0 - 0.5, height0 - 0.5, -0.5)}
        above.imshow(attacked, **frame)
        above.scatter(records["x_px0"], records["y_px0"], c="red", s=8)
        above.set_title(f"{letter}: image {id}", fontsize=9)
        noise = attacked.astype(float) - clean[..., None]
        bound = max(np.abs(noise).max(), 1)
        below.imshow(noise / (2 * bound) + 0.5, **frame)
        below.set_title(f"perturbation, up to {bound:.0f} of 255", fontsize=8)
        for panel in (above, below):
            panel.set_axis_off()
    save(path, figure)


# --- 7. baselines of one step ----------------------------------------------------------------------------------------


def baselines(out, runs):
    """How far landmarks fly under one step, untargeted and targeted.

    Args:
        runs: {epsilon: folder}.
    """
    rows = []
    for value, folder in sorted(runs.items()):
        for (method, role), found in last(read(folder)).groupby(["method", "role"], sort=False):
            flown = interval(by_image(found, found["flown_mm"]), np.nanmean)
            off = distance_from_truth(found)
            near = 100 * (found["radial_error_mm"] <= 4).mean() if role == "targeted" else np.nan
            rows.append(
                {"epsilon": value, "method": method, "role": role}
                | {"images": found["image"].nunique(), "landmarks": len(found)}
                | dict(zip(("flown_mm", "flown_mm_low", "flown_mm_high"), flown, strict=True))
                | {"median_flown_mm": found["flown_mm"].median(), "mre_to_truth_mm": off.mean()}
                | {"further_than_4mm_from_truth_%": 100 * (off > 4).mean(), "targets_within_4mm_%": near}
            )
    table = pd.DataFrame(rows)
    write_table(out / "baselines.csv", table)
    figure, (panel,) = panels(1, width=7, height=4.2)
    for (method, role), lines in table.groupby(["method", "role"], sort=False):
        name = method if role == "untargeted" else f"{method}, {role}"
        (line,) = panel.plot(lines["epsilon"], lines["flown_mm"], "o-", markersize=3, label=name)
        ends = lines["flown_mm_low"], lines["flown_mm_high"]
        panel.fill_between(lines["epsilon"], *ends, color=line.get_color(), alpha=0.15, linewidth=0)
    panel.set(xscale="log", xlabel="epsilon (half grey levels of 255)", ylim=(0, None))
    panel.set(ylabel="mean distance from the clean prediction (mm)", title="one step")
    panel.set_xticks(table["epsilon"].unique(), [f"{value:g}" for value in table["epsilon"].unique()])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend()
    save(out / "baselines.png", figure)
    shown = table.assign(flown_mm=with_interval(table, "flown_mm", 2)).drop(columns=["flown_mm_low", "flown_mm_high"])
    shown = shown.rename(
        columns={
            "flown_mm": "mean flight (mm)",
            "median_flown_mm": "median flight (mm)",
            "mre_to_truth_mm": "MRE to truth (mm)",
            "further_than_4mm_from_truth_%": "over 4 mm from truth (%)",
            "targets_within_4mm_%": "targets within 4 mm (%)",
        }
    )
    return f"\n{markdown(shown)}\n![how far landmarks fly](baselines.png)\n"


# --- 8. why the attack is weak ---------------------------------------------------------------------------------------


def causes(out, runs):
    """The same attack on detectors, or by noise, that differ in one thing.

    Answers to a question are compared on the images, and at the last iteration, that all of them have.

    Args:
        runs: list of (question, the answer tried, folder of the attack).
    """
    records, tables = {}, []
    for question in dict.fromkeys(question for question, *_ in runs):
        found = {answer: read(folder) for asked, answer, folder in runs if asked == question}
        images = set.intersection(*(set(rows["image"]) for rows in found.values()))
        end = max(set.intersection(*(set(rows["iteration"]) for rows in found.values())))
        for answer, rows in found.items():
            rows = rows[rows["image"].isin(images) & (rows["iteration"] <= end)]
            records[question, answer] = last(rows)
            tables.append(measures_of(rows).assign(question=question, answer=answer, iteration=end))
    table = pd.concat(tables)
    first = ["question", "answer", "iteration", "method", "images", "clean_mre_mm"]
    table = table[first + [name for name in table if name not in first]]
    write_table(out / "causes.csv", table)
    questions = list(table["question"].unique())
    figure, axes = panels(len(questions), width=3.6, height=4.2)
    methods = list(table["method"].unique())
    for panel, question in zip(axes, questions, strict=True):
        rows = table[table["question"] == question]
        answers = list(rows["answer"].unique())
        for i, method in enumerate(methods):
            part = rows[rows["method"] == method].set_index("answer").reindex(answers)
            places = np.arange(len(answers)) + (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
            share = part["within_4mm_%"]
            ends = np.stack([share - part["within_4mm_%_low"], part["within_4mm_%_high"] - share]).clip(0)
            panel.bar(
                places, share, 0.8 / len(methods), yerr=ends, capsize=2, error_kw={"linewidth": 0.8}, label=method
            )
        panel.set_xticks(np.arange(len(answers)), answers, fontsize=8)
        panel.set(title=question, ylim=(0, 100))
        panel.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("targeted, within 4 mm of target (%)")
    axes[0].legend(fontsize=8)
    save(out / "causes.png", figure)
    lines = []
    for question in questions:
        first, *_, second = (answer for asked, answer in records if asked == question)
        for method in methods:
            rows = [of_role(records[question, answer], "targeted") for answer in (second, first)]
            difference = paired_difference(*(part[part["method"] == method] for part in rows))
            lines.append(f"* {question}, {second} against {first}: {method} {difference}\n")
    text = f"\n{markdown(readable(table))}\n![share within 4 mm, one cause at a time](causes.png)\n"
    return f"{text}\nTargeted landmarks, on the same images:\n\n{''.join(lines)}"
