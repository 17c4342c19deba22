"""Draw synthetic lateral cephalograms (phantoms) in the official ISBI 2015 layout, to try and test without the data.

    python phantom.py --out phantoms --train 150 --test1 150 --test2 100 --seed 0

Landmarks are sampled from the shape statistics of the real population (assets/shape_model.json). The anatomy, outlined
on the mean shape (assets/atlas.json), is warped to them, so that each landmark lies on the structure that it marks in a
real head. The attenuations of all structures add up, as on a film; anatomy, exposure, blur and grain vary between
patients.

Annotations are x, y in px0 (0.1 mm), the atlas is in units of 0.25 mm.
"""

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from readers.images import cores
from readers.layouts import DOCTORS, FOLDERS, IDS
from support import command, distributed
from support.command import bounded, natural_int, progress
from support.files import atomic, check_same_config, own_folder, write_json, write_text

WIDTH, HEIGHT = 1935, 2400  # px0
UNIT = 2.5  # px0 per unit of the atlas
STEP = 3  # px0 per pixel of the drawing, before it is enlarged
NASION = 1  # index of the landmark
INCISORS = [10, 11]  # landmarks: the tips of the lower and of the upper incisor
PAIRED = [2, 3, 9, 18]  # landmarks that exist left and right: orbitale, porion, gonion, articulare
SHAPE, ATLAS = (Path(__file__).parent / "assets" / name for name in ("shape_model.json", "atlas.json"))


# --- landmarks -------------------------------------------------------------------------------------------------------


def sample_landmarks(rng, shape):
    """Sample the landmarks of a patient, and two doctors' annotations of them.

    The doctors differ as the real ones do; their mean is the landmark, up to rounding.

    Args:
        rng: numpy random generator.
        shape: content of shape_model.json.

    Returns:
        landmarks, senior's and junior's annotations: (19, 2) float64 x, y in px0 each, annotations in whole numbers.
    """
    weights = rng.standard_normal(len(shape["mode_std"])).clip(-2, 2) * shape["mode_std"]
    landmarks = np.array(shape["mean"]) + np.tensordot(weights, np.array(shape["modes"]), 1)
    landmarks += rng.normal(0, shape["residual_std"] / 2, landmarks.shape)
    difference = np.array(shape["doctors_mean"]) + rng.standard_normal(landmarks.shape) * shape["doctors_std"]
    doctors = [(landmarks + sign * difference / 2).round().clip(0, (WIDTH - 1, HEIGHT - 1)) for sign in (1, -1)]
    return landmarks, *doctors


# --- warp -------------------------------------------------------------------------------------------------------------


def spline(places, moved, stiffness=400.0):
    """Thin-plate spline that maps places (n, 2) to ``moved`` (n, 2).

    Args:
        places, moved: (n, 2).
        stiffness: regularisation: 0 interpolates exactly, infinity is the affine fit.

    Returns:
        function (m, 2) -> (m, 2).
    """

    def basis(points):
        """The kernels around all places, and the affine functions, at points (m, 2): (m, n + 3)."""
        squared = ((points[:, None] - places) ** 2).sum(-1)
        return np.c_[squared * np.log(squared + 1e-9) / 2, np.ones(len(points)), points]

    n = len(places)
    equations = basis(places) + stiffness * np.eye(n, n + 3)
    conditions = np.c_[equations[:, n:].T, np.zeros((3, 3))]  # the kernels' weights have no affine part
    weights = np.linalg.solve(np.r_[equations, conditions], np.r_[moved, np.zeros((3, 2))])
    return lambda points: basis(np.asarray(points, dtype=float)) @ weights


def warps(rng, landmarks, mean, anchors):
    """Warps of the atlas to a patient, for the left and for the right side of the head.

    Both map the mean landmarks to the patient's, approximately. Of paired structures, the landmark is the mean of both
    sides. Away from landmarks, the anatomy varies independently of them. The incisors' tips, which can pass each other,
    are left out.

    Args:
        rng: numpy random generator.
        landmarks, mean: (19, 2) the patient's and the population's, px0.
        anchors: (n, 3) x, y in units, and the standard deviation of the anatomy there in px0.

    Returns:
        left, right: functions (m, 2) units -> (m, 2) px0.
    """
    shift = np.zeros(landmarks.shape)
    anchors, deviation = np.split(np.array(anchors, dtype=float), [2], axis=1)
    jitter = rng.normal(0, 1, anchors.shape) * deviation
    shift[PAIRED] = rng.normal(0, (13, 10)) + rng.normal(0, 7, (len(PAIRED), 2))
    mean, landmarks, shift = (np.delete(part, INCISORS, 0) for part in (mean / UNIT, landmarks, shift))
    anchored = spline(mean, landmarks)(anchors) + jitter
    places = np.concatenate([mean, anchors])
    return [spline(places, np.concatenate([landmarks + side * shift, anchored])) for side in (1, -1)]


# --- drawing ---------------------------------------------------------------------------------------------------------


def vary(rng, amount):
    """A random factor in 1 - amount .. 1 + amount."""
    return rng.uniform(1 - amount, 1 + amount)


def curve(points, closed=False, steps=6):
    """Catmull-Rom spline through points (n, 2), ``steps`` points for each; if closed, its last point is its first."""
    points = np.pad(np.asarray(points, dtype=float), ((1, 1 + closed), (0, 0)), "wrap" if closed else "edge")
    a, b, c, d = points[:-3], points[1:-2], points[2:-1], points[3:]
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    pieces = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([pieces.swapaxes(0, 1).reshape(-1, 2), c[-1:]])


def ellipse(centre, radii, angle=0.0):
    """Points (25, 2) of an ellipse, closed."""
    t = np.linspace(0, 2 * np.pi, 25)
    cos, sin = np.cos(angle), np.sin(angle)
    return centre + np.stack([np.cos(t) * radii[0], np.sin(t) * radii[1]], axis=-1) @ [[cos, sin], [-sin, cos]]


def add(film, outline, amount, blur=1.5, width=0.0, body=False):
    """Add attenuation to the film, in place: inside an outline or, with a width, along it.

    Args:
        film: (h, w) float32, a pixel for STEP px0.
        outline: (n, 2) x, y in px0.
        amount: attenuation to add.
        blur: standard deviation of a Gaussian, in units.
        width: of the line, in units; 0: fill the outline.
        body: the attenuation falls to zero at the outline.
    """
    points, blur, width = np.asarray(outline) / STEP, blur * UNIT / STEP, width * UNIT / STEP
    margin = 3 * blur + width + 2
    low = np.maximum(np.floor(points.min(0) - margin), 0).astype(int)
    high = np.minimum(np.ceil(points.max(0) + margin), film.shape[::-1]).astype(int)
    if (high <= low).any():
        return  # not on the film
    mask = Image.new("L", (int(high[0] - low[0]), int(high[1] - low[1])))
    pen = ImageDraw.Draw(mask)
    path = [tuple(point) for point in points - low]
    if width:
        pen.line(path, fill=255, width=max(1, round(width)), joint="curve")
    else:
        pen.polygon(path, fill=255)
    profile = np.asarray(mask.filter(ImageFilter.GaussianBlur(blur)), np.float32) / 255
    if body:
        profile = (2 * profile - 1).clip(0)
    film[low[1] : high[1], low[0] : high[0]] += amount * profile


def draw_parts(film, rng, left, right, parts):
    """The parts of atlas.json, with random density, width and blur."""
    for part in parts:
        line = curve(part["path"], closed=part["kind"] != "line")
        amount = part["amount"] * rng.lognormal(0, 0.35)
        paired = part.get("paired", False)
        for warp in (left, right) if paired else (left,):
            factor = 0.5 * vary(rng, 0.4) if paired else 1
            width = part.get("width", 0) * vary(rng, 0.2)
            add(film, warp(line), factor * amount, part["blur"] * vary(rng, 0.3), width, body=part["kind"] == "body")


def draw_texture(film, rng, warp):
    """What varies most: cells of the middle face, mastoid cells, vessels and sutures of the skull's vault."""
    for _ in range(rng.integers(40, 110)):  # walls of the face's cells
        start = rng.uniform((330, 370), (540, 570))
        angle, bend, length = rng.uniform(0, np.pi), rng.normal(0, 0.5), rng.uniform(8, 28)
        steps = np.array([(np.cos(a), np.sin(a)) for a in (angle, angle + bend, angle + 2 * bend)]) * length
        line = warp(curve(start + np.concatenate([[(0, 0)], np.cumsum(steps, 0)])))
        add(film, line, rng.uniform(0.04, 0.22), rng.uniform(0.7, 1.5), rng.uniform(1.5, 4))
    for _ in range(rng.integers(8, 20)):  # air in them
        centre = rng.uniform((350, 390), (510, 560))
        add(film, warp(ellipse(centre, rng.uniform(6, 22, 2), rng.uniform(0, 3))), rng.uniform(-0.2, 0.05), 3)
    reach = vary(rng, 0.5)
    for _ in range(rng.integers(40, 200)):  # mastoid
        centre = (200, 490) + rng.normal(0, 1, 2) * (32 * reach, 26)
        add(film, warp(ellipse(centre, rng.uniform(2, 7, 2), rng.uniform(0, 3))), rng.uniform(-0.5, 0.3), 1.2)
    for _ in range(rng.integers(3, 9)):  # vessels and sutures
        start = rng.uniform((40, 90), (430, 330))
        line = start + np.cumsum(rng.normal((0, 12), (16, 10), (6, 2)), 0)
        add(film, warp(curve(line)), rng.uniform(-0.08, 0.1), 1.5, rng.uniform(2, 5))


def draw_ear(film, rng, warp):
    """The ear canal and, on most films, the ear rods of the head holder."""
    canal = (240, 493)
    add(film, warp(ellipse(canal, rng.uniform(5, 10, 2))), -0.8 * vary(rng, 0.6), 2)
    if rng.random() < 0.75:
        centre = canal + rng.normal((8, 12), (10, 14))
        for radius in (29, 17)[: rng.integers(1, 3)]:
            radius *= vary(rng, 0.15)
            rod = warp(ellipse(centre, (radius, radius)))
            add(film, rod, rng.uniform(0.0, 0.15), 1)
            add(film, rod, rng.uniform(0.2, 1.0), 0.8, 4)


def draw_teeth(film, rng, left, right, incisors):
    """Teeth on both sides, some missing, some with fillings, and the incisors; rarely brackets.

    Args:
        incisors: (2, 2) landmarks at the tips of the lower and of the upper incisor, px0.
    """
    amount = 0.22 * rng.lognormal(0, 0.3)
    metal = rng.choice([0, 0.1, 0.5], p=[0.5, 0.35, 0.15])  # probability of a filling
    rise = rng.normal(0.13, 0.06)  # slope of the occlusal plane
    missing = rng.choice([0, 0.15, 0.6], p=[0.7, 0.25, 0.05])
    for warp in (left, right):
        front = 558.0
        for width in (18, 23, 25, 26, 38, 36, 34):
            width *= vary(rng, 0.1)
            x = front - width / 2
            y = 677 - rise * (567 - x)
            front -= width
            for side in (-1, 1):  # upper, lower
                if rng.random() >= missing:
                    tip = (x + rng.normal(0, 2), y + 1.5 * side + rng.normal(0, 1.5))
                    apex = (x - 12 + rng.normal(0, 5), y + side * rng.uniform(68, 88))
                    dense, filled = amount / 2 * vary(rng, 0.3), rng.uniform(0.4, 2) * (rng.random() < metal)
                    draw_tooth(film, rng, warp, tip, apex, 0.92 * width, dense, filled)
    for tip, apex in zip(incisors, ((513, 748), (526, 602)), strict=True):
        apex = left([apex + rng.normal(0, 4, 2)])[0] / UNIT
        width, filled = 21 * vary(rng, 0.15), rng.uniform(0.4, 1.5) * (rng.random() < metal / 2)
        draw_tooth(film, rng, lambda points: points * UNIT, tip / UNIT, apex, width, 0.9 * amount, filled)
    if rng.random() < 0.1:  # brackets
        for x in range(400, 570, 26):
            for side in (-1, 1):
                add(film, left(ellipse((x, 677 - rise * (567 - x) + 16 * side), (5, 5))), 1.5, 0.8)


def draw_tooth(film, rng, warp, tip, apex, width, amount, filled):
    """Crown, root and pulp of a tooth from tip to apex, in units; ``filled`` is the attenuation of a filling, or 0."""
    tip, axis = np.array(tip), np.subtract(apex, tip)
    length = np.linalg.norm(axis)
    across = np.array([-axis[1], axis[0]]) / length * width / 2

    def shape(outline):
        return warp(curve([tip + u * axis + v * across for u, v in outline], True, 4))

    crown = [(0.0, -0.7), (0.1, -1), (0.38, -0.85), (0.38, 0.85), (0.1, 1), (0.0, 0.7)]
    add(film, shape([*crown[:3], (1.0, -0.25), (1.0, 0.25), *crown[3:]]), amount, 1.2)
    add(film, shape(crown), amount, 1)
    add(film, shape([(0.45, -0.1), (0.9, -0.06), (0.9, 0.06), (0.45, 0.1)]), -0.4 * amount, 1)  # pulp
    if filled:
        low, high = rng.uniform(0.1, 0.3, 2)
        add(film, shape([(0.0, -0.7), (low, -0.7), (high, 0.7), (0.0, 0.7)]), filled, 1)


def draw_spine(film, rng, warp):
    """The cervical vertebrae with their processes, from the dens of the second down, and the arch of the first."""
    amount = 0.3 * rng.lognormal(0, 0.3)
    spot = np.array([222.0, 612.0]) + rng.normal(0, (8, 14))
    add(film, warp(curve(spot + [(-14, -48), (14, -48), (18, 50), (-18, 50)], True)), amount, 2)  # dens
    arch = spot + [(34, -28), (10, -34), (-40, -22), (-100, -10), (-112, 4), (-100, 14), (-50, 0), (10, -12), (34, -10)]
    add(film, warp(curve(arch, True)), 0.7 * amount, 2)
    spot = spot + (0, 54)
    lean, bend, height = rng.normal(-6, 6), rng.normal(-1, 1.5), rng.normal(55, 3)
    for level in range(6):
        tilt = rng.normal(0.12, 0.06) - 0.03 * bend * level
        turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        w, h = 26 + level, 19 + 0.8 * level
        body = [(-w, -h), (0, 3 - h), (w, -h), (w - 3, 0), (w, h), (0, h - 3), (-w, h), (3 - w, 0)]
        reach, drop = rng.uniform(95, 135), 12 + 5 * level
        process = [(-w, -12), (-65, drop - 20), (-reach, drop + 8), (6 - reach, drop + 24), (-70, drop + 6), (-w, 14)]
        joint = [(-w - 4, -24), (-w - 22, -18), (-w - 30, 26), (-w - 10, 22)]
        bones = [(body, 1, 1.5, 0), (body, 0.5, 0.8, 3), (process, 0.6, 2, 0), (joint, 0.6, 1.5, 0)]
        for outline, share, blur, width in bones:
            add(film, warp(spot + curve(outline, True, 4) @ turn), share * amount, blur, width)
        spot = spot + (lean + bend * level, height + 2 * level)


def draw_holder(film, rng, nasion):
    """The nasal rest of the head holder with its ruler, on most films; ``nasion`` in px0."""
    if rng.random() < 0.1:
        return
    origin = nasion / UNIT + (rng.normal(90, 12), rng.normal(10, 14))
    slope = rng.normal(0, 0.02)

    def at(*places):
        return (places @ np.array([[1, 0], [-slope, 1]]) + origin) * UNIT

    amount = rng.lognormal(0, 0.4)
    rest = [(-75, 0), (-22, 0), (-22, -48), (10, -48), (10, 22), (-28, 22), (-32, 30), (-66, 30), (-78, 16)]
    add(film, at(*rest), 0.12 * amount, 2)
    add(film, at((-6, -90), (-6, -600)), 0.25 * amount, 1, 9)
    for edge in (-16, 5):
        add(film, at((edge, -175), (edge, -600)), 0.2 * amount, 1, 4)
    for tick in range(12):
        add(film, at((-12, -8 - 7 * tick), (2, -8 - 7 * tick)), 0.8 * amount, 0.8, 3.5)
    add(film, at((1, 0), (1, -90)), 0.5 * amount, 0.8, 4)


# --- film ------------------------------------------------------------------------------------------------------------


def draw_film(rng, landmarks, mean, atlas):
    """The radiograph of a patient.

    Args:
        rng: numpy random generator.
        landmarks, mean: (19, 2) the patient's and the population's, px0.
        atlas: content of atlas.json.

    Returns:
        (2400, 1935) uint8.
    """
    film = np.zeros((HEIGHT // STEP, WIDTH // STEP), np.float32)
    left, right = warps(rng, landmarks, mean, atlas["anchors"])
    draw_parts(film, rng, left, right, atlas["parts"])
    draw_texture(film, rng, left)
    draw_ear(film, rng, left)
    draw_teeth(film, rng, left, right, landmarks[INCISORS])
    draw_spine(film, rng, left)
    draw_holder(film, rng, landmarks[NASION])
    film = make_uneven(film, rng)
    image = scan(rng, expose(film, rng, landmarks[NASION, 0]))
    mark_edges(image, rng)
    return image.clip(0, 255).astype(np.uint8)


def make_uneven(film, rng):
    """The attenuation (h, w), positive and with the texture of bone and tissue, on several scales (px0)."""
    for scale, amount in ((150, 0.04), (400, 0.06)):  # tissue that is not in the atlas
        film += rng.uniform(0, 2) * amount * smooth_noise(rng, scale, film.shape)
    film = np.logaddexp(0, film / 0.05) * 0.05  # positive, smoothly
    scales = ((6, 0.02), (12, 0.025), (30, 0.03), (90, 0.04), (300, 0.06))
    texture = sum(amount * smooth_noise(rng, scale, film.shape) for scale, amount in scales)
    film *= 1 + rng.uniform(0.4, 1.3) * texture  # in proportion to the attenuation
    return film


def expose(film, rng, nasion_x):
    """Grey levels (h, w), 0 to 255, of an attenuation: fog, scatter, uneven exposure, the film's saturation.

    Scatter grows from the face, at ``nasion_x`` px0, to the border of the film.
    """
    rows, columns = np.mgrid[: film.shape[0], : film.shape[1]].astype(np.float32) * STEP
    film += rng.uniform(0.0, 0.1)  # fog
    edge = nasion_x + rng.uniform(0, 350)
    beyond = (columns - edge) / WIDTH + rng.normal(0, 0.06) * (rows / HEIGHT - 0.5)
    film += rng.uniform(0.5, 4.0) * beyond.clip(0) ** rng.uniform(0.8, 1.4)  # scatter
    film *= np.exp(rng.normal(0, 0.15) * (rows / HEIGHT - 0.5) + rng.normal(0, 0.15) * (columns / WIDTH - 0.5))
    if rng.random() < 0.6:  # the shoulder
        x, y = rng.uniform(300, 900), HEIGHT - rng.uniform(0, 380)
        shoulder = [(-200, y), (0.4 * x, y - 20), (0.8 * x, y + 90), (x, HEIGHT + 200), (-200, HEIGHT + 200)]
        add(film, curve(shoulder, True), rng.uniform(0.5, 2.5), 4)
    grey = 255 * (1 - np.exp(-rng.lognormal(0, 0.2) * film.clip(0))) ** rng.uniform(0.85, 1.25)
    if rng.random() < 0.25:
        grey = np.minimum(grey, rng.uniform(205, 245))
    return grey


def scan(rng, grey):
    """Grey levels (2400, 1935) float32: full size, the blur of the tube's focus, the grain of film and scanner."""
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    image = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3.0))), np.float32)
    coarse = rng.standard_normal((HEIGHT // 2, WIDTH // 2 + 1), dtype=np.float32).repeat(2, 0).repeat(2, 1)
    image = image + rng.uniform(0.5, 3.0) * coarse[:, :WIDTH]
    return image + rng.uniform(0.5, 2.0) * rng.standard_normal(image.shape, dtype=np.float32)


def mark_edges(image, rng):
    """Draw the white borders outside the collimation and the marks of the cassette, in place."""
    white = rng.uniform(235, 254)
    top, bottom, side = rng.choice([0, 8, 15, 30, 60, 90]), rng.choice([0, 8, 15, 40]), rng.choice([0, 0, 5, 15, 40])
    image[:top] = image[HEIGHT - bottom :] = image[:, :side] = white
    for x in rng.integers(330, 530) + np.array([0, 460, 920]):
        image[: top + 50, x : x + 120] = image[HEIGHT - bottom - 50 :, x : x + 120] = white


def smooth_noise(rng, scale, shape):
    """Normal noise (h, w) float32 with a correlation length ``scale`` in px0."""
    coarse = rng.standard_normal((HEIGHT // scale, WIDTH // scale), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))


# --- files -----------------------------------------------------------------------------------------------------------


def draw_patient(seed, file):
    """Draw a patient: two files of annotations, then the image.

    Args:
        seed: with the image's id, decides how the patient looks.
        file: <root>/RawImage/<folder of the split>/<id>.bmp.
    """
    rng = np.random.default_rng([seed, int(file.stem)])
    shape, atlas = json.loads(SHAPE.read_text()), json.loads(ATLAS.read_text())
    landmarks, *annotations = sample_landmarks(rng, shape)
    image = Image.fromarray(draw_film(rng, landmarks, np.array(shape["mean"]), atlas))
    for doctor, points in zip(DOCTORS, annotations, strict=True):
        text = "".join(f"{x:.0f},{y:.0f}\n" for x, y in points)
        write_text(file.parents[2] / "AnnotationsByMD" / doctor / f"{file.stem}.txt", text)
    with atomic(file) as temporary:
        image.save(temporary)


# --- command ---------------------------------------------------------------------------------------------------------


def make_parser():
    parser = command.Parser("Draw synthetic cephalograms in the official ISBI 2015 layout.")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    for split, ids in IDS.items():
        count = bounded(int, range(len(ids) + 1).__contains__, f"a whole number from 0 to {len(ids)}")
        parser.add_argument(f"--{split}", type=count, default=len(ids), metavar="N", help=f"images of {split}")
    parser.add_argument("--seed", type=natural_int, default=0, help="the same seed gives the same files")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    root = Path(args.out)
    config = {name: value for name, value in vars(args).items() if name != "out"}
    sources = Path(__file__), SHAPE, ATLAS  # decide how a phantom looks
    config["program_sha256"] = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
    distributed.start()
    with distributed.held_by_main(own_folder(root, "phantom.py", "--out", "phantom.json")):
        distributed.on_main(draw, root, config, args.seed, parser.defaults())
    distributed.on_main(print, f"written to {root}/")


def draw(root, config, seed, defaults):
    """The patients that the folder does not have yet.

    Raises:
        InputError: it holds phantoms of another configuration.
    """
    check_same_config(root / "phantom.json", config, defaults, [], "--out")
    write_json(root / "phantom.json", config)
    ids = {split: IDS[split][: config[split]] for split in IDS}
    files = [root / "RawImage" / FOLDERS[split] / f"{id:03d}.bmp" for split in IDS for id in ids[split]]
    files = [file for file in files if not file.exists()]  # a repeated command continues
    with ProcessPoolExecutor(min(cores(), len(files) or 1)) as pool:
        drawn = pool.map(partial(draw_patient, seed), files)
        list(progress(drawn, "drawing", len(files), unit="image", disable=not files))


if __name__ == "__main__":
    command.run(main)
