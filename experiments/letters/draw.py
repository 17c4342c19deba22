"""Draw the letters of the fancy attack: a position for each of the 19 landmarks, as files for test.py --targets.

    python experiments/letters/draw.py      # writes <letter>.csv beside this file, px of the original, 1935 x 2400

Points are spread evenly over a letter's strokes. Landmarks are assigned to them so that the distances from the mean
shape are small, since the attack is hard enough.
"""

import csv
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SHAPE = FOLDER.parent.parent / "assets" / "shape_model.json"
LEFT, TOP, WIDTH, HEIGHT = 600, 1000, 900, 1040  # px0: where landmarks usually are

STROKES = {  # polylines of (x, y), both from 0 to 1, y downwards
    "A": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.6), (0.8, 0.6)]],
    "C": [[(0.5 + 0.5 * np.cos(a), 0.5 - 0.5 * np.sin(a)) for a in np.radians(np.linspace(45, 315, 60))]],
    "I": [[(0.2, 0), (0.8, 0)], [(0.5, 0), (0.5, 1)], [(0.2, 1), (0.8, 1)]],
    "M": [[(0, 1), (0, 0), (0.5, 0.7), (1, 0), (1, 1)]],
}


def spread(strokes, count):
    """``count`` points (count, 2) on the strokes, evenly spaced on each."""
    strokes = [np.array(stroke, float) for stroke in strokes]
    lengths = [np.r_[0, np.linalg.norm(np.diff(stroke, axis=0), axis=1).cumsum()] for stroke in strokes]
    exact = np.array([along[-1] for along in lengths])
    exact *= count / exact.sum()
    counts = exact.astype(int)
    counts[np.argsort(counts - exact)[: count - counts.sum()]] += 1  # the largest remainders
    points = []
    for stroke, along, n in zip(strokes, lengths, counts, strict=True):
        places = (np.arange(n) + 0.5) / n * along[-1]
        points.append(np.stack([np.interp(places, along, axis) for axis in stroke.T], axis=-1))
    return np.concatenate(points)


def assign(points, landmarks):
    """The points in the order of their landmarks: pairs are swapped while that reduces the squared distances."""
    order = np.arange(len(points))
    cost = np.square(landmarks[:, None] - points).sum(-1)
    better = True
    while better:
        better = False
        for i in range(len(order)):
            for j in range(i):
                if cost[i, order[j]] + cost[j, order[i]] < cost[i, order[i]] + cost[j, order[j]] - 1e-9:
                    order[[i, j]] = order[[j, i]]
                    better = True
    return points[order]


def main():
    mean = np.array(json.loads(SHAPE.read_text())["mean"])
    for letter, strokes in STROKES.items():
        points = assign(spread(strokes, len(mean)) * (WIDTH, HEIGHT) + (LEFT, TOP), mean)
        with open(FOLDER / f"{letter}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["landmark", "x", "y"])
            writer.writerows([k + 1, *point] for k, point in enumerate(points.round().astype(int).tolist()))


if __name__ == "__main__":
    main()
