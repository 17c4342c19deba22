"""The ISBI 2015 cephalograms in memory: images as 8-bit grey at the network's size, and their landmarks.

px0 are pixels of the original image (1935 x 2400, 0.1 mm each), px those of the resized network input. How the data is
found, decoded and checked: readers/, and docs/data.md.
"""

import copy
import hashlib
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from readers import plausibility
from readers.images import read_images
from readers.layouts import SIZE0, contents, entries_of, is_official_repetition, parts_of
from readers.points import LANDMARKS, read_doctors
from readers.spacing import MM_PER_PX0, read_spacing
from support.errors import InputError, describe

COARSE = (20, 16)  # (H, W) at which images are compared
SAME = 0.15  # of the median difference; in Train and Test1, the same radiographs reach 0.05, others 0.37 at least


class Cephalograms:
    """Images in memory: each is decoded and resized once and kept as 8-bit grey.

    Args:
        root: folder of the data, in any of the layouts.
        split: "train", "test1", "test2", or "test": test1 and test2, as far as present.
        size: (H, W) px of the network input.
        limit: only the first so many images, by id.
        ids: only these images, in this order.
        unusual: leave out the checks of plausibility.
        names: of the K landmarks; those of others than ISBI 2015 are not checked for plausibility.
        mm_per_px: mm per px0 of all images; None: from a spacing file in ``root``, else 0.1.
        progress: wraps the iteration over the images, like tqdm: progress(iterable, total=N, desc=text).

    Attributes:
        split: as given, or "image".
        ids: N file names without suffix.
        files: N paths of the images.
        images: (N, H, W) uint8.
        landmarks: (N, K, 2) float32 x, y in px, mean of the doctors.
        doctors_px0: (N, D, K, 2) float64 x, y in px0, as each of D doctors marked them.
        landmarks_px0: (N, K, 2) float64 x, y in px0, mean of the doctors.
        reference_px0: (N, K, 2) positions that an attack displaces or keeps: the landmarks, unless they are unknown.
        sizes: (N, 2) int64 (H0, W0) of the original images.
        mm_per_px0: (N,) float64.
        sha256: of ids, images, landmarks, sizes and spacing.

    Raises:
        InputError: data missing, incomplete, damaged or implausible, or a name that is no UTF-8; the message names the
            file.
    """

    def __init__(self, root, split, size, limit=None, ids=None, unusual=False, names=LANDMARKS, **options):
        found = contents(root)
        entries = entries_of(root, found, split)
        if ids is not None:
            by_id = {entry.id: entry for entry in entries}
            if unknown := [id for id in ids if id not in by_id]:
                raise InputError(f"{root}: no image {unknown[0]} in {split} ({entries[0].id} .. {entries[-1].id})")
            entries = [by_id[id] for id in dict.fromkeys(ids)]
        entries = entries[:limit]

        def read(sizes):
            doctors = [read_doctors(entry, size0, names) for entry, size0 in zip(entries, sizes, strict=True)]
            if not unusual and names == LANDMARKS:
                plausibility.check(entries, np.stack(doctors), sizes)
            return np.stack(doctors)

        self._load(split, root, [entry.image for entry in entries], size, names, read, **options)
        if unused := [id for part, id in found.unused if part in parts_of(split)]:
            text = f"annotations are not used, since their images are missing ({unused[0]} is the first)"
            warnings.warn(f"{root}, {split}: {len(unused)} {text}", stacklevel=2)

    @classmethod
    def from_files(cls, files, size, names=LANDMARKS, **options):
        """Images without annotation, in any folders: ids are the file names without suffix, landmarks are nan.

        Args:
            files: N paths.
            size, names, and mm_per_px, progress: see the class.

        Raises:
            InputError: unreadable, of an unsupported suffix, two of the same name, or a name that is no UTF-8.
        """
        self, files, seen = cls.__new__(cls), [Path(file) for file in files], set()
        for file in files:
            if file.stem.casefold() in seen:  # A and a are one name on many systems
                raise InputError(f"{file}: a second image named {file.stem}; rename one")
            seen.add(file.stem.casefold())
        unknown = np.full((len(files), 1, len(names), 2), np.nan)
        self._load("image", None, files, size, names, lambda sizes: unknown, **options)
        return self

    def _load(self, split, root, files, size, names, read, mm_per_px=None, progress=None):
        """All attributes; ``read``: sizes -> (N, D, K, 2) px0, the doctors' marks. ``root`` is None for own images."""
        self.split, self.names = split, names
        self.ids, self.files = [file.stem for file in files], files
        where, text = (f"{root}, {split}", f"loading {split}") if root else ("images", "loading")
        spacing, source = read_spacing(root and Path(root), self.ids, mm_per_px)
        self.images, sizes = read_images(files, size, "L", progress, text)
        doctors_px0 = read(sizes)
        self.doctors_px0, self.landmarks_px0 = torch.from_numpy(doctors_px0), torch.from_numpy(doctors_px0.mean(1))
        self.sizes, self.mm_per_px0 = torch.tensor(sizes), torch.from_numpy(spacing)
        self.reference_px0 = self.landmarks_px0
        self.landmarks = rescale(self.landmarks_px0, self.sizes[:, None], size).float()
        digest = hashlib.sha256(repr(self.ids).encode())
        for content in (self.images, self.landmarks_px0, self.sizes):
            digest.update(content.numpy())
        if (self.mm_per_px0 != MM_PER_PX0).any():
            digest.update(self.mm_per_px0.numpy())
        self.sha256 = digest.hexdigest()
        others = [i for i, size0 in enumerate(sizes) if size0 != SIZE0]
        if others and source is None:
            height, width = sizes[others[0]]
            odd = f"{len(others)} of {len(files)} images are not of {SIZE0[1]} x {SIZE0[0]} px"
            assumed = f"{MM_PER_PX0} mm per pixel is assumed, though {odd} ({self.ids[others[0]]}: {width} x {height})"
            remedy = "give --mm-per-px or a spacing file (docs/data.md)"
            warnings.warn(f"{where}: {assumed}; {remedy}", stacklevel=3)

    def __len__(self):
        return len(self.ids)

    def select(self, ids):
        """A copy with only these images, in this order; ``sha256`` stays that of all."""
        chosen = [self.ids.index(id) for id in ids]
        part = copy.copy(self)
        part.ids, part.files = ([values[i] for i in chosen] for values in (self.ids, self.files))
        for name in ("images", "doctors_px0", "landmarks_px0", "reference_px0", "landmarks", "sizes", "mm_per_px0"):
            setattr(part, name, getattr(self, name)[chosen])
        return part


def check_disjoint(one, other):
    """Refuse two Cephalograms that have an image in common, even if it is stored in another format or size.

    The ISBI 2015 data itself repeats training images in Test1: a warning says how many of those there are.

    Raises:
        InputError: an image in common; the message names both files.
    """
    pairs = same_radiographs(one, other)
    for i, j in pairs:
        ids, sizes = (one.ids[i], other.ids[j]), (one.sizes[i].tolist(), other.sizes[j].tolist())
        if not is_official_repetition(ids, sizes):
            raise InputError(f"{one.files[i]} and {other.files[j]} are the same image; remove one")
    if pairs:
        i, j = pairs[0]
        warnings.warn(
            f"{len(pairs)} radiographs are in both splits, as in the ISBI 2015 data itself ({one.ids[i]} and "
            f"{other.ids[j]} are the first), see docs/data.md",
            stacklevel=2,
        )


def same_radiographs(one, other):
    """Pairs [i, j] of images i of one Cephalograms and j of another that show the same, however they are stored.

    Coarse inputs are compared: two are the same if they differ by at most SAME of the median difference of all pairs.
    """
    one, other = (
        torch.stack([F.adaptive_avg_pool2d(image[None].float(), COARSE).flatten() for image in data.images])
        for data in (one, other)
    )
    difference = torch.cdist(one, other, p=1)
    median = difference.flatten().kthvalue(difference.numel() // 2 + 1).values  # quantile() refuses large inputs
    return (difference <= SAME * median).nonzero().tolist()


def to_input(images, device):
    """8-bit images to the network's input.

    Args:
        images: (B, H, W) uint8 grey, or (B, H, W, 3) uint8 in colour.

    Returns:
        (B, 3, H, W) float32 in [-1, 1] on ``device``, channels last in memory.
    """
    if not torch.is_tensor(images) or images.dtype != torch.uint8 or images.dim() not in (3, 4):
        raise ValueError(f"images must be (B, H, W) or (B, H, W, 3), a tensor of uint8: they are {describe(images)}")
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
    old, new = (torch.as_tensor(s, dtype=torch.float64, device=points.device).flip(-1) for s in (size, new_size))
    return (points + 0.5) * (new / old) - 0.5
