"""Experiment 7: one step of full length, targeted and untargeted."""

import numpy as np
import pandas as pd

from eval import SUCCESS_MM
from experiments.charts import EPSILON, line_with_band, panels, save, tick_values
from experiments.markdown import fold_intervals, markdown
from experiments.measures import error_from_truth, last
from experiments.statistics import by_image, interval, named
from support.files import write_table

TITLE = "Untargeted and one-step FGSM"
TEXT = (
    "One step of full length: displacement of the predictions from the clean ones. *FGSM* moves the targeted landmarks "
    "towards random targets, the others are stationary; *untargeted-FGSM* moves all of them away from the clean "
    "prediction."
)
NAMES = {  # columns of the published tables
    "flown_mm": "mean displacement (mm)",
    "median_flown_mm": "median displacement (mm)",
    "mre_to_truth_mm": "MRE to truth (mm)",
    "further_than_4mm_from_truth_%": f"over {SUCCESS_MM} mm from truth (%)",
    "targets_within_4mm_%": f"within {SUCCESS_MM} mm of target (%)",
}


def publish(results, data, out):
    """Write the table and the chart to ``out``; return the section of the report."""
    table = compute(results)
    write_table(out / "baselines.csv", table)
    plot(table, out / "baselines.png")
    return render(table)


def compute(results):
    """A row for each epsilon, method and role."""
    rows = []
    for result in results:
        for (method, role), found in last(result.attacked()).groupby(["method", "role"], sort=False):
            error = error_from_truth(found)
            success = 100 * (found["radial_error_mm"] <= SUCCESS_MM).mean()
            rows.append(
                {
                    **result.labels,
                    "method": method,
                    "role": role,
                    "images": found["image"].nunique(),
                    "landmarks": len(found),
                    **named("flown_mm", *interval(by_image(found, found["flown_mm"]), np.nanmean)),
                    "median_flown_mm": found["flown_mm"].median(),
                    "mre_to_truth_mm": error.mean(),
                    "further_than_4mm_from_truth_%": 100 * (error > SUCCESS_MM).mean(),
                    "targets_within_4mm_%": success if role == "targeted" else np.nan,
                }
            )
    return pd.DataFrame(rows)


def plot(table, path):
    """Mean displacement against epsilon."""
    figure, (panel,) = panels(1, width=7, height=4.2)
    for (method, role), rows in table.groupby(["method", "role"], sort=False):
        label = method if role == "untargeted" else f"{method}, {role}"
        line_with_band(panel, rows, "epsilon", "flown_mm", label)
    panel.set(xscale="log", xlabel=EPSILON, ylim=(0, None), title="one step")
    panel.set_ylabel("mean distance from the clean prediction (mm)")
    tick_values(panel, table["epsilon"])
    panel.legend()
    save(figure, path)


def render(table):
    shown = fold_intervals(table, ".2f").rename(columns=NAMES)
    return f"\n{markdown(shown)}\n![displacement against epsilon](baselines.png)\n"
