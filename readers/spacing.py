"""Pixel spacing of the original images in mm: from the command line or from a file in the folder of the data."""

import numpy as np

from readers.tables import number, read_by_image, read_text
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
    names = root.iterdir() if root else ()
    files = [path for path in names if path.name.lower().startswith("spacing") and path.is_file()]
    if not files:
        return np.full(len(ids), MM_PER_PX0), None
    file, kind = files[0], files[0].name.lower()
    if len(files) > 1 or kind not in ("spacing.txt", "spacing.csv"):
        found = ", ".join(sorted(path.name for path in files))
        raise InputError(f"{root}: {found}: one file is read, spacing.txt or spacing.csv; rename it, remove others")
    if kind == "spacing.txt":
        return np.full(len(ids), check(read_text(file), file)), file
    rows = read_by_image(file, "image", ["mm_per_px"], "image,mm_per_px", [])
    values = {id: check(row["mm_per_px"], f"{file}: line {line}") for id, (line, row) in rows.items()}
    if missing := [id for id in ids if id not in values]:
        raise InputError(f"{file}: no row for image {missing[0]}; add it")
    return np.array([values[id] for id in ids]), file


def check(text, where):
    value = number(text)
    if value is None or not 0 < value <= MAX_MM:
        raise InputError(f"{where}: {text.strip()[:40]!r} is not the size of a pixel: above 0 and at most {MAX_MM} mm")
    return value
