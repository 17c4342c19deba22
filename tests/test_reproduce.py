"""All experiments at a very small scale, on phantoms."""

import json
import re
import sys
from functools import partial

import letters
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, K, assert_refused

import reproduce
import test
import train
from experiments import scales
from experiments.costs import Step
from experiments.report import EXPERIMENTS
from experiments.scales import NEAR, PAPER, SCALES, Checkpoint, Scale, arguments
from readers.points import LANDMARKS
from support import command
from support.errors import Stopped
from support.files import read_config

SMALL = {"size": (40, 32), "batch_size": 2, "epochs": 1}
LARGE = {"size": (48, 40), "init": Checkpoint("40x32", 0), "batch_size": 2, "epochs": 1}
TEST_PHANTOMS = {"train": 2, "test1": 3, "test2": 0}


def tiny(splits, ids):
    """The scale cpu, made tiny, on three images."""
    victim, few = "48x40", {"steps": 2, "limit": 3}
    attack = partial(scales.test, victim, subpixel=True)
    ati = partial(attack, attack="ATI-FGSM")
    shift = attack("attack", "shift", {"description": "Displacements"}, attack=PAPER, **NEAR, **few)
    random = attack("attack", "random", {"description": "Random targets"}, attack=PAPER, **few)
    longer = {"attack": "Vote-PGD", "steps": 3}
    table = {
        "batch norm": {"no": ("40x32", {}), "yes": ("normed", {})},
        "input size (px)": {"40 x 32": ("40x32", {"iteration": 0}), "48 x 40": None},
        "trainings": {"plain": (["40x32", "normed"], {}), "reversed": (["normed", "40x32"], {})},
    }
    diagnose = partial(attack, attack=("ATI-FGSM", "noise"), steps=1, limit=3)
    defend = partial(scales.sweep_defence, victim, {"steps": 1, "limit": 3}, LARGE, splits[0], (8,), 2)
    experiments = {
        "detection": [scales.train("40x32", **SMALL), scales.train(victim, **LARGE), *scales.detection(victim, splits)],
        "attack": [shift, random, random._replace(options=random.options | longer, name="random_longer")],
        "epsilon": scales.sweep_epsilon(partial(ati, steps=1, limit=2), {"random": (4, 64), "4 mm": (4,)}),
        "count": scales.sweep_count(partial(ati, **few), (1, 19)),
        "fancy": [
            scales.train("letters", **LARGE),
            *scales.spell(partial(scales.test, "letters", subpixel=True, attack=PAPER, steps=1), ids, "MI"),
        ],
        "causes": [
            scales.train("normed", **SMALL, encoder_batch_norm=True),
            *scales.causes({"attack": PAPER, **NEAR, **few, "subpixel": True}, shift, table),
            *scales.causes({**NEAR, **few}, None, {"neighbours": scales.neighbours(victim)}),
        ],
        "diagnosis": [
            *scales.sweep_diagnosis(diagnose, (4, 16), ("MW",)),
            *scales.deliver_diagnosis(diagnose, 16, ("MW",)),
            *scales.drive_diagnosis(diagnose, [(4, 8)], ("MW",)),
        ],
        "defence": defend(("jpeg:75", "noise:4")),
        "robustness": scales.shift_and_random(partial(attack, attack=scales.EQUAL, steps=1, limit=2), "robustness"),
    }
    return Scale(victim, experiments)


def tiny_demo(encoder_weights):
    """The scale demo, made tiny."""
    attack = partial(scales.test, "40x32", attack=PAPER, **NEAR, steps=2, limit=2, batch_size=1)
    spell = partial(scales.test, "40x32", attack="Vote-PGD", epsilon=8, steps=1)
    experiments = {
        "detection": [
            scales.Run("phantom.py", options=TEST_PHANTOMS),
            scales.train("40x32", **SMALL),
            scales.detection("40x32", ["test1"])[0],
        ],
        "attack": [attack("attack", "shift", {"description": "Displacements"}, pictures=1)],
        "fancy": scales.spell(spell, ["151", "152"], "AI"),
    }
    return Scale("40x32", experiments)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def reproduced(monkeypatch, capfd):
    """Runs reproduce.py, its scales made tiny, in the working folder: (status, stdout, stderr)."""
    monkeypatch.setitem(SCALES, "cpu", tiny)
    monkeypatch.setitem(SCALES, "demo", tiny_demo)

    def reproduced(*words):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, words)])
        capfd.readouterr()
        try:
            command.run(reproduce.main)
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capfd.readouterr()

    return reproduced


def stamps(folder, pattern="*"):
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern) if path.is_file()}


CPU = ["--scale", "cpu", "--data", "runs/demo-phantoms", "--encoder-weights", "none"]  # on the images of the demo


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["cpu", "--only", "epsilon"], "--only epsilon: depends on detection"),
        (["cpu", "--only", "detection", "causes"], "--only causes: depends on attack"),
        (["cpu", "--only", "everything"], "invalid choice: 'everything'"),
        (["cpu", "--data", "nowhere"], "nowhere: no such folder"),
        (["cpu", "--only", "attack"], "--only attack: depends on detection"),
        (["cpu", "--device", "gpu"], "--device gpu: "),
        (["demo", "--only", "attack"], "--only: not with --scale demo"),
        (["demo", "--data", "images"], "--scale demo: draws its own data"),
    ],
)
def test_refused_before_any_work(words, message, reproduced, official, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").symlink_to(official)  # the default of --data
    assert_refused(reproduced("--scale", *words), message, tmp_path / "results", tmp_path / "runs")


# --- what it would take ----------------------------------------------------------------------------------------------


def listed(out):
    """{experiment: (commands, images trained, image-iterations, hours, memory in GiB, disk in GiB)} of --list."""
    lines = [line.split() for line in out.partition("nothing was run")[2].splitlines()]
    return {line[0]: tuple(map(float, line[1:])) for line in lines if len(line) == 7 and line[0] != "experiment"}


def test_costs_are_counted_without_data_and_nothing_is_written(reproduced, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    step = Step((800, 640), training=3.6, attack=1.8, fixed_bytes=4 * 2**30, image_bytes=2**30)
    monkeypatch.setattr(reproduce, "time_steps", lambda *_: step)
    status, out, err = reproduced("--scale", "paper", "--list")
    assert status == 0, err
    table = listed(out)
    assert table["attack"][:3] == (3, 0, 250 * (300 + 300 + 100) + 250 * 100 * 3)
    assert table["attack"][3] == 250_000 * 1.8 / 3600
    assert table["all"][2] <= 900_000  # image-iterations: an hour of a GPU
    defended = 1 + 5 + 4  # without a defence, and behind each; a pass of noise's attack is one of four draws
    assert table["defence"][2] == 30 * 100 * (2 * defended + 1 + 2 * 5 + 2 + 2 * 3 + 1)
    detection = table["detection"]
    assert detection[1] == 230 * 150  # hours: the training, and two tests of 150 and of 100 images by forward passes
    assert detection[3] == pytest.approx((230 * 150 * 3.6 + 500 * 0.6) / 3600, abs=0.05)
    assert detection[4:] == (4 + 8 * 1, 46 + 3)  # memory of a batch of 8; checkpoints and resume.pth of 1 GiB each
    assert "python test.py --tag paper-800x640 --data dataset --precision fp32 --pictures 0 --attack I-FGSM" in out
    every = [sum(row[i] for name, row in table.items() if name != "all") for i in range(4)]
    assert table["all"][:4] == pytest.approx(every, abs=0.5)
    assert not list(tmp_path.iterdir())


def test_the_scale_of_the_paper_without_a_gpu_says_how_long_it_takes(reproduced, official, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "time_steps", lambda *_: Step((800, 640), 7.0, 4.5, 0, 0))
    monkeypatch.setattr(train, "main", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: False)
    status, _, err = reproduced("--scale", "paper", "--encoder-weights", "none", "--data", official)
    assert status == 130
    assert "warning: --scale paper without a GPU, on" in err and "hours" in err
    assert [file.name for file in tmp_path.rglob("*.*")] == ["config.json"]


def test_a_failing_command_ends_it_with_its_status(reproduced, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    too_many = scales.Run("phantom.py", options={"train": 1000})
    monkeypatch.setitem(
        SCALES, "demo", lambda _: Scale("40x32", {"detection": [too_many, scales.train("40x32", **SMALL)]})
    )
    assert_refused(
        reproduced("--scale", "demo"),
        "--train: 1000 is not a whole number from 0 to 150",
        tmp_path / "runs" / "demo-40x32",
    )


def test_folders_of_somebody_else_are_not_touched(reproduced, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "runs" / "demo-phantoms" / "results.csv"
    other.parent.mkdir(parents=True)
    other.write_text("precious")
    assert_refused(reproduced("--scale", "demo"), "runs/demo-phantoms", tmp_path / "runs" / "demo-40x32")
    assert other.read_text() == "precious" and len(stamps(tmp_path / "runs")) == 1


# --- runs of everything ----------------------------------------------------------------------------------------------


@pytest.fixture
def demonstrated(work, reproduced, monkeypatch):
    """The working folder after the demo."""
    monkeypatch.chdir(work)
    if not (work / "demo.out").exists():
        status, out, err = reproduced("--scale", "demo")
        assert status == 0, err
        (work / "demo.out").write_text(out)
    return work


def test_the_demo_from_drawing_to_its_report(demonstrated):
    out = (demonstrated / "demo.out").read_text()
    commands = [line.split()[1] for line in out.splitlines() if line.startswith("python ")]
    assert commands == ["phantom.py", "train.py", "test.py", "test.py", "test.py", "test.py"]
    run, results = demonstrated / "runs" / "demo-40x32", demonstrated / "results" / "demo"
    assert len(list((run / "attack" / "shift" / "pictures").iterdir())) == 2
    text = (results / "report.md").read_text()
    assert "1. The radiographs are synthetic" in text
    sentences = re.findall(r"^\d+[.] (.*)", text, re.M)
    assert len(sentences) == 6 and all(sentence in out for sentence in sentences)
    tested = pd.read_csv(run / "detection" / "test1_voting" / "summary.csv", index_col="landmark").loc["all"]
    assert f"{tested['mre_mm']:.2f} mm, {tested['sdr_2mm_%']:.0f} % within 2 mm" in text
    shift = pd.read_csv(run / "attack" / "shift" / "summary.csv").query("iteration == 2").set_index(["role", "method"])
    reached, kept = (shift.loc[(role, "ATI-FGSM"), "within_4mm_%"] for role in ("targeted", "stationary"))
    assert f"ATI-FGSM brings {reached:.0f} % to within 4 mm of their targets and leaves {kept:.0f} %" in text
    counts = (pd.read_csv(results / "fancy.csv")["within 4 mm (%)"] * 19 / 100).round().astype(int)
    assert f"Vote-PGD writes AI: {counts[0]}, {counts[1]} of the 19" in text
    for name in re.findall(r"[(]([\w.]+)[)]", text):
        assert (results / name).exists(), name


@pytest.mark.slow
def test_a_stopped_stage_resumes_and_finished_work_is_not_repeated(demonstrated, reproduced, monkeypatch):
    """An image and some records are lost; a stop in the attack ends everything; the same command does the rest."""
    runs = demonstrated / "runs"
    done = {**stamps(runs, "records/*.csv"), **stamps(runs, "*.bmp"), **stamps(runs, "model_epoch_*.pth")}
    assert len(done) == 3 + 2 * 2 + 2 + 5 + 1
    shift = runs / "demo-40x32" / "attack" / "shift"
    lost = [next(path for path in done if path.suffix == ".bmp"), *(shift / "records").glob("ATI*")]
    for path in (*lost, shift / "predictions.csv"):
        path.unlink()

    def stop(*_):
        raise Stopped("stopped by SIGTERM; finished work is kept")

    with monkeypatch.context() as patch:
        patch.setattr(test, "attack_all", stop)
        status, _, err = reproduced("--scale", "demo")
    assert status == command.STOPPED and "Traceback" not in err and "finished work is kept" in err
    assert lost[0].exists() and not lost[1].exists()

    status, _, err = reproduced("--scale", "demo")
    assert status == 0, err
    again = stamps(runs)
    assert (shift / "predictions.csv").exists() and len(lost) == 3
    for path, stamp in done.items():
        assert (again[path] == stamp) == (path not in lost), path


@pytest.mark.slow
def test_one_experiment_then_the_others(demonstrated, reproduced, monkeypatch):
    status, first, err = reproduced(*CPU, "--only", "detection")
    assert status == 0, err
    results = demonstrated / "results" / "cpu"
    report = (results / "report.md").read_text()
    assert "| test1 | subpixel | 3 |" in report and "Not yet run: `--only epsilon`" in report

    others = [name for name in EXPERIMENTS if name != "detection"]
    status, second, err = reproduced(*CPU, "--only", *others)
    assert status == 0, err
    check_report(results, first + second)
    check_tables(results)
    check_numbers(demonstrated)
    other = "bf16" if command.fast_precision("auto") == "fp32" else "fp32"
    assert_refused(reproduced(*CPU, "--precision", other), f"now it is '{other}'")
    assert_refused(reproduced(*CPU, "--precision", other, "--only", "causes"), f"now it is '{other}'")
    monkeypatch.setattr(reproduce, "read_doctors", lambda entry, _: np.full((1, K, 2), len(entry.id)))
    assert_refused(reproduced(*CPU, "--only", "causes"), "the content of the data has changed")


def check_report(results, out):
    """Complete, in order, with all its charts, and with the commands that were printed."""
    report = (results / "report.md").read_text()
    assert "Not yet run" not in report and "nan" not in report
    assert [int(n) for n in re.findall(r"^## (\d+)\.", report, re.M)] == [*range(1, 10)]
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", report):
        assert (results / name).stat().st_size > 5000, name
    assert not [file.name for file in results.iterdir() if ".part" in file.name]
    commands = re.findall(r"^python ((?:train|test)\.py .*)$", out, re.M)
    assert len(set(commands)) == len(commands) and set(commands) == set(re.findall(r"^python (.*)$", report, re.M))


def check_tables(results):
    epsilon = pd.read_csv(results / "epsilon.csv")
    assert epsilon[["targets", "epsilon"]].to_numpy().tolist() == [["random", 4], ["random", 64], ["4 mm", 4]]
    together = pd.read_csv(results / "attack_random.csv").groupby("method")["iteration"].max()
    assert together.to_dict() == {"I-FGSM": 2, "ATI-FGSM": 2, "Vote-PGD": 3}  # of two runs
    assert pd.read_csv(results / "count.csv")["targeted"].tolist() == [3, 3 * K]
    causes = pd.read_csv(results / "causes.csv")
    assert causes["answer"].nunique() == 9
    trainings = causes[causes["question"] == "trainings"]
    assert (trainings["targeted"] == 2 * 3 * 5).all()  # two trainings, three images
    assert (trainings.groupby("method")[["within_4mm_%", "clean_mre_mm"]].nunique() == 1).all(axis=None)
    neighbours = causes[causes["question"] == "neighbours"]
    assert (neighbours["targeted"] == 3).all() and neighbours["clean_mre_mm"].nunique() == 1
    runs = results.parents[1] / "runs" / "cpu-letters"
    for place, letter in ((1, "M"), (2, "I")):
        spelt = pd.read_csv(runs / "fancy" / f"{place}_{letter}" / "predictions.csv").query("iteration > 0")
        targets = pd.read_csv(scales.LETTERS / f"{letter}.csv").sort_values("landmark")
        for method in PAPER:
            rows = spelt[spelt["method"] == method].drop_duplicates("landmark")
            assert np.array_equal(rows[["target_x_px0", "target_y_px0"]], targets[["x", "y"]])


def check_numbers(work):
    """A number of the report, from the records."""
    folder = work / "runs" / "cpu-48x40" / "attack" / "shift"
    records = pd.read_csv(folder / "predictions.csv")
    rows = records.query("method == 'ATI-FGSM' and iteration == 2 and role == 'targeted'")["radial_error_mm"]
    table = pd.read_csv(work / "results" / "cpu" / "attack_shift.csv")
    row = table.query("method == 'ATI-FGSM' and iteration == 2 and role == 'targeted'").iloc[0]
    assert row["mre_mm"] == pytest.approx(rows.mean(), abs=1e-3)
    assert row["mre_mm_low"] <= row["mre_mm"] <= row["mre_mm_high"]
    folder_of = work / "runs" / "cpu-48x40" / "diagnosis" / "MW_16"
    changes = pd.read_csv(folder_of / "diagnoses.csv").set_index(["method", "iteration", "measure"])
    table = pd.read_csv(work / "results" / "cpu" / "diagnosis.csv").set_index(["epsilon", "method", "measure"])
    for method in ("ATI-FGSM", "noise"):
        for share in ("intended", "only intended", "any"):
            assert table.loc[(16, method, "MW"), f"{share}_%"] == changes.loc[(method, 1, share), "changed_%"]
    delivered = pd.read_csv(work / "results" / "cpu" / "diagnosis_delivered.csv").set_index(
        ["epsilon", "method", "stored"]
    )
    changes = pd.read_csv(folder_of.parent / "MW_16_stored" / "diagnoses.csv").query("measure == 'intended'")
    last = changes.query("method == 'ATI-FGSM' and iteration == 1")["changed_%"].item()
    assert delivered.loc[(16, "ATI-FGSM", "in memory"), "intended_%"] == last
    assert {"8-bit original", "JPEG original"} < {*delivered.index.unique("stored")}
    driven = pd.read_csv(work / "results" / "cpu" / "diagnosis_driven.csv").query("method == 'ATI-FGSM'")
    for to, row in driven.set_index("to").iterrows():
        values = pd.read_csv(folder_of.parent / f"MW_{to}_4_8_mm" / "measures.csv").query("measure == 'MW'")
        first, final = (values.query("method == 'ATI-FGSM' and iteration == @i").set_index("image") for i in (0, 1))
        assert row["change"] == pytest.approx((final["value"] - first["value"]).median(), abs=1e-3)
        assert row["class_wrong_after_%"] == pytest.approx(100 * (final["class"] != final["true_class"]).mean())
    config = read_config(folder / "config.json")
    assert config["subpixel"] is True and config["seed"] == 0


# --- scales ----------------------------------------------------------------------------------------------------------


def test_claims_are_made_on_the_evaluation_images():
    ids = scales.to_attack([f"{i}" for i in range(151, 401)])
    assert len(ids) == len(set(ids)) == 50 and {int(id) for id in ids} <= {*range(201, 301)} and ids[0] == "210"
    assert scales.to_attack(["151", "210"]) == ("151", "210")  # of other data, all


def test_options_become_arguments():
    options = {"size": (40, 32), "shift_mm": 8, "epsilon": 0.5, "grey": True, "attack": ("a", "b")}
    words = "--size 40 32 --shift-mm 8 --epsilon 0.5 --grey --attack a b"
    assert arguments(options) == words.split()


def make_plan(name):
    ids = scales.to_attack([f"{i}" for i in range(151, 401)])
    scale = SCALES[name]("none") if name == "demo" else SCALES[name](["test1", "test2"], ids)
    return reproduce.Plan(scale, list(scale.experiments), name, "images", "vgg19.pth", {"precision": "fp32"})


@pytest.mark.filterwarnings("ignore:--epsilon 0.5 is less than half a grey level")
@pytest.mark.parametrize("name", SCALES)
def test_the_real_scales_fit_together(name):
    plan = make_plan(name)
    commands = [line for experiment in plan.chosen for line in plan.commands(experiment)]
    trained, folders = {}, []
    for program, *words in commands:
        if program == "train.py":
            parser = train.make_parser()
            args = train.parse_arguments(parser, words)
            assert args.tag not in trained
            if args.init:
                origin = next(tag for tag in trained if args.init.startswith(f"runs/{tag}/"))  # trained before
                assert args.init == f"runs/{origin}/model_epoch_{trained[origin].epochs - 1}.pth"
            trained[args.tag] = args
        elif program == "test.py":
            args = test.parse_arguments(test.make_parser(), words)
            folders.append(args.rand)
            assert args.rand.startswith(f"runs/{args.tag}/")
            assert args.iteration is None or (args.iteration + 1) % trained[args.tag].checkpoint_every == 0
    assert len(set(folders)) == len(folders)  # none writes where another does
    assert f"{name}-{plan.scale.victim}" in trained
    plain = [run for run in plan.scale.experiments.get("diagnosis", ()) if not {"to", "delivered"} & {*run.labels}]
    methods = [(method, *run.labels.values()) for run in plain for method in np.atleast_1d(run.options["attack"])]
    assert len({*methods}) == len(methods)  # each is one figure of the table
    results = {str(result.folder) for name in plan.chosen for result in plan.results(name)}
    assert results == set(folders)  # each is reported


def test_letters_are_as_drawn_and_legible():
    mean = np.array(json.loads((ROOT / "assets" / "shape_model.json").read_text())["mean"])
    for letter in "ACIMS":
        table = pd.read_csv(scales.LETTERS / f"{letter}.csv")
        assert table["landmark"].tolist() == [*range(1, len(LANDMARKS) + 1)]
        places = table[["x", "y"]].to_numpy()
        assert len(np.unique(places, axis=0)) == len(LANDMARKS)
        assert (places > (302, 750)).all() and (places < (1814, 2250)).all()  # where the paper draws its targets
        strokes = letters.spread(letters.STROKES[letter], len(mean)) * (letters.WIDTH, letters.HEIGHT) + (
            letters.LEFT,
            letters.TOP,
        )
        assert np.array_equal(letters.assign(strokes, mean).round(), places)
        cost = np.square(places[None] - mean[:, None]).sum(-1)  # of each landmark at each place
        swapped = cost + cost.T <= np.diag(cost)[:, None] + np.diag(cost) - 1e-6
        assert not swapped.any()  # no two landmarks would be nearer in each other's place
