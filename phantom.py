"""Synthetic lateral cephalograms in the official ISBI 2015 layout: for trying and testing without the data.

    python phantom.py --out phantoms --train 150 --test1 150 --test2 100 --seed 0

Landmarks come from the shape statistics of the real population (shape_model.json), then the anatomy is drawn around
them so that each lies on a structure that a detector can find. Structures add up their attenuation, as on a film;
exposure, blur and grain differ from patient to patient. Positions are x, y in px0 (0.1 mm) unless said otherwise.
"""

import hashlib
import json
import os
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

import command
from command import InputError, natural_int
from dataset import FOLDERS, IDS
from runs import check_same_config, make_folder, write, write_text

WIDTH, HEIGHT = 1935, 2400
STEP = 3  # px0 a pixel of the drawing, before it is enlarged
SHAPE = Path(__file__).with_name("shape_model.json")

# the 19 landmarks in the order of the files, by their usual short names
Patient = namedtuple("Patient", "S N Or Po A B Pog Me Gn Go L1 U1 UL LL Sn softPog PNS ANS Ar")

# where doctors mark a structure, from where it is drawn here (px0): the mean error on phantoms of a detector that was
# trained on real radiographs
MARKS = [(-6, -38), (20, -36), (5, -14), (-19, -28), (36, 0), (8, 12), (1, 17), (-14, 22), (-10, 22), (-18, -8)]
MARKS += [(7, 0), (9, 4), (15, -12), (15, 16), (34, -4), (5, -8), (0, 0), (38, -4), (-30, -50)]


# --- landmarks -------------------------------------------------------------------------------------------------------


def sample_landmarks(rng, shape):
    """A patient's landmarks (19, 2), and the senior's and the junior's annotations of them, whole numbers.

    The doctors differ as the real ones do, and their mean is the landmark but for rounding.

    Args:
        rng: numpy random generator.
        shape: the content of shape_model.json.
    """
    weights = rng.standard_normal(len(shape["mode_std"])).clip(-2, 2) * shape["mode_std"]
    landmarks = np.array(shape["mean"]) + np.tensordot(weights, np.array(shape["modes"]), 1)
    landmarks += rng.normal(0, shape["residual_std"] / 2, landmarks.shape)
    difference = np.array(shape["doctors_mean"]) + rng.standard_normal(landmarks.shape) * shape["doctors_std"]
    senior, junior = ((landmarks + sign * difference / 2).round() for sign in (1, -1))
    limits = (WIDTH - 1, HEIGHT - 1)
    return landmarks, senior.clip(0, limits), junior.clip(0, limits)


# --- drawing tools ---------------------------------------------------------------------------------------------------


def curve(points, closed=False, steps=10):
    """A smooth curve (Catmull-Rom) through points (n, 2), ``steps`` points for each."""
    points = np.asarray(points, dtype=float)
    around = [points[-1:], points, points[:2]] if closed else [points[:1], points, points[-1:]]
    around = np.concatenate(around)
    a, b, c, d = around[:-3], around[1:-2], around[2:-1], around[3:]
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    pieces = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    line = pieces.swapaxes(0, 1).reshape(-1, 2)
    return line if closed else np.concatenate([line, points[-1:]])


def loop(points, steps=10):
    """A smooth closed outline through points, its end joined to its beginning."""
    line = curve(points, closed=True, steps=steps)
    return np.concatenate([line, line[:1]])


def ellipse(centre, radii, angle=0.0):
    t = np.linspace(0, 2 * np.pi, 37)
    cos, sin = np.cos(angle), np.sin(angle)
    return centre + np.stack([np.cos(t) * radii[0], np.sin(t) * radii[1]], axis=-1) @ [[cos, sin], [-sin, cos]]


def frame(origin, towards):
    """A function from (u, v) to px0: u along origin -> towards, v at right angles (down for a face), in its length."""
    along = towards - origin
    axes = np.stack([along, [-along[1], along[0]]])
    return lambda places: origin + np.asarray(places, dtype=float) @ axes


def add(film, outline, amount, blur=4.0, width=None):
    """Add attenuation to the film, in place: a filled outline, or with ``width`` a line along it. All in px0."""
    points = np.asarray(outline) / STEP
    margin = (3 * blur + (width or 0)) / STEP + 2
    low = np.maximum(np.floor(points.min(0) - margin), 0).astype(int)
    high = np.minimum(np.ceil(points.max(0) + margin), film.shape[::-1]).astype(int)
    if (high <= low).any():
        return  # outside the film
    mask = Image.new("L", (int(high[0] - low[0]), int(high[1] - low[1])))
    pen = ImageDraw.Draw(mask)
    path = [tuple(point) for point in points - low]
    if width is None:
        pen.polygon(path, fill=255)
    else:
        pen.line(path, fill=255, width=max(1, round(width / STEP)), joint="curve")
    mask = mask.filter(ImageFilter.GaussianBlur(blur / STEP))
    film[low[1] : high[1], low[0] : high[0]] += np.asarray(mask, np.float32) * (amount / 255)


# --- anatomy ---------------------------------------------------------------------------------------------------------
# Each draws its part on a film for a patient ``p``. Numbers are shares of the distance sella - nasion, read off real
# radiographs by eye, or px0 where a structure hardly varies.


def vary(rng, amount):
    return rng.uniform(1 - amount, 1 + amount)


def size_of(p):
    return np.linalg.norm(p.N - p.S)


def draw_soft_tissue(film, rng, p):
    """One outline from the crown over face and throat to the nape; landmarks 13 to 16 lie on it."""
    skull, size = frame(p.S, p.N), size_of(p)
    crown = [(-1.3, -0.8), (-1.0, -1.38), (-0.36, -1.74), (0.2, -1.72), (0.66, -1.45), (1.0, -1.0), (1.12, -0.55)]
    nose = p.Sn + np.array([0.22, -0.2]) * size * vary(rng, 0.12)
    throat = p.Me + np.array([-0.45, 0.42]) * size * vary(rng, 0.1)
    face = [
        skull((1.17, -0.2)),
        p.N + np.array([0.07, 0.02]) * size,
        (p.N + nose) / 2 + np.array([0.05, -0.02]) * size,
        nose + np.array([-0.02, -0.07]) * size,
        nose,
        (nose + p.Sn) / 2 + np.array([0.01, 0.05]) * size,
        p.Sn,
        p.UL + np.array([-0.05, -0.11]) * size,
        p.UL,
        (p.U1 + p.UL) / 2 + np.array([0, 0.07]) * size,
        p.LL + np.array([-0.02, -0.08]) * size,
        p.LL,
        (p.LL + p.softPog) / 2 + np.array([-0.1, -0.06]) * size,
        p.softPog + np.array([0.01, -0.12]) * size,
        p.softPog,
        p.Me + np.array([0.05, 0.12]) * size,
        p.Me + np.array([-0.2, 0.13]) * size,
        throat,
    ]
    neck = [
        (throat[0] - 0.05 * size, HEIGHT + 200),
        (p.Go[0] - 1.6 * size, HEIGHT + 200),
        skull((-1.15, 1.1)),
        skull((-1.2, 0.4)),
    ]
    outline = np.array([*skull(crown), *face, *neck])
    add(film, curve(outline, closed=True), 0.24 * vary(rng, 0.25), blur=6)
    add(film, curve(outline * 0.9 + skull((0, 0.5)) * 0.1, closed=True), 0.2 * vary(rng, 0.3), blur=60)
    add(film, curve(face[:12]), 0.07, blur=10, width=26)


def draw_cranium(film, rng, p):
    """Vault, base with the petrous bone, sella turcica, frontal sinus and nasal bone: landmarks 1, 2."""
    skull, size = frame(p.S, p.N), size_of(p)
    vault = [(1.05, -0.22), (1.01, -0.55), (0.9, -0.95), (0.6, -1.36), (0.17, -1.6), (-0.36, -1.63), (-0.92, -1.3)]
    vault += [(-1.2, -0.78), (-1.22, -0.2), (-1.02, 0.24), (-0.72, 0.36), (-0.45, 0.42)]
    vault = np.array([p.N - (14, 0), *skull(np.array(vault) * [vary(rng, 0.04), vary(rng, 0.05)])])
    base = [p.Po + 0.12 * (p.Po - p.S), p.Po]
    base += [
        *skull(
            [
                (-0.12, 0.3),
                (-0.1, 0.02),
                (-0.05, 0.06),
                (0.03, 0.06),
                (0.08, 0.0),
                (0.15, -0.06),
                (0.45, -0.12),
                (0.8, -0.2),
            ]
        )
    ]
    cavity = np.array([*vault, *base])
    add(film, curve(cavity, closed=True), 0.6 * vary(rng, 0.2), blur=14)
    add(film, curve(cavity * 0.7 + skull((-0.3, -0.6)) * 0.3, closed=True), 0.5 * vary(rng, 0.4), blur=110)
    temple = [(0.1, -1.5), (0.35, -0.9), (0.45, -0.2), (0.75, -0.3), (0.85, -0.9), (0.5, -1.35)]
    add(film, curve(skull(temple + rng.normal(0, 0.03, 2)), closed=True), -0.14 * vary(rng, 0.8), blur=16)

    line, thick = curve(vault), 42 * vary(rng, 0.2)
    add(film, line, 0.75, blur=9, width=thick)
    add(film, line, 0.4, width=10)
    add(film, skull((0, -0.6)) + (line - skull((0, -0.6))) * (1 - thick / size), 0.4, width=10)
    for _ in range(5):  # sutures and vessels
        start = rng.uniform((-0.9, -1.3), (0.5, -0.2))
        suture = skull(start + np.array([(0, 0), (0.1, 0.12), (0.13, 0.3), (0.27, 0.42)]))
        add(film, curve(suture), rng.uniform(0.03, 0.1), blur=5, width=9)

    petrous = p.Po + np.array([(-0.5, 0.0), (-0.25, -0.22), (0.1, -0.2)]) * size
    under = p.Ar + np.array([(0.16, -0.16), (0.05, -0.02), (-0.06, 0.03), (-0.3, 0.06), (-0.55, 0.02)]) * size
    add(film, curve([*petrous, *under], closed=True), 0.75 * vary(rng, 0.2), blur=14)
    wing = [
        p.Ar + np.array([0.0, -0.06]) * size,
        p.Ar + np.array([0.25, -0.13]) * size,
        *skull([(0.25, 0.42), (0.42, 0.28)]),
    ]
    add(film, curve(wing), 0.55 * vary(rng, 0.2), blur=12, width=52)  # floor of the middle fossa, greater wing
    add(film, curve(np.array(wing) - (0, 30)), 0.25, width=12)
    for _ in range(70):  # mastoid cells
        place = p.Po + rng.normal((-0.28, 0.06), (0.12, 0.09)) * size
        add(film, ellipse(place, rng.uniform(6, 16, 2), rng.uniform(0, 3)), rng.uniform(-0.2, 0.12))
    add(film, curve(skull([(-0.1, 0.0), (-0.16, 0.16), (-0.24, 0.36), (-0.36, 0.58)])), 0.5, blur=6, width=22)  # clivus

    rim = [(0.2, -0.07), (0.1, -0.075), (0.085, 0.0), (0.03, 0.062), (-0.05, 0.058), (-0.095, 0.0), (-0.1, -0.085)]
    add(film, curve(skull(rim)), 0.45, width=14)
    add(film, curve(skull(rim)), 0.35, blur=3, width=6)
    add(film, ellipse(skull((-0.11, -0.06)), (13, 20), 0.2), 0.35, blur=5)  # dorsum
    floor = skull([(0.2, -0.07), (0.42, -0.12), (0.65, -0.2), (0.88, -0.27), (1.0, -0.25)])
    for shift in ((0, 0), (0.02, -0.05), (-0.01, 0.05)):  # middle and both sides of the anterior fossa
        add(film, curve(floor + np.array(shift) * size), 0.33 * vary(rng, 0.3), width=11)
    sphenoid = curve(
        skull([(0.0, 0.1), (0.12, 0.04), (0.3, 0.0), (0.42, 0.1), (0.36, 0.26), (0.06, 0.26)]), closed=True
    )
    add(film, sphenoid, -0.4 * vary(rng, 0.4), blur=10)
    add(film, sphenoid, 0.3, width=9)

    sinus = skull([(0.95, -0.1), (1.0, -0.25), (0.97, -0.42), (0.9, -0.33), (0.9, -0.15)])
    add(film, curve(sinus, closed=True), -0.55 * vary(rng, 0.4), blur=7)
    nasal = [skull((1.02, -0.18)), p.N, p.N + np.array([0.05, 0.12]) * size, p.N + np.array([0.12, 0.3]) * size]
    add(film, curve(nasal), 0.5, width=17)
    add(film, curve([p.N, *skull([(0.9, 0.06), (0.82, 0.2)])]), 0.3, blur=5, width=12)


def draw_midface(film, rng, p):
    """Orbit, cheek bone, maxilla with palate, spines and sinus: landmarks 3, 5, 17, 18."""
    skull, size = frame(p.S, p.N), size_of(p)
    rim = [(-0.13, -0.5), (-0.2, -0.33), (-0.19, -0.15), (-0.1, -0.02), (0.0, 0.0), (0.1, -0.05)]
    rim = p.Or + np.array(rim) * size
    add(film, curve(rim), 0.55, width=15)
    add(film, curve(rim + rng.normal((-14, 8), 8)), 0.25, blur=5, width=12)  # the other side's
    orbit = [*rim, p.Or + np.array([0.13, -0.2]) * size, p.Or + np.array([0.05, -0.48]) * size]
    add(film, curve(orbit, closed=True), -0.22 * vary(rng, 0.3), blur=12)
    cheek = np.array([(-0.19, -0.15), (0, 0), (0.03, 0.13), (-0.1, 0.27), (-0.27, 0.05)])
    add(film, curve(p.Or + cheek * size, closed=True), 0.28, blur=9)
    arch = [p.Or - (0.2 * size, 0), (p.Or + p.Po) / 2 + (0, 0.06 * size), p.Po + np.array([0.15, 0.03]) * size]
    add(film, curve(arch), 0.25, blur=8, width=32)

    palate = [p.PNS, p.PNS * 0.6 + p.ANS * 0.4 + (0, 4), p.PNS * 0.25 + p.ANS * 0.75, p.ANS]
    sinus = [p.PNS - (0, 0.02 * size), p.Or + np.array([-0.32, 0.08]) * size, p.Or + np.array([-0.05, 0.03]) * size]
    sinus += [p.Or * 0.3 + p.ANS * 0.7 - (0.08 * size, 0), *palate[::-1]]
    add(film, curve(sinus, closed=True), -0.42 * vary(rng, 0.3), blur=10)
    add(film, loop(sinus), 0.25, width=9)
    add(film, curve([skull((0.42, 0.1)), p.PNS - (0, 0.3 * size), p.PNS]), 0.5, width=12)  # pterygomaxillary fissure
    add(film, curve(palate), 0.7, width=20)
    add(film, [p.ANS + (3, -2), p.ANS + (-70, -18), p.ANS + (-70, 18)], 0.5)

    front = [p.ANS - (25, 0), (p.ANS + p.A) / 2 - (8, 0), p.A, (p.A + p.U1) / 2 + (16, 4), p.U1 - (10, 55)]
    under = [p.U1 - (0.3 * size, 60), p.U1 - (0.62 * size, 50), p.PNS + (30, 0.2 * size), p.PNS + (20, 25)]
    add(film, curve([*front, *under, *palate], closed=True), 0.42 * vary(rng, 0.15), blur=8)
    add(film, curve(front), 0.45, width=12)

    for _ in range(22):  # walls of ethmoid cells and nose
        start = p.S + rng.uniform(0.05, 0.95) * (p.Or - p.S) + rng.uniform(0.03, 0.5) * (p.PNS - p.S)
        step = rng.normal(0, 0.09 * size, 2)
        wall = [start, start + step + rng.normal(0, 12, 2), start + 2 * step + rng.normal(0, 25, 2)]
        add(film, curve(wall), rng.uniform(0.05, 0.24), width=rng.uniform(6, 16))
    for _ in range(8):
        spot = p.PNS + rng.uniform(0.1, 0.9) * (p.ANS - p.PNS) - (0, rng.uniform(30, 0.4 * size))
        add(film, ellipse(spot, rng.uniform(25, 80, 2), rng.uniform(0, 3)), rng.uniform(-0.12, 0.12), blur=14)


def draw_mandible(film, rng, p):
    """Body, ramus with condyle and coronoid, symphysis: landmarks 6 to 10, 19."""
    size = size_of(p)
    condyle = p.Ar + np.array([0.03, -0.1]) * size
    coronoid = p.PNS * 0.55 + p.Ar * 0.45 + np.array([0.05, 0.02]) * size
    molar = p.PNS + np.array([-0.04, 0.48]) * size
    back = [condyle - (20, -5), p.Ar, (p.Ar * 2 + p.Go) / 3 + (10, 0), (p.Ar + p.Go * 2) / 3 + (6, 0), p.Go]
    below = [p.Go * 0.72 + p.Me * 0.28 + (14, 22), (p.Go + p.Me) / 2 + (0, 14), p.Me - (60, -4), p.Me]
    front = [p.Gn, p.Pog, (p.Pog + p.B) / 2 - (4, 0), p.B, (p.B + p.L1) / 2 + (10, 0), p.L1 + (-14, 60)]
    ridge = [p.L1 + (-0.3 * size, 70), p.L1 + (-0.6 * size, 60)]
    ramus = [molar, coronoid + np.array([0.03, 0.12]) * size, coronoid, (coronoid + condyle) / 2 + (0, 0.13 * size)]
    ramus += [condyle + (22, 8), condyle]
    add(film, curve([*back, *below, *front, *ridge, *ramus], closed=True), 0.55 * vary(rng, 0.12), blur=7)
    add(film, curve([*back, *below, p.Gn, p.Pog]), 0.5, width=17)
    add(film, curve(front[1:]), 0.55, width=13)
    other = np.array([*back, *below]) + rng.normal((8, -14), (10, 9))  # the other side, projected elsewhere
    add(film, curve(other), 0.22, blur=6, width=16)
    add(film, curve([*other, *ramus], closed=True), 0.14, blur=7)

    inside = [p.L1 + (-85, 90), p.B + (-105, 20), (p.B + p.Pog) / 2 + (-120, 40), p.Me + (-105, -70), p.Me - (25, 25)]
    inside += [p.Gn - (22, 18), p.Pog - (24, 0)]
    add(film, curve([*inside, *front[:0:-1]], closed=True), 0.3, blur=8)
    add(film, curve(inside[:5]), 0.4, blur=5, width=14)
    canal = [molar + (-60, 120), (p.Go + p.Me) / 2 + (20, -110), p.Me - (180, 110)]
    add(film, curve(canal), -0.12, blur=6, width=26)
    add(film, curve([condyle + (-22, 2), condyle + (0, -20), condyle + (26, 4)]), 0.45, blur=5, width=18)


def draw_teeth(film, rng, p):
    """Molars to canines on both sides of the occlusal plane, and the incisors: landmarks 11, 12."""
    back = (p.PNS - p.ANS) / np.linalg.norm(p.PNS - p.ANS)
    up = np.array([back[1], -back[0]])
    up *= -np.sign(up[1])  # y grows downwards
    place = (p.L1 + p.U1) / 2 + 55 * back
    for width, length in [(52, 150), (60, 165), (62, 150), (64, 150), (95, 150), (98, 140), (80, 110)]:
        half = 0.42 * width * back
        for side in (1, -1):
            root = side * length * up * vary(rng, 0.1) + rng.normal(0, 8, 2)
            crown = place + rng.normal(0, 5, 2) + 4 * side * up
            neck = [crown - half, crown - 1.1 * half + 0.35 * root, crown + 1.1 * half + 0.35 * root, crown + half]
            tooth = [*neck[:2], crown - 0.5 * half + root, crown + 0.5 * half + root, *neck[2:]]
            add(film, curve(tooth, closed=True, steps=4), 0.38 * vary(rng, 0.2))
            add(film, curve(neck, closed=True, steps=4), 0.35 * vary(rng, 0.3))
            if rng.random() < 0.08:
                add(film, ellipse(crown + 0.18 * root, (0.36 * width, 22)), 1.6, blur=3)  # a filling of metal
        place = place + width * back
    for tip, apex in ((p.U1, (p.ANS + p.A) / 2 + (-60, 25)), (p.L1, (p.B + p.Me) / 2 - (85, 60))):
        axis = (apex - tip) / np.linalg.norm(apex - tip)
        tooth = frame(tip, tip + axis)
        sides = [(40, 26), (95, 33), (240, 10)]
        add(film, curve(tooth([(0, 0), *sides, *((u, -v) for u, v in sides[::-1])]), closed=True, steps=4), 0.6, blur=3)
        crown = [(0, 0), (35, 22), (95, 30), (95, -30), (35, -22)]
        add(film, curve(tooth(crown), closed=True, steps=4), 0.45, blur=3)


def draw_ear(film, rng, p):
    """The ear canal and the rod of the head holder in it: landmark 4."""
    rod = p.Po + (-22 * vary(rng, 1), 36 * vary(rng, 0.5))
    for radius in (88, 50):
        ring = ellipse(rod, (radius, radius))
        add(film, ring, 0.12)
        add(film, ring, 0.55, blur=3, width=12)
    add(film, ellipse(p.Po + (0, 16), (24, 17), 0.3), -0.8, blur=5)
    add(film, curve([p.Po + (-30, 14), p.Po + (0, -3), p.Po + (30, 14)]), 0.4, width=11)


def draw_neck(film, rng, p):
    """Airway, vertebrae with their processes, hyoid bone."""
    size = size_of(p)
    airway = [p.PNS + (-30, 10), p.PNS + np.array([-0.12, 0.25]) * size]
    airway += [*(p.Go + np.array([(0.28, 0.1), (0.22, 0.75), (0.08, 0.8), (0.12, 0.1)]) * size)]
    airway += [*(p.PNS + np.array([(-0.28, 0.2), (-0.25, -0.05)]) * size)]
    add(film, curve(airway, closed=True), -0.2 * vary(rng, 0.3), blur=14)

    spot = p.Ar + np.array([-0.1, 0.3]) * size * vary(rng, 0.1)
    dens = spot + np.array([(-45, -30), (-25, -150), (20, -150), (40, -30)])
    add(film, curve(dens, closed=True), 0.4, blur=6)
    lean = 140 * rng.uniform(-0.1, 0.02)
    for level in range(6):
        tilt = rng.normal(0.12 + 0.02 * level, 0.04)
        vertebra = frame(spot, spot + (np.cos(tilt), np.sin(tilt)))
        w, h = 68 + 3.2 * level, 51 + 2.4 * level
        body = [(-w, -h), (0, 7 - h), (w, -h), (w - 7, 0), (w, h), (0, h - 7), (-w, h), (7 - w, 0)]
        add(film, curve(vertebra(body), closed=True, steps=5), 0.55 * vary(rng, 0.1), blur=6)
        add(film, loop(vertebra(body), steps=5), 0.25, width=11)
        end, drop = -rng.uniform(310, 370), 10 * level
        process = [(-80, -20), (-190, drop - 5), (end, 50 + drop), (end + 20, 90 + drop), (-180, 55), (-80, 40)]
        add(film, curve(vertebra(process), closed=True, steps=5), 0.28 * vary(rng, 0.3), blur=9)
        spot = spot + (lean + rng.normal(0, 4), 152 + 5 * level)

    hyoid = (p.Go + p.Me) / 2 + np.array([-0.25, 0.35]) * size * vary(rng, 0.15)
    hyoid = hyoid + np.array([(-110, -20), (-30, 12), (30, -8), (36, 32), (-20, 36)])
    add(film, curve(hyoid, closed=True), 0.3, blur=7)


def draw_holder(film, rng, p):
    """The nasal rest of the head holder with its ruler, and on some films the shoulder."""
    x = p.N[0] + rng.uniform(0.4, 0.55) * size_of(p)
    y = p.N[1] + rng.uniform(-10, 60)
    rest = [(-210, 5), (-60, 5), (-60, -140), (20, -140), (20, 80), (-200, 80)]
    add(film, np.array(rest) + (x, y), 0.22, blur=5)
    add(film, [(x - 35, -20), (x - 35, y)], 0.2, width=26)
    add(film, [(x - 35, y - 210), (x - 35, y - 15)], 0.9, blur=3, width=27)
    for edge in (-90, 30):
        add(film, [(x + edge, 20), (x + edge, y - 380)], 0.18, width=18)
    if rng.random() < 0.6:
        top = HEIGHT - rng.uniform(0, 260)
        shoulder = [(-200, top), (250, top - 40), (600, top + 120), (760, HEIGHT + 200), (-200, HEIGHT + 200)]
        add(film, curve(shoulder, closed=True), 1.2, blur=14)


# --- film ------------------------------------------------------------------------------------------------------------


def draw_film(rng, landmarks):
    """The radiograph (2400, 1935) uint8 of a patient with these landmarks (19, 2)."""
    p = Patient(*(landmarks - MARKS))
    film = np.zeros((HEIGHT // STEP, WIDTH // STEP), np.float32)
    for draw in (draw_soft_tissue, draw_cranium, draw_midface, draw_mandible, draw_teeth, draw_ear, draw_neck):
        draw(film, rng, p)
    draw_holder(film, rng, p)

    # bone and tissue are uneven on several scales (px0), in proportion to what is there
    unevenness = sum(
        amount * smooth_noise(rng, scale, film.shape)
        for scale, amount in ((5, 0.02), (12, 0.025), (30, 0.025), (90, 0.03), (300, 0.05))
    )
    film *= 1 + rng.uniform(0.5, 1.5) * unevenness

    # exposure: base fog, one end brighter, scatter that grows away from the face; then the film's own curve
    rows, columns = np.mgrid[: film.shape[0], : film.shape[1]].astype(np.float32) * STEP
    film += rng.uniform(0.05, 0.16) + rng.uniform(-0.06, 0.06) * (rows / HEIGHT - 0.5)
    beyond = (columns - p.N[0] - rng.uniform(150, 420)) / WIDTH - 0.12 * ((rows - 1500) / HEIGHT) ** 2
    film += rng.uniform(1.8, 6.6) * beyond.clip(0) ** 1.5
    grey = 255 * (1 - np.exp(-rng.uniform(0.75, 1.05) * film.clip(0))) ** rng.uniform(1.0, 1.35)

    # full size, blur of the tube's focus, grain of the film and of the scanner
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    image = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.0))), np.float32)
    coarse = rng.standard_normal((HEIGHT // 2, WIDTH // 2 + 1), dtype=np.float32).repeat(2, 0).repeat(2, 1)
    image = image + rng.uniform(1.0, 3.5) * coarse[:, :WIDTH]
    image += rng.uniform(0.5, 2.0) * rng.standard_normal(image.shape, dtype=np.float32)
    image = image.clip(0, 255).astype(np.uint8)

    # edge of the collimation, markers of the cassette
    edge = rng.integers(6, 26)
    image[:edge] = image[-edge // 2 :] = 250
    image[:, :5] = 250
    for x in rng.integers(470, 530) + np.array([0, 460, 920]):
        image[: 75 + edge, x : x + 125] = 253
        image[-60:, x : x + 125] = 253
    return image


def smooth_noise(rng, scale, shape):
    """Normal noise (h, w) of a scale in px0."""
    coarse = rng.standard_normal((HEIGHT // scale, WIDTH // scale), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))


# --- files -----------------------------------------------------------------------------------------------------------


def image_file(root, split, id):
    return root / "RawImage" / FOLDERS[split] / f"{id}.bmp"


def program():
    """What decides how a phantom looks: this file and the shape model."""
    return Path(__file__).read_bytes() + SHAPE.read_bytes()


def draw_patient(task):
    """Draw one patient and write annotations, then the image; ``task`` = (root, split, id, seed)."""
    root, split, id, seed = task
    rng = np.random.default_rng([seed, int(id)])
    landmarks, senior, junior = sample_landmarks(rng, json.loads(SHAPE.read_text()))
    image = Image.fromarray(draw_film(rng, landmarks))
    for doctor, points in (("400_senior", senior), ("400_junior", junior)):
        text = "".join(f"{x:.0f},{y:.0f}\n" for x, y in points)
        write_text(root / "AnnotationsByMD" / doctor / f"{id}.txt", text)
    write(image_file(root, split, id), image.save)


def main():
    parser = command.Parser("Draw synthetic cephalograms in the official ISBI 2015 layout.")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    for split, ids in IDS.items():
        parser.add_argument(f"--{split}", type=natural_int, default=len(ids), metavar="N", help=f"images of {split}")
    parser.add_argument("--seed", type=natural_int, default=0, help="the same seed gives the same bytes")
    args = parser.parse_args()
    root = Path(args.out)
    counts = {split: getattr(args, split) for split in IDS}
    for split, count in counts.items():
        if count > len(IDS[split]):
            raise InputError(f"--{split} {count}: at most {len(IDS[split])}, the number in the official data")
    if not any(counts.values()):
        raise InputError("--train, --test1, --test2: nothing to draw; one of them should be positive")

    config = {**counts, "seed": args.seed, "program_sha256": hashlib.sha256(program()).hexdigest()}
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if not (root / "phantom.json").exists():
            raise InputError(f"--out {root}: exists already and is not of phantom.py; choose another folder")
        check_same_config(root / "phantom.json", config, [], "--out")
    make_folder(root)
    write_text(root / "phantom.json", json.dumps(config, indent=2) + "\n")

    folders = [root / "RawImage" / FOLDERS[split] for split in counts if counts[split]]
    for folder in (*folders, root / "AnnotationsByMD" / "400_senior", root / "AnnotationsByMD" / "400_junior"):
        make_folder(folder)
    tasks = [(root, split, f"{id:03d}", args.seed) for split in IDS for id in IDS[split][: counts[split]]]
    tasks = [task for task in tasks if not image_file(*task[:3]).exists()]  # a repeated command goes on
    if tasks:
        with ProcessPoolExecutor(min(os.cpu_count(), len(tasks))) as pool:
            for _ in tqdm(pool.map(draw_patient, tasks), "drawing", len(tasks), unit="image"):
                pass
    print(f"written to {root}/")


if __name__ == "__main__":
    command.run(main)
