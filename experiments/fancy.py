"""The fancy attack.

All 19 landmarks targeted on the strokes of a letter; each letter of the word on another image.
"""

import numpy as np
import pandas as pd

from beyond.stored import stored_file
from eval import SUCCESS_MM
from experiments.markdown import markdown
from experiments.results import last
from readers.images import read_image
from readers.layouts import SIZE0, index  # letters are drawn for images of this size
from support.figures import grid, save, show
from support.files import write_table


def publish(results, data, out):
    """Write tables and charts to ``out``; return the section of the report."""
    records = [last(result.attacked()) for result in results]
    methods = {
        method: [(result, rows[rows["method"] == method]) for result, rows in zip(results, records, strict=True)]
        for method in records[0]["method"].unique()
    }
    table = compute(methods)
    write_table(out / "fancy.csv", table)
    plot(methods, out / "fancy.png")
    plot_images(methods, data, out / "contact_sheet.png")
    return render(table)


# ``methods`` below: {method: a list of (result, its records) of the letters}


def compute(methods):
    """A row for each method and letter; column names are those of the published tables."""
    return pd.DataFrame(
        {
            "method": method,
            **result.labels,
            "to go (mm)": found["start_mm"].mean(),
            "MRE to target (mm)": found["radial_error_mm"].mean(),
            "median (mm)": found["radial_error_mm"].median(),
            "within 4 mm (%)": 100 * (found["radial_error_mm"] <= SUCCESS_MM).mean(),
            "largest change (of 255)": found["largest_change"].max(),
        }
        for method, letters in methods.items()
        for result, found in letters
    )


def plot(methods, path):
    """Truth, targets and predictions of each letter, a row of panels for each method."""
    figure, axes = grid(len(methods), len(next(iter(methods.values()))), 2.4, 3.4, sharey=True)
    height, width = SIZE0
    for row, (method, letters) in zip(axes, methods.items(), strict=True):
        for panel, (result, found) in zip(row, letters, strict=True):
            truth, target, place = (found[[f"{of}x_px0", f"{of}y_px0"]].to_numpy().T for of in ("true_", "target_", ""))
            panel.plot(*truth, "+", color="tab:gray", label="truth", markersize=5)
            panel.plot(*np.stack([target, place]).transpose(1, 0, 2), color="tab:blue", linewidth=0.4)
            panel.plot(*target, "x", color="tab:blue", label="target", markersize=5)
            panel.plot(*place, "o", color="tab:red", label="prediction", markersize=3)
            panel.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xlabel="x (px0)")
            panel.set_title(f"{result.labels['letter']}, {method}", fontsize=9)
            panel.tick_params(labelsize=6)
        row[0].set_ylabel("y (px0)")
    axes[0, 0].legend(fontsize=6, loc="upper left")
    save(figure, path)


def plot_images(methods, data, path):
    """The clean images with what the detector finds; for each method the attacked images, above their perturbations."""
    files = {entry.id: entry.image for entry in index(data, "test")}
    first = next(iter(methods.values()))
    figure, axes = grid(1 + 2 * len(methods), len(first), 2.4, 3.2)
    for panel, (result, found) in zip(axes[0], first, strict=True):
        clean, size0 = read_image(files[result.labels["image"]], None)
        show(panel, clean, size0, f"image {result.labels['image']}, clean", fontsize=9)
        panel.scatter(found["x_px0_clean"], found["y_px0_clean"], c="red", s=14)
    for row, (method, letters) in enumerate(methods.items()):
        for (above, below), (result, found) in zip(axes[1 + 2 * row : 3 + 2 * row].T, letters, strict=True):
            draw_attacked(above, below, result, found, method, files)
    save(figure, path)


def draw_attacked(above, below, result, found, method, files):
    """An attacked image with predictions, and its perturbation."""
    id = result.labels["image"]
    attacked, size = read_image(stored_file(result.folder / "adversarial", method, "input", id), None, "RGB")
    clean, size0 = read_image(files[id], size)
    reached = (found["radial_error_mm"] <= SUCCESS_MM).sum()
    show(above, attacked, size0, f"{result.labels['letter']}, {method}: {reached} of {len(found)}", fontsize=9)
    above.scatter(found["x_px0"], found["y_px0"], c="red", s=14)
    perturbation = attacked.astype(float) - clean[..., None]
    bound = max(np.abs(perturbation).max(), 1)
    show(below, perturbation / (2 * bound) + 0.5, size0, f"perturbation, at most {bound:.0f} of 255", fontsize=8)


def render(table):
    shown = table.rename(columns={"to go (mm)": "initial distance to target (mm)"})
    return (
        f"\n{markdown(shown)}\n![targets and predictions](fancy.png)\n\n`contact_sheet.png` beside this file shows the "
        "clean and the attacked images with the detector's predictions, and the perturbations, magnified.\n"
    )
