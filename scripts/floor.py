"""How exact the truth of Test1 is, by radiographs that the data has under two ids, each with marks of its own.

    python test.py --tag TAG --split test1 --subpixel --rand clean/TAG
    python scripts/floor.py --out floor clean/TAG            # of any number of detectors, or of none

Writes into --out: pairs.csv, the pairs, how equal their images are and how far apart their truths; distances.csv, how
far apart marks of the same radiograph are, and the errors of the detectors with and without the repeated images, by
landmark, with 95 % intervals by a bootstrap over images. See docs/floor.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, when this file is run by its path

import numpy as np
import pandas as pd

from dataset import Cephalograms, rescale, same_radiographs
from eval import SDR_MM, exact, interval, read_records
from readers.images import read_image
from support import command
from support.errors import InputError
from support.files import own_folder, write_table


def main(argv=None):
    parser = command.Parser("How exact the truth of Test1 is, by its repeated radiographs.")
    parser.add_argument("folders", nargs="*", metavar="DIR", help="output folders of test.py --split test1")
    parser.add_argument("--data", default="dataset", help="folder of the images")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write to")
    args = parser.parse_args(argv)
    train, test = (Cephalograms(args.data, split, (80, 64)) for split in ("train", "test1"))
    if test.doctors_px0.shape[1] != 2:
        raise InputError(f"{args.data}: the marks of two doctors are needed, not of one")
    content = {"image": test.ids}
    found = {name: read_records({Path(name) / "predictions.csv": content}, test.names) for name in args.folders}
    pairs = [compare(train, i, test, j) for i, j in same_radiographs(train, test)]
    pairs += [compare(test, i, test, j) for i, j in same_radiographs(test, test) if i < j]
    if not pairs:
        raise InputError(f"{args.data}: no image of test1 is repeated, in train or in test1: nothing to measure")
    marks, pairs = np.stack([pair.pop("marks") for pair in pairs], axis=2), pd.DataFrame(pairs)
    with own_folder(Path(args.out), "scripts/floor.py", "--out", "distances.csv"):
        write_table(Path(args.out) / "distances.csv", summarize(distances(pairs, marks, test, found), test.names))
        write_table(Path(args.out) / "pairs.csv", pairs)
    print(f"{len(pairs)} pairs, their truths {pairs['truths_mm'].mean():.2f} mm apart; written to {args.out}/")


def compare(one, i, other, j):
    """A row of pairs.csv, and "marks": (2 images, 2 doctors, K, 2) in mm, both on the second image.

    Before, the first image is moved by whole pixels (x, y) onto the second, by the peak of their phase correlation.
    """
    size = tuple(other.sizes[j].tolist())
    images = np.stack([read_image(file, size)[0].astype(float) for file in (one.files[i], other.files[j])])
    first, second = np.fft.fft2(images * np.outer(*map(np.hanning, size)))  # the window hides the edges
    correlation = np.fft.fftshift(np.fft.ifft2(np.exp(1j * np.angle(second * first.conj()))).real)
    y, x = np.subtract(np.unravel_index(correlation.argmax(), size), np.array(size) // 2)
    inside = slice(max(abs(y), abs(x)), -max(abs(y), abs(x)) or None)  # what is moved out comes in opposite
    gap = abs(np.roll(images[0], (y, x), (0, 1)) - images[1])[inside, inside]
    moved = rescale(one.doctors_px0[i], one.sizes[i], size).numpy() + (x, y)
    marks = np.stack([moved, other.doctors_px0[j].numpy()]) * other.mm_per_px0[j].item()
    row = {"of": one.split, "image": one.ids[i], "test1": other.ids[j], "x_px0": x, "y_px0": y, "marks": marks}
    return row | {"equal_%": 100 * (gap == 0).mean(), "levels": gap.mean(), "truths_mm": apart(*marks.mean(1)).mean()}


def apart(one, other):
    """Distances of positions (..., 2), rounded, so that 2 mm are within 2 mm."""
    return np.linalg.norm(one - other, axis=-1).round(9)


def distances(pairs, marks, test, found):
    """[(between what, images, distances (images, K) in mm)].

    Between both truths of a pair, the same by sqrt(2) ("exact"), a doctor's two marks, both doctors' marks; and errors
    of detectors: on all of test1, without the images of train, with each radiograph once, and on the images of train by
    either truth.

    Args:
        marks: (2 images, 2 doctors, pairs, K, 2) in mm.
        found: {name of a detector: its records of all images of test1}.
    """
    places, train = np.array([test.ids.index(id) for id in pairs["test1"]]), (pairs["of"] == "train").to_numpy()
    truths, mm = marks.mean(1), test.mm_per_px0.numpy()[:, None, None]
    between, (senior, junior), doctors = apart(*truths), apart(*marks), apart(*marks[1])
    parts = [("truths", "pairs", between), ("truths", "train", between[train]), ("exact", "pairs", between / 2**0.5)]
    parts += [("senior", "pairs", senior), ("junior", "pairs", junior), ("doctors", "pairs", doctors)]
    parts += [("doctors", "test1", apart(*test.doctors_px0.numpy().swapaxes(0, 1) * mm))]
    for name, table in found.items():
        points = table.set_index("image").loc[test.ids, ["x_px0", "y_px0"]].to_numpy().reshape(len(test), -1, 2) * mm
        errors = apart(points, test.landmarks_px0.numpy() * mm)
        one, two = apart(points[places], truths)[:, train]
        parts += [(name, "test1", errors), (name, "without train", np.delete(errors, places[train], 0))]
        parts += [(name, "once", np.delete(errors, places, 0)), (name, "train truth", one), (name, "test1 truth", two)]
    return parts


def summarize(parts, names):
    """distances.csv: MRE and SDR of ``distances``, by landmark and of all, with their intervals."""
    rows = []
    for *labels, found in (part for part in parts if len(part[-1])):
        for name, chosen in zip((*names, "all landmarks"), (*found.T[..., None], found), strict=True):
            scores = np.stack([chosen, *(100 * (chosen <= t) for t in SDR_MM)], axis=-1).mean(1)
            ends = np.stack(interval(scores, lambda v: v.mean(0)))
            ends[:, 1:] = exact(*ends[:, 1:], len(found))  # of SDR
            rows.append([*labels, len(found), name, *ends.T.ravel()])
    ends = [f"{score}{end}" for score in ("mre_mm", *(f"sdr_{t}mm_%" for t in SDR_MM)) for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["between", "images", "count", "landmark", *ends])


if __name__ == "__main__":
    command.run(main)
