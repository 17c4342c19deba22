"""Small data that the tests draw, in all three layouts, and a fixture that runs the commands."""

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval import record_attack
from phantom import SHAPE, sample_landmarks
from readers.layouts import FOLDERS
from readers.points import LANDMARKS
from targets import Targets

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("ISBI2015", ROOT.parent / "shared" / "isbi2015"))  # the real data, if present
SIZE0 = (300, 240)  # H0, W0
SCALE = 8  # times as small as real images
IDS = {"train": ("001", "002", "003", "004"), "test1": ("151", "152", "153"), "test2": ("301",)}
K = 19

TRAIN = ["train.py", "--tag", "small", "--size", 64, 48, "--encoder-weights", "none", "--batch-size", 2, "--lr", 3e-4]

torch.set_num_threads(1)  # tests run in two workers; and so the commands that they start, for equal results
os.environ["OMP_NUM_THREADS"] = "1"
ENVIRONMENT = dict(os.environ)  # of processes that may see GPUs
GPUS = torch.cuda.device_count()


@pytest.fixture(autouse=True)
def sigterm():
    """Commands that run in this process leave SIGTERM ignored, as they then end."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session", autouse=True)
def no_gpu():
    """The suite runs on the CPU wherever it runs, and so the commands that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def draw_landmarks(rng):
    """The landmarks of a patient of the population in whole numbers, as doctors mark them."""
    return (sample_landmarks(rng, json.loads(SHAPE.read_text()))[0] / SCALE).round()


def draw_image(rng, landmarks, size0=SIZE0):
    """A dot on each landmark, of a size and brightness of its own, on a noisy gradient."""
    rows, columns = np.mgrid[: size0[0], : size0[1]]
    image = 40 + 0.2 * rows + rng.normal(0, 4, size0)
    for k, (x, y) in enumerate(landmarks):
        image += (60 + 5 * k) * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * (3 + k % 4) ** 2))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def write_points(path, points):
    lines = [f"{x:.0f},{y:.0f}" for x, y in points] + ["1", "2", "3"]  # clinical classes follow the landmarks
    path.write_text("\n".join(lines) + "\n")


def damage(rng, content):
    """Bytes with one to three faults: truncated, changed, deleted, repeated or inserted."""
    odd = [
        b"nan",
        b"inf",
        b"-1",
        b"1e999",
        b"9" * 400,
        b"\0",
        b"\xff\xfe",
        b",",
        b"\n",
        b'"',
        b" ",
        b"1_0",
        b"{",
        b"null",
    ]
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place, other = rng.integers(len(content) + 1, size=2)
        kind = rng.integers(5)
        if kind == 0:
            del content[place:]
        elif kind == 1:
            content[place : place + 1] = rng.bytes(1)
        elif kind == 2:
            del content[place : place + 20]
        elif kind == 3:
            content[place:place] = content[other : other + 50]
        else:
            content[place:place] = odd[rng.integers(len(odd))]
    return bytes(content)


class Code:
    """A malicious pickle: calls a function when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def spread(goal):
    """Full maps of a goal: offsets (B, 2, K, H, W), zero outside the mask, and the mask (B, K, H, W)."""
    size = goal.heatmap.shape[-2:]
    marked = goal.weight > 0
    mask = torch.zeros(*goal.heatmap.shape[:2], size.numel()).scatter_add_(-1, goal.pixels, marked.float())
    offset = torch.zeros(len(mask), 2, *mask.shape[1:], dtype=goal.offset.dtype)
    offset.scatter_add_(-1, goal.pixels[:, None].expand_as(goal.offset), goal.offset * marked[:, None])
    assert mask.max() <= 1  # each pixel counts once
    return offset.unflatten(-1, size), mask.unflatten(-1, size).bool()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """{split: {id: (image, senior, junior)}} of the drawn data."""
    rng = np.random.default_rng(7)
    data = {}
    for split, ids in IDS.items():
        data[split] = {}
        for id in ids:
            senior = draw_landmarks(rng)
            data[split][id] = (draw_image(rng, senior), senior, senior + rng.integers(-3, 4, (K, 2)))
    return data


def write_official(root, drawn, doctors="AnnotationsByMD", suffix=".bmp"):
    for split, images in drawn.items():
        folder = root / "RawImage" / FOLDERS[split]
        folder.mkdir(parents=True)
        for id, (image, senior, junior) in images.items():
            image.save(folder / f"{id}{suffix}")
            for name, points in (("400_senior", senior), ("400_junior", junior)):
                (root / doctors / name).mkdir(parents=True, exist_ok=True)
                write_points(root / doctors / name / f"{id}.txt", points)


def write_kaggle(root, drawn):
    (root / "cepha400").mkdir(parents=True)
    for split, images in drawn.items():
        with open(root / f"{split}_senior.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_path"] + [f"{k}_{axis}" for k in range(1, K + 1) for axis in "xy"])
            for id, (image, senior, _) in reversed(images.items()):  # rows may be in any order
                image.save(root / "cepha400" / f"{id}.png")
                writer.writerow([f"{id}.png", *senior.astype(int).ravel()])


@pytest.fixture(scope="session")
def official(drawn, tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    write_official(root, drawn)
    return root


@pytest.fixture(scope="session")
def kaggle(drawn, tmp_path_factory):
    root = tmp_path_factory.mktemp("kaggle")
    write_kaggle(root, drawn)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory, official):
    """A working folder with a run that train.py made in a process of its own."""
    folder = tmp_path_factory.mktemp("work")
    command = [*TRAIN, "--data", official, "--epochs", 3, "--checkpoint-every", 2]
    command = [sys.executable, ROOT / command[0], *map(str, command[1:])]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here, so that weights are equal bit for bit
    done = subprocess.run(command, cwd=folder, env=os.environ | threads, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return folder


@pytest.fixture
def data(official, tmp_path):
    """A copy of the official layout that a test may modify."""
    return Path(shutil.copytree(official, tmp_path / "data"))


def images(ids, truth, mm_per_px0=0.1):
    """What records need of dataset.Cephalograms; truth (N, K, 2) px0."""
    truth = torch.tensor(truth, dtype=torch.float64)
    spacing = torch.full((len(ids),), mm_per_px0, dtype=torch.float64)
    names = LANDMARKS[: truth.shape[1]]
    return SimpleNamespace(ids=ids, names=names, landmarks_px0=truth, reference_px0=truth, mm_per_px0=spacing)


def attack_record(ids, points, truth, targets, method, iteration, change=1.0):
    """``eval.record_attack`` of points (N, K, 2) px0; targets likewise, nan where stationary, None if untargeted."""
    if targets is not None:
        places = torch.tensor(targets)
        targets = Targets(places, ~places.isnan().any(-1))
    columns = {"method": method, "iteration": iteration, "largest_change": change}
    return record_attack(images(ids, truth), torch.tensor(points), targets, **columns)


def assert_refused(result, message, *untouched):
    """Status 2, one line with the message, no traceback, nothing written."""
    status, _, err = result
    assert status == 2, err
    assert [message in line for line in err.splitlines() if ": warning: " not in line] == [True], err
    assert err.endswith("\n") and "Traceback" not in err
    assert not any(path.exists() for path in untouched)


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command in this process, in the working folder: run("test.py", ...) -> (status, stdout, stderr)."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        return status, *capfd.readouterr()

    return run
