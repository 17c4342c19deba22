"""How the letters of the fancy attack were drawn: a position for each landmark, as files for test.py --targets.

    python tests/letters.py      # writes experiments/letters/<letter>.csv, px of the original, 1935 x 2400

Points are spread evenly over a letter's strokes. Landmarks are assigned to them so that the distances from the mean
shape are small, since the attack is hard enough.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "experiments" / "letters"
LEFT, TOP, WIDTH, HEIGHT = 600, 1000, 900, 1040  # px0: where landmarks usually are


def arc(start, end, y=0.5, height=1.0):
    """Points of an ellipse of width 1 around (0.5, y), from angle to angle in degrees, counterclockwise."""
    return [(0.5 + np.cos(a) / 2, y - height * np.sin(a) / 2) for a in np.radians(np.linspace(start, end, 60))]


STROKES = {  # polylines of (x, y), both from 0 to 1, y downwards
    "A": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.6), (0.8, 0.6)]],
    "C": [arc(45, 315)],
    "I": [[(0.2, 0), (0.8, 0)], [(0.5, 0), (0.5, 1)], [(0.2, 1), (0.8, 1)]],
    "M": [[(0, 1), (0, 0), (0.5, 0.7), (1, 0), (1, 1)]],
    "S": [arc(30, 270, y=0.25, height=0.5) + arc(90, -150, y=0.75, height=0.5)],
}


def spread(strokes, count):
    """``count`` points (count, 2) on the strokes, evenly spaced on each."""
    lengths = [np.linalg.norm(np.diff(stroke, axis=0), axis=1) for stroke in strokes]
    total = sum(length.sum() for length in lengths)
    points = []
    for stroke, length in zip(strokes, lengths, strict=True):
        n = round(count * length.sum() / total)
        places = (np.arange(n) + 0.5) / n * length.sum()
        along = np.r_[0, length.cumsum()]
        points.append(np.stack([np.interp(places, along, axis) for axis in np.transpose(stroke)], axis=-1))
    return np.concatenate(points)


def assign(points, landmarks):
    """The points in the order of their landmarks: pairs are swapped while that reduces the squared distances."""
    cost = np.square(landmarks[:, None] - points).sum(-1)
    order, before = np.arange(len(points)), None
    while not np.array_equal(order, before):
        before = order.copy()
        for pair in np.argwhere(np.tri(len(points), k=-1)):
            swapped = order[pair[::-1]]
            if cost[pair, swapped].sum() < cost[pair, order[pair]].sum() - 1e-9:
                order[pair] = swapped
    return points[order]


def main():
    mean = np.array(json.loads((FOLDER.parents[1] / "assets" / "shape_model.json").read_text())["mean"])
    for letter, strokes in STROKES.items():
        points = assign(spread(strokes, len(mean)) * (WIDTH, HEIGHT) + (LEFT, TOP), mean)
        table = pd.DataFrame(points.round().astype(int), range(1, len(mean) + 1), ["x", "y"])
        table.to_csv(FOLDER / f"{letter}.csv", index_label="landmark", lineterminator="\n")


if __name__ == "__main__":
    main()
