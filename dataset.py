"""The ISBI 2015 cephalograms: images and landmarks from any of the three layouts in which people have them.

official   RawImage/{TrainingData,Test1Data,Test2Data}/NNN.bmp, AnnotationsByMD/{400_senior,400_junior}/NNN.txt
2020       the same images, with 400_senior/ and 400_junior/ beside RawImage/
kaggle     cepha400/NNN.jpg with {train,test1,test2}_senior.csv (senior doctor only)

px0 are pixels of the original image (1935 x 2400, 0.1 mm each), px those of the resized network input.
"""

import csv
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from command import InputError, cores, progress

MM_PER_PX0 = 0.1
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
FOLDERS = {"train": "TrainingData", "test1": "Test1Data", "test2": "Test2Data"}
IDS = {"train": range(1, 151), "test1": range(151, 301), "test2": range(301, 401)}  # of the official 400 images
SPLITS = ("train", "test1", "test2", "test")
SUFFIXES = (".bmp", ".png", ".jpg", ".jpeg", ".tif", ".tiff")


class Entry(NamedTuple):
    """One image of a split: its id, its file, and where its landmarks stand (one file a doctor, or a CSV row)."""

    id: str
    image: Path
    annotations: tuple


class Cephalograms:
    """A split in memory: every image is decoded and resized once and kept as 8-bit grey.

    Args:
        root: folder of the data, in any of the layouts.
        split: "train", "test1", "test2", or "test": what there is of test1 and test2.
        size: (H, W) px of the network input.
        limit: only the first so many images, by id.
        ids: only these images, in this order.

    Attributes:
        ids: N file names without suffix.
        files: N paths of the images.
        images: (N, H, W) uint8.
        landmarks: (N, K, 2) float32 x, y in px, mean of the doctors.
        landmarks_px0: (N, K, 2) float64 x, y in px0, mean of the doctors.
        sizes: (N, 2) int (H0, W0) of the original images.
        sha256: of all these but the paths.

    Raises:
        InputError: data missing, incomplete or damaged; the message names the file.
    """

    def __init__(self, root, split, size, limit=None, ids=None):
        entries = index(root, split)
        if ids is not None:
            by_id = {entry.id: entry for entry in entries}
            if unknown := [id for id in ids if id not in by_id]:
                have = f"which has {entries[0].id} .. {entries[-1].id}"
                raise InputError(f"{root}: no image {unknown[0]} in {split}, {have}")
            entries = [by_id[id] for id in dict.fromkeys(ids)]
        entries = entries[:limit]
        self.ids = [entry.id for entry in entries]
        self.files = [entry.image for entry in entries]
        self.images, sizes = read_images(self.files, size, "L", f"loading {split}")
        self.sizes = torch.tensor(sizes)
        points = [read_landmarks(entry, size0) for entry, size0 in zip(entries, sizes, strict=True)]
        self.landmarks_px0 = torch.from_numpy(np.stack(points))
        self.landmarks = rescale(self.landmarks_px0, self.sizes[:, None], size).float()
        digest = hashlib.sha256(repr(self.ids).encode())
        for content in (self.images, self.landmarks_px0, self.sizes):
            digest.update(content.numpy())
        self.sha256 = digest.hexdigest()

    def __len__(self):
        return len(self.ids)


def to_input(images, device):
    """8-bit images to the network's input.

    Args:
        images: (B, H, W) uint8 grey, or (B, H, W, 3) uint8 in colour.

    Returns:
        (B, 3, H, W) float32 in [-1, 1] on ``device``, channels last in memory.
    """
    if torch.device(device).type == "cuda":
        images = images.pin_memory()  # so that the copy waits for nothing
    values = images.to(device, non_blocking=True).float() / 127.5 - 1
    if values.dim() == 3:
        values = torch.stack([values, values, values], dim=-1)
    return values.movedim(-1, 1)


def in_batches(items, size):
    """A sequence in pieces of ``size``; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def rescale(points, size, new_size):
    """Positions on an image of ``size`` (H, W) as positions on the same image resized to ``new_size``.

    Pixel centres are whole numbers, so the image's edges lie at -0.5 and W - 0.5.

    Args:
        points: (..., 2) float x, y.
        size, new_size: (H, W), or tensors (..., 2) of them.
    """
    scale = torch.as_tensor(new_size, dtype=torch.float64, device=points.device).flip(-1) / torch.as_tensor(
        size, dtype=torch.float64, device=points.device
    ).flip(-1)
    return (points + 0.5) * scale - 0.5


# --- finding the files -----------------------------------------------------------------------------------------------


def available_splits(root):
    """The splits among train, test1 and test2 that the folder holds."""
    return [split for split in FOLDERS if index(root, split, required=False)]


def index(root, split, required=True):
    """The entries of a split, in order of id.

    Raises:
        InputError: no such folder, none of the layouts, or images and annotations don't match.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data names the folder with the ISBI 2015 data")
    splits = ("test1", "test2") if split == "test" else (split,)
    doctors = next((pair for pair in doctors_of(root) if all(doctor.is_dir() for doctor in pair)), None)
    folder = next(
        (folder for folder in (root / "cepha400" / "cepha400", root / "cepha400") if list_images(folder)), None
    )
    tables = {part: root / f"{part}_senior.csv" for part in FOLDERS if (root / f"{part}_senior.csv").is_file()}
    if (root / "RawImage").is_dir() and doctors:
        entries = index_folders(root / "RawImage", doctors, splits)
        places = [f"RawImage/{FOLDERS[part]}" for part in splits]
    elif folder and tables:
        entries = index_tables(folder, tables, splits)
        places = [f"{part}_senior.csv" for part in splits]
    else:
        raise InputError(
            f"{root}: not the ISBI 2015 data: looked for RawImage/ with 400_senior/ and 400_junior/ in "
            "AnnotationsByMD/ or beside it, and for cepha400/ with images and {train,test1,test2}_senior.csv beside it"
        )
    if required and not entries:
        raise InputError(f"{root}: no images in {' or '.join(places)}")
    by_id = {entry.id: entry for entry in entries}
    for entry in entries:
        if by_id[entry.id] != entry:
            raise InputError(f"{root}: the id {entry.id} is in {' and '.join(places)}; remove one")
    return entries


def doctors_of(root):
    """Where the senior's and the junior's annotations may lie: in the official and in the 2020 layout."""
    return [[parent / doctor for doctor in ("400_senior", "400_junior")] for parent in (root / "AnnotationsByMD", root)]


def list_images(folder):
    """The image files of a folder by id: {} where there is no such folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    images = [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    by_id = {file.stem: file for file in images}
    if len(by_id) < len(images):
        twice = next(file for file in images if by_id[file.stem] != file)
        raise InputError(f"{twice}: a second image of the same name lies beside it; remove one")
    return by_id


def ids_of(splits):
    """The official ids of splits: what is known of those that the user does not have."""
    return {f"{number:03d}" for split in splits for number in IDS[split]}


def index_folders(root, doctors, splits):
    """Entries of the official and the 2020 layout; every image needs its annotations, and the reverse."""
    images = {part: list_images(root / folder) for part, folder in FOLDERS.items()}
    known = set().union(*images.values())
    absent = ids_of([part for part in FOLDERS if not images[part]])
    for doctor in doctors:
        for file in sorted(doctor.glob("[!.]*.txt")):
            if file.stem not in known and file.stem not in absent:
                raise InputError(f"{file}: its image is missing in {root}; add it or remove the annotation")
    entries = []
    for part in splits:
        for id, image in images[part].items():
            annotations = tuple(doctor / f"{id}.txt" for doctor in doctors)
            for file in annotations:
                if not file.is_file():
                    raise InputError(f"{image}: its annotation {file} is missing; add it or remove the image")
            entries.append(Entry(id, image, annotations))
    return entries


def index_tables(folder, tables, splits):
    """Entries of the Kaggle layout; every image needs its row, and the reverse."""
    images = list_images(folder)
    rows = {part: read_table(table) for part, table in tables.items()}
    for part, table in tables.items():
        for id in rows[part]:
            if id not in images:
                raise InputError(f"{table}: the image {id} of its list is missing in {folder}")
    absent = ids_of(FOLDERS.keys() - tables.keys())
    for id in images.keys() - set().union(*rows.values()) - absent:
        raise InputError(f"{images[id]}: no row in {', '.join(table.name for table in tables.values())}; add it")
    return [
        Entry(id, images[id], ((tables[part], rows[part][id]),))
        for part in splits
        if part in tables
        for id in sorted(rows[part])
    ]


def read_table(path):
    """A Kaggle CSV as {id: its row of 2 K numbers as text}."""
    header = ["image_path"] + [f"{k}_{axis}" for k in range(1, len(LANDMARKS) + 1) for axis in "xy"]
    table = {}
    for line, (name, *numbers) in read_csv(path, header, f"image_path,1_x,1_y,...,{len(LANDMARKS)}_y"):
        id = Path(name).stem
        if id in table:
            raise InputError(f"{path}: line {line}: a second row of image {id}; remove one")
        table[id] = numbers
    return table


def read_csv(path, header, shown):
    """The rows of a CSV file with exactly this header, each as (line number, fields).

    Raises:
        InputError: unreadable, another header than the one ``shown`` in the message, or a row of another length.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file ({error})") from None
    if not rows or rows[0][1] != header:
        raise InputError(f"{path}: the header should be {shown}")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise InputError(f"{path}: line {line}: {len(row)} fields, {len(header)} needed")
    return rows[1:]


# --- reading them ----------------------------------------------------------------------------------------------------


def read_images(files, size, mode, description):
    """Read images on all cores, see ``read_image``: (N, H, W) or (N, H, W, 3) uint8, and a list of (H0, W0)."""
    images = torch.empty(len(files), *size, *((3,) if mode == "RGB" else ()), dtype=torch.uint8)

    def load(i):
        images.numpy()[i], size0 = read_image(files[i], size, mode)
        return size0

    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes and resizes outside the interpreter's lock
        loaded = pool.map(load, range(len(files)))
        return images, list(progress(loaded, description, len(files), unit="image", leave=False, disable=None))


def read_image(path, size, mode="L"):
    """Decode an image and resize it, bilinearly.

    Args:
        path: file.
        size: (H, W) px, or None: as it is.
        mode: "L": as grey, "RGB": in colour.

    Returns:
        (H, W) or (H, W, 3) uint8, and (H0, W0) px0.

    Raises:
        InputError: unreadable, or of more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a pixel; convert it to 8 bits")
            image = image.convert(mode)
        resized = image if size is None else image.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(resized), (image.height, image.width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
        raise InputError(f"{path}: not a readable image, or a truncated one ({error})") from None


def read_landmarks(entry, size0):
    """Landmarks (K, 2) float64 px0 of an entry: the mean over its doctors."""
    return read_doctors(entry, size0).mean(0)


def read_doctors(entry, size0):
    """Landmarks (D, K, 2) float64 px0 of an entry as each of D doctors marked them, checked against the image's size.

    ``size0`` is (H0, W0).
    """
    doctors = []
    for source in entry.annotations:
        if isinstance(source, tuple):
            path, numbers = source
            where = [f"{path}: image {entry.id}, landmark {k + 1}" for k in range(len(LANDMARKS))]
            lines = [f"{x},{y}" for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
        else:
            lines = read_lines(source)
            where = [f"{source}: line {k + 1}" for k in range(len(LANDMARKS))]
            if len(lines) < len(LANDMARKS):
                raise InputError(f"{source}: {len(lines)} lines, one for each of {len(LANDMARKS)} landmarks needed")
        doctors.append([parse_point(*pair, size0) for pair in zip(lines, where, strict=False)])
    return np.array(doctors)


def read_lines(path):
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()[: len(LANDMARKS)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file ({error})") from None


def parse_point(text, where, size0):
    """A line ``x,y`` as two numbers inside an image of ``size0`` (H0, W0)."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise InputError(f"{where}: {text.strip()[:40]!r} is not x,y") from None
    if not (0 <= x <= size0[1] - 1 and 0 <= y <= size0[0] - 1):  # also false for nan
        raise InputError(f"{where}: ({x:g}, {y:g}) lies outside the image of {size0[1]} x {size0[0]} px")
    return x, y
