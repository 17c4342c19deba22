"""Which landmarks an attack moves, and where to: drawn, displaced from the truth, or read from a file.

Drawn targets depend only on the seed and the image (its id, size and ground truth), not on detector, attack, input size
or batch, so that every method compared has the same. Without a ground truth the prediction on the clean image takes its
place.
"""

import hashlib
import zlib
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from dataset import rescale
from readers.points import finder, read_targets
from readers.tables import read_table
from support.errors import InputError
from support.files import write_table

DRAWN = ("random", "shift", "common")  # sources of targets that are no file
RANDOM_SIZE = (800, 640)  # (H, W) px of the image for which the paper states its random targets,
RANDOM_X = (100, 600)  # the range of x
RANDOM_Y = (250, 750)  # and of y
NEAREST = 2  # landmarks that count as the neighbours of one


class Targets(NamedTuple):
    """Targets of N images with K landmarks."""

    places: torch.Tensor  # (N, K, 2) float64 x, y in px0; of no meaning where a landmark is not targeted
    targeted: torch.Tensor  # (N, K) bool
    free: torch.Tensor | None = None  # (N, K) bool: neither targeted nor stationary, may go anywhere; None: no landmark

    def of(self, images):
        """Those of some images, given by their indices."""
        return Targets(*(part if part is None else part[images] for part in self))

    def or_nan(self):
        """(N, K, 2) places, nan where a landmark is not targeted: for tables and charts."""
        return self.places.masked_fill(~self.targeted[..., None], torch.nan)

    def sha256(self):
        free = b"" if self.free is None else self.free.numpy().tobytes()
        return hashlib.sha256(self.or_nan().numpy().tobytes() + free).hexdigest()


def image_rng(seed, id):
    """The random generator of one image."""
    return np.random.default_rng([seed, zlib.crc32(id.encode())])


def choose_targets(source, data, seed, count, shift_mm, neighbours=None):
    """Targets for all images of a data set.

    Args:
        source: "random", see ``random_targets``; "shift": displacements drawn for each image; "common": displacements
            drawn once for all; or the path of a file of targets, see ``readers.points.read_targets``.
        data: dataset.Cephalograms.
        seed: of what is drawn.
        count: number of landmarks that "shift" and "common" target.
        shift_mm: their displacement in mm, from ``data.reference_px0``.
        neighbours: of those that "shift" displaces, see ``with_neighbours``.

    Raises:
        InputError: the file is wrong, a target lies outside its image, or ``count`` exceeds the landmarks.
    """
    landmarks, sizes = data.reference_px0.numpy(), data.sizes.tolist()
    if source in ("shift", "common") and count > len(data.names):
        raise InputError(f"--shift-count {count}: there are {len(data.names)} landmarks")
    rngs, spacing = (image_rng(seed, id) for id in data.ids), data.mm_per_px0.numpy()
    if source == "random":
        drawn = [random_targets(rng, len(data.names), size0) for rng, size0 in zip(rngs, sizes, strict=True)]
        places, targeted = map(np.stack, zip(*drawn, strict=True))
    elif source == "shift":
        each = zip(rngs, landmarks, sizes, shift_mm / spacing, data.ids, strict=True)
        drawn = [shift_targets(rng, points, size0, count, px0, id) for rng, points, size0, px0, id in each]
        places, targeted = map(np.stack, zip(*drawn, strict=True))
    elif source == "common":
        rng = image_rng(seed, source)
        chosen = rng.choice(len(data.names), count, replace=False)
        displacement, chosen = place(len(data.names), chosen, shift_mm * directions(rng, count))
        places, targeted = landmarks + displacement / spacing[:, None, None], np.tile(chosen, (len(data), 1))
    else:
        places, targeted = read_targets(source, data.ids, data.names)
    targets = Targets(torch.from_numpy(places), torch.from_numpy(targeted))
    targets = with_neighbours(targets, data, neighbours) if neighbours else targets
    check_inside(targets, data, source)
    return targets


def check_inside(targets, data, source):
    """Refuse targets outside their image."""
    wrong = targets.targeted & outside(targets.places, data.sizes)
    if wrong.any():
        i, k = wrong.nonzero()[0].tolist()
        (x, y), (height, width) = targets.places[i, k].tolist(), data.sizes[i].tolist()
        image = f"image {data.ids[i]} of {width} x {height} px"
        raise InputError(f"--targets {source}: the target ({x:g}, {y:g}) of landmark {k + 1} lies outside {image}")


def outside(places, sizes):
    """Which places (N, K, 2) px0 lie outside their images of sizes (N, 2), H0 and W0: (N, K) bool."""
    return ((places < 0) | (places > sizes.flip(-1)[:, None] - 1)).any(-1)


def random_targets(rng, num_landmarks, size0):
    """The paper's random protocol for one image.

    |T| is uniform in 1 .. K - 2, T uniform, and targets are uniform in x of [100, 600] and y of [250, 750] px of a
    640 x 800 image, scaled to the image's size.

    Args:
        rng: numpy random generator.
        num_landmarks: K.
        size0: (H0, W0) of the original image.

    Returns:
        places (K, 2) px0, and which landmarks are targeted (K,) bool.
    """
    count = rng.integers(1, max(2, num_landmarks - 1))
    chosen = rng.choice(num_landmarks, count, replace=False)
    drawn = np.stack([rng.uniform(*RANDOM_X, count), rng.uniform(*RANDOM_Y, count)], axis=-1)
    return place(num_landmarks, chosen, rescale(torch.from_numpy(drawn), RANDOM_SIZE, size0).numpy())


def shift_targets(rng, landmarks, size0, count, displacement, id):
    """Displacements: ``count`` landmarks, each targeted at a fixed distance from its position, in a random direction.

    Args:
        rng: numpy random generator.
        landmarks: (K, 2) x, y in px0.
        size0: (H0, W0) of the original image; a direction that leads out of it is drawn again.
        count: number of targeted landmarks.
        displacement: distance in px0.
        id: of the image, for a message.

    Returns:
        as ``random_targets``.

    Raises:
        InputError: no direction stays inside the image.
    """
    limits = np.array([size0[1] - 1, size0[0] - 1])
    chosen = rng.choice(len(landmarks), count, replace=False)
    places = landmarks[chosen, None] + displacement * directions(rng, (count, 1000))  # (count, draws, 2)
    inside = ((places >= 0) & (places <= limits)).all(-1)
    if not inside.any(1).all():
        k = chosen[~inside.any(1)][0]
        raise InputError(f"--shift-mm: image {id} has no room for landmark {k + 1}, {displacement:g} px away")
    return place(len(landmarks), chosen, places[np.arange(count), inside.argmax(1)])


def with_neighbours(targets, data, neighbours):
    """Targets with a role for the two landmarks nearest to each targeted one, unless they are targeted themselves.

    "along": they become targets, displaced like the first landmark that they are near to, or stay stationary where that
    leads out of the image. "free": they may go anywhere.
    """
    points = data.reference_px0
    apart = torch.cdist(points, points)
    apart.diagonal(0, 1, 2).fill_(torch.inf)
    nearest = apart.topk(min(NEAREST, points.shape[1]), largest=False).indices
    near = torch.zeros_like(apart, dtype=torch.bool).scatter_(-1, nearest, True)
    near &= targets.targeted[..., None] & ~targets.targeted[:, None]  # (N, K, K): the latter is a neighbour
    which = near.any(1)
    if neighbours == "free":
        return targets._replace(free=which)
    moved = points + (targets.places - points).take_along_dim(near.int().argmax(1)[..., None], 1)
    which &= ~outside(moved, data.sizes)
    return Targets(torch.where(which[..., None], moved, targets.places), targets.targeted | which)


def directions(rng, shape):
    """Random unit vectors (*shape, 2)."""
    angles = rng.uniform(0, 2 * np.pi, shape)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def place(num_landmarks, chosen, values):
    """Values (n, 2) at the chosen landmarks: (K, 2), zero elsewhere; and where they are, (K,) bool."""
    places, targeted = np.zeros((num_landmarks, 2)), np.zeros(num_landmarks, bool)
    places[chosen], targeted[chosen] = values, True
    return places, targeted


# --- targets.csv -----------------------------------------------------------------------------------------------------


def write_targets(file, ids, targets):
    """Targets as a file for --targets."""
    image, landmark = targets.targeted.nonzero().T
    x, y = targets.places[image, landmark].T
    write_table(file, pd.DataFrame({"image": [ids[i] for i in image], "landmark": landmark + 1, "x": x, "y": y}))


def read_stored_targets(file, data):
    """The ids and targets of ``write_targets``, of an earlier call.

    Raises:
        InputError: they are of images that ``data`` does not have.
    """
    rows = read_table(file, ["image", "landmark", "x", "y"], "image,landmark,x,y")
    ids = list(dict.fromkeys(map(finder(data.ids), [row["image"] for _, row in rows])))
    if unknown := [id for id in ids if id not in data.ids]:
        raise InputError(f"{file}: has targets of image {unknown[0]}, which is not attacked; choose another --rand")
    return ids, Targets(*map(torch.from_numpy, read_targets(file, ids, data.names)))
