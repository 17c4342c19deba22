"""Experiment 1: radial errors without an attack, with published results and the inter-observer distance."""

import numpy as np
import pandas as pd

from eval import SDR_MM, interval, metrics
from experiments.markdown import markdown, with_interval
from experiments.results import read_marks
from experiments.statistics import by_image
from readers.points import LANDMARKS
from support.figures import grouped_places, panels, save
from support.files import write_table

TITLE = "Detection"
TEXT = (
    "Radial errors without an attack, on images that were not used in training. *voting* is the paper's decoding, to a "
    "whole pixel; *subpixel* is the mean of the votes around it. MRE and SD are means over the 19 landmarks. The truth "
    "is the mean of the doctors' marks. A stationary landmark whose clean heatmap nowhere exceeds 0.5 has no offsets "
    "in the paper's goal maps."
)
INTER_OBSERVER = "inter-observer (senior vs. junior)"
PUBLISHED = {  # MRE in mm, SDR in %
    "the 2020 code's results file, Test1 + Test2": {"mre_mm": 1.375},
    "the 2015 challenge's winner, Test1 (truth: senior)": {"mre_mm": 1.67, "sdr": (73.7, 80.2, 85.2, 91.5)},
}
HEADINGS = {"mre_mm": "MRE (mm)", "sd_mm": "SD (mm)", "median_mm": "median (mm)"}
HEADINGS |= {f"sdr_{t}mm_%": f"SDR {t:g} mm (%)" for t in SDR_MM} | {"peak_%": "heatmaps above 0.5 (%)"}


def publish(results, data, out):
    """Write tables and the chart to ``out``; return the section of the report."""
    errors, peaks = collect(results, data)
    overall, landmarks, gains = compute(errors, peaks), compute_landmarks(errors), compute_gain(errors)
    write_table(out / "detection.csv", overall)
    write_table(out / "detection_landmarks.csv", landmarks)
    plot(landmarks, out / "detection.png")
    return render(overall, landmarks, gains)


def collect(results, data):
    """Of each split, then of all of them together, two dicts with the keys (images, decoding).

    Returns:
        radial errors (N, K) in mm, also those of the doctors; percentage of heatmaps that somewhere exceed 0.5.
    """
    tables = {(result.labels["images"], result.labels["landmarks by"]): result.predictions() for result in results}
    splits, decodings = (list(dict.fromkeys(names)) for names in zip(*tables, strict=True))
    doctors = {split: inter_observer(data, split, tables[split, decodings[0]]) for split in splits}
    errors, peaks = {}, {}
    for group in [[split] for split in splits] + ([splits] if len(splits) > 1 else []):
        name = " + ".join(group)
        for decoding in decodings:
            found = [tables[split, decoding] for split in group]
            errors[name, decoding] = np.concatenate([by_image(table, table["radial_error_mm"]) for table in found])
            peak = pd.concat(found).get("heatmap_peak", pd.Series([np.nan]))
            if peak.notna().all():  # not of an older version
                peaks[name, decoding] = 100 * (peak > 0.5).mean()
        if all(len(doctors[split]) for split in group):
            errors[name, INTER_OBSERVER] = np.concatenate([doctors[split] for split in group])
    return errors, peaks


def inter_observer(data, split, predictions):
    """Distances (N, K) in mm between the doctors' marks of a split; (0, K) if only one doctor has marked it.

    ``predictions`` on the split have the spacing of its images.
    """
    mm_per_px0 = predictions.groupby("image")["mm_per_px0"].first()
    marks = read_marks(data, split, mm_per_px0.index)
    if len(marks) < len(mm_per_px0):
        return np.empty((0, len(LANDMARKS)))
    return np.stack(
        [np.linalg.norm(np.diff(marks[id], axis=0)[0], axis=-1) * mm_per_px0[id] for id in mm_per_px0.index]
    )


def compute(errors, peaks):
    """The official metrics over all landmarks, a row for each set of errors, then published ones."""
    rows = [
        {"images": images, "landmarks by": source, "n": len(values), **metrics(values).loc["all"]}
        | ({"peak_%": peaks[images, source]} if (images, source) in peaks else {})
        for (images, source), values in errors.items()
    ]
    for name, found in PUBLISHED.items():
        sdr = {f"sdr_{t}mm_%": value for t, value in zip(SDR_MM, found.get("sdr", ()), strict=False)}
        rows.append({"images": name, "landmarks by": "published", "n": "", "mre_mm": found["mre_mm"], **sdr})
    return pd.DataFrame(rows)


def compute_landmarks(errors):
    """The official metrics of each landmark."""
    tables = []
    for (images, source), values in errors.items():
        table = metrics(values).drop("all").rename_axis("landmark").reset_index()
        table.insert(0, "images", images)
        table.insert(1, "landmarks by", source)
        table.insert(3, "name", LANDMARKS)
        tables.append(table)
    return pd.concat(tables)


def compute_gain(errors):
    """{images: (value, low, high)}: MRE in mm that subpixel decoding saves, with its interval."""
    return {
        images: interval(values - errors[images, "subpixel"], np.mean)
        for (images, source), values in errors.items()
        if source == "voting" and (images, "subpixel") in errors
    }


def plot(landmarks, path):
    """MRE of each landmark on the largest set of images."""
    images = landmarks["images"].iloc[-1]
    groups = list(landmarks[landmarks["images"] == images].groupby("landmarks by", sort=False))
    figure, (panel,) = panels(1, width=9, height=6)
    for i, (source, rows) in enumerate(groups):
        places, width = grouped_places(len(LANDMARKS), len(groups), i)
        panel.barh(places, rows["mre_mm"], height=width, label=source)
    panel.set_yticks(np.arange(len(LANDMARKS)), [f"{k + 1} {name}" for k, name in enumerate(LANDMARKS)])
    panel.invert_yaxis()
    panel.set(xlabel="MRE (mm)", title=f"detection on {images}")
    panel.grid(alpha=0.3, axis="x")
    panel.legend()
    save(figure, path)


def render(overall, landmarks, gains):
    """The section of the report; each landmark on the largest set of images, by the last decoding."""
    images = landmarks["images"].iloc[-1]
    here = landmarks[landmarks["images"] == images]
    decoding = here.loc[here["landmarks by"] != INTER_OBSERVER, "landmarks by"].iloc[-1]
    each = here[here["landmarks by"] == decoding].drop(columns=["images", "landmarks by"])
    text = markdown(overall.rename(columns=HEADINGS))
    for name, gain in gains.items():
        text += f"\nSubpixel decoding lowers the MRE on {name} by {with_interval(*gain, '.2f')} mm.\n"
    text += f"\n![MRE of each landmark](detection.png)\n\nEach landmark on {images}, {decoding}:\n\n"
    return text + markdown(each.rename(columns=HEADINGS))
