"""Attacked images as files, and what is left of the attack when they are read back: a real attacker must store them.

    adversarial/<method>_input/<id>.png       the attacked input, rounded to grey levels
    adversarial/<method>_original/<id>.png    the original image with the noise enlarged to its size
    adversarial/in_memory.csv                 what the attack had reached before it was stored

Images are 8-bit PNG, in colour, or grey where the noise is.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch.nn.functional as F
from PIL import Image

import distributed
from command import InputError
from dataset import read_image, read_images
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


def load_stored(folder, data):
    """The attacks of a folder adversarial/, each as its record in memory (DataFrame), the indices of its images in
    ``data``, and for each of SIZES the images (N, H, W, 3) uint8 resized to the input and their largest changes (N,).

    Raises:
        InputError: a file is missing, damaged, or of another image.
    """
    for method, rows in read_records([folder / "in_memory.csv"]).groupby("method", sort=False):
        ids = list(rows["image"].unique())
        if strangers := set(ids) - set(data.ids):
            raise InputError(f"{folder}: image {min(strangers)} is not of this --data, --split, --limit; name those")
        chosen = [data.ids.index(id) for id in ids]
        clean = {"input": data.images[chosen].numpy(), "original": [data.files[i] for i in chosen]}
        images, changes = {}, {}
        for size in SIZES:
            files = [stored_file(folder, method, size, id) for id in ids]
            images[size], _ = read_images(files, data.images.shape[-2:], "RGB", f"loading {method}, {size}")
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                changes[size] = np.array(list(pool.map(largest_change, clean[size], files)))
        yield rows, chosen, images, changes


def read_back(folder, model, data, batch_size, device):
    """What a detector finds on stored images.

    Args:
        folder: a folder adversarial/.
        model: as for ``eval.predict``; it may be another than the attacked one.
        data: dataset.Cephalograms with the same images, not attacked.

    Returns:
        DataFrame like ``eval.record_attack``'s, with the column stored: "in memory" (from the attack's own record),
        "8-bit input", "8-bit original".

    Raises:
        InputError: a file is missing, damaged, or of another image.
    """
    with distributed.together():
        attacks = list(load_stored(folder, data))
    tables = []
    for rows, chosen, images, changes in attacks:
        tables.append(rows.assign(stored="in memory"))
        ids, method, iteration = rows["image"].unique(), rows["method"].iloc[0], rows["iteration"].iloc[0]
        truth = data.landmarks_px0[chosen].numpy()
        targets = rows[["target_x_px0", "target_y_px0"]].to_numpy().reshape(truth.shape)
        targets = None if (rows["role"] == "untargeted").all() else targets
        for size in SIZES:
            points = to_px0(predict(model, images[size], batch_size, device), data, chosen).numpy()
            table = record_attack(ids, points, truth, targets, method, iteration, changes[size])
            tables.append(table.assign(stored=f"8-bit {size}"))
    return pd.concat(tables)


def largest_change(clean, file):
    """In grey levels, of a stored image from a clean one, (H, W) uint8 or its file."""
    clean = clean if isinstance(clean, np.ndarray) else read_image(clean, None)[0]
    attacked, _ = read_image(file, None, "RGB")
    if attacked.shape[:2] != clean.shape:
        raise InputError(f"{file}: of {attacked.shape[:2]} px (H, W), but the clean image is of {clean.shape}")
    return np.abs(attacked.astype(np.int16) - clean[..., None]).max()
