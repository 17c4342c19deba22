"""Attacked images as files, and what is left of the attack when they are read back: a real attacker must store them.

    adversarial/<method>_input/<id>.png       the attacked input, rounded to grey levels
    adversarial/<method>_original/<id>.png    the original image with the noise enlarged to its size
    adversarial/in_memory.csv                 what the attack had reached before it was stored

Images are 8-bit PNG, in colour, or grey where the noise is.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch.nn.functional as F
from PIL import Image

import distributed
from attack import ATTACKS, UNTARGETED
from command import InputError, cores
from dataset import LANDMARKS, read_image, read_images
from eval import predict, read_records, record_attack, to_px0
from runs import write

SIZES = ("input", "original")


def stored_file(folder, method, size, id):
    return folder / f"{method}_{size}" / f"{id}.png"


def save_adversarial(folder, method, data, i, attacked):
    """Store an attacked image at both sizes.

    At the original's size each of its pixels gets the noise of the input's pixel in which it lies: no change is greater
    than in the input, but the resizing back mixes the noise of neighbours.

    Args:
        folder: the folder adversarial/.
        method: name of the attack.
        data: dataset.Cephalograms.
        i: index of the image in it.
        attacked: (C, H, W) float in [-1, 1], C = 1 or 3.

    Raises:
        InputError: the original is no longer there, or nothing can be written.
    """
    attacked = (attacked.cpu() + 1) * 127.5
    original, size0 = read_image(data.files[i], None)
    noise = F.interpolate((attacked - data.images[i])[None], size0, mode="nearest-exact")[0]
    for size, image in zip(SIZES, (attacked.numpy(), original + noise.numpy()), strict=True):
        levels = image.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        picture = Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)
        write(stored_file(folder, method, size, data.ids[i]), lambda path: picture.save(path, compress_level=1))


def in_memory_file(folder):
    return folder / "in_memory.csv"


def find_in_memory(folder):
    """``in_memory_file`` of a folder that should have one.

    Raises:
        InputError: it has none.
    """
    file = in_memory_file(folder)
    if not file.is_file():
        raise InputError(f"{file}: no such file; --adversarial names the folder adversarial/ of a --save-adversarial")
    return file


def read_back(folder, model, data, batch_size, device, subpixel=False):
    """What a detector finds on stored images.

    Args:
        folder: a folder adversarial/.
        model: as for ``eval.predict``; it may be another than the attacked one, of the same input size.
        data: dataset.Cephalograms with the same images, not attacked.

    Returns:
        DataFrame like ``eval.record_attack``'s, with the column stored: "in memory" (from the attack's own record),
        "8-bit input", "8-bit original".

    Raises:
        InputError: a file is missing, damaged, or of another image.
    """
    with distributed.together():
        attacks = read_in_memory(find_in_memory(folder), data)
    tables = []
    for method, rows, chosen, targets in attacks:
        tables.append(rows.assign(stored="in memory"))
        ids, truth = [data.ids[i] for i in chosen], data.landmarks_px0[chosen].numpy()
        clean = {"input": data.images[chosen].numpy(), "original": [data.files[i] for i in chosen]}
        for size in SIZES:
            with distributed.together():
                files = [stored_file(folder, method, size, id) for id in ids]
                images, _ = read_images(files, data.images.shape[-2:], "RGB", f"loading {method}, {size}")
                with ThreadPoolExecutor(cores()) as pool:
                    changes = list(pool.map(largest_change, clean[size], files))
            points = to_px0(predict(model, images, batch_size, device, subpixel), data, chosen).numpy()
            table = record_attack(ids, points, truth, targets, method, rows["iteration"].iloc[0], changes)
            tables.append(table.assign(stored=f"8-bit {size}"))
    return pd.concat(tables)


def read_in_memory(file, data):
    """The last state of each attack before it was stored.

    Returns:
        list of (method, record, indices of its images in ``data``, targets (N, K, 2) px0 or None if untargeted).

    Raises:
        InputError: damaged, or of other images.
    """
    table, attacks = read_records([file]), []
    if not {"method", "role", "target_x_px0", "target_y_px0"} <= set(table):
        raise InputError(f"{file}: not the record of an attack; make it again by --save-adversarial")
    for method, rows in table.groupby("method", sort=False, dropna=False):
        ids = list(rows["image"].unique())
        targets = rows[["target_x_px0", "target_y_px0"]].apply(pd.to_numeric, errors="coerce").to_numpy()
        if method not in ATTACKS or len(rows) != len(ids) * len(LANDMARKS) or rows["iteration"].nunique() != 1:
            raise InputError(f"{file}: not one record of each image; make it again by --save-adversarial")
        if strangers := set(ids) - set(data.ids):
            raise InputError(f"{file}: image {min(strangers)} is not of this --data, --split, --limit; name those")
        targets = None if method == UNTARGETED else targets.reshape(len(ids), len(LANDMARKS), 2)
        attacks.append((method, rows, [data.ids.index(id) for id in ids], targets))
    return attacks


def largest_change(clean, file):
    """In grey levels, of a stored image from a clean one, (H, W) uint8 or its file."""
    clean = clean if isinstance(clean, np.ndarray) else read_image(clean, None)[0]
    attacked, _ = read_image(file, None, "RGB")
    if attacked.shape[:2] != clean.shape:
        raise InputError(
            f"{file}: of {attacked.shape[:2]} px (H, W), the clean image of {clean.shape}; use a detector of the same "
            "--size and the same data"
        )
    return np.abs(attacked.astype(np.int16) - clean[..., None]).max()
