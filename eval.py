"""Measure landmarks as the ISBI 2015 challenge does, and draw the results: tables, line charts, pictures.

A radial error is the Euclidean distance in px0 x 0.1 mm. MRE is its mean, SDR the share of errors up to a threshold.
"""

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import distributed
from command import InputError, progress
from dataset import LANDMARKS, MM_PER_PX0, in_batches, rescale, to_input
from model import decode

SDR_MM = (2, 2.5, 3, 4)
ROLES = ("targeted", "stationary", "untargeted")  # of a landmark in an attack


# --- metrics ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model, images, batch_size, device, subpixel=False):
    """Landmarks that a network (see ``model.freeze``) finds on images, the batches shared out among all processes.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8.
        subpixel: see ``model.decode``.

    Returns:
        (N, K, 2) float32 px, on the CPU, in every process.
    """
    points = torch.zeros(len(images), len(LANDMARKS), 2, device=device)
    batches = distributed.share(in_batches(range(len(images)), batch_size))
    for batch in progress(batches, desc="testing", unit="batch", leave=False):
        rows = slice(batch.start, batch.stop)
        points[rows] = decode(model(to_input(images[rows], device)), subpixel)
    return distributed.add(points.cpu())


def to_px0(points, data, images=slice(None)):
    """Positions (B, K, 2) in px on some images of ``data`` (default: all) as float64 positions in px0."""
    return rescale(points.double(), data.images.shape[-2:], data.sizes[images, None])


def radial_errors(points, data):
    """Distances (N, K) float64 in mm between points (N, K, 2) px and the un-resized ground truth of ``data``."""
    return (to_px0(points, data) - data.landmarks_px0).norm(dim=-1) * MM_PER_PX0


def summarize(errors):
    """The official metrics of radial errors, an array (N, K) in mm.

    Returns:
        DataFrame of a row a landmark ("1".."K") and one for "all": MRE, SD (population) and median in mm, SDR in %.
        MRE and SD of "all" are the means over landmarks of theirs; its median and SDR are over all errors.
    """
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
    right.set(xlabel="epoch", ylabel="radial error (mm)", ylim=(0, None))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_attack(summary, column, label, path):
    """A column of the summary of an attack against iterations: targeted and stationary, methods side by side.

    With the 95 % intervals of ``summarize_with_confidence`` as bands, where the summary has them.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    roles = list(dict.fromkeys(summary["role"]))
    for axes, role in zip(figure.subplots(1, len(roles), squeeze=False)[0], roles, strict=True):
        for method, lines in summary[summary["role"] == role].groupby("method", sort=False):
            (line,) = axes.plot(lines["iteration"], lines[column], "o-", markersize=3, label=method)
            if f"{column}_low" in lines:
                ends = lines[f"{column}_low"], lines[f"{column}_high"]
                axes.fill_between(lines["iteration"], *ends, color=line.get_color(), alpha=0.15, linewidth=0)
        # one scale for all roles
        top = 1.05 * max(summary[[name for name in (column, f"{column}_high") if name in summary]].max(axis=None), 1e-3)
        axes.set(title=f"{role} landmarks", xlabel="iteration", ylabel=label, ylim=(0, top))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


# --- records of predictions ------------------------------------------------------------------------------------------


def record(ids, points_px0, truth_px0, reference_px0=None, **columns):
    """A tidy table, a row for each prediction.

    Args:
        ids: B image ids.
        points_px0: (B, K, 2) predictions, x, y in px0.
        truth_px0: (B, K, 2) ground truth.
        reference_px0: (B, K, 2) places from which radial errors are measured, if not the ground truth.
        columns: further columns; scalars, or arrays that broadcast to (B, K).

    Returns:
        DataFrame: image, landmark (1..K), name, the further columns, positions in px0, radial error in mm.
    """
    shape = points_px0.shape[:2]
    landmarks = np.broadcast_to(np.arange(shape[1]), shape)
    table = {
        "image": np.repeat(ids, shape[1]),
        "landmark": landmarks.ravel() + 1,
        "name": np.array(LANDMARKS)[landmarks].ravel(),
    }
    table |= {name: np.broadcast_to(np.asarray(values), shape).ravel() for name, values in columns.items()}
    table |= {"x_px0": points_px0[..., 0].ravel(), "y_px0": points_px0[..., 1].ravel()}
    table |= {"true_x_px0": truth_px0[..., 0].ravel(), "true_y_px0": truth_px0[..., 1].ravel()}
    reference_px0 = truth_px0 if reference_px0 is None else reference_px0
    table["radial_error_mm"] = np.linalg.norm(points_px0 - reference_px0, axis=-1).ravel() * MM_PER_PX0
    return pd.DataFrame(table)


def record_attack(ids, points_px0, truth_px0, targets_px0, method, iteration, largest_change):
    """The predictions of an attack at one iteration as ``record``.

    ``targets_px0`` (B, K, 2) is nan for stationary landmarks, None for an untargeted attack. The column role says
    targeted, stationary or untargeted; the radial error of a targeted landmark is its distance from its target, that
    of any other its distance from the ground truth. ``largest_change`` (B,) is that of each image, in grey levels.
    """
    if targets_px0 is None:
        role, reference = "untargeted", truth_px0
        targets_px0 = np.full_like(truth_px0, np.nan)
    else:
        targeted = ~np.isnan(targets_px0).any(-1)
        role = np.where(targeted, "targeted", "stationary")
        reference = np.where(targeted[..., None], targets_px0, truth_px0)
    table = record(ids, points_px0, truth_px0, reference, method=method, iteration=iteration, role=role)
    table["target_x_px0"], table["target_y_px0"] = targets_px0.reshape(-1, 2).T
    table["largest_change"] = np.repeat(largest_change, points_px0.shape[1])
    return table


def read_records(files):
    """Records from CSV files, one below the other, each with all landmarks of its images in order.

    Raises:
        InputError: one is missing or damaged.
    """
    tables = []
    for file in files:
        try:
            table = pd.read_csv(file, dtype={"image": str}, encoding="utf-8")
            numbers = ["x_px0", "y_px0", "true_x_px0", "true_y_px0", "radial_error_mm"]
            if "role" in table:
                numbers += ["iteration", "largest_change"]
            whole = table["landmark"].tolist() == [*range(1, len(LANDMARKS) + 1)] * (len(table) // len(LANDMARKS))
            values = table[numbers].select_dtypes("number")
            if not len(table) or not whole or list(values) != numbers or not np.isfinite(values).all(axis=None):
                raise ValueError("rows are missing or damaged")
            if "role" in table and not table["role"].isin(ROLES).all():
                raise ValueError("there is no such role")
            if tables and list(table) != list(tables[0]):
                raise ValueError("other columns than in the first record")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{file}: not a readable record ({reason}); remove it and repeat the command") from None
        tables.append(table)
    return pd.concat(tables)


def summarize_attack(records, by="iteration"):
    """Over all landmarks: mean and median radial error, the share within 4 mm, and the largest change in grey levels.

    A row for each role, method and value of the column ``by``.
    """
    records = records.sort_values("role", key=lambda role: role.map(ROLES.index), kind="stable")
    groups = records.groupby(["role", "method", by], sort=False)
    table = groups["radial_error_mm"].agg(landmarks="size", mre_mm="mean", median_mm="median")
    table["within_4mm_%"] = groups["radial_error_mm"].agg(lambda errors: 100 * (errors <= 4).mean())
    table["largest_change"] = groups["largest_change"].max()
    return table.reset_index()


def summarize_with_confidence(records, by="iteration", draws=1000, seed=0):
    """``summarize_attack`` with 95 % confidence intervals: columns <measure>_low and <measure>_high.

    Bootstrap over images, percentiles: landmarks of one image are not independent. The same draws serve all rows.
    """
    table = summarize_attack(records, by).set_index(["role", "method", by])
    errors = records.pivot(index=["role", "method", by, "image"], columns="landmark", values="radial_error_mm")
    images = errors.index.unique("image")
    chosen = resample(len(images), draws, seed)
    intervals = {}
    for key, rows in errors.groupby(level=["role", "method", by], sort=False):
        rows = rows.droplevel(["role", "method", by]).reindex(images).to_numpy()
        resampled = rows[chosen].reshape(draws, -1)  # nan where a landmark has another role
        resampled = resampled[~np.isnan(resampled).all(1)]
        measures = {
            "mre_mm": np.nanmean(resampled, axis=1),
            "median_mm": np.nanmedian(resampled, axis=1),
            "within_4mm_%": 100 * (resampled <= 4).sum(1) / (~np.isnan(resampled)).sum(1),
        }
        intervals[key] = {
            f"{name}_{end}": np.percentile(values, percent)
            for name, values in measures.items()
            for end, percent in (("low", 2.5), ("high", 97.5))
        }
    intervals = pd.DataFrame.from_dict(intervals, orient="index")
    intervals.index.names = table.index.names
    return table.join(intervals).reset_index()


def resample(count, draws, seed):
    """A bootstrap's draws from ``count`` images: indices (draws, count)."""
    return np.random.default_rng(seed).integers(count, size=(draws, count))


# --- pictures --------------------------------------------------------------------------------------------------------

TRUTH, PREDICTED, TARGET = (
    {"marker": "+", "c": "lime", "s": 30, "linewidths": 0.8},
    {"marker": "o", "c": "none", "edgecolors": "red", "s": 18, "linewidths": 0.8},
    {"marker": "x", "c": "cyan", "s": 25, "linewidths": 0.8},
)


def draw(path, title, image, truth, predicted, adversarial=None, attacked=None, targets=None):
    """A picture of one image: as it is and, if attacked, the attacked image and the perturbation, magnified.

    Args:
        path, title: where to and what above.
        image, adversarial: arrays (3, H, W) in [-1, 1].
        truth, predicted, attacked, targets: arrays (K, 2) of x, y in px; targets nan for stationary landmarks.
    """
    panels = 1 if adversarial is None else 3
    figure = Figure(figsize=(4.2 * panels, 5.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title)
    axes[0].imshow(image[0], cmap="gray", vmin=-1, vmax=1)
    axes[0].scatter(*truth.T, label="truth", **TRUTH)
    axes[0].scatter(*predicted.T, label="prediction", **PREDICTED)
    axes[0].set_title("clean")
    if adversarial is not None:
        axes[1].imshow(adversarial.transpose(1, 2, 0) / 2 + 0.5)
        axes[1].scatter(*truth.T, label="truth", **TRUTH)
        axes[1].scatter(*attacked.T, label="prediction", **PREDICTED)
        axes[1].set_title("attacked")
        if targets is not None:
            chosen = ~np.isnan(targets).any(-1)
            lines = np.stack([targets[chosen], attacked[chosen]])
            axes[1].plot(lines[..., 0], lines[..., 1], color="cyan", linewidth=0.4)
            axes[1].scatter(*targets[chosen].T, label="target", **TARGET)
        noise = (adversarial - image) * 127.5
        bound = max(np.abs(noise).max(), 1e-6)
        axes[2].imshow(noise.transpose(1, 2, 0) / (2 * bound) + 0.5)
        axes[2].set_title(f"perturbation x {127.5 / bound:.3g}: black -{bound:.1f}, white +{bound:.1f} of 255")
    for panel in axes:
        panel.set_axis_off()
    axes[int(panels > 1)].legend(loc="lower left", fontsize=7)
    figure.savefig(path, dpi=120)
