"""Finding images and annotations in the three layouts in which the data is distributed.

official   RawImage/{TrainingData,Test1Data,Test2Data}/NNN.bmp, AnnotationsByMD/{400_senior,400_junior}/NNN.txt
2020       the same images, with 400_senior/ and 400_junior/ beside RawImage/
kaggle     cepha400/NNN.jpg with {train,test1,test2}_senior.csv (senior doctor only)

RawImage/RawImage/, AnnotationsByMD/AnnotationsByMD/ and cepha400/cepha400/ are found too, and one doctor is enough.
"""

import filecmp
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from readers.images import SUFFIXES, UNSUPPORTED, check_suffix, read_size
from readers.points import read_kaggle
from readers.tables import find
from support.errors import InputError

FOLDERS = {"train": "TrainingData", "test1": "Test1Data", "test2": "Test2Data"}
IDS = {"train": range(1, 151), "test1": range(151, 301), "test2": range(301, 401)}  # of the official 400 images
SPLITS = ("train", "test1", "test2", "test")
SIZE0 = (2400, 1935)  # (H0, W0) of those
DOCTORS = ("400_senior", "400_junior")


class Entry(NamedTuple):
    """One image of a split: its id, its file, and the sources of its annotations.

    annotations: for each doctor a file, or (table, line number, numbers as text).
    """

    id: str
    image: Path
    annotations: tuple


class Contents(NamedTuple):
    """What a folder holds of train, test1 and test2, the parts."""

    places: dict  # {part: name of its folder or table}
    entries: dict  # {part: its entries, in order of id}
    unused: list  # (part, id) of official images that have an annotation only


def available_splits(root):
    """The splits among train, test1 and test2 that the folder holds."""
    return [part for part, entries in contents(root).entries.items() if entries]


def index(root, split):
    """The entries of a split, in order of id.

    Raises:
        InputError: no such folder, none of the layouts, images and annotations do not match, or an image is both in the
            training and in a test split.
    """
    return entries_of(root, contents(root), split)


def entries_of(root, found, split):
    """``index`` with the folder's Contents."""
    parts = parts_of(split)
    entries = [entry for part in parts for entry in found.entries[part]]
    if not entries:
        raise InputError(f"{root}: no images in {' or '.join(found.places[part] for part in parts)}")
    for part, other in itertools.combinations(FOLDERS, 2):
        if split == "test" or (part == "train" and split in (part, other)):
            check_disjoint_parts(root, found, part, other)
    for entry in entries:
        for annotation in entry.annotations:
            if isinstance(annotation, Path) and not annotation.is_file():
                raise InputError(f"{annotation} is missing; add it or remove {entry.image} (--image needs none)")
    return entries


def parts_of(split):
    return ("test1", "test2") if split == "test" else (split,)


def check_disjoint_parts(root, found, part, other):
    """Raise InputError if both parts have an image: by its id, or, between train and test, a file of the same bytes."""
    one, two = ({entry.id.casefold(): entry.image for entry in found.entries[name]} for name in (part, other))
    places = f"{found.places[part]} and {found.places[other]}"
    if common := sorted(one.keys() & two.keys()):  # A and a may be one name
        raise InputError(f"{root}: the id {common[0]} is in {places}; remove one")
    for pair in find_copies(one.values(), two.values()) if part == "train" else ():
        if not is_official_repetition([file.stem for file in pair], [read_size(file) for file in pair]):
            raise InputError(f"{root}: {pair[0].name} and {pair[1].name} in {places} are the same image; remove one")


def is_official_repetition(ids, sizes):
    """Whether two equal images may be a radiograph that the ISBI 2015 data itself has under two ids.

    Args:
        ids: of the two.
        sizes: their (H0, W0).
    """
    one, two = map(official_part, ids)
    return None not in (one, two) and one != two and all(tuple(size) == SIZE0 for size in sizes)


def find_copies(files, others):
    """All pairs of a file and another one with the same bytes; few are read whole."""
    prints = {file: fingerprint(file) for file in (*files, *others)}
    pairs = itertools.product(files, others)
    return [(one, two) for one, two in pairs if prints[one] == prints[two] and filecmp.cmp(one, two, shallow=False)]


def fingerprint(file):
    """A file's size, and 4 KiB in its middle."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        stream.seek(max(0, size // 2 - 2048))
        return size, stream.read(4096)


# --- finding the files -----------------------------------------------------------------------------------------------


def contents(root):
    """The Contents of a folder.

    Raises:
        InputError: no such folder, none of the layouts, or an annotation without image that is not of an official one.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data names the folder with the ISBI 2015 data")
    parents = *nested(root, "AnnotationsByMD"), root  # of the doctors' folders, in the official and in the 2020 layout
    doctors = [d for doctor in DOCTORS if (d := find_folder(*(find(parent, doctor) for parent in parents)))]
    raw = find_folder(*nested(root, "RawImage"))
    cepha = find_folder(*(folder for folder in nested(root, "cepha400") if list_images(folder)))
    tables = {part: file for part in FOLDERS if (file := find(root, f"{part}_senior.csv")).is_file()}
    if raw and doctors:
        return contents_of_folders(raw, doctors)
    if cepha and tables:
        return contents_of_tables(cepha, tables)
    raise InputError(
        f"{root}: not the ISBI 2015 data: looked for RawImage/ with 400_senior/ and 400_junior/ (or one of them) in "
        "AnnotationsByMD/ or beside it, and for cepha400/ with images and {train,test1,test2}_senior.csv beside it"
    )


def contents_of_folders(raw, doctors):
    """The Contents of the official and the 2020 layout."""
    marked = [list_files(doctor, (".txt",)) for doctor in doctors]
    annotated = {id: file for files in marked for id, file in files.items()}

    def annotations(id):
        return tuple(files.get(id, folder / f"{id}.txt") for folder, files in zip(doctors, marked, strict=True))

    images = {part: list_images(find(raw, folder)) for part, folder in FOLDERS.items()}
    entries = {part: [Entry(id, file, annotations(id)) for id, file in images[part].items()] for part in images}
    places = {part: f"{raw.name}/{folder}" for part, folder in FOLDERS.items()}
    return Contents(places, entries, find_unused(annotated, entries, raw))


def contents_of_tables(folder, tables):
    """The Contents of the Kaggle layout; every image needs a row, but official images of a table that is not there."""
    images = list_images(folder)
    rows = {part: sorted(read_kaggle(table).items()) for part, table in tables.items()}
    annotated = {id: tables[part] for part in rows for id, _ in rows[part]}
    for id in sorted(images.keys() - annotated.keys()):
        if official_part(id) not in FOLDERS.keys() - tables.keys():
            raise InputError(f"{images[id]}: no row in {', '.join(table.name for table in tables.values())}; add it")
    entries = {
        part: [Entry(id, images[id], (row,)) for id, row in rows.get(part, ()) if id in images] for part in FOLDERS
    }
    places = {part: f"{part}_senior.csv" for part in FOLDERS}
    return Contents(places, entries, find_unused(annotated, entries, folder))


def find_unused(annotated, entries, folder):
    """(part, id) of the official images that have an annotation only, in parts of which there are images.

    Args:
        annotated: {id: file of its annotation}.
        entries: {part: entries}.
        folder: where the images are, for the message.

    Raises:
        InputError: an annotation without image that is not of an official one.
    """
    missing = sorted(annotated.keys() - {entry.id for part in entries.values() for entry in part})
    for id in missing:
        if official_part(id) is None:
            raise InputError(f"{annotated[id]}: the image {id} is missing in {folder}; add it or remove its annotation")
    return [(official_part(id), id) for id in missing if entries[official_part(id)]]


def official_part(id):
    """Which of train, test1 and test2 has this id among the official 400 images, or None."""
    number = int(id) if re.fullmatch("[0-9]{3}", id) else 0
    return next((part for part, numbers in IDS.items() if number in numbers), None)


def nested(root, name):
    """Possible paths of a folder; archives unpacked into a folder of their own name nest it twice."""
    return find(find(root, name), name), find(root, name)


def find_folder(*places):
    """The first of the places that is a folder, or None."""
    return next((place for place in places if place.is_dir()), None)


def list_files(folder, suffixes):
    """The files of a folder that have one of the suffixes, by id: {} where there is no such folder."""
    by_id = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix.lower() in suffixes and not file.name.startswith("."):
            if not file.is_file():
                raise InputError(f"{file}: no regular file; remove it")
            if file.stem.casefold() in map(str.casefold, by_id):  # A and a are one name on many systems
                raise InputError(f"{file}: another file in this folder has the same name; remove one")
            by_id[file.stem] = file
    return by_id


def image_files(path):
    """The images of a folder, given by its path; a file as it is.

    Raises:
        InputError: the folder has no image.
    """
    path = Path(path)
    images = list_images(path).values() if path.is_dir() else [path]
    if not images:
        raise InputError(f"{path}: no images in this folder")
    return images


def list_images(folder):
    """The image files of a folder by id.

    Raises:
        InputError: an image that is not supported, and not there in another format, too.
    """
    images = list_files(folder, SUFFIXES)
    for id, file in list_files(folder, UNSUPPORTED).items():
        if id not in images:
            check_suffix(file)
    return images
