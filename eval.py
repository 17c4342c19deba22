"""The metrics of the ISBI 2015 challenge, tables of predictions and diagnoses, line charts and pictures.

A radial error is the Euclidean distance in mm: in px0 times the spacing of the image, 0.1 mm in the official data. MRE
is the mean radial error, SDR (successful detection rate) the percentage of errors up to a threshold.
"""

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dataset import LANDMARKS, MM_PER_PX0, in_batches, rescale, to_input
from diagnosis import MEASURES, challenge_score, classes, measures
from model import decode
from support import distributed
from support.command import progress
from support.errors import InputError

SDR_MM = (2, 2.5, 3, 4)
SUCCESS_MM = 4  # the radial error up to which the paper counts an attack on a landmark as successful
MAY_BE_MISSING = ("true_x_px0", "true_y_px0", "radial_error_mm", "target_x_px0", "target_y_px0")
MAY_BE_MISSING += ("largest_change", "heatmap_peak", "vote_share")  # the last two in records of older versions
TEXT = {"image": str, "detector": str}  # columns that may look like numbers
ROLES = ("targeted", "stationary", "untargeted")  # of a landmark in an attack


# --- metrics ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_batches(model, images, batches, device, subpixel=False):
    """Landmarks that a network finds, batch by batch, with a progress bar.

    Args:
        model: see ``model.freeze``.
        images: (N, H, W) or (N, H, W, 3) uint8.
        batches: lists of indices of images.
        subpixel: see ``model.decode``.

    Yields:
        (batch, points, maps): points (B, K, 2) float32 x, y in px, and the maps that they come from, on the device.
    """
    for batch in progress(batches, desc="testing", unit="batch", leave=False, disable=not batches):
        maps = model(to_input(images[batch], device))
        yield batch, decode(maps, subpixel), maps


def predict(model, images, batch_size, device, subpixel=False):
    """Landmarks of all images (N, K, 2) float32 px on the CPU, in every process, each of which takes its batches."""
    points = torch.zeros(len(images), len(LANDMARKS), 2, device=device)
    batches = distributed.shard(in_batches(list(range(len(images))), batch_size))
    for batch, found, _ in predict_batches(model, images, batches, device, subpixel):
        points[batch] = found
    return distributed.all_reduce(points.cpu())


def to_px0(points, data, images=slice(None)):
    """Positions (B, K, 2) in px on images of ``data``, given by their indices, as float64 positions in px0."""
    return rescale(points.double(), data.images.shape[-2:], data.sizes[images, None])


def radial_errors(points, data):
    """Radial errors (N, K) float64 in mm of points (N, K, 2) px, against the ground truth in the original images."""
    return (to_px0(points, data) - data.landmarks_px0).norm(dim=-1) * data.mm_per_px0[:, None]


def summarize(errors):
    """The official metrics of radial errors, an array (N, K) in mm.

    Returns:
        DataFrame with a row for each landmark ("1".."K") and one for "all": MRE, SD (population) and median in mm, SDR
        in %. MRE and SD of "all" are means over landmarks; its median and SDR are those of all errors.
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
    """Line chart of the loss terms and of the monitored MRE against epochs."""
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
    """Line chart of a column of ``summarize_attack`` against iterations: a panel for each role, a line for each method.

    Bands show the interval from <column>_low to <column>_high, where the summary has these columns.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    roles = list(dict.fromkeys(summary["role"]))
    for axes, role in zip(figure.subplots(1, len(roles), squeeze=False)[0], roles, strict=True):
        for method, lines in summary[summary["role"] == role].groupby("method", sort=False):
            (line,) = axes.plot(lines["iteration"], lines[column], "o-", markersize=3, label=method)
            if f"{column}_low" in lines:
                ends = lines[f"{column}_low"], lines[f"{column}_high"]
                axes.fill_between(lines["iteration"], *ends, color=line.get_color(), alpha=0.15, linewidth=0)
        # all panels have one scale
        top = 1.05 * max(summary[[name for name in (column, f"{column}_high") if name in summary]].max(axis=None), 1e-3)
        axes.set(title=f"{role} landmarks", xlabel="iteration", ylabel=label, ylim=(0, top))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


# --- records of predictions ------------------------------------------------------------------------------------------


def record(ids, points_px0, truth_px0, reference_px0=None, mm_per_px0=MM_PER_PX0, **columns):
    """A tidy table with a row for each prediction.

    Args:
        ids: B image ids.
        points_px0: (B, K, 2) predictions, x, y in px0.
        truth_px0: (B, K, 2) ground truth, nan where unknown.
        reference_px0: (B, K, 2) positions from which radial errors are measured (default: the ground truth).
        mm_per_px0: spacing, a number or (B,).
        columns: further columns; scalars, or arrays that broadcast to (B, K).

    Returns:
        DataFrame: image, landmark (1..K), name, the further columns, positions in px0, radial error in mm, spacing.
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
    spacing = np.broadcast_to(np.reshape(mm_per_px0, (-1, 1)), shape).ravel()
    table["radial_error_mm"] = np.linalg.norm(points_px0 - reference_px0, axis=-1).ravel() * spacing
    return pd.DataFrame(table | {"mm_per_px0": spacing})


def record_attack(
    ids,
    points_px0,
    truth_px0,
    targets_px0,
    method,
    iteration,
    largest_change,
    mm_per_px0=MM_PER_PX0,
    reference_px0=None,
):
    """The predictions of an attack at one iteration, see ``record``.

    Args:
        targets_px0: (B, K, 2), nan for stationary landmarks; None for an untargeted attack.
        largest_change: (B,) L-infinity norm of each perturbation, in grey levels of 255.
        reference_px0: (B, K, 2) positions of landmarks without a target (default: the ground truth).

    The column role is targeted (radial error: distance from the target), stationary or untargeted (distance from the
    reference).
    """
    reference_px0 = truth_px0 if reference_px0 is None else reference_px0
    if targets_px0 is None:
        role, reference = "untargeted", reference_px0
        targets_px0 = np.full_like(truth_px0, np.nan)
    else:
        targeted = ~np.isnan(targets_px0).any(-1)
        role = np.where(targeted, "targeted", "stationary")
        reference = np.where(targeted[..., None], targets_px0, reference_px0)
    table = record(ids, points_px0, truth_px0, reference, mm_per_px0, method=method, iteration=iteration, role=role)
    table["target_x_px0"], table["target_y_px0"] = targets_px0.reshape(-1, 2).T
    table["largest_change"] = np.repeat(largest_change, points_px0.shape[1])
    table["mm_per_px0"] = table.pop("mm_per_px0")  # last
    return table


def read_records(files):
    """Concatenate records that ``files.write_table`` wrote.

    Raises:
        InputError: one is missing or not a table.
    """
    tables = []
    missing = {name: [""] for name in MAY_BE_MISSING}  # in no other column: an image may be named NA
    for file in files:
        try:
            tables.append(pd.read_csv(file, dtype=TEXT, keep_default_na=False, na_values=missing))
        except FileNotFoundError:
            raise InputError(f"{file}: no such file; finish the run of test.py that writes it") from None
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{file}: not a readable record ({reason}); remove it and repeat the command") from None
    return pd.concat(tables)


def summarize_attack(records, by="iteration"):
    """Mean and median radial error, percentage within 4 mm and largest L-infinity norm, over images and landmarks.

    Returns:
        DataFrame with a row for each role, method and value of the column or columns ``by``.
    """
    records = records.sort_values("role", key=lambda role: role.map(ROLES.index), kind="stable")
    groups = records.groupby(["role", "method", *([by] if isinstance(by, str) else by)], sort=False)
    table = groups["radial_error_mm"].agg(landmarks="size", mre_mm="mean", median_mm="median")
    table["within_4mm_%"] = groups["radial_error_mm"].agg(lambda errors: 100 * (errors <= SUCCESS_MM).mean())
    table["largest_change"] = groups["largest_change"].max()
    return table.reset_index()


# --- diagnoses -------------------------------------------------------------------------------------------------------


def diagnose(records):
    """The clinical measures of all predictions, see ``diagnosis.measures``.

    Returns:
        DataFrame with a row for each measure of each image (and method and iteration): value, class and meaning; where
        there is a ground truth also its value and class.
    """
    keys = [name for name in ("method", "iteration", "image") if name in records]
    records = records.sort_values([*keys, "landmark"], kind="stable")
    heads = records.iloc[:: len(LANDMARKS)]
    mm_per_px0 = torch.tensor(heads["mm_per_px0"].to_numpy())

    def read(*columns):
        points = torch.tensor(records[[*columns]].to_numpy(float)).unflatten(0, (-1, len(LANDMARKS)))
        values = measures(points, mm_per_px0)
        return values.flatten().numpy(), classes(values).flatten().numpy()

    table = pd.DataFrame({name: np.repeat(heads[name].to_numpy(), len(MEASURES)) for name in keys})
    table["measure"] = [measure.name for measure in MEASURES] * len(heads)
    table["unit"] = [measure.unit for measure in MEASURES] * len(heads)
    table["value"], table["class"] = read("x_px0", "y_px0")
    table["meaning"] = [MEASURES[i % len(MEASURES)].words.get(c, "undefined") for i, c in enumerate(table["class"])]
    if records["true_x_px0"].notna().all():
        table["true_value"], table["true_class"] = read("true_x_px0", "true_y_px0")
    return table


def summarize_diagnoses(table, doctors_px0, mm_per_px0):
    """How far the measures of ``diagnose`` are from the truth, and two doctors' from each other.

    Args:
        table: of a test, with truth.
        doctors_px0: (N, D, 19, 2) marks of each doctor; without effect unless there are two.
        mm_per_px0: (N,).

    Returns:
        DataFrame with a row for each measure: mean absolute difference in its unit, agreement of the classes in %, the
        challenge's score in %; the last row has the means of the percentages. The truth of the detector is the mean of
        the doctors, that of the doctors (the junior one) is the senior one.
    """
    rows = []
    for j, measure in enumerate(MEASURES):
        found = table[table["measure"] == measure.name]
        pairs = {"": tuple(torch.tensor(found[c].to_numpy()) for c in ("true_value", "true_class", "value", "class"))}
        if doctors_px0.shape[1] == 2:
            values = [measures(points, mm_per_px0) for points in doctors_px0.unbind(1)]
            pairs["doctors_"] = tuple(v[:, j] for value in values for v in (value, classes(value)))
        row = {"measure": measure.name, "unit": measure.unit, "patients": len(found)}
        for of, (true_value, true_class, value, one_class) in pairs.items():
            row[f"{of}mean_difference"] = (value - true_value).abs().mean().item()
            row[f"{of}agreement_%"] = 100 * (true_class == one_class).double().mean().item()
            row[f"{of}challenge_score_%"] = challenge_score(true_class, one_class)
        rows.append(row)
    summary = pd.DataFrame(rows)
    means = summary[[name for name in summary if name.endswith("_%")]].mean()
    return pd.concat([summary, pd.DataFrame([{"measure": "all", "patients": len(doctors_px0), **means}])])


def changed_diagnoses(table, measure=None, to=None):
    """Which patients' diagnoses an attack changes, against the detector's output on the clean image.

    Args:
        table: ``diagnose`` of an attack.
        measure: name of the measure that the attack is meant to change.
        to: the class that it should have (None: any other than before).

    Returns:
        DataFrame with a row for each method, iteration and image: a bool for each measure, whether its class differs;
        ``any`` of them; and for an intended one ``intended``, whether it is as wanted, and ``only intended``, whether
        the seven others are also as before.
    """
    found = table.pivot(index=["method", "iteration", "image"], columns="measure", values="class")
    clean = found.xs(0, level="iteration").reindex(found.index.droplevel("iteration"))
    changed = (found != clean.to_numpy())[[measure.name for measure in MEASURES]]
    others = changed.drop(columns=measure) if measure else changed
    changed = changed.assign(any=changed.any(axis=1))
    if measure:
        wanted = changed[measure] if to is None else found[measure] == to
        changed = changed.assign(**{"intended": wanted, "only intended": wanted & ~others.any(axis=1)})
    return changed


def summarize_changes(changed):
    """``changed_diagnoses`` as percentages of patients: a row for each method, iteration and kind of change."""
    groups = changed.groupby(["method", "iteration"], sort=False)
    table = (100 * groups.mean()).reset_index()
    table = table.melt(["method", "iteration"], var_name="measure", value_name="changed_%")
    table.insert(3, "patients", changed.index.unique("image").size)
    return table.sort_values(["method", "iteration"], kind="stable")


# --- pictures --------------------------------------------------------------------------------------------------------

TRUTH, PREDICTED, TARGET = (
    {"marker": "+", "c": "lime", "s": 30, "linewidths": 0.8},
    {"marker": "o", "c": "none", "edgecolors": "red", "s": 30, "linewidths": 0.8},
    {"marker": "x", "c": "cyan", "s": 14, "linewidths": 0.8},  # within the circle of a prediction that reached it
)


def draw(path, title, image, truth, predicted, adversarial=None, attacked=None, targets=None):
    """Draw one image with its landmarks and, if attacked, the attacked image and the magnified perturbation.

    Args:
        path: file to write.
        title: above the picture.
        image, adversarial: arrays (3, H, W) in [-1, 1].
        truth, predicted, attacked, targets: arrays (K, 2) of x, y in px, nan for what does not exist.
    """
    panels = 1 if adversarial is None else 3
    figure = Figure(figsize=(4.2 * panels, 5.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title)
    axes[0].imshow(image[0], cmap="gray", vmin=-1, vmax=1)
    if not np.isnan(truth).all():
        for panel in axes[:2]:
            panel.scatter(*truth.T, label="ground truth", **TRUTH)
    axes[0].scatter(*predicted.T, label="prediction", **PREDICTED)
    axes[0].set_title("clean")
    if adversarial is not None:
        axes[1].imshow(adversarial.transpose(1, 2, 0) / 2 + 0.5)
        axes[1].scatter(*attacked.T, label="prediction", **PREDICTED)
        axes[1].set_title("attacked")
        if targets is not None:
            chosen = ~np.isnan(targets).any(-1)
            lines = np.stack([targets[chosen], attacked[chosen]])
            axes[1].plot(lines[..., 0], lines[..., 1], color="cyan", linewidth=0.4)
            axes[1].scatter(*targets[chosen].T, label="target", **TARGET)
        delta = (adversarial - image) * 127.5
        bound = max(np.abs(delta).max(), 1e-6)
        axes[2].imshow(delta.transpose(1, 2, 0) / (2 * bound) + 0.5)
        axes[2].set_title(f"perturbation x {127.5 / bound:.3g}: black -{bound:.1f}, white +{bound:.1f} of 255")
    for panel in axes:
        panel.set_axis_off()
    axes[int(panels > 1)].legend(loc="lower left", fontsize=7)
    figure.savefig(path, dpi=120)
