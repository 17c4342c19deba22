import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_refused, write_official
from PIL import Image, ImageDraw
from torch import nn

from attack import ATTACKS, aim_at, last, run
from detectors import Detector, coordinates, heatmap, voting
from model import OUTPUTS, UNet, confidence, expected_pixel, highest_pixel

SIZE, K = (64, 48), 5
TARGETED = torch.tensor([[True, True, False, False, False]] * 2)


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(0)
    return torch.rand(2, 3, *SIZE) * 2 - 1


def layers(*last_ones, stride=1):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride, 2), nn.ReLU(), *last_ones).eval().requires_grad_(False)


def forms():
    """A small detector of each form; heatmaps at half the resolution."""
    maps = layers(nn.Conv2d(8, K, 5, padding=2), stride=2)
    points = layers(nn.Flatten(), nn.Linear(8 * 16 * 12, 2 * K), nn.Unflatten(1, (K, 2)), stride=4)
    return {
        "voting": voting(layers(nn.Conv2d(8, 3 * K, 5, padding=2), nn.Unflatten(1, (3, K))), size=SIZE),
        "heatmap": heatmap(maps, SIZE),
        "expectation": heatmap(lambda image: 20 * maps(image), SIZE, expectation=True),
        "coordinates": coordinates(lambda image: 24 + 20 * points(image), SIZE),
    }


def test_pixels_of_smaller_maps_by_hand():
    maps = torch.zeros(1, 1, 2, 3)  # in an input of 4 x 9 px: their centres are at y 0.5, 2.5, and at x 1, 4, 7
    assert expected_pixel(maps, (4, 9)).flatten().tolist() == pytest.approx([4, 1.5])
    maps[0, 0, 1, 2] = math.log(5)  # half of the distribution
    assert highest_pixel(maps, (4, 9)).tolist() == [[[7, 2.5]]]
    assert expected_pixel(maps, (4, 9))[0, 0].tolist() == pytest.approx([5.2, 1.9])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_names_pixels_exactly(dtype):
    maps = torch.zeros(1, 1, 800, 640, dtype=dtype)
    maps[0, 0, 777, 605] = 100  # all of the distribution
    assert highest_pixel(maps, (800, 640)).tolist() == [[[605, 777]]]
    assert expected_pixel(maps, (800, 640))[0, 0].tolist() == pytest.approx([605, 777])
    maps = torch.stack([maps, *torch.zeros(2, *maps.shape, dtype=dtype)], dim=1)
    peak, share = confidence(maps, torch.tensor([[[605.0, 777.0]]])).values()
    assert peak.item() == 1 and share.dtype == torch.float32


def test_an_input_of_less_than_20_px_is_attacked():
    """Its R of 5 % is less than a pixel."""
    torch.manual_seed(0)
    small, targets = torch.rand(1, 3, 16, 12) * 2 - 1, torch.full((1, K, 2), 8.0)
    detector = heatmap(layers(nn.Conv2d(8, K, 5, padding=2)), (16, 12))
    for name in ("I-FGSM", "Vote-PGD"):
        _, adversarial, _ = last(run(ATTACKS[name], detector, small, targets, TARGETED[:1], steps=3))
        assert not torch.equal(adversarial, small)


@pytest.mark.parametrize("form", ["heatmap", "expectation", "coordinates"])
@pytest.mark.parametrize(
    "name", [name for name, attack in ATTACKS.items() if attack.loss and (attack.steps is None or attack.votes)]
)
def test_each_form_is_attacked_by_each_attack(form, name, image):
    """The attacked landmarks come nearer, by a tenth at least if it sees gradients."""
    detector, attack = forms()[form], ATTACKS[name]
    targets = torch.tensor([20.0, 25.0]).expand(2, K, 2)
    if attack.votes:
        with pytest.raises(ValueError, match="an attack on detectors by voting"):
            run(attack, detector, image, targets, TARGETED)
        return
    _, adversarial, outputs = last(run(attack, detector, image, targets, TARGETED, epsilon=64, steps=40))
    assert (adversarial - image).abs().max() <= 64 / 256 + 1e-6
    found = [
        (points - targets)[TARGETED].norm(dim=-1).mean()
        for points in (detector.predict(image), detector.landmarks(outputs))
    ]
    assert found[1] < (1 if name == "Square" else 0.9) * found[0]


@pytest.mark.parametrize("form", ["voting", "heatmap", "expectation", "coordinates"])
def test_the_goal_of_a_clean_detector_is_its_own_output(form, image):
    """Nothing is left to move where the targets are the clean landmarks: no attack becomes nan by it."""
    detector = forms()[form]
    clean = detector.predict(image)
    for name in ("I-FGSM", "ATI-FGSM", "Vote-PGD", "APGD"):
        _, adversarial, outputs = last(run(ATTACKS[name], detector, image, clean.clamp(0, 47), TARGETED, steps=3))
        assert adversarial.isfinite().all()
        if form == "coordinates":
            assert (detector.landmarks(outputs) - clean).abs().max() < 8


def test_pulls_by_hand():
    """At the width's distance half of a vote counts."""
    R = 3  # of 64 x 48 px
    places, widths = torch.tensor([[[10.0, 10.0]]]), torch.tensor([[2.0]])
    points = coordinates(None, SIZE)
    assert points.pull(places + torch.tensor([2.0 * R, 0]), places, widths).item() == pytest.approx(math.log(2))
    maps = torch.full((1, 1, *SIZE), -100.0)
    maps[0, 0, 10, 10 + 2 * R] = 100  # all of the distribution
    detector = heatmap(lambda image: maps, SIZE)
    aim = aim_at(detector, torch.zeros(1, 3, *SIZE), places, torch.tensor([[True]]))
    assert detector.pull(maps, aim.goal, widths).item() == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_network_of_each_output(output):
    torch.manual_seed(0)
    outputs = UNet(K, output=output).eval()(torch.zeros(1, 3, 40, 32))
    shape = {"voting": (1, 3, K, 40, 32), "heatmap": (1, K, 40, 32), "coordinates": (1, K, 2)}[output]
    assert outputs.shape == shape and outputs.dtype == torch.float32


# --- over what users of other libraries stumble


def plain(image):
    return image[:, :1].expand(-1, K, -1, -1)


REFUSED = {  # the network, and the message
    "training mode": (layers(nn.BatchNorm2d(8), nn.Conv2d(8, K, 1)).train(), "training mode, .* call .eval()"),
    "a tuple": (lambda image: (plain(image),), "must return one tensor: .* it returns a tuple"),
    "a dict": (lambda image: {"out": plain(image)}, "must return one tensor: .* it returns a dict"),
    "no_grad": (torch.no_grad()(plain), "the loss has no gradient in the image"),
    "detached": (lambda image: plain(image).detach(), "the loss has no gradient in the image"),
    "another tensor": (lambda image: torch.zeros(2, K, 64, 48, requires_grad=True), "the loss has no gradient in the"),
    "another device": (layers(nn.Conv2d(8, K, 1)).to("meta"), "the network is on meta, the image on cpu"),
    "a layer elsewhere": (layers(nn.Conv2d(8, K, 1, device="meta")), "the network is on meta, the image on cpu"),
    "another form": (lambda image: plain(image)[:, None], "maps must be (B, K, H, W)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_networks_that_cannot_be_attacked(case, image):
    network, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message).replace(re.escape(".*"), ".*")):
        last(run(ATTACKS["I-FGSM"], heatmap(network, SIZE), image, torch.zeros(2, K, 2), TARGETED, steps=1))


def test_the_example_of_the_docs():
    example = (ROOT / "docs" / "detectors.md").read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 17  # no more to write
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, 2, 7, padding=3)).requires_grad_(
        False
    )
    image, targets = torch.rand(1, 1, 32, 40) * 2 - 1, torch.tensor([[[5.0, 20], [33, 8]]])
    names = {"network": network, "image": image, "targets": targets, "targeted": torch.ones(1, 2, dtype=torch.bool)}
    exec(example, names)
    detector = names["detector"]
    assert isinstance(detector, Detector) and not torch.equal(detector.predict(image), targets)
    assert torch.equal(detector.predict(names["adversarial"]), targets)
    assert (names["adversarial"] - image).abs().max() <= 64 / 256 + 1e-6


# --- from the command line

LEVELS = (60, 105, 150, 195, 240)  # grey levels of five dots
OWN = """
from __future__ import annotations
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from beside import LEVELS
from detectors import coordinates, heatmap

@dataclass
class Scale:
    factor: float = 40

def network(image):
    levels = torch.tensor(LEVELS).view(1, -1, 1, 1) / 127.5 - 1
    return Scale().factor * F.avg_pool2d(-(image[:, :1] - levels).square(), 5, 1, 2)

class Network(torch.nn.Dropout):  # in training mode
    def forward(self, image):
        return super().forward(network(image))

def dots():
    return heatmap(Network(), (64, 48), names=["red", "green", "blue", "left (L)", "right"])

def trained():
    factor, *other = open("weights").read().split()
    return heatmap(lambda image: float(factor) * network(image).flip([1] * len(other)), (64, 48), names=5)

def number():
    return heatmap(network, (64, 48), names=5)

def six():
    return heatmap(network, (64, 48), names=6)

def lost():
    return coordinates(lambda image: 0 * network(image)[:, :, 0, :2], (64, 48), names=5)

def detached():
    return heatmap(torch.no_grad()(network), (64, 48), names=5)

def dropping():
    net = Network()
    return heatmap(lambda image: net(image), (64, 48), names=5)

def batch_norm():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 5, 9))
    return heatmap(lambda image: net(image), (256, 256), names=5)

def undefined():
    return coordinates(lambda image: network(image)[:, :, 0, :2] / 0, (64, 48), names=5)

def several():
    return heatmap(lambda image: (network(image),), (64, 48), names=5)

def nothing():
    return 3

def broken():
    raise KeyError("x")
"""


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    """A folder with data of five landmarks, each a dot of its grey level, and detectors of them."""
    folder, rng, data = tmp_path_factory.mktemp("dots"), np.random.default_rng(0), {}
    for id in ("151", "152", "153"):
        places = np.stack([rng.permutation([20, 50, 80, 110, 140]), rng.permutation([20, 60, 100, 140, 180])], axis=1)
        image = Image.new("L", (160, 200), 0)
        for (x, y), level in zip(places.tolist(), LEVELS, strict=True):
            ImageDraw.Draw(image).ellipse([x - 15, y - 15, x + 15, y + 15], fill=level)
        data[id] = image, places, places
    write_official(folder / "dataset", {"test1": data})
    (folder / "own.py").write_text(OWN)
    (folder / "weights").write_text("40")
    (folder / "beside.py").write_text(f"LEVELS = {LEVELS}")
    return folder


def done(result):
    """The output and warnings of a command that has to succeed."""
    status, out, err = result
    assert status == 0, err
    return out, err


def test_an_own_detector_is_tested_and_attacked(dots, run, monkeypatch):
    monkeypatch.chdir(dots)
    done(run("test.py", "--detector", "own.py:dots", "--rand", "test"))
    summary = pd.read_csv("test/summary.csv")
    assert summary["name"].tolist() == ["red", "green", "blue", "left (L)", "right", "all landmarks"]
    assert summary["mre_mm"].max() < 1 and not Path("test/diagnoses.csv").exists()
    Path("aims.csv").write_text("landmark,x,y\nred,80,100\nL,30,30\n")
    attack = "test.py", "--detector", "own.py:dots", "--attack", 4, "random-search", "--targets", "aims.csv"
    attack += "--epsilon", 64, "--steps", 30, "--save-adversarial"
    out, _ = done(run(*attack))
    assert "MRE on the clean images: 0." in out
    folder = Path("runs/dots/attack_test")
    end = pd.read_csv(folder / "summary.csv").query("iteration == 30 and method == 'Vote-PGD'").set_index("role")
    assert end["landmarks"].to_dict() == {"targeted": 6, "stationary": 9, "worst": 3}
    assert end.loc["targeted", "within_4mm_%"] > 50
    assert len(list((folder / "pictures").iterdir())) == 6
    done(run(*attack))  # nothing is left to do
    for experiment in ("attack", "robustness", "defence"):
        done(run("scripts/tables.py", experiment, folder, "--out", experiment))
    assert set(pd.read_csv("robustness/robustness.csv")["targeted"]) == {6}


def test_results_of_other_weights_are_refused(dots, run, monkeypatch, tmp_path):
    shutil.copytree(dots, tmp_path / "dots")
    monkeypatch.chdir(tmp_path / "dots")
    done(run("test.py", "--detector", "own.py:trained", "--rand", "weights_40"))
    before = Path("weights_40/predictions.csv").read_bytes()
    for content in ("50", "40 reversed"):
        Path("weights").write_text(content)
        assert_refused(run("test.py", "--detector", "own.py:trained", "--rand", "weights_40"), "detector_outputs")
    assert Path("weights_40/predictions.csv").read_bytes() == before


OWN_REFUSED = {  # --detector, arguments; the message
    "no file": ("nowhere.py:dots", [], "FileNotFoundError"),
    "no function": ("own.py:other", [], "AttributeError"),
    "no name": ("own.py", [], "FILE.py:NAME is needed"),
    "no .py": ("own:dots", [], "FILE.py:NAME is needed"),
    "another number": ("own.py:six", [], "finds 5 landmarks, but has 6 names"),
    "no detector": ("own.py:nothing", [], "AttributeError"),
    "an error": ("own.py:broken", [], "KeyError: 'x'"),
    "training mode behind a function": ("own.py:dropping", [], "is the network in training mode?"),
    "batch norm behind a function": ("own.py:batch_norm", [], "is the network in training mode?"),
    "landmarks nowhere": ("own.py:undefined", [], "a landmark at nan or inf"),
    "several outputs": ("own.py:several", ["--attack", 0], "maps is a tuple (docs/detectors.md)"),
    "no gradient": ("own.py:detached", ["--attack", 1], "--attack ATI-FGSM: the loss has no gradient in the image"),
    "no votes": (
        "own.py:number",
        ["--attack", 1, "CosPGD"],
        "--attack CosPGD: CosPGD is an attack on",
    ),
    "a precision": ("own.py:dots", ["--precision", "bf16"], "--precision: not with --detector"),
    "an iteration": ("own.py:dots", ["--iteration", 0], "--iteration: not with --detector"),
    "a diagnosis": (
        "own.py:dots",
        ["--attack", 1, "--targets", "diagnosis", "--measure", "ANB"],
        "not with --detector",
    ),
    "a run too": ("own.py:dots", ["--tag", "small"], "--tag or --detector: one of them is needed"),
    "too many targets": (
        "own.py:dots",
        ["--attack", 1, "--targets", "shift", "--shift-count", 6],
        "--shift-count 6: there are 5 landmarks",
    ),
}


@pytest.mark.parametrize("case", OWN_REFUSED)
def test_what_is_no_detector_is_refused(case, dots, run, monkeypatch):
    monkeypatch.chdir(dots)
    source, arguments, message = OWN_REFUSED[case]
    assert_refused(run("test.py", "--detector", source, *arguments), message)


def test_a_detector_that_is_far_off_is_warned_of(dots, run, monkeypatch):
    monkeypatch.chdir(dots)
    _, err = done(run("test.py", "--detector", "own.py:lost", "--attack", "FGSM", "--rand", "lost", "--mm-per-px", 1))
    assert "does it take images in [-1, 1]" in err


@pytest.mark.parametrize("output", ["heatmap", "coordinates"])
def test_training_of_each_output(output, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    train = ["train.py", "--data", official, "--size", 64, 48, "--output", output, "--encoder-weights", "none"]
    for epochs, resume in ((2, []), (3, ["--resume"])):
        done(run(*train, "--tag", output, "--batch-size", 2, "--checkpoint-every", 1, "--epochs", epochs, *resume))
    log = pd.read_csv(Path("runs", output, "train_log.csv"))
    assert log["epoch"].tolist() == [0, 1, 2] and "heatmap_bce" not in log
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]
    attacks = "--attack", 0, 1, "Vote-PGD", "--steps", 3
    done(run("test.py", "--tag", output, "--data", official, "--split", "test1", *attacks))
    init = "--init", f"runs/{output}/model_epoch_2.pth"
    done(run(*train[:-2], "--tag", "robust", *init, "--adversarial", "--epochs", 1, "--batch-size", 4))
