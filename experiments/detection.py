"""Detection.

Radial errors without an attack, on images that were not used in training. *voting* is the paper's decoding, to a
whole pixel; *subpixel* is the mean of the votes around it. MRE and SD are means over the 19 landmarks. The truth is
the mean of the doctors' marks. A stationary landmark whose clean heatmap nowhere exceeds 0.5 has no offsets in the
paper's goal maps.
"""

import numpy as np
import pandas as pd

from eval import SDR_MM, metrics
from experiments.markdown import markdown
from experiments.results import read_marks
from experiments.statistics import by_image
from readers.points import LANDMARKS
from support.figures import grouped_places, panels, save
from support.files import write_table

INTER_OBSERVER = "inter-observer (senior vs. junior)"
SDR = {f"sdr_{t}mm_%": f"SDR {t:g} mm (%)" for t in SDR_MM}
HEADINGS = {"mre_mm": "MRE (mm)", "sd_mm": "SD (mm)", "median_mm": "median (mm)", **SDR}
HEADINGS |= {"peak_%": "heatmaps above 0.5 (%)"}
WINNER = dict(zip(SDR, (73.7, 80.2, 85.2, 91.5), strict=True))
PUBLISHED = {
    "the 2020 code's results file, Test1 + Test2": {"mre_mm": 1.375},
    "the 2015 challenge's winner, Test1 (truth: senior)": {"mre_mm": 1.67, **WINNER},
}


def publish(results, data, out):
    """Write tables and the chart to ``out``; return the section of the report."""
    records = collect(results, data)
    errors = {key: by_image(rows, rows["radial_error_mm"]) for key, rows in records.items()}
    overall, landmarks = compute(records, errors), compute_landmarks(errors)
    write_table(out / "detection.csv", overall)
    write_table(out / "detection_landmarks.csv", landmarks)
    plot(landmarks, out / "detection.png")
    return render(overall, landmarks)


def collect(results, data):
    """{(images, decoding or doctors): records}, of each split, then of all of them together."""
    splits = {}
    for result in results:
        splits.setdefault(result.labels["images"], {})[result.labels["landmarks by"]] = result.predictions()
    for split, sources in splits.items():
        sources |= inter_observer(data, split, next(iter(sources.values())))
    if len(splits) > 1:
        first, *others = splits.values()
        shared = [source for source in first if all(source in sources for sources in others)]
        together = {source: pd.concat(sources[source] for sources in splits.values()) for source in shared}
        splits[" + ".join(splits)] = together
    return {(images, source): rows for images, sources in splits.items() for source, rows in sources.items()}


def inter_observer(data, split, predictions):
    """{INTER_OBSERVER: records of the distances between the doctors' marks}; empty if only one has marked the split.

    ``predictions`` on the split have the spacing of its images.
    """
    mm_per_px0 = predictions.groupby("image")["mm_per_px0"].first()
    marks = read_marks(data, split, mm_per_px0.index)
    if len(marks) < len(mm_per_px0):
        return {}
    apart = {id: np.linalg.norm(senior - junior, axis=-1) * mm_per_px0[id] for id, (senior, junior) in marks.items()}
    table = pd.DataFrame(apart).rename_axis("landmark").reset_index()
    return {INTER_OBSERVER: table.melt("landmark", var_name="image", value_name="radial_error_mm")}


def compute(records, errors):
    """The official metrics over all landmarks, a row for each set of records, then published ones."""
    rows = []
    for (images, source), found in records.items():
        values = errors[images, source]
        rows.append({"images": images, "landmarks by": source, "n": len(values), **metrics(values).loc["all"]})
        if found.get("heatmap_peak", pd.Series([np.nan])).notna().all():  # not of doctors, or without votes
            rows[-1]["peak_%"] = 100 * (found["heatmap_peak"] > 0.5).mean()
    for name, found in PUBLISHED.items():
        rows.append({"images": name, "landmarks by": "published", "n": "", **found})
    return pd.DataFrame(rows)


def compute_landmarks(errors):
    """The official metrics of each landmark."""
    names = pd.Index(LANDMARKS)
    tables = {key: metrics(values).drop("all").set_index(names, append=True) for key, values in errors.items()}
    return pd.concat(tables, names=["images", "landmarks by", "landmark", "name"]).reset_index()


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


def render(overall, landmarks):
    """The section of the report; each landmark on the largest set of images, by the last decoding."""
    images = landmarks["images"].iloc[-1]
    here = landmarks[landmarks["images"] == images]
    decoding = here.loc[here["landmarks by"] != INTER_OBSERVER, "landmarks by"].iloc[-1]
    each = here[here["landmarks by"] == decoding].drop(columns=["images", "landmarks by"])
    return (
        f"{markdown(overall.rename(columns=HEADINGS))}\n![MRE of each landmark](detection.png)\n\n"
        f"Each landmark on {images}, {decoding}:\n\n{markdown(each.rename(columns=HEADINGS))}"
    )
