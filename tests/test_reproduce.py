"""All experiments at a very small scale, on phantoms."""

import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, K, assert_refused

import reproduce
import test
import train
from command import run as run_command
from dataset import LANDMARKS
from runs import read_config

SMALL = "--encoder-weights none --batch-size 2"
SHIFT = "--targets shift --steps 2 --limit 3"
TINY = reproduce.SCALES["cpu"]._replace(
    detectors={
        "40x32": f"--size 40 32 {SMALL} --epochs 1",
        "48x40": "--size 48 40 --init {runs}-40x32/model_epoch_0.pth --batch-size 2 --epochs 1",
        "normed": f"--size 40 32 {SMALL} --epochs 1 --encoder-batch-norm",
    },
    victim="48x40",
    compared={"shift": ("Displacements", SHIFT), "random": ("Random targets", "--targets random --steps 2 --limit 3")},
    epsilons={"random": ("--targets random", (4, 64)), "4 mm": ("--targets shift --shift-mm 4", (4,))},
    epsilon="--attack ATI-FGSM --steps 1 --limit 2",
    counts=(1, 19),
    count=f"--attack ATI-FGSM {SHIFT}",
    fancy="--attack ATI-FGSM --steps 1",
    baselines=(4, 64),
    baseline="--limit 2",
    causes=(
        ("batch norm", "no", "40x32", None, ""),
        ("batch norm", "yes", "normed", None, ""),
        ("input size (px)", "40 x 32", "40x32", 0, ""),
        ("input size (px)", "48 x 40", "48x40", None, None),
    ),
    cause=f"--attack I-FGSM ATI-FGSM {SHIFT}",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def phantoms(work, monkeypatch, run):
    monkeypatch.chdir(work)
    if not (work / "phantoms").exists():
        assert run("phantom.py", "--out", "phantoms", "--train", 2, "--test1", 3, "--test2", 0)[0] == 0


@pytest.fixture
def reproduced(work, phantoms, monkeypatch, capfd):
    """Runs reproduce.py --scale cpu, made tiny, on three images, as (status, stdout, stderr)."""
    monkeypatch.setitem(reproduce.SCALES, "cpu", TINY)
    monkeypatch.setattr(reproduce, "WORD", "MI")

    def reproduced(*arguments):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
        capfd.readouterr()
        try:
            run_command(reproduce.main)
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capfd.readouterr()

    return reproduced


COMMAND = ["--scale", "cpu", "--data", "phantoms"]


def test_what_builds_on_something_else_asks_for_it(reproduced, work):
    assert_refused(reproduced(*COMMAND, "--only", "epsilon"), "--only epsilon: builds on detection", work / "results")
    assert_refused(reproduced(*COMMAND, "--only", "detection", "coupling"), "--only coupling: builds on attack")
    assert_refused(reproduced("--scale", "cpu", "--data", "nowhere"), "nowhere: no such folder", work / "results")
    assert_refused(reproduced(*COMMAND, "--only", "everything"), "invalid choice: 'everything'")


def test_one_experiment_then_all(reproduced, work):
    status, _, err = reproduced(*COMMAND, "--only", "detection")
    assert status == 0, err
    results = work / "results" / "cpu"
    report = (results / "report.md").read_text()
    assert "| test1 | subpixel | 3 |" in report and "Not run yet: `--only epsilon`" in report
    weights = work / "runs" / "cpu-48x40" / "model_epoch_0.pth"
    stamp = weights.stat().st_mtime_ns

    status, out, err = reproduced(*COMMAND)
    assert status == 0, err
    assert weights.stat().st_mtime_ns == stamp  # trained once
    report = (results / "report.md").read_text()
    assert "Not run yet" not in report and "nan" not in report
    assert [int(n) for n in re.findall(r"^## (\d+)\.", report, re.M)] == [*range(1, 9)]
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", report):
        assert (results / name).stat().st_size > 5000, name
    assert not [file.name for file in results.iterdir() if ".part" in file.name]
    commands = re.findall(r"^python ((?:train|test)\.py .*)$", out, re.M)
    assert set(commands) == set(re.findall(r"^python (.*)$", report, re.M))

    epsilon = pd.read_csv(results / "epsilon.csv")
    assert epsilon[["targets", "epsilon"]].to_numpy().tolist() == [["random", 4], ["random", 64], ["4 mm", 4]]
    assert pd.read_csv(results / "count.csv")["targeted"].tolist() == [3, 3 * K]
    assert pd.read_csv(results / "causes.csv")["answer"].nunique() == 4
    flown = pd.read_csv(results / "baselines.csv").groupby("method")["flown_mm"]
    assert (flown.last() > flown.first()).all()  # the greater epsilon
    spelt = pd.read_csv(results / "fancy_predictions.csv", dtype={"image": str})
    for image, letter in (("151", "M"), ("152", "I")):
        targets = pd.read_csv(ROOT / "letters" / f"{letter}.csv").sort_values("landmark")
        rows = spelt[spelt["image"] == image]
        assert np.array_equal(rows[["target_x_px0", "target_y_px0"]], targets[["x", "y"]])


def test_results_are_those_of_the_commands(reproduced, work):
    """After the test above: a number of the report, from the records."""
    records = pd.read_csv(work / "runs" / "cpu-48x40" / "attack" / "shift" / "predictions.csv")
    rows = records.query("method == 'ATI-FGSM' and iteration == 2 and role == 'targeted'")["radial_error_mm"]
    table = pd.read_csv(work / "results" / "cpu" / "attack_shift.csv")
    row = table.query("method == 'ATI-FGSM' and iteration == 2 and role == 'targeted'").iloc[0]
    assert row["mre_mm"] == pytest.approx(rows.mean(), abs=1e-3)
    assert row["mre_mm_low"] <= row["mre_mm"] <= row["mre_mm_high"]
    config = read_config(work / "runs" / "cpu-48x40" / "attack" / "shift" / "config.json")
    assert config["subpixel"] is True and config["seed"] == 0


def test_another_configuration_under_the_same_name_is_refused(reproduced):
    other = "bf16" if reproduce.command.fast_precision() == "fp32" else "fp32"
    assert_refused(reproduced(*COMMAND, "--precision", other), f"now it is '{other}'")


@pytest.mark.parametrize("name", reproduce.SCALES)
def test_the_real_scales_fit_together(name, phantoms):
    scale = reproduce.SCALES[name]
    names = list(scale.detectors)
    for place, arguments in enumerate(scale.detectors.values()):
        for origin, epoch in re.findall(r"--init \{runs\}-(\S+)/model_epoch_(\d+)\.pth", arguments):
            assert origin in names[:place]  # trained before
            assert f"--epochs {int(epoch) + 1} " in scale.detectors[origin] + " "
    assert scale.victim in names
    assert {detector for _, _, detector, *_ in scale.causes} <= set(names)
    assert all(detector == scale.victim for _, _, detector, _, arguments in scale.causes if arguments is None)
    plan = reproduce.Plan(scale, name, "phantoms", ("--precision", "fp32"))
    commands = [plan.train(detector) for detector in names]
    for experiment, *_ in reproduce.EXPERIMENTS.values():
        commands += experiment(plan)[0]
    folders = []
    for program, *arguments in commands:
        parsed = {"train.py": train, "test.py": test}[program].parse_arguments(arguments)
        folders.append((parsed.tag, getattr(parsed, "rand", None)))
        if getattr(parsed, "iteration", None) is not None:
            every = train.parse_arguments(plan.train(parsed.tag.removeprefix(f"{name}-"))[1:]).checkpoint_every
            assert (parsed.iteration + 1) % every == 0
    tests = [folder for folder in folders if folder[1]]
    assert len(set(tests)) == len(tests)  # none writes where another does


def test_letters_are_as_drawn_and_legible(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "letters")
    import draw

    mean = np.array(json.loads((ROOT / "shape_model.json").read_text())["mean"])
    for letter in set(reproduce.WORD):
        table = pd.read_csv(ROOT / "letters" / f"{letter}.csv")
        assert table["landmark"].tolist() == [*range(1, len(LANDMARKS) + 1)]
        places = table[["x", "y"]].to_numpy()
        assert len(np.unique(places, axis=0)) == len(LANDMARKS)
        assert (places > (302, 750)).all() and (places < (1814, 2250)).all()  # where the paper draws its targets
        strokes = draw.spread(draw.STROKES[letter], len(mean)) * (draw.WIDTH, draw.HEIGHT) + (draw.LEFT, draw.TOP)
        assert np.array_equal(draw.share_out(strokes, mean).round(), places)
        way = np.square(places[None] - mean[:, None]).sum(-1)  # of each landmark to each place
        swapped = way + way.T <= np.diag(way)[:, None] + np.diag(way) - 1e-6
        assert not swapped.any()  # no two landmarks would travel less in each other's place
