"""Image files as 8-bit arrays: rotated by their EXIF orientation, composed on black, resized."""

import contextlib
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from support.distributed import launched
from support.errors import UNFIT, InputError

SUFFIXES = (".bmp", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
FORMATS = ("BMP", "PNG", "JPEG", "TIFF")  # Pillow's names: no other content is read, whatever the suffix
MEGAPIXELS = 100  # that an image may have: a film of 24 x 30 cm at 900 dpi; a file of few bytes may have more
MAX_NAME = 200  # bytes of an id, for the names of files of results
UNSUPPORTED = (
    *(".dcm", ".dicom", ".ima", ".nii", ".nrrd", ".mha", ".mhd", ".raw", ".npy", ".pdf", ".svg", ".psd"),
    *(".webp", ".jp2", ".j2k", ".jpx", ".gif", ".heic", ".heif", ".avif", ".jxl", ".jfif", ".tga", ".pgm", ".ppm"),
)
DEPTHS = (8, 10, 12, 14, 16)  # bits of a grey pixel, of which the fewest that hold an image's largest value count
WHITE_IS_ZERO = 0  # value of the TIFF tag
PHOTOMETRIC, BITS = 262, 258  # numbers of TIFF tags


def cores():
    """CPU cores for each process on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable // launched("LOCAL_WORLD_SIZE", 1))


def read_images(files, size, mode="L", progress=None, description="loading"):
    """Read images on all cores, see ``read_image``.

    Args:
        progress: wraps the iteration over the images, like tqdm: progress(iterable, total=N, desc=description).

    Returns:
        (N, H, W) or (N, H, W, 3) uint8, and a list of N (H0, W0).
    """
    images = torch.empty(len(files), *size, *((3,) if mode == "RGB" else ()), dtype=torch.uint8)

    def load(i):
        images.numpy()[i], size0 = read_image(files[i], size, mode)
        return size0

    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes and resizes outside the interpreter's lock
        loaded = pool.map(load, range(len(files)))
        return images, list(progress(loaded, total=len(files), desc=description) if progress else loaded)


def read_image(path, size, mode="L"):
    """Decode an image, rotate it by its EXIF orientation, and resize it bilinearly.

    Args:
        path: file.
        size: (H, W) px, or None: as it is.
        mode: "L": as grey, "RGB": in colour.

    Returns:
        (H, W) or (H, W, 3) uint8, and (H0, W0) px0.

    Raises:
        InputError: of another suffix, unreadable, too large, transparent, of more than 16 bits or 8 in colour.
    """
    check_suffix(path)
    with opened(path) as image:
        # of other than grey images Pillow keeps the upper 8 bits, in which 12-bit data are black
        deep = max(image.tag_v2.get(BITS, (8,))) > 8 if image.format == "TIFF" else ";16B" in str(image.tile)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            image = to_8_bits(image, path)
        elif deep:
            raise InputError(f"{path}: 16 bits in colour or with transparency; store it as grey, or with 8 bits")
        elif "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            if not image.getextrema()[3][1]:
                raise InputError(f"{path}: transparent everywhere; store it without its alpha channel")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        image = image.convert(mode)
        resized = image if size is None else image.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(resized), (image.height, image.width)


def read_size(path):
    """(H0, W0) of an image file by its header, not rotated by EXIF; InputError: see ``opened``."""
    with opened(path) as image:
        return image.height, image.width


@contextlib.contextmanager
def opened(path):
    """A Pillow image of one of the FORMATS, not decoded yet.

    Raises:
        InputError: no file, of another format, or of more than MEGAPIXELS; or the block meets damaged content.
    """
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is for all images, and of 1.6 GB in colour
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, or no regular one")  # a pipe would wait for its other end
    try:
        # by a file object: of uncompressed TIFFs opened by name, Pillow 11 to 13 scrambles those that are rotated
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MEGAPIXELS * 10**6:
                raise InputError(f"{path}: {image.width} x {image.height} px; reduce it to {MEGAPIXELS} million")
            yield image
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, struct.error) as error:  # Pillow's, of damage
        raise InputError(f"{path}: not a readable image ({', '.join(FORMATS)}), or truncated ({error})") from None


def to_8_bits(image, path):
    """A grey image of 16 bits as one of 8: 0 stays 0, and the full scale of its depth, see ``DEPTHS``, becomes 255."""
    values = np.asarray(image)
    if image.mode.startswith("F") or values.min() < 0 or values.max() >= 2 ** max(DEPTHS):
        raise InputError(f"{path}: grey values that are not of 16 bits; convert it to 8 or 16 bits")
    full = next(2**depth - 1 for depth in DEPTHS if values.max() < 2**depth)
    levels = np.rint(values * (255 / full)).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts those of 8 bits only
        levels = 255 - levels
    return Image.fromarray(levels)


def check_suffix(path):
    """Raise InputError unless the file's suffix is one of those that are read, and its name can be an id."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: {path.suffix or 'an image without suffix'} is not supported; convert it to .png")
    if UNFIT.match(path.stem) or len(os.fsencode(path.stem)) > MAX_NAME:
        raise InputError(f"{path}: rename it: not UTF-8, control characters, > {MAX_NAME} bytes, or = + - @ at first")
