"""Predictions on attacked images: while the attack runs, and afterwards under other conditions.

A condition is a form in which the images are stored, and a detector that sees them, the attacked one or another:

    adversarial/<method>_input/<id>.png, .jpg       the attacked input, rounded to grey levels
    adversarial/<method>_original/<id>.png, .jpg    the original image with the perturbation enlarged to its size
    adversarial/in_memory.csv                       predictions on the attacked images before they were stored

Files are in colour, or grey where the perturbation is. JPEGs have quality 95 and no chroma subsampling.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from attack import UNTARGETED
from dataset import LANDMARKS, read_image, read_images
from defences import confidence
from eval import predict, read_records, record_attack, to_px0
from model import decode
from readers.images import read_size
from support import distributed
from support.errors import InputError
from support.files import atomic

RECORDED = (0, 1, 5, 10, 20, 30, 50, 99, 150, 200, 250, 299)  # iterations; the last one of an attack is recorded too
SIZES = ("input", "original")
FORMATS = {".png": ("8-bit", {"compress_level": 1}), ".jpg": ("JPEG", {"quality": 95, "subsampling": 0})}


class Observer:
    """Measures an attack on a batch while it runs.

    Landmarks and L-infinity norms of the recorded iterations stay on the device, so that the attack waits for no copy.

    Args:
        image: (B, C, H, W) clean input, C = 1 or 3.
        steps: the attack's last iteration.
        subpixel: see ``model.decode``.

    Attributes:
        points: {iteration: (B, K, 2) px}.
        norms: {iteration: (B,) in units of the [-1, 1] scale}.
        confidence: {iteration: (peak, share)}, see ``defences.confidence``.
        adversarial: like ``image``, of the last iteration observed.
    """

    def __init__(self, image, steps, subpixel=False):
        self.image, self.steps, self.subpixel = image, steps, subpixel
        self.points, self.norms, self.confidence, self.adversarial = {}, {}, {}, image

    def observe(self, iteration, adversarial, maps):
        """Take what an attack yields."""
        self.adversarial = adversarial
        if iteration in RECORDED or iteration == self.steps:
            self.points[iteration] = decode(maps, self.subpixel)
            self.confidence[iteration] = confidence(maps, self.points[iteration])
            self.norms[iteration] = (adversarial - self.image).abs().amax((1, 2, 3))

    def records(self, data, batch, targets_px0, method):
        """The predictions at all recorded iterations, see ``eval.record_attack``.

        Args:
            data: dataset.Cephalograms.
            batch: indices of the images in it.
            targets_px0: (B, K, 2), or None for an untargeted attack.
            method: name of the attack.
        """
        tables = []
        for iteration, points in self.points.items():
            points_px0 = to_px0(points.cpu(), data, batch).numpy()
            norms = self.norms[iteration].cpu().numpy() * 127.5
            table = record_points(data, batch, points_px0, targets_px0, method, iteration, norms)
            peak, share = (values.cpu().numpy().ravel() for values in self.confidence[iteration])
            tables.append(table.assign(heatmap_peak=peak, vote_share=share))
        return pd.concat(tables)


def shown(model, image, adversarial, steps):
    """What an attack would yield whose result is known: the clean image, and the attacked one as the last."""
    for iteration, seen in ((0, image), (steps, adversarial)):
        with torch.no_grad():
            maps = model(seen)
        yield iteration, seen, maps


def observe_defended(defended, observer, adaptive):
    """What a defended detector finds on clean and attacked images, in passes of their own.

    Args:
        defended: the detector, see ``defences.defend``.
        observer: Observer of the attack on the detector without the defence.
        adaptive: what the attack on the defended detector yields; empty for one that is made without it.

    Yields:
        (attacker, Observer): "oblivious", then "adaptive".
    """
    attacked = {"oblivious": observer.adversarial}
    for _, adversarial, _ in adaptive:
        attacked["adaptive"] = adversarial
    with torch.no_grad():
        clean = defended(observer.image).clone()  # with CUDA graphs, the next call overwrites its maps
    for attacker, adversarial in attacked.items():
        other = Observer(observer.image, observer.steps, observer.subpixel)
        other.observe(0, observer.image, clean)
        with torch.no_grad():
            other.observe(observer.steps, adversarial, defended(adversarial))
        yield attacker, other


def record_points(data, batch, points_px0, targets_px0, method, iteration, norms):
    """``eval.record_attack`` of images ``batch`` (indices) of ``data``; norms (B,) in grey levels."""
    ids, truth = [data.ids[i] for i in batch], data.landmarks_px0[batch].numpy()
    spacing, reference = data.mm_per_px0[batch].numpy(), data.reference_px0[batch].numpy()
    return record_attack(ids, points_px0, truth, targets_px0, method, iteration, norms, spacing, reference)


# --- storing ---------------------------------------------------------------------------------------------------------


def stored_file(folder, method, size, id, suffix=".png"):
    """A stored image below the folder adversarial/; size is "input" or "original"."""
    return folder / f"{method}_{size}" / f"{id}{suffix}"


def stored_files(folder, method, id):
    """All files of an attacked image."""
    return [stored_file(folder, method, size, id, suffix) for size in SIZES for suffix in FORMATS]


def save_adversarial(folder, method, data, i, adversarial):
    """Store an attacked image in both sizes and formats.

    In the original's size, each pixel gets the perturbation of the input pixel that contains it. The L-infinity norm
    stays the same; resizing back to the input's size averages neighbours.

    Args:
        folder: the folder adversarial/.
        method: name of the attack.
        data: dataset.Cephalograms.
        i: index of the image in it.
        adversarial: (C, H, W) float in [-1, 1], C = 1 or 3.

    Raises:
        InputError: the original no longer exists, or the file cannot be written.
    """
    adversarial = (adversarial.cpu() + 1) * 127.5
    original, size0 = read_image(data.files[i], None)
    delta = F.interpolate((adversarial - data.images[i])[None], size0, mode="nearest-exact")[0]
    for size, image in zip(SIZES, (adversarial.numpy(), original + delta.numpy()), strict=True):
        levels = image.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        picture = Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)
        for suffix, (_, options) in FORMATS.items():
            with atomic(stored_file(folder, method, size, data.ids[i], suffix)) as temporary:
                picture.save(temporary, **options)


# --- reading back ----------------------------------------------------------------------------------------------------


def in_memory_file(folder):
    return folder / "in_memory.csv"


def find_in_memory(folder):
    """``in_memory_file`` of an existing folder of attacked images.

    Raises:
        InputError: it does not exist.
    """
    file = in_memory_file(folder)
    if not file.is_file():
        raise InputError(f"{file}: no such file; --adversarial takes the folder adversarial/ of --save-adversarial")
    return file


def read_in_memory(folder, data):
    """Predictions before storing, by method.

    Returns:
        list of (method, DataFrame, indices of its images in ``data``, targets (N, K, 2) px0 or None if untargeted).

    Raises:
        InputError: no such record, or one of images that ``data`` does not have.
    """
    file = find_in_memory(folder)
    table, attacks = read_records([file]), []
    if not {"method", "iteration", "target_x_px0", "target_y_px0"} <= set(table):
        raise InputError(f"{file}: not the record of an attack; --adversarial takes the folder of --save-adversarial")
    for method, rows in table.groupby("method", sort=False):
        ids = list(rows["image"].unique())
        if missing := set(ids) - set(data.ids):
            raise InputError(f"{file}: image {min(missing)} is not in this --data, --split, --limit, --images")
        targets = rows[["target_x_px0", "target_y_px0"]].to_numpy(float).reshape(len(ids), len(LANDMARKS), 2)
        attacks.append((method, rows, [data.ids.index(id) for id in ids], None if method == UNTARGETED else targets))
    return attacks


def observe(detectors, folder, batch_size, device, subpixel=False):
    """Predictions on stored attacked images, under every condition.

    Args:
        detectors: list of (name, model, data): the model, see ``eval.predict``, and the clean images, as
            dataset.Cephalograms of its input size. The first is that of the "in memory" record. Stored inputs are
            shown to the detectors of their size only, stored originals to all.
        folder: a folder adversarial/.

    Returns:
        DataFrame like ``eval.record_attack``'s, with the columns detector and stored: "in memory" (predictions before
        storing), "8-bit input", "8-bit original", "JPEG input", "JPEG original".

    Raises:
        InputError: a file is missing or damaged, or no detector is of the size of any.
    """
    with distributed.guard():
        attacks = read_in_memory(folder, detectors[0][2])
    tables = []
    for method, rows, batch, targets in attacks:
        attacked = rows.get("detector", detectors[0][0])  # files of older versions do not name it
        tables.append(rows.assign(detector=attacked, stored="in memory"))
        ids, iteration = [detectors[0][2].ids[i] for i in batch], rows["iteration"].iloc[0]
        for size, suffix in stored_forms(folder, method, ids):
            for name, model, data in detectors:
                with distributed.guard():
                    shown = size == "original" or is_input_of(stored_file(folder, method, size, ids[0], suffix), data)
                    if shown:
                        images, norms = load_stored(folder, method, size, suffix, data, batch)
                if not shown:
                    continue
                points = to_px0(predict(model, images, batch_size, device, subpixel), data, batch).numpy()
                table = record_points(data, batch, points, targets, method, iteration, norms)
                tables.append(table.assign(detector=name, stored=f"{FORMATS[suffix][0]} {size}"))
    if len(tables) == len(attacks):
        raise InputError(f"{folder}: stored inputs only, of another size; use a detector of their --size")
    return pd.concat(tables).drop(columns=["heatmap_peak", "vote_share", "clean_peak"], errors="ignore")


def is_input_of(file, data):
    """Whether a stored input is of the size of the images of ``data``; also if missing, which is reported later."""
    return not file.exists() or read_size(file) == tuple(data.images.shape[-2:])


def stored_forms(folder, method, ids):
    """The (size, suffix) of which any file exists; without any, those of PNG."""
    forms = [(size, suffix) for size in SIZES for suffix in FORMATS]
    exist = [form for form in forms if any(stored_file(folder, method, form[0], id, form[1]).exists() for id in ids)]
    return exist or [(size, ".png") for size in SIZES]  # reported as missing by the caller


def load_stored(folder, method, size, suffix, data, batch):
    """Stored images (N, H, W, 3) uint8 at the input's size, and their L-infinity norms (N,) in grey levels."""
    files = [stored_file(folder, method, size, data.ids[i], suffix) for i in batch]
    clean = [data.images[i].numpy() if size == "input" else data.files[i] for i in batch]
    images, _ = read_images(files, data.images.shape[-2:], "RGB")
    with ThreadPoolExecutor() as pool:
        return images, list(pool.map(largest_change, clean, files))


def largest_change(clean, file):
    """L-infinity distance in grey levels of a stored image from a clean one, (H, W) uint8 or its file."""
    clean = clean if isinstance(clean, np.ndarray) else read_image(clean, None)[0]
    attacked, _ = read_image(file, None, "RGB")
    if attacked.shape[:2] != clean.shape:
        raise InputError(
            f"{file}: size {attacked.shape[:2]} (H, W), but the clean image has {clean.shape}; use a detector of the "
            "same --size and the same data"
        )
    return np.abs(attacked.astype(np.int16) - clean[..., None]).max()
