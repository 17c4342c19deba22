"""Landmarks in text: the doctors' annotations, and files of targets.

x runs to the right and y down from the centre of the top left pixel of the original image (px0).
"""

import re

import numpy as np

from readers.tables import image_id, number, read_by_image, read_table, read_text
from support.errors import InputError

LANDMARKS = (
    "sella",
    "nasion",
    "orbitale",
    "porion",
    "subspinale (A)",
    "supramentale (B)",
    "pogonion",
    "menton",
    "gnathion",
    "gonion",
    "incision inferius",
    "incision superius",
    "upper lip",
    "lower lip",
    "subnasale",
    "soft tissue pogonion",
    "posterior nasal spine",
    "anterior nasal spine",
    "articulare",
)
NOT_MARKED = ("", "nan", "na", "n/a", "none", "null", "-")  # as a field of an annotation


# --- annotations -----------------------------------------------------------------------------------------------------


def read_doctors(entry, size0, names=LANDMARKS):
    """The landmarks of an image as each of D doctors marked them.

    Args:
        entry: layouts.Entry.
        size0: (H0, W0) of its image in px0.
        names: of the K landmarks.

    Returns:
        (D, K, 2) float64 x, y in px0.

    Raises:
        InputError: unreadable, not K landmarks, not all of them marked, or one outside the image.
    """
    doctors = []
    for source in entry.annotations:
        if isinstance(source, tuple):  # a row of a Kaggle table
            path, line, numbers = source
            pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
            check_count(path, len(pairs), names)
            places = [f"{path}: line {line}: image {entry.id}, landmark {k + 1}" for k in range(len(names))]
        else:
            pairs = read_pairs(source, names)
            places = [f"{source}: line {k + 1}" for k in range(len(names))]
        doctors.append([parse_point(names, *pair, size0) for pair in zip(names, pairs, places, strict=True)])
    return np.array(doctors)


def check_count(path, found, names, unit="landmarks"):
    """Refuse another number of landmarks than that of the names."""
    if found != len(names):
        needed = f"the {len(names)} of {'ISBI 2015' if names == LANDMARKS else 'the detector'} are needed"
        raise InputError(f"{path}: {found} {unit}, {needed}: one line x,y each, in their order (docs/data.md)")


def read_pairs(path, names):
    """The first K lines of an annotation file, each split into its fields.

    Lines that follow are clinical classes, one number each; a pair of numbers among them is one landmark too many.
    """
    lines = [split_fields(line) for line in read_text(path).rstrip().splitlines()]
    further = [fields for fields in lines[len(names) :] if len(fields) == 2 and None not in map(number, fields)]
    check_count(path, min(len(lines), len(names)), names, "lines")
    check_count(path, len(names) + len(further), names)
    return lines[: len(names)]


def split_fields(line):
    """A line ``x,y``, ``x;y`` or ``x y`` as a list of texts."""
    separator = ";" if ";" in line else "," if "," in line else None
    return [field.strip() for field in line.split(separator)]


def parse_point(names, name, fields, place, size0):
    """Two fields as the position of one of the landmarks inside an image of ``size0`` (H0, W0)."""
    x, y = map(number, fields) if len(fields) == 2 else (None, None)
    text = ",".join(fields)[:40]
    marked = any(field.lower() not in NOT_MARKED for field in fields)
    if marked and (x is None or y is None):
        raise InputError(f"{place}: {text!r} is not x,y")
    if not marked or x == y <= 0:  # 0,0 as in COCO, or -1,-1
        needed = f"all {len(names)} landmarks are needed; mark it or remove the image"
        raise InputError(f"{place}: {text!r}: {name} is not marked, but {needed}")
    if not (0 <= x <= size0[1] - 1 and 0 <= y <= size0[0] - 1):
        hint = "; a line is x,y" if x <= size0[0] - 1 and y <= size0[1] - 1 else ""  # the other way round, it is inside
        raise InputError(f"{place}: ({x:g}, {y:g}) lies outside the image of {size0[1]} x {size0[0]} px{hint}")
    return x, y


def read_kaggle(path):
    """A Kaggle table as {id: (path, line number, its 2 K numbers as text)}; columns are found by name."""
    header = read_text(path).lower().lstrip().partition("\n")[0]
    count = max(map(int, re.findall(r"\b(\d{1,3})_[xy]\b", header)), default=len(LANDMARKS))
    columns = [f"{k}_{axis}" for k in range(1, count + 1) for axis in "xy"]
    rows = read_by_image(path, "image_path", columns, f"image_path,1_x,1_y,...,{count}_y")
    return {id: (path, line, [row[column] for column in columns]) for id, (line, row) in rows.items()}


# --- targets ---------------------------------------------------------------------------------------------------------


def read_targets(path, ids, names=LANDMARKS):
    """Targets from a CSV file with the columns ``landmark,x,y``, and ``image`` for targets of single images.

    Landmarks are numbers 1..K or names, positions are px0; rows and columns come in any order.

    Args:
        path: the file.
        ids: N ids of the images that are attacked.
        names: of the K landmarks.

    Returns:
        places (N, K, 2) float64 x, y in px0, and which landmarks are targeted, (N, K) bool. Whether the places lie
        inside the images is not checked.

    Raises:
        InputError: unreadable, a row is wrong, or an image has no target; the message names it.
    """
    rows = read_table(path, ["landmark", "x", "y"], "landmark,x,y, or image,landmark,x,y", ["image"])
    numbers, num_landmarks = landmark_numbers(names), len(names)
    each = bool(rows) and "image" in rows[0][1]  # or the same for all
    find = finder(ids)
    targets = {id: np.full((num_landmarks, 2), np.nan) for id in (ids if each else [None])}
    for line, row in rows:
        id, where = find(row["image"]) if each else None, f"{path}: line {line}"
        if id not in targets:
            attacked = f"{len(ids)} to be attacked ({ids[0]} .. {ids[-1]})"
            raise InputError(f"{where}: image {id!r} is not among the {attacked}")
        k = numbers.get(row["landmark"].lower().removesuffix(".0"))  # as spreadsheets write numbers
        if k is None:
            raise InputError(f"{where}: there is no landmark {row['landmark']!r}, only 1 to {num_landmarks} and names")
        if not np.isnan(targets[id][k]).all():
            of = f" of image {id}" if each else ""
            raise InputError(f"{where}: landmark {k + 1}{of} has a target already")
        position = number(row["x"]), number(row["y"])
        if None in position:
            raise InputError(f"{where}: '{row['x']},{row['y']}' is not x,y")
        targets[id][k] = position
    for id, points in targets.items():
        if np.isnan(points).all():
            of = f" for image {id}" if each else ""
            raise InputError(f"{path}: no target{of}; at least one row landmark,x,y is needed")
    places = np.stack([targets[id if each else None] for id in ids])
    return np.nan_to_num(places), ~np.isnan(places).any(-1)


def finder(ids):
    """A function from how a table names an image, see ``image_id`` and without spaces around it, to its id; else to
    the same text."""
    found = {id.strip(): id for id in ids} | {id: id for id in ids}
    return lambda text: found.get(text) or found.get(image_id(text), text)


def landmark_numbers(names):
    """{text: index} of landmarks: their names; where these leave it free, a name without what is in parentheses, that
    alone, if no other has it, and a number from 1."""
    meant = [(text, k) for k, name in enumerate(names) for text in {*name.lower().rstrip(")").split(" (")}]
    once = {text: k for text, k in meant if sum(text == other for other, _ in meant) == 1}
    return {str(k + 1): k for k in range(len(names))} | once | {name.lower(): k for k, name in enumerate(names)}
