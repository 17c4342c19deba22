"""Coupling.

Are landmarks with close neighbours harder to move, or does the error follow the initial distance to the target? *r
over landmarks*: one point for each landmark, its mean error over the images in which it is targeted; p by 10,000
permutations. *r over single targets*: one point for each targeted landmark of each image; at equal distance to
target: partial correlation, the initial distance to the target held constant. A negative r with the distance from
neighbours is coupling as the paper describes it.
"""

import numpy as np
import pandas as pd

from experiments.markdown import markdown, with_interval
from experiments.results import last, of_role
from experiments.statistics import correlation, correlation_interval, permutation_p
from readers.points import LANDMARKS
from support.figures import grid, save
from support.files import write_table

NEIGHBOURS = {"nearest_mm": (1, "its nearest neighbour"), "nearest_six_mm": (6, "its nearest six")}
EQUAL = "the same at equal way"  # column of the published tables


def publish(results, data, out):
    """Write tables and charts to ``out``; return the section of the report."""
    text = ""
    for result in results:
        name = f"coupling_{result.folder.name}"
        targets = targeted(result.attacked())
        landmarks = compute_landmarks(targets)
        table = pd.DataFrame(compute(targets, landmarks))
        write_table(out / f"{name}.csv", landmarks)
        write_table(out / f"{name}_correlations.csv", table)
        plot(landmarks, out / f"{name}.png")
        shown = markdown(table.rename(columns={EQUAL: "the same at equal distance to target"}))
        text += (
            f"\n### {result.labels['description']}\n\n{shown}\n![error against distance from neighbours]({name}.png)\n"
        )
    return text


def neighbour_distances(points):
    """Mean distance of each point to its nearest and to its nearest six others: (..., K, 2) -> (..., K, 2)."""
    distances = np.linalg.norm(points[..., :, None, :] - points[..., None, :, :], axis=-1)
    others = np.sort(distances, axis=-1)[..., 1:]
    return np.stack([others[..., :count].mean(-1) for count, _ in NEIGHBOURS.values()], axis=-1)


def targeted(records):
    """The targeted landmarks at the last iteration, with the distances of their true places from neighbours."""
    records = last(records).reset_index(drop=True).sort_values(["method", "image", "landmark"])
    points = records[["true_x_px0", "true_y_px0"]].to_numpy().reshape(-1, len(LANDMARKS), 2)
    distances = neighbour_distances(points).reshape(-1, len(NEIGHBOURS))
    records[[*NEIGHBOURS]] = distances * records[["mm_per_px0"]].to_numpy()
    return of_role(records.sort_index(), "targeted")


def compute_landmarks(targets):
    """As in the paper, means over images: a row for each method and landmark."""
    groups = targets.groupby(["method", "landmark", "name"], sort=False)
    means = groups[["radial_error_mm", "start_mm", *NEIGHBOURS]].mean()
    return means.assign(times_targeted=groups.size()).reset_index().sort_values(["method", "landmark"])


def compute(targets, landmarks):
    """Rows of correlations of the error with the distances from neighbours and with the initial distance to target."""
    distances = {column: words for column, (_, words) in NEIGHBOURS.items()} | {"start_mm": "its target"}
    for method in targets["method"].unique():
        points, each = (table[table["method"] == method] for table in (landmarks, targets))
        for column, words in distances.items():
            x, y = points[column].to_numpy(), points["radial_error_mm"].to_numpy()
            p = permutation_p(x, y)
            row = {"method": method, "error against distance from": words}
            row |= {"r over landmarks": correlation(x, y), "n": len(x)}
            row |= {"p": "" if np.isnan(p) else f"{p:.4f}" if p >= 0.001 else "< 0.001"}
            r = correlation_interval(each, column, "radial_error_mm")
            row |= {"r over single targets": with_interval(*r, "+.2f"), EQUAL: ""}
            if column != "start_mm":
                partial = correlation_interval(each, column, "radial_error_mm", "start_mm")
                row[EQUAL] = with_interval(*partial, "+.2f")
            yield row


def plot(landmarks, path):
    """Mean error of each landmark against its distance from neighbours."""
    methods = landmarks["method"].unique()
    figure, axes = grid(len(methods), len(NEIGHBOURS), width=6.5, height=5)
    for line, method in zip(axes, methods, strict=True):
        points = landmarks[landmarks["method"] == method].sort_values("radial_error_mm")
        for panel, (column, (_, words)) in zip(line, NEIGHBOURS.items(), strict=True):
            panel.scatter(points[column], points["radial_error_mm"], s=4)
            for number, x, y in points[["landmark", column, "radial_error_mm"]].to_numpy():
                panel.annotate(f"{number:g}", (x, y), (2, 2), textcoords="offset points", fontsize=8)
            panel.margins(x=0.2)
            panel.set(title=method, xlabel=f"mean distance from {words} (mm)", ylim=(0, None))
            panel.set(ylabel="mean distance from target after the attack (mm)")
            panel.grid(alpha=0.3)
    names = [f"{number} {name}" for number, name in enumerate(LANDMARKS, 1)]
    figure.supxlabel("\n".join(", ".join(names[i : i + 10]) for i in (0, 10)), fontsize=7)
    save(figure, path)
