"""Measure landmarks as the ISBI 2015 challenge does, and draw the results: tables, line charts, pictures.

A radial error is the Euclidean distance in px0 x 0.1 mm. MRE is its mean, SDR the share of errors up to a threshold.
"""

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from dataset import LANDMARKS, MM_PER_PX0, rescale, to_input
from model import decode

SDR_MM = (2, 2.5, 3, 4)


# --- metrics ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model, data, batch_size, device, precision):
    """Landmarks that the network finds on a whole split: (N, K, 2) float32 px, on the CPU."""
    model.eval()
    points = []
    for images in tqdm(data.images.split(batch_size), desc="testing", unit="batch", leave=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            maps = model(to_input(images, device))
        points.append(decode(maps))
    return torch.cat(points).cpu()


def radial_errors(points, data):
    """Distances (N, K) float64 in mm between points (N, K, 2) px and the un-resized ground truth of ``data``."""
    points_px0 = rescale(points.double(), data.images.shape[-2:], data.sizes[:, None])
    return (points_px0 - data.landmarks_px0).norm(dim=-1) * MM_PER_PX0


def summarize(errors):
    """The official metrics of radial errors (N, K) in mm.

    Returns:
        DataFrame of a row a landmark ("1".."K") and one for "all": MRE, SD (population) and median in mm, SDR in %.
        MRE and SD of "all" are the means over landmarks of theirs; its median and SDR are over all errors.
    """
    errors = np.asarray(errors)
    table = pd.DataFrame(
        {"mre_mm": errors.mean(0), "sd_mm": errors.std(0), "median_mm": np.median(errors, axis=0)}
        | {f"sdr_{t}mm_%": 100 * (errors <= t).mean(0) for t in SDR_MM},
        index=[str(k + 1) for k in range(errors.shape[1])],
    )
    overall = table.mean()
    overall["median_mm"] = np.median(errors)
    table.loc["all"] = overall
    return table


# --- charts ----------------------------------------------------------------------------------------------------------


def plot_training(log, path):
    """Loss terms against epochs and, where a split was monitored, its MRE."""
    monitored = log.dropna(subset="mre_mm") if "mre_mm" in log else log[:0]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for column, label in [
        ("loss", "loss"),
        ("heatmap_bce", "heatmap cross-entropy"),
        ("offset_x_l1", "x-offset L1"),
        ("offset_y_l1", "y-offset L1"),
    ]:
        left.plot(log["epoch"], log[column], label=label)
    left.set(title="training loss", xlabel="epoch", ylabel="loss", yscale="log")
    left.legend()
    if len(monitored):
        right.plot(monitored["epoch"], monitored["mre_mm"], "o-", label="MRE")
        right.plot(monitored["epoch"], monitored["median_mm"], "o-", label="median")
        right.set_title(f"monitoring on {monitored['monitored_split'].iloc[-1]}")
        right.legend()
    right.set(xlabel="epoch", ylabel="radial error (mm)", yscale="log")
    figure.savefig(path, dpi=120)
