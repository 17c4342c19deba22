"""Pixel spacing of the original images in mm: from the command line or from a file in the folder of the data."""

import numpy as np

from readers.tables import find, image_id, number, read_table, read_text
from support.errors import InputError

MM_PER_PX0 = 0.1  # of the ISBI 2015 images
MAX_MM = 10


def read_spacing(root, ids, mm_per_px=None):
    """mm per px0 of images, and where it was found.

    Args:
        root: folder of the data, which may contain spacing.txt (one number) or spacing.csv (image,mm_per_px), in any
            case; or None.
        ids: N ids.
        mm_per_px: for all images; the files are then not read.

    Returns:
        ((N,) float64, None or the source).

    Raises:
        InputError: not a positive number of at most 10 mm, an image without one, two files, or one of a similar name.
    """
    if mm_per_px is not None:
        return np.full(len(ids), check(str(mm_per_px), "--mm-per-px")), "--mm-per-px"
    assumed = np.full(len(ids), MM_PER_PX0), None
    if root is None:
        return assumed
    text, table = (find(root, name) for name in ("spacing.txt", "spacing.csv"))
    if text.exists() and table.exists():
        raise InputError(f"{text}: {table.name} is in the same folder; remove one")
    if text.exists():
        return np.full(len(ids), check(read_text(text), text)), text
    if table.exists():
        values = read_rows(table, ids)
        if missing := [id for id in ids if id not in values]:
            raise InputError(f"{table}: no row for image {missing[0]}; add it")
        return np.array([values[id] for id in ids]), table
    if similar := [path for path in root.iterdir() if path.name.lower().startswith("spacing") and path.is_file()]:
        raise InputError(f"{similar[0]}: is it the spacing? name it spacing.txt or spacing.csv, or give --mm-per-px")
    return assumed


def read_rows(path, ids):
    """{id: mm per px0} of a spacing.csv, which names images by their ids or files."""
    values = {}
    for line, row in read_table(path, ["image", "mm_per_px"], "image,mm_per_px", []):
        id = row["image"] if row["image"] in ids else image_id(row["image"])
        if id in values:
            raise InputError(f"{path}: line {line}: a second row of image {id}; remove one")
        values[id] = check(row["mm_per_px"], f"{path}: line {line}")
    return values


def check(text, where):
    value = number(text)
    if value is None or not 0 < value <= MAX_MM:
        raise InputError(f"{where}: {text.strip()[:40]!r} is not the size of a pixel: above 0 and at most {MAX_MM} mm")
    return value
