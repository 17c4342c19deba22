"""Attacked images as files, and what is left of the attack when they are read back: a real attacker must store them.

    adversarial/<method>_input/<id>.png       the attacked input, rounded to grey levels
    adversarial/<method>_original/<id>.png    the original image with the noise enlarged to its size
    adversarial/in_memory.csv                 what the attack had reached before it was stored

Images are 8-bit PNG, in colour, or grey where the noise is.
"""

import numpy as np
import pandas as pd
import torch.nn.functional as F
from PIL import Image

from command import InputError
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
    in_memory = read_records([folder / "in_memory.csv"])
    tables = []
    for method, rows in in_memory.groupby("method", sort=False):
        tables.append(rows.assign(stored="in memory"))
        ids = list(rows["image"].unique())
        if strangers := set(ids) - set(data.ids):
            raise InputError(f"{folder}: image {min(strangers)} is not of this --data, --split, --limit; name those")
        chosen = [data.ids.index(id) for id in ids]
        truth = data.landmarks_px0[chosen].numpy()
        targets = rows[["target_x_px0", "target_y_px0"]].to_numpy().reshape(len(ids), len(LANDMARKS), 2)
        targets = None if (rows["role"] == "untargeted").all() else targets
        iteration = rows["iteration"].iloc[0]
        for size in SIZES:
            files = [stored_file(folder, method, size, id) for id in ids]
            images, _ = read_images(files, data.images.shape[-2:], "RGB", f"loading {method}, {size}")
            points = to_px0(predict(model, images, batch_size, device), data, chosen).numpy()
            if size == "input":
                clean = data.images[chosen].numpy()
                changes = [largest_change(*pair) for pair in zip(clean, images.numpy(), strict=True)]
            else:
                changes = [original_change(data.files[i], file) for i, file in zip(chosen, files, strict=True)]
            table = record_attack(ids, points, truth, targets, method, iteration, np.array(changes))
            tables.append(table.assign(stored=f"8-bit {size}"))
    return pd.concat(tables)


def largest_change(clean, attacked):
    """In grey levels, between (H, W) and (H, W, 3) uint8."""
    return np.abs(attacked.astype(np.int16) - clean[..., None]).max()


def original_change(clean, attacked):
    """``largest_change`` between two files."""
    before, size0 = read_image(clean, None)
    after, size = read_image(attacked, None, "RGB")
    if size != size0:
        raise InputError(f"{attacked}: of {size[1]} x {size[0]} px, but {clean} of {size0[1]} x {size0[0]} px")
    return largest_change(before, after)
