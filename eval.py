"""What is measured: the metrics of the ISBI 2015 challenge, records of predictions and attacks, and their one summary.

A radial error is the Euclidean distance in mm: in px0 times the spacing of the image, 0.1 mm in the official data. MRE
is the mean radial error, SDR (successful detection rate) the percentage of errors up to a threshold.
"""

import itertools
import warnings

import numpy as np
import pandas as pd
import torch

from attack import ATTACKS, adaptive_loss, grey_detector, last, paper_loss, replay, run
from dataset import in_batches, rescale, to_input
from readers import plausibility
from readers.points import LANDMARKS
from support import distributed
from support.command import progress
from support.errors import InputError

SDR_MM = (2, 2.5, 3, 4)
# iterations; the last one of an attack is recorded too
RECORDED = (0, 1, 5, 10, 20, 30, 50, 99, 150, 200, 250, 299, 500, 700, 1000, 1500, 2000, 3000, 4000)
FAR_OFF_MM = 20  # MRE of an own detector that sees something else than images
APART_MM, APART_MAD = 10, 8  # see ``stand_apart``
VOTES = 0.15  # median vote share of an image, below which no head is seen: real heads reach 0.33, other images 0.11
SUCCESS_MM = 4  # the radial error up to which the paper counts an attack on a landmark as successful
# columns of the summary
LABELS = {"mre_mm": "MRE (mm)", "median_mm": "median radial error (mm)", "within_4mm_%": f"within {SUCCESS_MM} mm (%)"}
ROLES = ("targeted", "stationary", "free", "untargeted")  # of a landmark in an attack
WORST = "worst"  # in summaries: of each image its worst landmark, see ``with_worst``
TEXT = ("image", "name", "method", "role", "defence", "attacker", "detector", "stored", "seen")
CONDITION = ("method", "iteration", "defence", "attacker", "detector", "stored")  # with the image: what K rows are of
COLUMNS = (  # of a record, in this order; those of attacks and of single conditions are absent elsewhere
    *("image", "landmark", "name", "method", "iteration", "role"),
    *("x_px0", "y_px0", "true_x_px0", "true_y_px0", "radial_error_mm", "target_x_px0", "target_y_px0"),
    *("largest_change", "mm_per_px0", "heatmap_peak", "vote_share"),
    *("defence", "attacker", "detector", "stored", "seen"),
)


# --- predictions and metrics -----------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_batches(detector, images, batches, device):
    """Landmarks that a network finds, batch by batch, with a progress bar.

    Args:
        detector: detectors.Detector.
        images: (N, H, W) or (N, H, W, 3) uint8.
        batches: lists of indices of images.

    Yields:
        (batch, points, outputs): points (B, K, 2) float x, y in px, and the network's outputs, on the device.
    """
    for batch in progress(batches, desc="predicting", unit="batch", leave=False, disable=not batches):
        outputs = detector.network(to_input(images[batch], device))
        yield batch, detector.landmarks(outputs), outputs


def predict(detector, images, batch_size, device):
    """Landmarks of all images (N, K, 2) float32 px on the CPU, in every process, each of which takes its batches."""
    points = torch.zeros(len(images), len(detector.names), 2)
    batches = distributed.shard(in_batches(list(range(len(images))), batch_size))
    predicted = [(batch, found) for batch, found, _ in predict_batches(detector, images, batches, device)]
    for batch, found in predicted:  # not before: a copy would wait for the device
        points[batch] = found.cpu()
    return distributed.all_reduce(points)


def to_px0(points, data):
    """Positions (N, K, 2) in px on the images of ``data`` as float64 positions in px0, on the CPU."""
    return rescale(points.cpu().double(), data.images.shape[-2:], data.sizes[:, None])


def predict_px0(detector, data, batch_size, device):
    """Predictions (N, K, 2) float64 px0 on all images, on the CPU, in every process."""
    return to_px0(predict(detector, data.images, batch_size, device), data)


def errors_on(detector, data, batch_size, device):
    """Radial errors (N, K) in mm of a detector's predictions, against the truth, as an array, in every process."""
    distance_px0 = (predict_px0(detector, data, batch_size, device) - data.landmarks_px0).norm(dim=-1)
    return (distance_px0 * data.mm_per_px0[:, None]).numpy()


def metrics(errors):
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
    table.loc["all"] = {**table.mean(), "median_mm": np.median(errors)}
    return table


def stand_apart(errors):
    """Images that may not fit their annotation: MRE above 10 mm, and 8 median absolute deviations above the median.

    Args:
        errors: array (N, K), radial errors in mm.

    Returns:
        (N,) bool.
    """
    mre = errors.mean(1)
    above = mre - np.median(mre)
    return (mre > APART_MM) & (above > APART_MAD * np.median(abs(above)))


def accuracy_table(errors, ids, names=LANDMARKS):
    """``metrics`` with a column for the landmarks' names; and last, those without the images that ``stand_apart``."""
    table = metrics(errors).rename_axis("landmark").reset_index()
    table.insert(1, "name", [*names, "all landmarks"])
    warn_of_misfits(errors, ids)
    if (apart := stand_apart(errors)).any():
        name = f"all landmarks, without {listed(np.array(ids)[apart])}"
        table.loc[len(table)] = {"landmark": "others", "name": name, **metrics(errors[~apart]).loc["all"]}
    return table


def warn_of_misfits(errors, ids):
    """Name the images that ``stand_apart``, and the MRE with and without; errors: array (N, K) in mm, ids: N."""
    apart, mre = stand_apart(errors), errors.mean(1)
    if apart.any():
        found = [f"{ids[i]} (MRE {mre[i]:.1f} mm)" for i in np.flatnonzero(apart)]
        others = mre[~apart]
        warnings.warn(
            f"{listed(found)}: image and annotation may not belong together (median of the others "
            f"{np.median(others):.1f} mm); the MRE of all is {mre.mean():.2f} mm, without {others.mean():.2f} mm",
            stacklevel=2,
        )


def listed(ids):
    """Some ids as text; of many, only the first."""
    return ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


def warn_of_weak_goals(table):
    """Say how many stationary landmarks the paper's goal maps constrain by the heatmap term alone."""
    paper = table["method"].map(lambda name: ATTACKS[name].loss in (paper_loss, adaptive_loss))
    clean = table[paper & (table["iteration"] == 0) & (table["role"] == "stationary")]
    clean = clean.drop_duplicates(["image", "landmark"])
    weak = (clean.reindex(columns=["heatmap_peak"])["heatmap_peak"] <= 0.5).sum()
    if weak:
        warnings.warn(
            f"the clean heatmaps of {weak} of {len(clean)} stationary landmarks nowhere exceed 0.5 (heatmap_peak in "
            "predictions.csv): the goal maps of the paper's attacks leave their offsets free",
            stacklevel=2,
        )


def report_clean(detector, name, data, batch_size, device):
    """Print the MRE of an own detector on the clean images, before it is attacked."""
    mre = errors_on(detector, data, batch_size, device).mean()
    distributed.on_main(print, f"MRE on the clean images: {mre:.2f} mm")
    if not mre <= FAR_OFF_MM:
        text = "does it take images in [-1, 1], and find x, y in px of its input, in the order of the annotations?"
        warnings.warn(f"--detector {name}: its MRE is {mre:.0f} mm; {text}", stacklevel=2)


# --- what an image shows ---------------------------------------------------------------------------------------------

SEEN = {  # what a detector sees in an image, other than a head: as in records, and in words
    "no head": "the detector sees no head",
    "faces left": "the head faces left, but the detector knows those that face right",
    "faces right": "the head faces right, but the detector knows those that face left",
    "odd shape": "the landmarks found are not those of a head, some are far off",
}


@torch.inference_mode()
def what_is_seen(detector, image, points_px0, vote_share=None, **_):
    """The column of records that says what a detector sees in clean images: "head", or a key of SEEN.

    Args:
        image: (B, C, H, W), input of the network.
        points_px0: array (B, K, 2), what was found there, x, y in px0.
        vote_share: array (B, K), see ``model.confidence``; None: of a detector without.

    Returns:
        {"seen": (B, 1) object}; {} without votes, or where the landmarks are others than those of a head.
    """
    if detector.names != LANDMARKS or vote_share is None:
        return {}
    strange = ~(plausibility.strangeness(points_px0) <= plausibility.STRANGE)
    seen = np.where(strange, "odd shape", "head").astype(object)
    few = np.median(vote_share, axis=1) < VOTES
    if few.any():
        outputs = detector.network(image.flip(-1))
        points = detector.landmarks(outputs)
        mirrored = detector.confidence(outputs, points)["vote_share"].median(1).values.cpu().numpy()
        side = np.where(plausibility.faces_left(points.cpu().numpy()), "faces right", "faces left")
        seen[few] = np.where(mirrored < VOTES, "no head", side)[few]
    return {"seen": seen[:, None]}


# --- records ---------------------------------------------------------------------------------------------------------


def record(data, points_px0, reference_px0=None, **columns):
    """A table with a row for each prediction, its columns in the order of COLUMNS.

    Args:
        data: dataset.Cephalograms of N images.
        points_px0: (N, K, 2) predictions, x, y in px0.
        reference_px0: (N, K, 2) positions from which radial errors are measured (default: the ground truth).
        columns: further ones of COLUMNS: scalars, or arrays that broadcast to (N, K).
    """
    truth, points = data.landmarks_px0.numpy(), np.asarray(points_px0)
    error = np.linalg.norm(points - (truth if reference_px0 is None else np.asarray(reference_px0)), axis=-1)
    spacing = data.mm_per_px0.numpy()[:, None]
    columns |= {"image": np.array(data.ids, object)[:, None], "name": np.array(data.names)}
    columns |= {"landmark": np.arange(points.shape[1]) + 1, "x_px0": points[..., 0], "y_px0": points[..., 1]}
    columns |= {"true_x_px0": truth[..., 0], "true_y_px0": truth[..., 1]}
    columns |= {"radial_error_mm": error * spacing, "mm_per_px0": spacing}
    shape = points.shape[:2]
    return pd.DataFrame({name: np.broadcast_to(columns[name], shape).ravel() for name in COLUMNS if name in columns})


def record_clean(detector, data, points, outputs):
    """``record`` of a test: the network's outputs on clean images, and the points (B, K, 2) px found in them."""
    sure = {name: values.cpu().numpy() for name, values in detector.confidence(outputs, points).items()}
    places = to_px0(points, data).numpy()
    seen = what_is_seen(detector, to_input(data.images, points.device), places, **sure)
    return record(data, places, **sure, **seen)


def record_attack(data, points_px0, targets, **columns):
    """``record`` of an attack at one iteration.

    Args:
        targets: targets.Targets of the images; None for an untargeted attack.
        columns: method, iteration, largest_change (N, 1), the L-infinity norms in grey levels of 255, and others.

    The column role is targeted (radial error: distance from the target), stationary, free or untargeted (distance from
    ``data.reference_px0``).
    """
    reference = data.reference_px0
    role, aims = "untargeted", torch.full_like(reference, torch.nan)
    if targets is not None:
        role, aims = np.where(targets.targeted, *ROLES[:2]), targets.or_nan()
        role = role if targets.free is None else np.where(targets.free, "free", role)
        reference = torch.where(targets.targeted[..., None], aims, reference)
    return record(
        data, points_px0, reference, role=role, target_x_px0=aims[..., 0], target_y_px0=aims[..., 1], **columns
    )


def read_records(files, names=None):
    """Concatenate records that ``files.write_table`` wrote, each checked to be whole, see ``check_record``.

    Args:
        files: paths, or {path: what it must hold, see ``content_of``}.
        names: see ``check_record``.

    Raises:
        InputError: one is missing, not a table, or not whole.
    """
    tables = []
    missing = {name: [""] for name in COLUMNS if name not in TEXT}  # in no other column: an image may be named NA
    for file in files:
        try:
            table = pd.read_csv(file, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=missing)
            check_record(table, files[file] if isinstance(files, dict) else None, names)
        except FileNotFoundError:
            raise InputError(f"{file}: no such file; finish the run of test.py that writes it") from None
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{file}: not a readable record; remove it and repeat the command ({reason})") from None
        tables.append(table)
    return pd.concat(tables)


def check_record(table, content=None, names=None):
    """Refuse a table that is no whole record: K rows for each image and condition, as ``record`` makes them.

    Args:
        content: {column: values}: each combination must be there, and no other; None: each condition must have the same
            images.
        names: of the K landmarks; None: K is the largest number of a landmark.

    Raises:
        ValueError: it says what is wrong.
    """
    attack = "method" in table
    needed = {*COLUMNS[:3], *COLUMNS[6:11], "mm_per_px0", *(content or ())}
    needed |= {*COLUMNS[3:6], *COLUMNS[11:14]} if attack else set()
    numbers = table[[name for name in COLUMNS if name in table]].select_dtypes("number")
    if absent := (needed | ({*COLUMNS} & {*table})) - {*numbers} - ({*TEXT} & {*table}):
        raise ValueError(f"no column {min(absent)}, or other than numbers in it")
    empty = ~np.isfinite(numbers)
    aims = empty.filter(like="target_").eq(table.get("role") == "targeted", axis=0)  # where others should be empty
    truth = ["true_x_px0", "true_y_px0", *([] if attack else ["radial_error_mm"])]
    may_be_empty = [*aims, *(truth if empty[truth].all(axis=None) else [])]  # of images without annotation
    odd = attack and not table["role"].isin(ROLES).all()
    if odd or aims.any(axis=None) or empty.drop(columns=may_be_empty).any(axis=None):
        raise ValueError("values are missing")
    keys = ["image", *(name for name in CONDITION if name in table)]
    count = len(names) if names else int(table["landmark"].max())
    blocks = table[keys][::count]
    whole = len(blocks) > 0 and table["landmark"].tolist() == [*range(1, count + 1)] * len(blocks)
    whole = whole and (table[keys].to_numpy() == blocks.to_numpy().repeat(count, 0)).all()
    if content:
        found = sorted(map(tuple, blocks[[*content]].to_numpy()))
        whole = whole and found == sorted(itertools.product(*content.values()))
    elif attack:
        whole = whole and (blocks.groupby(keys[1:])["image"].nunique() == blocks["image"].nunique()).all()
    if not whole or blocks.duplicated().any():
        raise ValueError(f"not {count} rows for each image, method and iteration that it should hold")


def content_of(id, attack, steps, defence=None):
    """What the record of an image must hold of an attack, behind a defence if it is named, see ``check_record``."""
    steps, attackers = attack.steps or steps, ["oblivious"] if attack.blind else ["oblivious", "adaptive"]
    behind = {"defence": [defence], "attacker": attackers} if defence else {}
    iterations = [0, steps] if defence or attack.universal else recorded(steps)  # see ``attack.replay``
    return {"image": [id], "method": [attack.name], "iteration": iterations} | behind


def recorded(steps):
    """The iterations of an attack that are recorded."""
    return [*(iteration for iteration in RECORDED if iteration < steps), steps]


def is_last(table):
    """Which rows of records, or of what is made of them, are of the last iteration of their method."""
    return table["iteration"] == table.groupby("method")["iteration"].transform("max")


# --- attacks, measured -----------------------------------------------------------------------------------------------


def attack_batch(attack, detector, data, targets, defended=(), device="cpu", epsilon=8, steps=300, seed=0, grey=False):
    """Attack a batch of images, and the same detector behind defences.

    Args:
        attack: a row of ``attack.ATTACKS``.
        detector: detectors.Detector.
        data, targets: dataset.Cephalograms of B images, and their targets.Targets.
        defended: list of (name, judge, attacked), see ``beyond.defences.both_sides``. The judge sees the images that
            were attacked without the defence ("oblivious"), and those of an attack on ``attacked`` ("adaptive").
        epsilon, steps, seed: see ``attack.run``.
        grey: the same perturbation in all channels.

    Returns:
        records, {None: of the iterations ``recorded``, name: of the clean images and of the last iteration}, see
        ``record_attack``; and the attacked images (B, C, H, W) of the last iteration without a defence.
    """
    image = to_input(data.images, device)[:, : 1 if grey else 3]
    places = rescale(targets.places, data.sizes[:, None], data.images.shape[-2:]).float().to(device)
    targeted, steps = targets.targeted.to(device), attack.steps or steps
    free = None if targets.free is None else targets.free.to(device)
    wrap = grey_detector if grey else lambda detector: detector

    def craft(detector):
        iterates = run(attack, detector, image, places, targeted, epsilon, steps, seed, free)
        return progress(iterates, desc=attack.name, total=steps + 1, unit="iteration", leave=False)

    tables, detector = {}, wrap(detector)
    tables[None], adversarial = observe(craft(detector), attack, detector, data, targets, image, steps)
    for name, judge, attacked in defended:
        images = {"oblivious": adversarial} | ({} if attack.blind else {"adaptive": last(craft(wrap(attacked)))[1]})
        for attacker, seen in images.items():
            iterates = replay(wrap(judge).network, image, seen, steps)
            found, _ = observe(iterates, attack, wrap(judge), data, targets, image, steps)
            tables[name] = pd.concat([tables.get(name), found.assign(defence=name, attacker=attacker)])
    return tables, adversarial


def observe(iterates, attack, detector, data, targets, image, steps):
    """Records of what a detector finds at the iterations ``recorded``; and the last images.

    While the attack runs nothing leaves the device, so that it waits for no copy.
    """
    found = []
    for iteration, adversarial, outputs in iterates:
        if iteration in recorded(steps):
            points = detector.landmarks(outputs)
            change = 127.5 * (adversarial - image).abs().amax((1, 2, 3))[:, None]
            found.append((iteration, points, {"largest_change": change} | detector.confidence(outputs, points)))
    tables, aims = [], targets if attack.targeted else None
    for iteration, points, columns in found:
        places, columns = to_px0(points, data).numpy(), {name: values.cpu().numpy() for name, values in columns.items()}
        if iteration == 0:
            columns |= what_is_seen(detector, image, places, **columns)
        tables.append(record_attack(data, places, aims, method=attack.name, iteration=iteration, **columns))
    return pd.concat(tables), adversarial


# --- the summary, with intervals -------------------------------------------------------------------------------------
# Landmarks of one image are not independent, hence images are resampled.


def resample(count, seed=0):
    """A bootstrap's 1000 draws from ``count`` images: indices (1000, count)."""
    return np.random.default_rng(seed).integers(count, size=(1000, count))


def interval(values, statistic, axes=1):
    """A statistic with its 95 % confidence interval: percentiles of a bootstrap over images.

    Args:
        values: array (images, ...).
        statistic: function of such an array to a number or an array of numbers; nan where it is undefined.
        axes: 2: of (images, trainings, ...) the trainings are drawn too, independently of the images (Owen, The
            pigeonhole bootstrap, Ann. Appl. Stat. 2007). Of few trainings such an interval is rather too narrow.

    Returns:
        (value, low, high), each of the statistic's shape.
    """
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # means of nothing are nan
        draws = zip(*(resample(count, seed) for seed, count in enumerate(values.shape[:axes])), strict=True)
        found = [statistic(values[np.ix_(*chosen)]) for chosen in draws]
        return statistic(values), *np.nanpercentile(found, [2.5, 97.5], axis=0)


def exact(value, low, high, images):
    """An interval of a percentage, its bound exact where all succeeded or none did, which no bootstrap can vary.

    That of Clopper and Pearson (Biometrika, 1934) with the images as trials, since landmarks of one are not
    independent: of 20 images 100 [83, 100].
    """
    bound = 100 * 0.025 ** (1 / images)
    return value, np.where(value == 100, bound, low)[()], np.where(value == 0, 100 - bound, high)[()]


def named(name, value, low, high):
    """An interval as columns of a table: <name>, <name>_low, <name>_high."""
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def with_worst(records, by=("iteration",)):
    """Records, and for each image, method and value of ``by`` a row of its worst targeted or stationary landmark.

    Where that is within 4 mm, the attack on the image is complete: all targets are reached, all others in place.
    """
    aimed = records[records["role"].isin(ROLES[:2])].groupby(["image", "method", *by], sort=False)
    worst = aimed[["radial_error_mm", "largest_change"]].max().reset_index()
    return pd.concat([records, worst.assign(role=WORST, landmark=0)])


def summarize(records, by=("iteration",)):
    """Mean and median radial error and percentage within 4 mm with 95 % intervals, and the largest L-infinity norm.

    Returns:
        DataFrame with a row for each role, ``WORST`` included, method and value of the columns ``by``. The same draws
        of a bootstrap over images serve all rows.
    """
    records = with_worst(records, by).sort_values("role", key=lambda r: r.map([*ROLES, WORST].index), kind="stable")
    keys = ["role", "method", *by]
    place = {image: i for i, image in enumerate(sorted(set(records["image"])))}
    counts = np.stack([np.bincount(drawn, minlength=len(place)) for drawn in resample(len(place))])
    groups = records.groupby(keys, sort=False)
    table = groups["radial_error_mm"].agg(landmarks="size", mre_mm="mean", median_mm="median")
    table["within_4mm_%"] = groups["radial_error_mm"].agg(lambda errors: 100 * (errors <= SUCCESS_MM).mean())
    table["largest_change"] = groups["largest_change"].max()
    ends = []
    for _, found in groups:
        drawn = statistics_of(found["radial_error_mm"].to_numpy(), counts[:, found["image"].map(place)])
        ends.append(np.nanpercentile(drawn, [2.5, 97.5], axis=1).T.ravel())
    names = [f"{name}_{end}" for name in LABELS for end in ("low", "high")]
    table = table.reset_index().join(pd.DataFrame(ends, columns=names))
    rate = [f"within_4mm_%{end}" for end in ("", "_low", "_high")]
    table[rate] = np.stack(exact(*table[rate].to_numpy().T, groups["image"].nunique().to_numpy()), axis=1)
    return table


def statistics_of(errors, weights):
    """Mean, median and percentage within 4 mm of errors (n,), each of which counts weights (draws, n) times."""
    order = errors.argsort()
    errors, weights = errors[order], weights[:, order]
    total = weights.sum(1)
    upto = weights.cumsum(1)
    middle = [errors[(upto <= at[:, None]).sum(1).clip(max=len(errors) - 1)] for at in ((total - 1) // 2, total // 2)]
    with np.errstate(invalid="ignore"):  # a draw may have none of these landmarks
        found = weights @ errors / total, (middle[0] + middle[1]) / 2, 100 * (weights @ (errors <= SUCCESS_MM)) / total
    return np.where(total > 0, np.stack(found), np.nan)
