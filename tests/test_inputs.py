"""Inputs as people have them: what is read must have the right values, anything else is refused in one line."""

import json
import os
import re
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IDS, REAL, ROOT, K, draw_image, write_kaggle, write_official
from PIL import Image, TiffImagePlugin

from dataset import Cephalograms, check_disjoint
from phantom import SHAPE, sample_landmarks
from readers import plausibility
from readers.images import read_image
from readers.layouts import Entry, index
from readers.points import LANDMARKS, read_doctors, read_targets
from support.errors import InputError

SIZE0 = (240, 194)  # H0, W0: a tenth of the real images
SIZE = (60, 48)
MEAN = np.array(json.loads((ROOT / "assets" / "shape_model.json").read_text())["mean"]) / 10


@pytest.fixture(scope="session")
def heads():
    """Drawn data like conftest's, with landmarks where they are in heads."""
    rng = np.random.default_rng(3)
    data = {}
    for split, ids in IDS.items():
        data[split] = {}
        for id in ids:
            senior = (MEAN + rng.uniform(-8, 8, 2) + rng.normal(0, 1.5, (K, 2))).round()
            data[split][id] = (draw_image(rng, senior, SIZE0), senior, senior + rng.integers(-2, 3, (K, 2)))
    return data


@pytest.fixture
def official_heads(heads, tmp_path):
    write_official(tmp_path / "data", heads, suffix=".png")
    return tmp_path / "data"


@pytest.fixture
def kaggle_heads(heads, tmp_path):
    write_kaggle(tmp_path / "data", heads)
    return tmp_path / "data"


def read(root, split="train", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Cephalograms(root, split, SIZE, **options)


def annotations(root, doctors=("senior", "junior"), ids=IDS["train"]):
    return [root / "AnnotationsByMD" / f"400_{doctor}" / f"{id}.txt" for doctor in doctors for id in ids]


def image_of(root, id="002", folder="TrainingData"):
    return root / "RawImage" / folder / f"{id}.png"


def each_line(change, doctors=("senior", "junior"), ids=IDS["train"]):
    """Change the text of all landmarks: change(k, x, y) -> line."""

    def spoil(root):
        for file in annotations(root, doctors, ids):
            points = [line.split(",") for line in file.read_text().splitlines()[:K]]
            file.write_text("\n".join(change(k, int(x), int(y)) for k, (x, y) in enumerate(points)) + "\n")

    return spoil


def one_line(number, line, doctor="junior", id="002"):
    def spoil(root):
        (file,) = annotations(root, [doctor], [id])
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines[: number - 1], line, *lines[number:]]) + "\n")

    return spoil


def each_text(change):
    def spoil(root):
        for file in annotations(root):
            file.write_bytes(change(file.read_text()).encode())

    return spoil


def lines_in_order(order, doctors=("senior", "junior")):
    def spoil(root):
        for file in annotations(root, doctors):
            lines = file.read_text().splitlines()
            file.write_text("\n".join(lines[k] for k in order) + "\n")

    return spoil


def move(old, new):
    def spoil(root):
        (root / "moved").mkdir()
        (root / old).rename(root / "moved" / old)
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / "moved" / old).rename(root / new)

    return spoil


def stored(change, suffix=".png", **options):
    """Store image 002 in another way: change(picture, its pixels) -> picture."""

    def spoil(root):
        file = image_of(root)
        with Image.open(file) as picture:
            changed = change(picture.copy(), np.asarray(picture))
        file.unlink()
        changed.save(file.with_suffix(suffix), **options)

    return spoil


def turned(orientation, suffix=".png", **options):
    """As a camera stores what it has turned: the pixels otherwise, and the tag that says how to turn them back."""
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    back |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(
        lambda picture, _: picture.transpose(Image.Transpose[back[orientation]]), suffix, exif=exif, **options
    )


def white_is_zero(root):
    """A 16-bit TIFF whose largest value is black."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    stored(lambda _, pixels: Image.fromarray((255 - pixels).astype(np.uint16) * 257), ".tif", tiffinfo=tags)(root)


def with_alpha(picture, alpha):
    picture = picture.convert("RGBA")
    picture.putalpha(Image.fromarray(alpha))
    return picture


# --- other spellings of the same data


SAME = {
    "x y": each_line(lambda k, x, y: f"{x} {y}"),
    "x;y": each_line(lambda k, x, y: f"{x};{y}"),
    "x, y": each_line(lambda k, x, y: f"{x}, {y}"),
    "tab": each_line(lambda k, x, y: f"{x}\t{y}"),
    "spaces around": each_line(lambda k, x, y: f"  {x} , {y}  "),
    "decimals": each_line(lambda k, x, y: f"{x}.000000,{y}.0"),
    "exponents": each_line(lambda k, x, y: f"{x:.6e} {y:.6e}"),
    "no classes": each_line(lambda k, x, y: f"{x},{y}"),
    "classes in one line": each_text(lambda text: "\n".join(text.splitlines()[:K]) + "\n1 2 1 1 3 1 1 2\n"),
    "Windows line ends": each_text(lambda text: text.replace("\n", "\r\n")),
    "byte order mark": each_text(lambda text: "\ufeff" + text),
    "empty lines at the end": each_text(lambda text: text + "\n\n"),
    ".TXT": lambda root: [file.rename(file.with_suffix(".TXT")) for file in annotations(root)],
    "RawImage/RawImage": move("RawImage", "RawImage/RawImage"),
    "AnnotationsByMD twice": move("AnnotationsByMD", "AnnotationsByMD/AnnotationsByMD"),
    "doctors beside RawImage": lambda root: [
        (root / "AnnotationsByMD" / name).rename(root / name) for name in ("400_senior", "400_junior")
    ],
    "one doctor there, one here": lambda root: (root / "AnnotationsByMD" / "400_junior").rename(root / "400_junior"),
    ".PNG": lambda root: image_of(root).rename(image_of(root).with_suffix(".PNG")),
    "RGB": stored(lambda picture, _: picture.convert("RGB")),
    "palette": stored(lambda picture, _: picture.convert("P")),
    "bmp": stored(lambda picture, _: picture, ".bmp"),
    "16 bits, PNG": stored(lambda _, pixels: Image.fromarray(pixels.astype(np.uint16) * 257)),
    "16 bits, TIFF": stored(lambda _, pixels: Image.fromarray(pixels.astype(np.uint16) * 257), ".tif"),
    "16 bits, big-endian": stored(
        lambda _, pixels: Image.fromarray((pixels.astype(">u2") * 257).astype(">u2")), ".tif"
    ),
    "14 bits": stored(lambda _, pixels: Image.fromarray(np.rint(pixels * (16383 / 255)).astype(np.uint16))),
    "12 bits": stored(lambda _, pixels: Image.fromarray(np.rint(pixels * (4095 / 255)).astype(np.uint16))),
    "10 bits": stored(lambda _, pixels: Image.fromarray(np.rint(pixels * (1023 / 255)).astype(np.uint16))),
    "8 of 16 bits": stored(lambda _, pixels: Image.fromarray(pixels.astype(np.uint16))),
    "32 bits that hold 16": stored(lambda _, pixels: Image.fromarray(pixels.astype(np.int32) * 257), ".tif"),
    "white is zero": white_is_zero,
    "opaque": stored(lambda picture, pixels: with_alpha(picture, np.full_like(pixels, 255))),
    "grey and opaque": stored(lambda picture, _: picture.convert("LA")),
    **{f"EXIF orientation {i}": turned(i) for i in range(2, 9)},
    "EXIF orientation 3 in a TIFF": turned(3, ".tif"),
    "EXIF orientation 6 in a TIFF": turned(6, ".tif"),
    "EXIF orientation 8 in a compressed TIFF": turned(8, ".tif", compression="tiff_lzw"),
    "a webp that has been converted": lambda root: image_of(root).with_suffix(".webp").write_bytes(b"RIFF"),
    "a hidden file": lambda root: (image_of(root).parent / "._001.dcm").write_bytes(b"0"),
    "folders in other capitals": lambda root: [
        folder.rename(folder.with_name(folder.name.swapcase()))
        for folder in (*root.glob("*/*"), *root.glob("*"))
        if folder.is_dir()
    ],
    "notes beside the images": lambda root: image_of(root).with_suffix(".txt").write_text("mild class II"),
    "annotations of absent test images": lambda root: shutil.rmtree(root / "RawImage" / "Test1Data"),
}


@pytest.mark.parametrize("case", SAME)
def test_read_as_the_same(case, heads, official_heads):
    before = read(official_heads)
    SAME[case](official_heads)
    data = read(official_heads)
    truth = np.stack([(senior + junior) / 2 for _, senior, junior in heads["train"].values()])
    assert data.ids == before.ids and np.array_equal(data.landmarks_px0, truth)
    assert data.sizes.tolist() == [list(SIZE0)] * 4
    assert torch.equal(data.images, before.images) and data.sha256 == before.sha256


def rows(change):
    """Rewrite the Kaggle tables: change(rows of fields, header first) -> text."""

    def spoil(root):
        for table in root.glob("*.csv"):
            table.write_text(change([line.split(",") for line in table.read_text().splitlines()]))

    return spoil


def joined(table, separator=","):
    return "\n".join(separator.join(row) for row in table) + "\n"


SAME_KAGGLE = {
    "Windows path": rows(lambda table: joined([table[0], *[[f"C:\\data\\{row[0]}", *row[1:]] for row in table[1:]]])),
    "POSIX path": rows(lambda table: joined([table[0], *[[f"/data/x/{row[0]}", *row[1:]] for row in table[1:]]])),
    "ids": rows(lambda table: joined([table[0], *[[row[0][:3], *row[1:]] for row in table[1:]]])),
    "index": rows(lambda table: joined([[str(i) if i else "", *row] for i, row in enumerate(table)])),
    "named index": rows(lambda table: joined([[str(i) if i else "Unnamed: 0", *row] for i, row in enumerate(table)])),
    "classes": rows(
        lambda table: joined([[*row, *(f"c{i}" if row is table[0] else "1" for i in range(8))] for row in table])
    ),
    "semicolons": rows(lambda table: joined(table, ";")),
    "tabs": rows(lambda table: joined(table, "\t")),
    "spaces": rows(lambda table: joined(table, ", ")),
    "other order": rows(lambda table: joined([row[::-1] for row in table])),
    "quotes": rows(lambda table: joined([[f'"{field}"' for field in row] for row in table])),
    "capitals": rows(lambda table: joined([[field.upper() for field in table[0]], *table[1:]])),
    "empty rows": rows(lambda table: joined(table) + "\n" + "," * 38 + "\n"),
    "decimals": rows(lambda table: joined([table[0], *[[row[0], *(f"{n}.0" for n in row[1:])] for row in table[1:]]])),
    "a folder of a strange name": rows(
        lambda table: joined([table[0], *[[f"25_x/{row[0]}", *row[1:]] for row in table[1:]]])
    ),
    "cepha400 twice": move("cepha400", "cepha400/cepha400"),
    "tables and folder in other capitals": lambda root: [
        path.rename(path.with_name(path.name.title())) for path in [*root.iterdir()]
    ],
}


@pytest.mark.parametrize("case", SAME_KAGGLE)
def test_kaggle_read_as_the_same(case, heads, kaggle_heads):
    before = read(kaggle_heads)
    SAME_KAGGLE[case](kaggle_heads)
    data = read(kaggle_heads)
    assert data.ids == list(IDS["train"])
    assert np.array_equal(data.landmarks_px0, np.stack([senior for _, senior, _ in heads["train"].values()]))
    assert data.sha256 == before.sha256


# --- values


@pytest.mark.parametrize("doctor", [0, 1])
def test_one_doctor(doctor, heads, official_heads):
    shutil.rmtree(official_heads / "AnnotationsByMD" / ("400_junior", "400_senior")[doctor])
    truth = np.stack([points[1 + doctor] for points in heads["train"].values()])
    assert np.array_equal(read(official_heads).landmarks_px0, truth)


@pytest.mark.parametrize("layout", ["official_heads", "kaggle_heads"])
def test_some_of_the_images_with_all_annotations(layout, request):
    root = request.getfixturevalue(layout)
    next(root.rglob("002.png")).unlink()
    next(root.rglob("004.png")).unlink()
    with pytest.warns(UserWarning, match=r"train: 2 annotations are not used, .* \(002 is the first\)"):
        assert Cephalograms(root, "train", SIZE, mm_per_px=0.1).ids == ["001", "003"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing here
        assert Cephalograms(root, "test1", SIZE, mm_per_px=0.1).ids == list(IDS["test1"])


@pytest.mark.parametrize("id", ["NA", "null", "nan", "None", "1", "1e5", "007", "True", "a b"])
def test_ids_stay_texts(id, official_heads):
    image_of(official_heads).rename(image_of(official_heads, id))
    for file in annotations(official_heads, ids=["002"]):
        file.rename(file.with_stem(id))
    data = read(official_heads)
    assert sorted(data.ids) == sorted(["001", "003", "004", id])
    assert read(official_heads, ids=[id]).ids == [id]


def write_png(path, size, depth, colour, rows, *more):
    """A PNG that Pillow would not write: of ``size`` (W, H), the bits and the colour type of its header, its rows."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = (b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    chunks = [(struct.pack(">I", len(data)), kind + data) for kind, data in parts]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + b"".join(n + chunk + struct.pack(">I", zlib.crc32(chunk)) for n, chunk in chunks)
    )


def deep_png(root, colour=2, channels=3):
    """An image becomes one of 12-bit data in 16 bits of several channels."""
    row = b"\0" + np.full((SIZE0[1], channels), 2000, ">u2").tobytes()  # after its filter, none
    write_png(image_of(root), SIZE0[::-1], 16, colour, SIZE0[0] * row)


def deep_tiff(root):
    """The same as an uncompressed TIFF of one strip."""
    pixels, file = np.full((*SIZE0, 3), 2000, "<u2").tobytes(), image_of(root)
    tags = {256: SIZE0[1], 257: SIZE0[0], 259: 1, 262: 2, 273: 8, 277: 3, 278: SIZE0[0], 279: len(pixels)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    entries.insert(2, struct.pack("<HHIHH", 258, 3, 3, 0, 0)[:8] + struct.pack("<I", 8 + len(pixels)))
    bits = struct.pack("<HHH", 16, 16, 16)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    at = struct.pack("<2sHI", b"II", 42, 8 + len(pixels) + len(bits))
    file.unlink()
    file.with_suffix(".tif").write_bytes(at + pixels + bits + directory)


def transparent_left(picture, pixels):
    alpha = np.full_like(pixels, 255)
    alpha[:, :97] = 0
    return with_alpha(Image.fromarray(np.full_like(pixels, 200)), alpha)


def transparent_grey(picture, pixels):
    values = np.full_like(pixels, 200)
    values[:, :97] = 255
    return Image.fromarray(values)


@pytest.mark.parametrize(
    "spoil",
    [
        stored(transparent_left),
        stored(lambda picture, pixels: transparent_left(picture, pixels).convert("LA")),
        stored(lambda picture, pixels: transparent_left(picture, pixels), ".tif"),
        stored(transparent_grey, transparency=255),
    ],
    ids=["RGBA", "LA", "TIFF", "a transparent grey"],
)
def test_what_is_transparent_is_black(spoil, official_heads):
    spoil(official_heads)
    (file,) = image_of(official_heads).parent.glob("002.*")
    values, size0 = read_image(file, None)
    assert size0 == SIZE0 and (values[:, :97] == 0).all() and (values[:, 97:] == 200).all()


def test_half_transparent_is_half_as_bright(official_heads):
    stored(lambda picture, pixels: with_alpha(Image.fromarray(np.full_like(pixels, 200)), np.full_like(pixels, 128)))(
        official_heads
    )
    assert (read(official_heads).images[1] == 100).all()


@pytest.mark.parametrize(
    ("largest", "full"), [(255, 255), (256, 1023), (1023, 1023), (1024, 4095), (4096, 16383), (16384, 65535)]
)
def test_the_scale_of_deep_images(largest, full, official_heads):
    values = np.linspace(0, largest, SIZE0[0]).round().astype(np.uint16)[:, None].repeat(SIZE0[1], 1)
    Image.fromarray(values).save(image_of(official_heads))
    expected = np.rint(values * (255 / full)).astype(np.uint8)
    assert np.array_equal(read_image(image_of(official_heads), None)[0], expected)
    assert expected.max() == round(255 * largest / full)


def test_a_turned_image_has_the_size_that_is_seen(official_heads):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the first row becomes the last column
    pixels = np.zeros((200, 300), np.uint8)
    pixels[0] = 250
    file = image_of(official_heads).with_suffix(".jpg")
    Image.fromarray(pixels).save(file, exif=exif, quality=100)
    values, size0 = read_image(file, None)
    assert size0 == (300, 200) and values.shape == size0
    assert values[:, -1].min() > 240 and values[:, 0].max() < 10


def test_damaged_exif_is_refused(official_heads):
    entries = (0x0112, 3, 1, b"\6\0\0\0"), (0x011A, 2, 3, b"72\0\0")  # to be turned; a resolution that is a text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    file = image_of(official_heads).with_suffix(".jpg")
    Image.fromarray(np.zeros((200, 300), np.uint8)).save(file, exif=exif + bytes(4))
    with pytest.raises(InputError, match=r"\.jpg: "):
        read_image(file, None)


def test_read_image_takes_texts(official_heads):
    assert read_image(str(image_of(official_heads)), SIZE)[0].shape == SIZE


# --- millimetres


SPACINGS = {
    "argument": (None, None, {"mm_per_px": 0.3}, [0.3] * 4),
    "one value": ("spacing.txt", "0.25\n", {}, [0.25] * 4),
    "one an image": (
        "spacing.csv",
        "image,mm_per_px\n004,0.4\n001,0.1\n003,0.3\n002,.2\n151,9\n",
        {},
        [0.1, 0.2, 0.3, 0.4],
    ),
    "semicolons, other order": (
        "spacing.csv",
        "mm_per_px;image\n0.2;001\n0.2;002\n0.2;003\n0.2;004\n",
        {},
        [0.2] * 4,
    ),
    "other capitals": ("Spacing.TXT", "0.25", {}, [0.25] * 4),
    "files, in other capitals": (
        "SPACING.CSV",
        "image,mm_per_px\n001.bmp,0.1\nx/002.PNG,0.2\nC:\\x\\003.dcm,0.3\n004,0.4\n",
        {},
        [0.1, 0.2, 0.3, 0.4],
    ),
    "argument before file": ("spacing.txt", "0.25", {"mm_per_px": 0.1}, [0.1] * 4),
    "the default said": ("spacing.txt", "0.1", {}, [0.1] * 4),
}


@pytest.mark.parametrize("case", SPACINGS)
def test_spacing(case, official_heads):
    file, text, options, expected = SPACINGS[case]
    assumed = read(official_heads)
    if file:
        (official_heads / file).write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is assumed
        data = Cephalograms(official_heads, "train", SIZE, **options)
    assert data.mm_per_px0.dtype == torch.float64 and data.mm_per_px0.tolist() == expected
    assert (data.sha256 == assumed.sha256) == (expected == [0.1] * 4)


def test_spacing_follows_the_order_of_images(official_heads):
    (official_heads / "spacing.csv").write_text("image,mm_per_px\n" + "".join(f"00{i},0.{i}\n" for i in range(1, 5)))
    assert read(official_heads, ids=["003", "001"]).mm_per_px0.tolist() == [0.3, 0.1]


def test_what_is_assumed_is_said(official_heads, tmp_path):
    with pytest.warns(UserWarning, match=r"test1: 0.1 mm per pixel is assumed, though 3 of 3 .*\(151: 194 x 240\)"):
        data = Cephalograms(official_heads, "test1", SIZE)
    assert data.mm_per_px0.tolist() == [0.1] * 3
    large = tmp_path / "large.png"
    Image.new("L", (1935, 2400)).save(large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Cephalograms.from_files([large], SIZE).mm_per_px0.tolist() == [0.1]
    with pytest.warns(UserWarning, match=r"assumed, though 1 of 2 images are not of 1935 x 2400 px \(151"):
        Cephalograms.from_files([large, image_of(official_heads, "151", "Test1Data")], SIZE)


BAD_SPACINGS = {
    "zero": ("spacing.txt", "0", "spacing.txt: '0' is not the size of a pixel"),
    "negative": ("spacing.txt", "-0.1", "'-0.1' is not the size of a pixel"),
    "dots per inch": ("spacing.txt", "300", "'300' is not the size of a pixel: above 0 and at most 10 mm"),
    "a unit": ("spacing.txt", "0.1 mm", "'0.1 mm' is not"),
    "decimal comma": ("spacing.txt", "0,1", "'0,1' is not"),
    "two values": ("spacing.txt", "0.1\n0.1\n", "is not the size of a pixel"),
    "empty": ("spacing.txt", "", "'' is not"),
    "nan": ("spacing.txt", "nan", "'nan' is not"),
    "no text": ("spacing.txt", "\0", "is not the size"),
    "an image without": ("spacing.csv", "image,mm_per_px\n001,0.1\n", "spacing.csv: no row for image 002; add it"),
    "an image twice": ("spacing.csv", "image,mm_per_px\n001,0.1\n001,0.2\n", "line 3: a second row of image 001"),
    "a bad row": ("spacing.csv", "image,mm_per_px\n001,small\n", "line 2: 'small' is not"),
    "another header": ("spacing.csv", "image,mm\n001,0.1\n", "the header should be image,mm_per_px"),
    "an image twice, as a file": (
        "spacing.csv",
        "image,mm_per_px\n001,0.1\n001.png,0.2\n",
        "a second row of image 001",
    ),
    "another suffix": (
        "Spacing.csv.txt",
        "0.3",
        "Spacing.csv.txt: one file is read, spacing.txt or spacing.csv; rename it",
    ),
    "two of a name": ("Spacing.txt", "0.3", "Spacing.txt, spacing.txt: one file is read"),
}


@pytest.mark.parametrize("case", BAD_SPACINGS)
def test_bad_spacing(case, official_heads):
    file, text, message = BAD_SPACINGS[case]
    (official_heads / file).write_text(text)
    if case == "two of a name":
        (official_heads / "spacing.txt").write_text("0.3")
    assert message in refused(official_heads)


def test_two_spacing_files(official_heads):
    (official_heads / "spacing.txt").write_text("0.1")
    (official_heads / "spacing.csv").write_text("image,mm_per_px\n")
    assert "spacing.csv, spacing.txt: one file is read" in refused(official_heads)
    assert "--mm-per-px: '0' is not" in refused(official_heads, mm_per_px=0)


# --- refused


def refused(root, split="train", **options):
    """The message with which data is refused: one line."""
    with pytest.raises(InputError) as error:
        read(root, split, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def swap(k, x, y):
    return f"{y},{x}"


def widened(root):
    """Images as wide as high, so that x and y may change places."""
    for file in (root / "RawImage" / "TrainingData").iterdir():
        with Image.open(file) as picture:
            picture.crop((0, 0, 240, 240)).save(file)


def copy(source, target):
    """Copy an image and its annotations: (folder, id) each."""

    def spoil(root):
        shutil.copy(image_of(root, source[1], source[0]), image_of(root, target[1], target[0]))
        for old, new in zip(annotations(root, ids=[source[1]]), annotations(root, ids=[target[1]]), strict=True):
            if old != new:
                shutil.copy(old, new)

    return spoil


def image_only(root):
    """A training image with another name and another annotation in Test2Data."""
    shutil.copy(image_of(root, "003"), image_of(root, "301", "Test2Data"))


def more_landmarks(count):
    return each_text(lambda text: "\n".join((text.splitlines()[:K] * 2)[:count]) + "\n")


def other_points(places):
    """Replace the annotations of each image: places(a patient's landmarks (K, 2), rng) -> (K, 2)."""

    def spoil(root):
        for i, (senior, junior) in enumerate(
            zip(annotations(root, ["senior"]), annotations(root, ["junior"]), strict=True)
        ):
            points = np.loadtxt(senior, delimiter=",", max_rows=K)
            text = "\n".join(f"{x:.0f},{y:.0f}" for x, y in places(points, np.random.default_rng(i)))
            senior.write_text(text)
            junior.write_text(text)

    return spoil


def exchange(one, other, doctors=("senior", "junior")):
    """Exchange two landmarks, counted from 1, in all images."""
    order = list(range(K))
    order[one - 1], order[other - 1] = other - 1, one - 1
    return lines_in_order(order, doctors)


# another list: sella, nasion, orbitale, A, B, posterior and anterior nasal spine, incisors, menton, molars, ...
LIST = [1, 2, 3, 5, 6, 17, 18, 12, 11, 8, 12, 11, 10, 7, 9, 19, 19, 4, 10]
NO_HEAD = (
    "the landmarks are not those of a head, or not in the order of ISBI 2015 (4 of 4 images); correct it, or add --un"
)
TURNED = "the head is turned or mirrored: are x and y swapped, or does y count upwards? a line is x,y, y from the top"
REFUSED = {
    # other sets of landmarks
    "20 landmarks": (more_landmarks(20), "400_senior/001.txt: 20 landmarks, the 19 of ISBI 2015 are needed"),
    "29 landmarks": (more_landmarks(29), "001.txt: 29 landmarks, the 19 of ISBI 2015 are needed"),
    "38 landmarks": (more_landmarks(38), "001.txt: 38 landmarks, the 19 of ISBI 2015 are needed"),
    "29 of x y": (
        each_text(lambda text: "\n".join((text.splitlines()[:K] * 2)[:29]).replace(",", " ")),
        "001.txt: 29 landmarks",
    ),
    "18 landmarks": (each_text(lambda text: "\n".join(text.splitlines()[:18])), "001.txt: 18 lines, the 19"),
    "18 and classes": (each_text(lambda text: text.partition("\n")[2]), "001.txt: line 19: '1' is not x,y"),
    "no landmark": (each_text(lambda text: ""), "001.txt: 0 lines, the 19 of"),
    # a line
    "header": (one_line(1, "x,y"), "400_junior/002.txt: line 1: 'x,y' is not x,y"),
    "three numbers": (one_line(7, "1,50,60"), "002.txt: line 7: '1,50,60' is not x,y"),
    "decimal commas": (one_line(7, "50,1;60,1"), "line 7: '50,1,60,1' is not x,y"),
    "underscore": (one_line(7, "1_0,60"), "line 7: '1_0,60' is not x,y"),
    "half marked": (one_line(7, "nan,60"), "line 7: 'nan,60' is not x,y"),
    "infinite": (one_line(7, "inf,60"), "line 7: 'inf,60' is not x,y"),
    "outside": (one_line(7, "194,60"), "line 7: (194, 60) lies outside the image of 194 x 240 px"),
    "negative": (one_line(7, "60,-1"), "line 7: (60, -1) lies outside"),
    # not marked
    "0,0": (one_line(3, "0,0"), "002.txt: line 3: '0,0': orbitale is not marked, but all 19 landmarks are needed"),
    "0.0 0.0": (one_line(3, "0.0 0.0"), "line 3: '0.0,0.0': orbitale is not marked"),
    "-1,-1": (one_line(19, "-1,-1"), "line 19: '-1,-1': articulare is not marked"),
    "-999,-999": (one_line(1, "-999;-999"), "line 1: '-999,-999': sella is not marked"),
    "nan,nan": (one_line(8, "nan,nan"), "line 8: 'nan,nan': menton is not marked"),
    "NA NA": (one_line(8, "NA NA"), "menton is not marked"),
    "a comma": (one_line(8, ","), "line 8: ',': menton is not marked"),
    "an empty line": (one_line(8, ""), "line 8: '': menton is not marked"),
    # units
    "mm": (each_line(lambda k, x, y: f"{x / 10},{y / 10}"), "lie in a small part of the image; are they pixels"),
    "mm of 0.3": (each_line(lambda k, x, y: f"{x * 0.3},{y * 0.3}"), "(4 of 4 images); correct it, or add --unusual"),
    "0 to 1": (each_line(lambda k, x, y: f"{x / 194:.4f},{y / 240:.4f}"), "lie in a small part of the image; are they"),
    "percent": (each_line(lambda k, x, y: f"{x / 1.94:.1f},{y / 2.4:.1f}"), "lie in the upper left quarter"),
    "of a smaller copy": (each_line(lambda k, x, y: f"{x / 2},{y / 2}"), "lie in the upper left quarter"),
    "mm in one image": (
        each_line(lambda k, x, y: f"{x / 10},{y / 10}", ids=["003"]),
        "400_senior/003.txt: all landmarks lie in a small part of the image; "
        "are they pixels of this image (not mm, not 0 to 1, not of a smaller copy)? (1 of 4 images)",
    ),
    # axes and order
    "y,x": (
        lambda root: [widened(root), each_line(swap)(root)],
        f"001.txt: {TURNED} (4 of 4 images)",
    ),
    "y,x in one image": (
        lambda root: [widened(root), each_line(swap, ids=["004"])(root)],
        f"004.txt: {TURNED} (1 of 4 images)",
    ),
    "y,x, outside": (each_line(swap), "line 8: (200, 123) lies outside the image of 194 x 240 px; a line is x,y"),
    "y upwards": (each_line(lambda k, x, y: f"{x},{239 - y}"), f"001.txt: {TURNED}"),
    "upside down": (each_line(lambda k, x, y: f"{193 - x},{239 - y}"), f"001.txt: {TURNED}"),
    "on its side": (
        each_line(lambda k, x, y: f"{193 - y * 0.8:.0f},{x}"),
        f"001.txt: {TURNED}",
    ),
    "reverse order": (lines_in_order(range(K)[::-1]), NO_HEAD),
    "another order": (lines_in_order(np.random.default_rng(0).permutation(K)), "not in the order of ISBI 2015"),
    "two swapped": (
        lines_in_order([*range(7), 1, *range(8, K)]),
        "001.txt: landmark 8 (menton) is far from its position relative to the others (4 of 4 images)",
    ),
    "a digit less": (
        lambda root: [one_line(8, "12,200", doctor)(root) for doctor in ("senior", "junior")],
        "002.txt: landmark 8 (menton) is far from its position relative to the others (1 of 4 images)",
    ),
    "another list": (other_points(lambda points, rng: points[np.array(LIST) - 1] + rng.normal(0, 3, (K, 2))), NO_HEAD),
    "at random": (other_points(lambda points, rng: rng.uniform((5, 5), (188, 235), (K, 2))), NO_HEAD),
    "x of a smaller copy": (each_line(lambda k, x, y: f"{x / 5},{y}"), NO_HEAD),
    "on a circle": (
        other_points(lambda points, rng: 100 + 80 * np.stack([np.cos(np.arange(K) / 3), np.sin(np.arange(K) / 3)], 1)),
        NO_HEAD,
    ),
    "five other landmarks": (
        other_points(lambda points, rng: points + np.outer(np.isin(range(K), [2, 9, 14, 16, 18]), (-15, 20))),
        "the landmarks are not those of a head, or not in the order of ISBI 2015",
    ),
    # two exchanged
    "menton and gnathion": (
        exchange(8, 9),
        "001.txt: landmarks 8 (menton) and 9 (gnathion) seem to be exchanged (4 of 4 images); correct it, or add --un",
    ),
    "pogonion and gnathion": (exchange(7, 9), "landmarks 7 (pogonion) and 9 (gnathion) seem to be exchanged"),
    "porion and articulare": (exchange(4, 19), "landmarks 4 (porion) and 19 (articulare) seem to be exchanged"),
    "A and anterior nasal spine": (exchange(5, 18), "landmarks 5 (subspinale (A)) and 18 (anterior nasal spine) seem"),
    "lips": (exchange(13, 14), "landmarks 13 (upper lip) and 14 (lower lip) seem to be exchanged"),
    "a doctor's lips": (
        exchange(13, 14, ["junior"]),
        "400_junior/001.txt: landmarks 13 (upper lip) and 14 (lower lip) seem to be exchanged",
    ),
    "three exchanged": (lines_in_order([*range(6), 7, 8, 6, *range(9, K)]), "seem to be exchanged (4 of 4 images)"),
    # doctors
    "a doctor's reverse order": (lines_in_order(range(K)[::-1], ["junior"]), "001.txt: the doctors are "),
    "a doctor's mm": (each_line(lambda k, x, y: f"{x / 10},{y / 10}", ["junior"]), "px apart in landmark"),
    "a doctor's slip": (one_line(10, "150,60"), "px apart in landmark 10 (gonion) (1 of 4 images)"),
    "a doctor's next line": (lines_in_order([*range(1, K), 0], ["junior"]), "the doctors are "),
    "a doctor's other image": (
        each_line(lambda k, x, y: f"{x + 12},{y + 12}", ["junior"], ["002"]),
        "002.txt: the doctors are far apart in all landmarks: another order, or another image (1 of 4 images)",
    ),
    # files
    "a pipe as annotation": (
        lambda root: [annotations(root)[0].unlink(), os.mkfifo(annotations(root)[0])],
        "400_senior/001.txt: no regular file; remove it",
    ),
    "a pipe as image": (
        lambda root: [image_of(root).unlink(), os.mkfifo(image_of(root))],
        "002.png: no regular file; remove it",
    ),
    "A and a": (
        lambda root: [
            image_of(root, "001").rename(image_of(root, "A")),
            image_of(root, "002").rename(image_of(root, "a")),
        ],
        "a.png: another file in this folder has the same name; remove one",
    ),
    ".webp": (
        stored(lambda picture, _: picture, ".webp"),
        "002.webp: .webp is not supported; convert it to .png",
    ),
    ".gif": (stored(lambda picture, _: picture, ".gif"), "002.gif: .gif is not supported"),
    ".dcm": (lambda root: image_of(root).rename(image_of(root).with_suffix(".dcm")), "002.dcm: .dcm is not supported"),
    ".jp2": (lambda root: image_of(root).rename(image_of(root).with_suffix(".jp2")), ".jp2 is not supported"),
    "float pixels": (
        stored(lambda _, pixels: Image.fromarray(pixels.astype(np.float32)), ".tif"),
        "002.tif: grey values that are not of 16 bits; convert it to 8 or 16 bits",
    ),
    "more than 16 bits": (
        stored(lambda _, pixels: Image.fromarray(pixels.astype(np.int32) * 1000), ".tif"),
        "002.tif: grey values that are not of 16 bits",
    ),
    "16 bits in colour": (deep_png, "002.png: 16 bits in colour or with transparency; store it as grey, or with 8"),
    "16 bits with transparency": (lambda root: deep_png(root, 4, 2), "002.png: 16 bits in colour or with transparency"),
    "16 bits in colour, TIFF": (deep_tiff, "002.tif: 16 bits in colour or with transparency"),
    "nothing but transparency": (
        stored(lambda picture, pixels: with_alpha(picture, np.zeros_like(pixels))),
        "002.png: transparent everywhere; store it without its alpha channel",
    ),
    "negative pixels": (
        stored(lambda _, pixels: Image.fromarray(pixels.astype(np.int32) - 300), ".tif"),
        "002.tif: grey values that are not of 16 bits",
    ),
    "no image": (
        lambda root: image_of(root).write_text("nothing"),
        "002.png: not a readable image (BMP, PNG, JPEG, TIFF), or truncated",
    ),
    "annotation twice": (
        lambda root: shutil.copy(annotations(root)[1], annotations(root)[1].with_suffix(".TXT")),
        "002.txt: another file in this folder has the same name; remove one",
    ),
    "own image without annotation": (
        lambda root: Image.new("L", (194, 240)).save(image_of(root, "own")),
        "400_senior/own.txt is missing; add it or remove ",
    ),
    "own annotation without image": (
        lambda root: [shutil.copy(file, file.with_stem("own")) for file in annotations(root, ids=["001"])],
        "own.txt: the image own is missing in",
    ),
    "a doctor for some images": (
        lambda root: annotations(root, ["junior"])[2].unlink(),
        "400_junior/003.txt is missing",
    ),
    # in train and in a test split
    "the same id in Test1Data": (
        copy(("TrainingData", "001"), ("Test1Data", "001")),
        "the id 001 is in RawImage/TrainingData and RawImage/Test1Data; remove one",
    ),
    "the same id in Test2Data": (
        copy(("Test2Data", "301"), ("TrainingData", "301")),
        "the id 301 is in RawImage/TrainingData and RawImage/Test2Data; remove one",
    ),
    "the same image in Test1Data": (
        copy(("TrainingData", "001"), ("Test1Data", "160")),
        "001.png and 160.png in RawImage/TrainingData and RawImage/Test1Data are the same image; remove one",
    ),
    "the same image, another annotation": (image_only, "003.png and 301.png in RawImage/TrainingData and"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, official_heads):
    read(official_heads)
    spoil, message = REFUSED[case]
    spoil(official_heads)
    assert message in refused(official_heads)


PLAUSIBILITY = [
    "mm",
    "0 to 1",
    "percent",
    "y,x in one image",
    "y upwards",
    "reverse order",
    "a digit less",
    "another list",
    "menton and gnathion",
    "a doctor's mm",
]


@pytest.mark.parametrize("case", PLAUSIBILITY)
def test_unusual_data_is_read_if_told(case, official_heads):
    REFUSED[case][0](official_heads)
    data = read(official_heads, unusual=True)
    doctors = np.stack([read_doctors(entry, (240, 240)) for entry in index(official_heads, "train")])
    assert np.array_equal(data.landmarks_px0, doctors.mean(1))


@pytest.mark.parametrize("case", ["0,0", "outside", "29 landmarks", "the same image in Test1Data"])
def test_unusual_does_not_make_wrong_data_right(case, official_heads):
    spoil, message = REFUSED[case]
    spoil(official_heads)
    assert message in refused(official_heads, unusual=True)


def patients(count):
    """Annotations (N, 1, K, 2) of patients of the population, and what else ``plausibility.check`` takes."""
    shape = json.loads(SHAPE.read_text())
    points = np.stack([sample_landmarks(np.random.default_rng(i), shape)[0] for i in range(count)])
    return [Entry(str(i), None, (Path(f"{i}.txt"),)) for i in range(count)], points[:, None], [(2400, 1935)] * count


@pytest.mark.parametrize(
    ("one", "other", "counts"),  # so many images are accepted, warned of, refused
    [(11, 12, (1, 4, 20)), (8, 9, (1, 2, 5)), (7, 9, (1, 2, 5)), (5, 18, (None, None, 2)), (4, 19, (None, None, 1))],
)
def test_exchanged_landmarks_are_found_in_the_images_together(one, other, counts):
    for accepted, count in zip((True, None, False), counts, strict=True):
        entries, points, sizes = patients(count or 1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            plausibility.check(entries, points, sizes)
            plausibility.check(entries, (points * 0.7 - (1934, 0)) * (-1, 1), sizes)  # smaller, and facing left
            assert not said
            points[:, :, [one - 1, other - 1]] = points[:, :, [other - 1, one - 1]]
            message = rf"txt: landmarks {one} \(.*\) and {other} \(.*\) seem to be exchanged \(\d+ of {count} images\)"
            if accepted is False:
                with pytest.raises(InputError, match=message):
                    plausibility.check(entries, points, sizes)
            elif count:
                plausibility.check(entries, points, sizes)
                assert len(said) == (accepted is None)
                assert all(re.search(message, str(warning.message)) for warning in said)


def test_some_other_landmarks_are_found_in_the_images_together():
    """A place on the ramus for gonion, the nose's tip for subnasale: too near for one image."""
    entries, points, sizes = patients(6)
    points[:, :, 9] += (-20, -180)
    points[:, :, 14] += (140, -100)
    for count in (4, 6):
        if count > 4:
            with pytest.raises(InputError, match=NO_HEAD.partition(" (")[0]):
                plausibility.check(entries, points, sizes)
        else:
            plausibility.check(entries[:count], points[:count], sizes[:count])


BAD_KAGGLE = {
    "20 landmarks": (
        rows(lambda table: joined([[*row, *(("20_x", "20_y") if row is table[0] else "12")] for row in table])),
        "train_senior.csv: 20 landmarks, the 19 of ISBI 2015 are needed",
    ),
    "18 landmarks": (rows(lambda table: joined([row[:-2] for row in table])), "18 landmarks, the 19 of ISBI 2015"),
    "no 19_y": (
        rows(lambda table: joined([row[:-1] for row in table])),
        "the header should be image_path,1_x,1_y,...,19_y",
    ),
    "no header": (rows(lambda table: joined(table[1:])), "the header should be image_path,1_x,1_y,...,19_y"),
    "a column twice": (
        rows(lambda table: joined([[*row, row[3]] for row in table])),
        "19_y, each column once",
    ),
    "a field more": (
        rows(lambda table: joined([table[0], *[[*row, "1"] for row in table[1:]]])),
        "line 2: 40 fields, 39",
    ),
    "not marked": (
        rows(lambda table: joined([table[0], *[[*row[:5], "", "", *row[7:]] for row in table[1:]]])),
        "train_senior.csv: line 5: image 001, landmark 3: ',': orbitale is not marked",
    ),
    "0,0": (
        rows(lambda table: joined([table[0], *[[*row[:5], "0", "0", *row[7:]] for row in table[1:]]])),
        "landmark 3: '0,0': orbitale is not marked",
    ),
    "decimal commas": (
        rows(lambda table: joined([table[0], *[[row[0], *(f"{n},5" for n in row[1:])] for row in table[1:]]], ";")),
        "image 001, landmark 1: ",
    ),
    "y,x": (
        rows(
            lambda table: joined(
                [
                    [row[0], *np.array(row[1:]).reshape(-1, 2)[:, ::-1].ravel()] if i else row
                    for i, row in enumerate(table)
                ]
            )
        ),
        "line 5: image 001, landmark 8: (200, 123) lies outside the image of 194 x 240 px; a line is x,y",
    ),
    "an image in train and test1": (
        lambda root: (root / "test1_senior.csv").write_text((root / "train_senior.csv").read_text()),
        "151.png: no row in",
    ),
    "an image of train in test1, too": (
        lambda root: (
            (root / "test1_senior.csv").open("a").write((root / "train_senior.csv").read_text().splitlines()[1])
        ),
        "the id 004 is in train_senior.csv and test1_senior.csv; remove one",
    ),
    "a copy of a training image": (
        lambda root: shutil.copy(root / "cepha400" / "001.png", root / "cepha400" / "301.png"),
        "001.png and 301.png in train_senior.csv and test2_senior.csv are the same image; remove one",
    ),
    "own image of its list missing": (
        rows(lambda table: joined([*table, ["own.png", *table[1][1:]]])),
        "_senior.csv: the image own is missing in",
    ),
    "an id with dots": (
        rows(lambda table: joined([*table, ["1.2.840", *table[1][1:]]])),
        "the image 1.2.840 is missing in",
    ),
    "two tables of a name": (
        lambda root: shutil.copy(root / "train_senior.csv", root / "Train_Senior.csv"),
        "are in the same folder; remove one",
    ),
    ".webp": (
        lambda root: (root / "cepha400" / "001.png").rename(root / "cepha400" / "001.webp"),
        "001.webp: .webp is not supported",
    ),
}


@pytest.mark.parametrize("case", BAD_KAGGLE)
def test_kaggle_refused(case, kaggle_heads):
    read(kaggle_heads)
    spoil, message = BAD_KAGGLE[case]
    spoil(kaggle_heads)
    assert message in refused(kaggle_heads)


# --- the same image in two splits, stored differently


def stored_again(suffix, size=SIZE0, **options):
    def store(root):
        with Image.open(image_of(root, "003")) as picture:
            picture.resize(size[::-1], Image.Resampling.BILINEAR).save(
                image_of(root, "152", "Test1Data").with_suffix(suffix), **options
            )
        if suffix != ".png":
            image_of(root, "152", "Test1Data").unlink()

    return store


@pytest.mark.parametrize(
    "store",
    [
        stored_again(".bmp"),
        stored_again(".jpg", quality=40),
        stored_again(".png", compress_level=0),
        stored_again(".tif"),
        stored_again(".png", (480, 388)),
    ],
    ids=["bmp", "jpg", "png", "tif", "twice the size"],
)
def test_a_training_image_stored_in_another_way(store, official_heads):
    check_disjoint(read(official_heads), read(official_heads, "test"))
    store(official_heads)
    train, test = read(official_heads), read(official_heads, "test", unusual=True)
    with pytest.raises(InputError, match=r"003.png and .*152\.\w+ are the same image; remove one"):
        check_disjoint(train, test)


@pytest.mark.parametrize("grey", [0, 255])
def test_one_odd_image_does_not_make_the_others_the_same(grey, official_heads):
    Image.new("L", SIZE0[::-1], grey).save(image_of(official_heads, "151", "Test1Data"))
    check_disjoint(read(official_heads), read(official_heads, "test1"))


def test_repetitions_in_the_official_data_are_said(official_heads, tmp_path):
    """The real data has radiographs under two ids, which are no reason to refuse it: of that size and those ids."""
    rng = np.random.default_rng(0)
    for name in ("TrainingData", "Test1Data"):
        (tmp_path / "RawImage" / name).mkdir(parents=True)
    for name in ("400_senior", "400_junior"):
        (tmp_path / name).mkdir()
    for folder, id in (("TrainingData", "001"), ("TrainingData", "002"), ("Test1Data", "275"), ("Test1Data", "276")):
        file = image_of(tmp_path, id, folder)
        if id == "275":
            shutil.copy(image_of(tmp_path, "001"), file)
        else:
            Image.fromarray(rng.integers(0, 256, (30, 24), dtype=np.uint8)).resize((1935, 2400)).save(file)
        for doctor in ("400_senior", "400_junior"):
            lines = "\n".join(f"{x:.0f},{y:.0f}" for x, y in MEAN * 10)
            (tmp_path / doctor / f"{id}.txt").write_text(lines)
    train, test = read(tmp_path), read(tmp_path, "test1")
    with pytest.warns(UserWarning, match=r"^1 radiographs are in both splits, .*\(001 and 275 are the first\)"):
        check_disjoint(train, test)


# --- images without annotation


def test_own_images(official_heads, tmp_path):
    files = [image_of(official_heads, "004"), image_of(official_heads, "151", "Test1Data")]
    own = shutil.copy(files[0], tmp_path / "NA.png")
    data = Cephalograms.from_files([own, str(files[1])], SIZE, mm_per_px=0.2)
    assert data.ids == ["NA", "151"] and data.files == [own, files[1]] and len(data) == 2
    assert data.landmarks.shape == data.landmarks_px0.shape == (2, K, 2)
    assert data.landmarks.isnan().all() and data.landmarks_px0.isnan().all()
    assert data.landmarks.dtype == torch.float32 and data.landmarks_px0.dtype == torch.float64
    assert data.mm_per_px0.tolist() == [0.2, 0.2] and data.sizes.tolist() == [list(SIZE0)] * 2
    assert torch.equal(data.images[0], read(official_heads).images[3])
    assert data.sha256 != Cephalograms.from_files([files[1]], SIZE, mm_per_px=0.2).sha256


def write_black_png(path, size):
    """A PNG of a palette and as few bytes as possible: its rows are missing, but for few, which no check needs."""
    write_png(path, size, 8, 3, bytes(min((size[0] + 1) * size[1], 10**6)), (b"PLTE", bytes(3)))


OWN = {
    "missing": (["nowhere.png"], "nowhere.png: no such file"),
    "a pipe": (["pipe.png"], "pipe.png: no such file, or no regular one"),
    "a device": (["device.png"], "device.png: no such file, or no regular one"),
    "EPS, which would run a program": (
        ["eps.png"],
        r"eps.png: not a readable image \(BMP, PNG, JPEG, TIFF\), or truncated",
    ),
    "GIF": (["gif.png"], r"gif.png: not a readable image \(BMP, PNG, JPEG, TIFF\)"),
    "WebP": (["webp.png"], r"webp.png: not a readable image \(BMP, PNG, JPEG, TIFF\)"),
    "huge, of few bytes": (["bomb.png"], "bomb.png: 13300 x 13300 px; reduce it to 100 million"),
    "of 900 million pixels": (["larger.png"], "larger.png: 30000 x 30000 px"),
    "a name of 201 bytes": ([f"{'x' * 201}.png"], "rename it: .* > 200 bytes"),
    "a formula as a name": (["=1+1.png"], r"=1\+1.png: rename it: .* or = . - @ at"),
    "a name of 202 bytes in 101 letters": ([f"{'é' * 101}.png"], "rename it: .* > 200 bytes"),
    "a name for the terminal": (["\x1b[2J.png"], "rename it: not UTF-8"),
    "a name of two lines": (["a\nb.png"], "rename it: not UTF-8"),
    "a name that runs backwards": (["\u202egnp.png"], "rename it: not UTF-8"),
    "A and a": (["a.png", "folder/A.jpg"], "folder/A.jpg: a second image named A; rename one"),
    "DICOM": (["a.dcm"], "a.dcm: .dcm is not supported; convert it to .png"),
    "folder": (["folder"], "folder: an image without suffix is not supported"),
    "no image": (["a.png"], "a.png: not a readable image"),
    "no UTF-8": (["\udcbb\udcbc.png"], "rename it: not UTF-8"),
    "two of a name": (["a.png", "folder/a.jpg"], "folder/a.jpg: a second image named a; rename one"),
}


@pytest.mark.parametrize("case", OWN)
def test_bad_own_images(case, tmp_path):
    names, message = OWN[case]
    (tmp_path / "folder").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "\udcbb\udcbc.png")
    for name in ("a.dcm", "a.png", "folder/a.jpg"):
        (tmp_path / name).write_text("nothing")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for format in ("eps", "gif", "webp"):
        Image.new("RGB", SIZE).save(tmp_path / f"{format}.png", format)
    for name, size in (("bomb", (13300, 13300)), ("larger", (30000, 30000))):
        write_black_png(tmp_path / f"{name}.png", size)
    with pytest.raises(InputError, match=message):
        Cephalograms.from_files([tmp_path / name for name in names], SIZE)


# --- targets


def same(*targets):
    return {"151": targets, "NA": targets}


def test_a_name_goes_before_a_number_and_must_be_of_one_landmark(tmp_path):
    file, teeth = tmp_path / "targets.csv", ("2", "1", "canine (left)", "canine (right)")
    file.write_text("landmark,x,y\n1,1,1\n4,2,2\nleft,3,3\n")
    assert read_targets(file, ["151"], teeth)[1].tolist() == [[False, True, True, True]]
    file.write_text("landmark,x,y\ncanine,1,1\n")
    with pytest.raises(InputError, match="line 2: there is no landmark 'canine'"):
        read_targets(file, ["151"], teeth)


TARGETS = {
    "numbers": ("landmark,x,y\n8,130,190\n19,1.5,2\n", same((8, 130, 190), (19, 1.5, 2))),
    "spaces after commas": ("landmark, x, y\n8, 130, 190\n", same((8, 130, 190))),
    "spaces": ("landmark x  y\n  8   130 190 \n", same((8, 130, 190))),
    "semicolons": ("landmark;x;y\n8;130;190\n", same((8, 130, 190))),
    "tabs": ("landmark\tx\ty\n8\t130\t190\n", same((8, 130, 190))),
    "floats": ("landmark,x,y\n8.0,130.0,1.9e2\n", same((8, 130, 190))),
    "names": ("landmark,x,y\nmenton,130,190\nSella,1,2\n", same((8, 130, 190), (1, 1, 2))),
    "name with a letter": ("landmark,x,y\nsubspinale (A),3,4\n", same((5, 3, 4))),
    "name without": ("landmark,x,y\nSupramentale,3,4\n", same((6, 3, 4))),
    "the letter": ("landmark,x,y\nA,3,4\nb,5,6\n", same((5, 3, 4), (6, 5, 6))),
    "name of several words": ("landmark,x,y\nsoft tissue pogonion,3,4\n", same((16, 3, 4))),
    "name among spaces": ('landmark x y\n"upper lip" 3 4\n', same((13, 3, 4))),
    "other order": ("y,landmark,x\n190,8,130\n", same((8, 130, 190))),
    "capitals": ("Landmark,X,Y\n8,130,190\n", same((8, 130, 190))),
    "Windows": ("\ufefflandmark,x,y\r\n8,130,190\r\n\r\n", same((8, 130, 190))),
    "outside, which is checked later": ("landmark,x,y\n8,-5,9999\n", same((8, -5, 9999))),
    "images by their files": (
        "image,landmark,x,y\nNA.png,8,130,190\nx/151.bmp,8,120,180\n",
        {"151": [(8, 120, 180)], "NA": [(8, 130, 190)]},
    ),
    "ids with spaces": (
        "image,landmark,x,y\nN A,8,130,190\n151 ,3,1,1\n",
        {" 151": [(3, 1, 1)], "N A": [(8, 130, 190)]},
    ),
    "images": (
        "image,landmark,x,y\nNA,8,130,190\n151,8,120,180\n151,gonion,1,2\n",
        {"151": [(8, 120, 180), (10, 1, 2)], "NA": [(8, 130, 190)]},
    ),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets(case, tmp_path):
    text, expected = TARGETS[case]
    (tmp_path / "targets.csv").write_bytes(text.encode())
    places, targeted = read_targets(tmp_path / "targets.csv", list(expected), LANDMARKS)
    wanted = {(i, k): [x, y] for i, rows in enumerate(expected.values()) for k, x, y in rows}
    assert {(i, k + 1): places[i, k].tolist() for i, k in np.argwhere(targeted)} == wanted


BAD_TARGETS = {
    "no such landmark": ("landmark,x,y\n20,10,10\n", "line 2: there is no landmark '20', only 1 to 19"),
    "landmark zero": ("landmark,x,y\n1,1,1\n0,10,10\n", "line 3: there is no landmark '0'"),
    "a fraction": ("landmark,x,y\n8.5,10,10\n", "line 2: there is no landmark '8.5'"),
    "no such name": ("landmark,x,y\nchin,10,10\n", "line 2: there is no landmark 'chin', only 1 to 19 and names"),
    "no landmark": ("landmark,x,y\n,10,10\n", "line 2: there is no landmark ''"),
    "not a number": ("landmark,x,y\n3,ten,10\n", "line 2: 'ten,10' is not x,y"),
    "infinite": ("landmark,x,y\n3,inf,10\n", "line 2: 'inf,10' is not x,y"),
    "a field less": ("landmark,x,y\n3,10\n", "line 2: 2 fields, 3 needed"),
    "a field more": ("landmark,x,y\n3,10,10,10\n", "line 2: 4 fields, 3 needed"),
    "an empty field": ("landmark,x,y\n3,10,\n", "line 2: '10,' is not x,y"),
    "twice": ("landmark,x,y\n3,1,1\n3,2,2\n", "line 3: landmark 3 has a target already"),
    "twice by name": ("landmark,x,y\n3,1,1\norbitale,2,2\n", "line 3: landmark 3 has a target already"),
    "no header": ("3,10,10\n", "the header should be landmark,x,y"),
    "another header": ("landmark,x,y,z\n3,1,1,1\n", "the header should be landmark,x,y, or image,landmark,x,y"),
    "no row": ("landmark,x,y\n", "no target; at least one row"),
    "empty": ("", "the header should be landmark,x,y"),
    "unknown image": (
        "image,landmark,x,y\n7,3,1,1\n",
        "line 2: image '7' is not among the 2 to be attacked (151 .. NA)",
    ),
    "no image": ("image,landmark,x,y\n,3,1,1\n", "line 2: image '' is not among the 2 to be attacked"),
    "an image without target": ("image,landmark,x,y\n151,3,1,1\n", "no target for image NA"),
    "twice for an image": (
        "image,landmark,x,y\n151,3,1,1\n151,3,1,1\n",
        "line 3: landmark 3 of image 151 has a target already",
    ),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_targets(case, tmp_path):
    text, message = BAD_TARGETS[case]
    file = tmp_path / "targets.csv"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_targets(file, ["151", "NA"], LANDMARKS)
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value)


def test_no_file_of_targets(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.csv: not a readable CSV file"):
        read_targets(tmp_path / "nowhere.csv", ["151"])


# --- the bounds of plausibility


@pytest.mark.parametrize(
    ("count", "distance", "message"),
    [
        (6, 0.03, None),
        (6, 0.04, "a.txt: the doctors are far apart in most images: other images, or another order (6 of 6 images)"),
        (4, 0.04, None),
        (1, 0.06, "a.txt: the doctors are far apart in all landmarks: another order, or another image (1 of 1 images)"),
    ],
)
def test_doctors_that_differ(count, distance, message):
    """``distance``: between the doctors in all landmarks, relative to the diagonal of the landmarks' bounding box."""
    entries = [Entry("a", Path("a.png"), (Path("a.txt"), Path("b.txt")))] * count
    shift = distance * np.hypot(*np.ptp(MEAN, axis=0)) / np.sqrt(2)
    doctors = np.repeat(np.stack([MEAN - shift / 2, MEAN + shift / 2])[None], count, axis=0)
    if message is None:
        plausibility.check(entries, doctors, [SIZE0] * count)
    else:
        with pytest.raises(InputError) as error:
            plausibility.check(entries, doctors, [SIZE0] * count)
        assert str(error.value).startswith(message)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_real_annotations_are_plausible_with_a_margin():
    """Still accepted with every deviation from the mean shape, and all between the doctors, 1.5 times as large."""
    for split in ("train", "test1"):
        entries = index(REAL, split)
        doctors = np.stack([read_doctors(entry, (2400, 1935)) for entry in entries])
        sizes = [(2400, 1935)] * len(entries)
        with warnings.catch_warnings(action="error"):
            plausibility.check(entries, doctors, sizes)
            plausibility.check(entries, doctors * (1, 0.8), sizes)  # stretched
        truth = doctors.mean(1, keepdims=True)
        plausibility.check(entries, truth + 1.5 * (doctors - truth), sizes)
        plausibility.check(entries, doctors + 0.5 * (truth - truth.mean(0)), sizes)
        turned = doctors.copy()
        turned[..., 0] = 1934 - turned[..., 0]  # facing left
        plausibility.check(entries, turned, sizes)
