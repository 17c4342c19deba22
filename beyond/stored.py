"""Attacked images as files, and predictions on them: by the attacked detector or by another.

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

from attack import ATTACKS
from eval import predict, read_records, record_attack, summarize, to_px0
from readers.images import cores, read_image, read_images, read_size
from support import distributed
from support.errors import InputError
from support.files import atomic, write_table
from targets import Targets

IN_MEMORY = "in_memory.csv"
SIZES = ("input", "original")
FORMATS = {".png": ("8-bit", {"compress_level": 1}), ".jpg": ("JPEG", {"quality": 95, "subsampling": 0})}


# --- storing ---------------------------------------------------------------------------------------------------------


def stored_file(folder, method, size, id, suffix=".png"):
    """A stored image below the folder adversarial/; size is "input" or "original"."""
    return folder / f"{method}_{size}" / f"{id}{suffix}"


def stored_files(folder, method, id):
    """All files of an attacked image."""
    return [stored_file(folder, method, size, id, suffix) for size in SIZES for suffix in FORMATS]


def save_adversarial(folder, method, data, adversarial):
    """Store an attacked image in both sizes and formats.

    In the original's size, each pixel gets the perturbation of the input pixel that contains it. The L-infinity norm
    stays the same; resizing back to the input's size averages neighbours.

    Args:
        folder: the folder adversarial/.
        method: name of the attack.
        data: dataset.Cephalograms of this one image.
        adversarial: (C, H, W) float in [-1, 1], C = 1 or 3.

    Raises:
        InputError: the original no longer exists, or the file cannot be written.
    """
    adversarial = (adversarial.cpu() + 1) * 127.5
    original, size0 = read_image(data.files[0], None)
    delta = F.interpolate((adversarial - data.images[0])[None], size0, mode="nearest-exact")[0]
    for size, image in zip(SIZES, (adversarial.numpy(), original + delta.numpy()), strict=True):
        levels = image.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        picture = Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)
        for suffix, (_, options) in FORMATS.items():
            with atomic(stored_file(folder, method, size, data.ids[0], suffix)) as temporary:
                picture.save(temporary, **options)


# --- reading back ----------------------------------------------------------------------------------------------------


def find_in_memory(folder):
    """The record of an existing folder of attacked images.

    Raises:
        InputError: it does not exist.
    """
    file = folder / IN_MEMORY
    if not file.is_file():
        raise InputError(f"{file}: no such file; --adversarial takes the folder adversarial/ of --save-adversarial")
    return file


def read_in_memory(folder, data):
    """Predictions before storing, by method.

    Returns:
        list of (method, DataFrame, ids of its images, their targets.Targets or None if untargeted).

    Raises:
        InputError: no such record, or one of images that ``data`` does not have.
    """
    file = find_in_memory(folder)
    table, attacks = read_records([file], data.names), []
    if not {*table.get("method", [""])} <= {*ATTACKS}:  # a method becomes a path of images
        raise InputError(f"{file}: not the record of an attack; --adversarial takes the folder of --save-adversarial")
    for method, rows in table.groupby("method", sort=False):
        ids = list(rows["image"].unique())
        if missing := set(ids) - set(data.ids):
            raise InputError(f"{file}: image {min(missing)} is not in this --data, --split, --limit, --images")
        places = torch.from_numpy(rows[["target_x_px0", "target_y_px0"]].to_numpy(float)).unflatten(0, (len(ids), -1))
        roles = rows["role"].to_numpy().reshape(len(ids), -1)
        targeted, free = (torch.from_numpy(roles == role) for role in ("targeted", "free"))
        attacks.append((method, rows, ids, None if "untargeted" in roles else Targets(places, targeted, free)))
    return attacks


def predict_stored(detectors, folder, batch_size, device):
    """Predictions on stored attacked images, by each detector that takes them.

    Args:
        detectors: list of (name, detectors.Detector, data): data are the clean images, as
            dataset.Cephalograms of its input size. The data of the first are of all attacked images. Stored inputs are
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
    for method, rows, ids, targets in attacks:
        tables.append(rows.assign(stored="in memory"))
        for size, suffix in stored_forms(folder, method, ids):
            for name, detector, data in detectors:
                files = [stored_file(folder, method, size, id, suffix) for id in ids]
                with distributed.guard():
                    if size == "input" and read_size(files[0]) != tuple(data.images.shape[-2:]):
                        continue
                    part = data.select(ids)
                    images, norms = load_stored(files, part, size)
                points = to_px0(predict(detector, images, batch_size, device), part)
                columns = {"method": method, "iteration": rows["iteration"].iloc[0], "largest_change": norms[:, None]}
                columns |= {"detector": name, "stored": f"{FORMATS[suffix][0]} {size}"}
                tables.append(record_attack(part, points, targets, **columns))
    if len(tables) == len(attacks):
        raise InputError(f"{folder}: stored inputs only, of another size; use a detector of their --size")
    return pd.concat(tables).drop(columns=["heatmap_peak", "vote_share"], errors="ignore")


def report_stored(table, out):
    """read_back.csv and read_back_summary.csv of what ``predict_stored`` returns."""
    write_table(out / "read_back.csv", table)
    summary = summarize(table, by=["detector", "stored"])
    write_table(out / "read_back_summary.csv", summary)
    print(summary.to_string(index=False, float_format="%.2f"))


def stored_forms(folder, method, ids):
    """The (size, suffix) of which any file exists; without any, those of PNG."""
    forms = [(size, suffix) for size in SIZES for suffix in FORMATS]
    exist = [form for form in forms if any(stored_file(folder, method, form[0], id, form[1]).exists() for id in ids)]
    return exist or [(size, ".png") for size in SIZES]  # reported as missing by the caller


def load_stored(files, data, size):
    """Stored images (N, H, W, 3) uint8 at the input's size, and their L-infinity norms (N,) in grey levels."""
    images, _ = read_images(files, data.images.shape[-2:], "RGB")
    clean = data.images.numpy() if size == "input" else data.files
    with ThreadPoolExecutor(cores()) as pool:  # originals take long to decode
        return images, np.array([*pool.map(largest_change, clean, files)])


def largest_change(clean, file):
    """L-infinity distance in grey levels of a stored image from a clean one, (H, W) uint8 or its file."""
    clean = clean if isinstance(clean, np.ndarray) else read_image(clean, None)[0]
    attacked, _ = read_image(file, None, "RGB")
    if attacked.shape[:2] != clean.shape:
        other = f"size {attacked.shape[:2]} (H, W), but the clean image has {clean.shape}"
        raise InputError(f"{file}: {other}; use a detector of the same --size and the same data")
    return np.abs(attacked.astype(np.int16) - clean[..., None]).max()
