"""The commands on drawn data: from training to the comparison of attacks, and every kind of wrong input."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TRAIN, Code, K, assert_refused
from PIL import Image

from eval import metrics, predict_px0, read_records, summarize
from model import UNet, load_weights
from support.command import find_device, progress
from test import defence

pytestmark = pytest.mark.slow


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


# --- the four commands


def test_training_writes_its_files(trained):
    folder = trained / "runs" / "small"
    assert sorted(file.name for file in folder.iterdir() if file.is_file()) == [
        "config.json",
        "model_epoch_1.pth",
        "model_epoch_2.pth",
        "resume.pth",
        "train_log.csv",
        "train_log.png",
    ]
    assert (folder / "model_epoch_2.pth").stat().st_size < 100e6
    config = json.loads((folder / "config.json").read_text())
    assert config["size"] == [64, 48] and config["seed"] == 0 and config["lr"] == 3e-4
    assert config["versions"]["torch"] == torch.__version__
    log = pd.read_csv(folder / "train_log.csv")
    assert log["epoch"].tolist() == [0, 1, 2]
    assert np.allclose(log["loss"], 2 * log["heatmap_bce"] + log["offset_x_l1"] + log["offset_y_l1"])
    assert log["loss"].iloc[2] < log["loss"].iloc[0]
    assert log["mre_mm"].notna().tolist() == [False, True, True]
    assert log["monitored_split"].dropna().unique().tolist() == ["test1"]
    assert Image.open(folder / "train_log.png").size[0] > 500
    state = torch.load(folder / "model_epoch_2.pth", weights_only=True)
    assert state.keys() == UNet(K).state_dict().keys()  # weights, no classifier, nothing else


def test_accuracy(here, official, run):
    status, out, err = run("test.py", "--tag", "small", "--data", official, "--iteration", 1, "--rand", "clean")
    assert status == 0, err
    folder = here / "clean"
    table = pd.read_csv(folder / "predictions.csv", dtype={"image": str})
    assert table["image"].unique().tolist() == ["151", "152", "153", "301"] and len(table) == 4 * K
    distance = np.hypot(table["x_px0"] - table["true_x_px0"], table["y_px0"] - table["true_y_px0"]) * 0.1
    assert np.allclose(distance, table["radial_error_mm"], atol=2e-3)
    summary = pd.read_csv(folder / "summary.csv", index_col="landmark")
    expected = metrics(table["radial_error_mm"].to_numpy().reshape(4, K))
    assert np.allclose(summary[expected.columns], expected, atol=2e-3)
    assert f"{summary.loc['all', 'mre_mm']:.2f}" in out
    assert len(list((folder / "pictures").iterdir())) == 4
    log = pd.read_csv(here / "runs" / "small" / "train_log.csv")  # monitoring tells the same of the same checkpoint
    assert metrics(table["radial_error_mm"].to_numpy().reshape(4, K)[:3]).loc["all", "mre_mm"] == pytest.approx(
        log["mre_mm"][1], abs=1e-3
    )


def test_an_attack(here, official, run):
    arguments = ["--tag", "small", "--data", official, "--attack", 1, "--rand", "temp", "--steps", 3, "--limit", 2]
    status, _, err = run("test.py", *arguments)
    assert status == 0, err
    table = pd.read_csv(here / "temp" / "predictions.csv")
    assert table["method"].unique().tolist() == ["ATI-FGSM"]
    assert table["iteration"].unique().tolist() == [0, 1, 3]
    assert len(table) == 2 * 3 * K
    assert json.loads((here / "temp" / "config.json").read_text())["iteration"] == 2  # the newest


def test_without_a_tag_the_time_is_the_tag(official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("train.py", "--data", official, *TRAIN[3:], "--epochs", 1)
    assert status == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    datetime.strptime(folder.name, "%Y-%m-%d_%H-%M-%S")
    assert f"--tag {folder.name}" in out and (folder / "model_epoch_0.pth").exists()


def test_a_run_of_before_an_argument_existed(here, official, run):
    """Results stay usable: an argument that their config.json does not have counts as its default."""
    arguments = ["test.py", "--tag", "small", "--data", official, "--rand", "older", "--limit", 1]
    assert run(*arguments)[0] == 0
    file = here / "older" / "config.json"
    config = json.loads(file.read_text())
    del config["subpixel"], config["mm_per_px"], config["targets"]
    file.write_text(json.dumps(config))
    assert run(*arguments)[0] == 0
    assert_refused(run(*arguments, "--subpixel"), "subpixel was False, now it is True")
    file.write_text(json.dumps(config | {"restarts": 2}))  # an argument that no longer exists
    assert_refused(run(*arguments), "restarts was 2, now it is None")


def test_more_epochs_for_a_finished_run(here, official, run):
    arguments = [TRAIN[0], "--tag", "longer", *TRAIN[3:], "--data", official]
    assert run(*arguments, "--epochs", 1)[0] == 0
    status, _, err = run(*arguments, "--epochs", 3, "--checkpoint-every", 5, "--resume")
    assert status == 0, err
    assert json.loads((here / "runs" / "longer" / "config.json").read_text())["epochs"] == 3
    weights = [torch.load(here / "runs" / tag / "model_epoch_2.pth", weights_only=True) for tag in ("longer", "small")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_checkpoints_without_their_resume_state_are_not_overwritten(here, official, run):
    arguments = [TRAIN[0], "--tag", "stateless", *TRAIN[3:], "--data", official, "--epochs", 1]
    assert run(*arguments)[0] == 0
    folder = here / "runs" / "stateless"
    (folder / "resume.pth").unlink()
    before = (folder / "model_epoch_0.pth").stat().st_mtime_ns
    assert_refused(run(*arguments, "--resume"), "--init runs/stateless/model_epoch_0.pth to start from its weights")
    assert (folder / "model_epoch_0.pth").stat().st_mtime_ns == before


@pytest.mark.parametrize("epsilon, warning", [(0, False), (0.0314, True), (1, True), (1.01, False)])
def test_an_epsilon_below_half_a_grey_level(epsilon, warning, here, official, run):
    out = f"epsilon_{epsilon}"
    attack = ["--attack", 1, "--steps", 2, "--limit", 1, "--epsilon", epsilon, "--rand", out]
    status, _, err = run("test.py", "--tag", "small", "--data", official, *attack)
    assert status == 0 and ("less than half a grey level" in err) == warning
    if epsilon == 0:
        table = pd.read_csv(here / out / "predictions.csv")
        assert (table["largest_change"] == 0).all()


def test_vote_pgd_and_one_perturbation_for_all_images(here, official, run):
    """All methods move the same landmarks by the same displacement; a universal perturbation is trained on train."""
    arguments = ["test.py", "--tag", "small", "--data", official, "--targets", "common", "--shift-mm", 1, "--steps", 4]
    arguments += ["--attack", 1, 4, "universal-Vote-PGD", "--rand", "universal"]
    status, _, err = run(*arguments)
    assert status == 0, err
    folder = here / "universal"
    table = pd.read_csv(folder / "predictions.csv")
    iterations = table.groupby("method")["iteration"].unique()
    assert list(iterations["ATI-FGSM"]) == [0, 1, 4]
    assert list(iterations["Vote-PGD"]) == [0, 1, 4] and list(iterations["universal-Vote-PGD"]) == [0, 4]
    moved = table[table["role"] == "targeted"]
    assert (moved.groupby(["image", "method", "iteration"]).size() == 5).all()
    for axis in "xy":
        displacement = moved[f"target_{axis}_px0"] - moved[f"true_{axis}_px0"]
        assert (displacement.groupby(moved["landmark"]).agg(np.ptp) < 1e-3).all()
    file = folder / "universal_perturbation.pth"
    delta = torch.load(file, weights_only=True)["delta"]
    assert delta.shape == (1, 3, 64, 48) and 0 < delta.abs().max() <= 8 / 256
    changes = table[(table["method"] == "universal-Vote-PGD") & (table["iteration"] == 4)]["largest_change"]
    assert np.allclose(changes, delta.abs().max() * 127.5, atol=0.1)

    stamp = file.stat().st_mtime_ns
    (folder / "records" / "universal-Vote-PGD_301.csv").unlink()
    assert run(*arguments)[0] == 0
    assert file.stat().st_mtime_ns == stamp
    pd.testing.assert_frame_equal(pd.read_csv(folder / "predictions.csv"), table)

    for wrong, message in (
        ({"delta": delta[:, :1]}, "delta is torch.float32 (1, 1, 64, 48)"),
        ([1], "not a state dict"),
    ):
        torch.save(wrong, file)
        assert_refused(run(*arguments), message)


def test_an_attack_on_a_diagnosis(here, official, run):
    """Targets are found once: the overjet is that of two landmarks. Noise is the control."""
    arguments = ["test.py", "--tag", "small", "--data", official, "--targets", "diagnosis", "--measure", "MW"]
    arguments += ["--attack", 1, "noise", "--steps", 3, "--rand", "diagnosis", "--subpixel"]
    status, out, err = run(*arguments)
    assert status == 0, err
    folder = here / "diagnosis"
    targets = pd.read_csv(folder / "targets.csv", dtype={"image": str})
    assert set(targets["landmark"]) == {11, 12} and len(targets) >= 2
    table = read_records([folder / "predictions.csv"])
    assert table["image"].unique().tolist() == targets["image"].unique().tolist()
    assert set(table[table["role"] == "targeted"]["landmark"]) == {11, 12}
    noise = table[(table["method"] == "noise") & (table["iteration"] == 1)]["largest_change"]
    assert (noise > 3.9).all() and (noise <= 8 * 127.5 / 256).all()
    clean = table[(table["iteration"] == 0) & (table["method"] == "noise")]
    for image, rows in targets.groupby("image"):  # the places lie in another class, and the least way is symmetric
        before = clean[clean["image"] == image].set_index("landmark")[["x_px0", "y_px0"]].loc[[11, 12]].to_numpy()
        after = rows[["x", "y"]].to_numpy()
        assert np.allclose(before.mean(0), after.mean(0), atol=1)
        classes = [np.digitize(0.1 * np.hypot(*np.diff(points, axis=0)[0]), (2, 4.5)) for points in (before, after)]
        assert classes[0] != classes[1]
    changes = pd.read_csv(folder / "diagnoses.csv")
    assert {"any", "intended", "only intended"} < set(changes["measure"]) and "only intended" in out
    assert (changes["patients"] == targets["image"].nunique()).all()
    assert (changes[changes["iteration"] == 0]["changed_%"] == 0).all()
    assert len(pd.read_csv(folder / "measures.csv")) == len(table) / K * 8

    status, _, err = run("scripts/tables.py", "diagnosis", folder, "--data", official, "--out", "tables")
    assert status == 0, err
    shares = pd.read_csv(here / "tables" / "diagnosis.csv").set_index(["method", "measure"])
    final = changes.groupby(["method", "measure"])["changed_%"].last()
    assert shares.loc[("ATI-FGSM", "MW"), "intended_%"] == final["ATI-FGSM", "intended"]
    assert (here / "tables" / "diagnosis_patient.png").stat().st_size > 5000
    shutil.copytree(folder, here / "twice")
    tables = "scripts/tables.py", "diagnosis", folder
    assert_refused(run(*tables, here / "twice", "--out", "none"), "a second run of epsilon 8")
    assert_refused(run(*tables, here / "twice" / ".." / "diagnosis", "--out", "none"), "name each folder once")
    config = here / "twice" / "config.json"
    config.write_text(config.read_text().replace('"steps": 3', '"steps": 4'))
    assert_refused(run(*tables, here / "twice", "--out", "none"), "ATI-FGSM has another detector, --steps or --sub")
    assert_refused(run(*tables[:2], here / "twice", "--out", "tables"), "folders was")
    moved = Path(shutil.copytree(official, here / "moved"))
    for file in moved.rglob("[0-9]*.txt"):
        file.write_text(re.sub(r"^\d+(?=,)", lambda x: str(int(x[0]) + 10), file.read_text(), flags=re.M))
    assert_refused(run(*tables, "--data", moved, "--out", "none"), "has other landmarks than in the results")
    for file in [*Path(shutil.copytree(official, here / "others")).rglob("[0-9]*.*")]:
        file.rename(file.with_stem(f"{int(file.stem) + 20}"))  # no patient has this number
    assert run(*tables, "--data", here / "others", "--out", "patientless")[0] == 0
    assert (here / "patientless" / "diagnosis_patient.png").exists()

    result = run(*arguments[:4], official, "--limit", 1, *arguments[5:])
    assert result[0] == 2 and "which is not attacked; choose another --rand" in result[2], result[2]
    (folder / "records" / f"noise_{targets['image'][0]}.csv").unlink()
    targets.assign(x=targets["x"] + 1).to_csv(folder / "targets.csv", index=False)
    status, _, err = run(*arguments)
    assert status == 2 and "the content of the targets has changed" in err
    targets.to_csv(folder / "targets.csv", index=False)
    assert run(*arguments)[0] == 0
    pd.testing.assert_frame_equal(read_records([folder / "predictions.csv"]), table)


def test_diagnoses_of_a_test(here, official, run):
    status, out, err = run("test.py", "--tag", "small", "--data", official, "--split", "test1", "--rand", "diagnosed")
    assert status == 0, err
    summary = pd.read_csv(here / "diagnosed" / "diagnoses.csv", index_col="measure")
    assert (summary["patients"] == 3).all() and summary.loc["MW", "doctors_mean_difference"] > 0
    assert summary.loc["all", "agreement_%"] == pytest.approx(summary["agreement_%"].iloc[:-1].mean(), abs=1e-3)
    assert "doctors_agreement_%" in out
    image = official / "RawImage" / "Test1Data" / "151.bmp"
    status, out, err = run("test.py", "--tag", "small", "--image", image, "--rand", "own_diagnosis")
    assert status == 0, err
    own, found = (pd.read_csv(here / folder / "measures.csv") for folder in ("own_diagnosis", "diagnosed"))
    assert "true_class" in found and "true_class" not in own
    pd.testing.assert_frame_equal(own, found.iloc[:8][[*own]])
    assert own["meaning"][0] in out


def test_what_is_seen_is_recorded_and_said(here, run):
    """A blank image; of an attack, what the clean image shows."""
    Image.new("L", (240, 300)).save(here / "blank.png")
    arguments = ["test.py", "--tag", "small", "--image", "blank.png"]
    for name, attack in (("blank", []), ("blank_attacked", ["--attack", 2, "--targets", "shift"])):
        status, out, err = run(*arguments, *attack, "--rand", name)
        assert status == 0, err
        assert len(re.findall("blank: the detector sees no head .median vote share at most 0.[01]", err)) == 1
        records, table = (pd.read_csv(here / name / f"{file}.csv") for file in ("predictions", "measures"))
        for found in (records, table):
            clean = found["iteration"] == 0 if attack else found["image"] == "blank"
            assert (found["seen"][clean] == "no head").all() and found["seen"][~clean].isna().all()
        assert attack or "no head" in out


def test_training_images_that_stand_apart_are_named(here, official, monkeypatch, run):
    errors = np.ones((4, K))
    errors[2] = 60
    monkeypatch.setattr("eval.errors_on", lambda detector, data, *_: errors[: len(data)])
    status, _, err = run(*TRAIN, "--data", official, "--epochs", 3, "--checkpoint-every", 2, "--resume")
    assert status == 0 and err.count("003 (MRE 60.0 mm): image and annotation may not belong together") == 1, err


def test_own_images_without_annotation(here, official, run, monkeypatch):
    files = [official / "RawImage" / "Test1Data" / f"{id}.bmp" for id in (151, 152)]
    status, out, err = run("test.py", "--tag", "small", "--image", *files, "--rand", "own")
    assert status == 0 and "0.1 mm per pixel is assumed" in err
    assert run("test.py", "--tag", "small", "--data", official, "--split", "test1", "--rand", "annotated")[0] == 0
    own, annotated = (pd.read_csv(here / name / "predictions.csv") for name in ("own", "annotated"))
    found = annotated[annotated["image"].isin([151, 152])]
    assert np.array_equal(own[["x_px0", "y_px0"]], found[["x_px0", "y_px0"]]) and own["true_x_px0"].isna().all()
    assert sorted(file.name for file in (here / "own" / "pictures").iterdir()) == ["151.png", "152.png"]
    assert not (here / "own" / "summary.csv").exists() and "sella" in out

    (here / "own_targets.csv").write_text("landmark,x,y\nmenton,100,200\n")
    for targets in ("shift", "own_targets.csv"):
        rand = f"own_{Path(targets).stem}"
        attack = ["--attack", 1, "--steps", 2, "--targets", targets, "--rand", rand]
        status, _, err = run("test.py", "--tag", "small", "--image", *files, *attack)
        assert status == 0, err
        clean = pd.read_csv(here / rand / "predictions.csv").query("iteration == 0")
        moved = clean[clean["role"] == "targeted"]
        assert (
            clean[clean["role"] == "stationary"]["radial_error_mm"] == 0
        ).all()  # measured from the clean prediction
        if targets == "shift":
            assert len(moved) == 10 and np.allclose(moved["radial_error_mm"], 8, atol=1e-3)
            next((here / rand / "records").iterdir()).unlink()
            with monkeypatch.context() as patch:  # another GPU rounds otherwise
                patch.setattr("test.predict_px0", lambda *_: predict_px0(*_) + 0.01)
                assert run("test.py", "--tag", "small", "--image", *files, *attack)[0] == 0
            status, _, err = run("test.py", "--tag", "small", "--image", files[0], *attack)
            assert status == 2 and "choose another --rand" in err
            attack[-3] = "own_targets.csv"
            assert_refused(run("test.py", "--tag", "small", "--image", *files, *attack), "of the targets has changed")
        else:
            assert moved["landmark"].tolist() == [8, 8] and moved["target_x_px0"].tolist() == [100, 100]


def test_own_images_of_a_folder_and_one_by_one(here, official, run, monkeypatch):
    """A folder is its images; another image goes to another folder; a wrong file of targets ends before any work."""
    folder = official / "RawImage" / "Test1Data"
    attack = ["--attack", 0, "--steps", 1, "--targets", "shift", "--pictures", 0]
    for image in folder, folder / "151.bmp", folder / "152.bmp":
        status, out, err = run("test.py", "--tag", "small", "--image", image, *attack)
        assert status == 0, err
        assert ("Diagnoses at the first and at the last iteration" in out) == (image != folder)
    made = {
        path.name: read_records([path / "predictions.csv"]) for path in (here / "runs" / "small").glob("attack_15*")
    }
    found = {name: sorted(set(table["image"])) for name, table in made.items()}
    assert found == {"attack_151_2": ["151"], "attack_152_2": ["152"], "attack_151_and_2_more_2": ["151", "152", "153"]}
    (here / "empty").mkdir()
    assert_refused(
        run("test.py", "--tag", "small", "--image", "empty"), "argument --image: empty: no images in this folder"
    )
    monkeypatch.setattr("eval.predict_batches", None)  # it would fail
    wrong = run("test.py", "--tag", "small", "--image", folder, *attack[:4], "--targets", "nowhere.csv")
    assert_refused(wrong, "nowhere.csv: ")


def test_help_does_without_torchvision():
    """Whose import takes as long as PyTorch's."""
    loaded = "import sys, runpy; sys.argv = ['test.py', '--help']\n"
    loaded += "runpy.run_path(sys.argv[0], run_name='__main__'); print('torchvision' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True).stdout
    assert "--attack" in shown and shown.endswith("False\n")


def test_bars_in_a_file_are_lines(capfd):
    """One a minute: here the first and the last state, and none of a short task whose bar would vanish."""
    with progress(total=3, desc="outer", unit="image") as bar:
        for _ in progress(range(3), desc="inner", leave=False):
            bar.set_postfix(loss=1, refresh=False)
            bar.update()
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("outer:   0%") and last.startswith("outer: 100%") and "loss=1" in last


def test_spacing_scales_every_millimetre(here, official, run):
    arguments = ["test.py", "--tag", "small", "--data", official, "--limit", 2]
    assert run(*arguments, "--rand", "spaced_1")[0] == 0
    status, _, err = run(*arguments, "--rand", "spaced_3", "--mm-per-px", 0.3)
    assert status == 0 and "assumed" not in err
    tables = [pd.read_csv(here / f"spaced_{n}" / "predictions.csv") for n in (1, 3)]
    assert np.allclose(3 * tables[0]["radial_error_mm"], tables[1]["radial_error_mm"], atol=3e-4)
    assert (tables[1]["mm_per_px0"] == 0.3).all()
    assert run(*arguments, "--rand", "spaced_fine", "--mm-per-px", 25.4 / 720)[0] == 0
    assert (pd.read_csv(here / "spaced_fine" / "predictions.csv")["mm_per_px0"] == 25.4 / 720).all()
    shift = ["--attack", 1, "--steps", 1, "--targets", "shift", "--shift-mm", 3, "--mm-per-px", 0.3, "--rand", "spaced"]
    assert run(*arguments, *shift)[0] == 0
    moved = pd.read_csv(here / "spaced" / "predictions.csv").query("role == 'targeted'")
    way = moved[["target_x_px0", "target_y_px0"]].to_numpy() - moved[["true_x_px0", "true_y_px0"]].to_numpy()
    assert np.allclose(np.hypot(*way.T), 10, atol=1e-3)  # 3 mm


@pytest.mark.parametrize("name", ["NA", "null", "nan", "007", " a b "])
def test_ids_stay_text(name, data, here, run):
    for file in [*data.rglob("151.*")]:
        file.rename(file.with_stem(name))
    arguments = ["--attack", 0, "--steps", 1, "--save-adversarial", "--images", name, "--rand", f"id_{name}"]
    status, _, err = run("test.py", "--tag", "small", "--data", data, "--split", "test1", *arguments)
    assert status == 0, err
    for table in ("predictions.csv", "read_back.csv", "adversarial/in_memory.csv"):
        assert set(read_records([here / f"id_{name}" / table])["image"]) == {name}


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "_orig_mod.module.", "state_dict", "resume.pth"])
def test_checkpoints_as_other_programs_wrap_them(wrap, here, official, tmp_path, run):
    weights = torch.load("runs/small/model_epoch_2.pth", weights_only=True)
    file = tmp_path / "wrapped.pth"
    if wrap == "resume.pth":
        file = here / "runs" / "small" / "resume.pth"
    elif wrap == "state_dict":
        torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}, "epoch": 3}, file)
    else:
        torch.save({wrap + key: value for key, value in weights.items()}, file)
    model = UNet(K)
    load_weights(model, file)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_below_a_pixel_on_chosen_images(here, official, run):
    arguments = ["--tag", "small", "--data", official, "--images", 301, 152, "--pictures", 0, "--rand"]
    assert run("test.py", *arguments, "whole")[0] == 0
    assert run("test.py", *arguments, "below", "--subpixel")[0] == 0
    whole, below = (pd.read_csv(here / name / "predictions.csv", dtype={"image": str}) for name in ("whole", "below"))
    assert below["image"].unique().tolist() == ["301", "152"]
    px = [(table["x_px0"] + 0.5) * 48 / 240 - 0.5 for table in (whole, below)]
    assert np.allclose(px[0], px[0].round(), atol=1e-4) and not np.allclose(px[1], px[1].round(), atol=1e-2)
    assert ((px[0] - px[1]).abs() <= 1.5).all()  # the mean of votes that round to places at most a pixel away
    attack = [*arguments, "attacked", "--attack", 1, "--steps", 1, "--subpixel"]
    assert run("test.py", *attack)[0] == 0
    clean = pd.read_csv(here / "attacked" / "predictions.csv").query("iteration == 0")
    assert np.allclose(clean["x_px0"], below["x_px0"], atol=1e-3)
    assert below["heatmap_peak"].between(0, 1, inclusive="neither").all() and below["vote_share"].between(0, 1).all()
    for name in ("heatmap_peak", "vote_share"):
        assert np.allclose(clean[name], below[name], atol=1e-3)
    assert_refused(run("test.py", *arguments, "below"), "subpixel was True, now it is False")


def test_batch_norm_in_the_encoder(here, official, run):
    status, _, err = run(*TRAIN, "--tag", "normed", "--data", official, "--epochs", 1, "--encoder-batch-norm")
    assert status == 0, err
    weights = torch.load(here / "runs" / "normed" / "model_epoch_0.pth", weights_only=True)
    assert weights["encoder.1.running_mean"].abs().max() > 0
    status, _, err = run("test.py", "--tag", "normed", "--data", official, "--attack", 1, "--steps", 1, "--limit", 1)
    assert status == 0, err


def test_a_grey_attack(here, official, run):
    arguments = ["--tag", "small", "--data", official, "--attack", 1, "--steps", 3, "--limit", 2, "--rand", "grey"]
    arguments += ["--pictures", 0, "--targets", "shift", "--shift-count", 1, "--neighbours", "free"]
    assert run("test.py", *arguments, "--grey", "--save-adversarial")[0] == 0
    for id in (151, 152):
        assert Image.open(here / "grey" / "adversarial" / "ATI-FGSM_input" / f"{id}.png").mode == "L"
    table = read_records([here / "grey" / "predictions.csv"])
    assert (table[table["iteration"] == 3]["largest_change"] > 0.1).all()
    stored = read_records([here / "grey" / "read_back.csv"]).query("stored == 'JPEG input'")
    for rows in (table[table["iteration"] == 3], stored):
        assert rows["role"].value_counts().to_dict() == {"stationary": 2 * 16, "free": 2 * 2, "targeted": 2}
    assert_refused(run("test.py", *arguments), "grey was True, now it is False")


def test_attacks_compared_on_the_same_targets_go_on_after_a_stop(here, official, tmp_path, run):
    arguments = ["--tag", "small", "--data", official, "--split", "test1", "--targets", "shift", "--steps", 2]
    arguments += ["--attack", "I-FGSM", "ati-fgsm", "FGSM", "untargeted-FGSM", "--shift-count", 3, "--rand", "compared"]
    status, out, err = run("test.py", *arguments)
    assert status == 0, err
    folder = here / "compared"
    table = pd.read_csv(folder / "predictions.csv", dtype={"image": str})
    assert table["method"].unique().tolist() == ["I-FGSM", "ATI-FGSM", "FGSM", "untargeted-FGSM"]
    targets = table[table["role"] == "targeted"].groupby(["image", "landmark"])[["target_x_px0", "target_y_px0"]]
    assert len(targets) == 3 * 3 and (targets.nunique() == 1).all(axis=None)
    distance = np.hypot(table["target_x_px0"] - table["true_x_px0"], table["target_y_px0"] - table["true_y_px0"])
    assert np.allclose(distance.dropna(), 80, atol=1e-3)  # 8 mm
    clean = table[table["iteration"] == 0].groupby(["image", "landmark"])[["x_px0", "y_px0"]]
    assert (clean.nunique() == 1).all(axis=None)  # all methods begin with the clean image

    summary = pd.read_csv(folder / "summary.csv")
    assert summary["role"].unique().tolist() == ["targeted", "stationary", "untargeted", "worst"]
    assert summary[summary["method"] == "FGSM"]["iteration"].tolist() == [0, 1] * 3
    again = summarize(table)
    assert np.allclose(again["mre_mm"], summary["mre_mm"], atol=1e-3) and "ATI-FGSM" in out
    charts = {"mre.png", "median.png", "within_4mm.png"}
    assert charts < {file.name for file in folder.iterdir()}
    assert len(list((folder / "pictures").iterdir())) == 3 * 4

    # a stop: two records are lost; the same command makes them again and touches no other
    kept = folder / "records" / "I-FGSM_151.csv"
    stamp = kept.stat().st_mtime_ns
    for name in ("I-FGSM_152.csv", "ATI-FGSM_153.csv"):
        (folder / "records" / name).unlink()
    (folder / "predictions.csv").unlink()
    assert run("test.py", *arguments)[0] == 0
    assert kept.stat().st_mtime_ns == stamp
    after = pd.read_csv(folder / "predictions.csv", dtype={"image": str})
    assert np.isclose(after["radial_error_mm"], table["radial_error_mm"], atol=1e-3).mean() > 0.99
    assert len(after) == len(table)

    (folder / "pictures" / "152_FGSM.png").unlink()
    assert run("test.py", *arguments)[0] == 0
    assert (folder / "pictures" / "152_FGSM.png").exists()

    assert_refused(run("test.py", *arguments, "--epsilon", 4), "epsilon was 8.0, now it is 4.0")
    other = shutil.copytree(official, tmp_path / "data")
    x, y = annotation(other).read_text().splitlines()[6].split(",")
    replace_line(annotation(other), 7, f"{int(x) + 1},{y}")
    assert_refused(run("test.py", *arguments[:3], other, *arguments[4:]), "the content of the data has changed")


def test_a_killed_training_goes_on_and_ends_the_same(trained, official, tmp_path):
    """The kill comes after a row with monitoring; a log lost after the last epoch is written again."""
    command = [*TRAIN, "--data", official, "--epochs", 3, "--checkpoint-every", 2, "--resume"]
    command = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    folder = tmp_path / "runs" / "small"
    while not (folder / "train_log.csv").exists() or len(pd.read_csv(folder / "train_log.csv")) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(pd.read_csv(folder / "train_log.csv")) == 2
    subprocess.run(command, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    (folder / "train_log.csv").unlink()
    subprocess.run(command, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    unbroken = torch.load(trained / "runs" / "small" / "model_epoch_2.pth", weights_only=True)
    resumed = torch.load(folder / "model_epoch_2.pth", weights_only=True)
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)
    logs = [
        pd.read_csv(root / "runs" / "small" / "train_log.csv").drop(columns="seconds") for root in (trained, tmp_path)
    ]
    pd.testing.assert_frame_equal(*logs)


def test_training_from_a_checkpoint_in_bf16_on_the_kaggle_layout(here, kaggle, run):
    init = "runs/small/model_epoch_2.pth"
    arguments = ["--tag", "fine", "--size", 96, 80, "--init", init, "--epochs", 1, "--schedule", "cosine"]
    status, _, err = run(
        "train.py", *arguments, "--data", kaggle, "--batch-size", 4, "--precision", "bf16", "--lr", 1e-9
    )
    assert status == 0, err
    start = torch.load(init, weights_only=True)
    end = torch.load("runs/fine/model_epoch_0.pth", weights_only=True)
    assert torch.allclose(start["encoder.0.weight"], end["encoder.0.weight"], atol=1e-6)
    status, _, err = run("test.py", "--tag", "fine", "--data", kaggle, "--split", "test2", "--precision", "bf16")
    assert status == 0, err


def test_a_run_of_the_2020_code_is_tested_attacked_and_continued(trained, official, tmp_path, run, monkeypatch):
    """Its folder as it is: other names of the weights, a config.yaml, always 800 x 640 px (here smaller)."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "work"))
    monkeypatch.setattr("model.SIZE_2020", (64, 48))
    weights = torch.load("runs/small/model_epoch_2.pth", weights_only=True)
    old = {"vgg.classifier.0.weight": torch.zeros(2, 2)}
    for name, value in weights.items():
        for pattern, before in (r"^encoder", "vgg.features"), (r"^head", "final"), (r"(up\d\.conv)", r"\1.double_conv"):
            name = re.sub(pattern, before, name)
        old[f"module.{name}"] = value
    Path("runs/old").mkdir()
    Path("runs/old/config.yaml").write_text("batch_size: 8\n")
    torch.save(old, "runs/old/model_epoch_2.pth")
    common = ["--iteration", 2, "--data", official, "--split", "test1", "--pictures", 0]
    attack = ["--attack", 1, "--steps", 2, "--save-adversarial"]
    for tag, transfer in ("small", "old"), ("old", "small"):
        assert run("test.py", "--tag", tag, *common, "--rand", f"{tag}_tested")[0] == 0
        status, _, err = run("test.py", "--tag", tag, *common, *attack, "--transfer", transfer, "--rand", tag)
        assert status == 0 and "runs/old: a run of the 2020 code" in err
    for name in ("_tested/predictions.csv", "/predictions.csv"):
        assert Path(f"small{name}").read_bytes() == Path(f"old{name}").read_bytes()
    tiny = ["--size", 64, 48, "--epochs", 1, "--lr", 1e-12, "--data", official]
    assert run("train.py", "--tag", "on", "--init", "runs/old/model_epoch_2.pth", *tiny)[0] == 0
    continued = torch.load("runs/on/model_epoch_0.pth", weights_only=True)
    assert torch.allclose(continued["head.weight"], weights["head.weight"])
    assert_refused(run("train.py", "--tag", "old", "--resume", *tiny), "runs/old: has checkpoints but no resume.pth")


def test_compiling_is_called_for_and_changes_no_result(here, official, run, monkeypatch):
    """With a compiler that leaves the network as it is: the real one takes a minute."""
    calls = []

    def compile(model, **options):
        def compiled(image):
            calls.append(model.training)
            return model(image)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    status, _, err = run(*TRAIN[:2], "compiled", *TRAIN[3:], "--data", official, "--epochs", 1, "--compile")
    assert status == 0, err
    assert calls == [True, True, True]  # a trial, two batches
    log, plain = (pd.read_csv(here / "runs" / tag / "train_log.csv") for tag in ("compiled", "small"))
    assert log["loss"][0] == plain["loss"][0]  # the trial has left nothing behind
    arguments = ["--tag", "small", "--data", official, "--attack", 1, "--steps", 2, "--limit", 1]
    for rand in ("plain", "compiled"):
        assert run("test.py", *arguments, "--rand", rand, *(["--compile"] if rand == "compiled" else []))[0] == 0
    assert len(calls) > 3 and not any(calls[3:])  # the attack's passes, in evaluation mode
    tables = [pd.read_csv(here / rand / "predictions.csv") for rand in ("plain", "compiled")]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("command", ["train", "test"])
def test_running_out_of_memory_is_one_line(device, command, here, official, run, monkeypatch):
    def forward(*_):
        if device == "cpu":
            torch.empty(2**60, dtype=torch.uint8)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the manual")

    monkeypatch.setattr(UNet, "forward", forward)
    arguments = [*TRAIN[:2], "greedy", *TRAIN[3:]] if command == "train" else ["test.py", "--tag", "small"]
    status, _, err = run(*arguments, "--data", official)
    shutil.rmtree(here / "runs" / "greedy", ignore_errors=True)
    *_, message = err.replace("\r", "\n").strip().split("\n")
    assert status == 2 and message.startswith(f"{command}.py: error: out of memory; use a smaller --batch-size (")
    assert "Traceback" not in err


# --- wrong input: one line on standard error, status 2, nothing written


def annotation(data, id="152", doctor="400_senior"):
    return data / "AnnotationsByMD" / doctor / f"{id}.txt"


def image(data, id="152"):
    return data / "RawImage" / "Test1Data" / f"{id}.bmp"


def replace_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("command", ["train.py", "test.py"])
def test_help(command, run):
    status, out, _ = run(command, "--help")
    assert status == 0 and "--precision" in out and "(default: fp32)" in out


# all others: tests/test_inputs.py
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda data: data.rename(data.with_name("elsewhere")), "no such folder"),
        (lambda data: (data / "RawImage").rename(data / "Raw"), "looked for RawImage/"),
        (lambda data: (data / "AnnotationsByMD").rename(data / "A"), "400_senior/ and 400_junior/"),
        (lambda data: cut(image(data), 0), "152.bmp: not a readable image"),
    ],
    ids=["no folder", "no layout", "no doctors", "empty image"],
)
def test_bad_data(spoil, message, data, here, run):
    spoil(data)
    result = run("test.py", "--tag", "small", "--data", data, "--split", "test1", "--rand", "bad")
    assert_refused(result, message, here / "bad")


@pytest.mark.parametrize("split, message", [("train", "002.txt: line 7"), ("test1", "152.txt: line 7")])
def test_bad_training_data(split, message, data, here, run):
    replace_line(annotation(data, {"train": "002", "test1": "152"}[split]), 7, "1,2,3")
    assert_refused(run(*TRAIN[:1], "--tag", "bad", *TRAIN[3:], "--data", data), message, here / "runs" / "bad")


def test_a_split_that_is_empty(data, here, run):
    shutil.rmtree(data / "RawImage" / "Test1Data")
    result = run("test.py", "--tag", "small", "--data", data, "--split", "test1", "--rand", "bad")
    assert_refused(result, "no images in RawImage/Test1Data", here / "bad")


@pytest.mark.parametrize(
    "text, message",
    [
        ("landmark,x,y\n3,10,300\n", "target (10, 300) of landmark 3 lies outside image 151 of 240 x 300 px"),
        ("landmark,x,y\n20,10,10\n", "line 2: there is no landmark '20', only 1 to 19"),
    ],
)
def test_bad_targets(text, message, official, tmp_path, here, run):
    (tmp_path / "targets.csv").write_text(text)
    arguments = ["--attack", 0, "--targets", tmp_path / "targets.csv", "--rand", "bad", "--split", "test1"]
    result = run("test.py", "--tag", "small", "--data", official, *arguments)
    assert_refused(result, message, here / "bad")


BAD_ARGUMENTS = {
    "epsilon of [0, 1]": (
        ["--attack", 0, "--epsilon", "8/255"],
        "8/255 is not a number of half grey levels; 4/255 of an image in [0, 1] is",
    ),
    "an own image that is missing": (["--image", "nowhere.png"], "nowhere.png: no such file"),
    "own images and ids": (["--image", "a.png", "--images", 151], "--image: not with --images"),
    "epsilon negative": (["--attack", 0, "--epsilon", -8], "--epsilon"),
    "epsilon nan": (["--attack", 0, "--epsilon", "nan"], "--epsilon"),
    "steps 0": (["--attack", 0, "--steps", 0], "--steps"),
    "steps no number": (["--attack", 0, "--steps", "many"], "--steps"),
    "a universal perturbation for other targets": (
        ["--attack", "universal-Vote-PGD"],
        "a universal one needs --targets common",
    ),
    "common targets too far": (
        ["--attack", 4, "--targets", "common", "--shift-mm", 20],
        "--targets common: the target (",
    ),
    "a diagnosis of nothing": (["--attack", 1, "--targets", "diagnosis"], "--measure and --targets diagnosis"),
    "a measure without diagnosis": (["--attack", 1, "--measure", "ANB"], "--measure and --targets diagnosis"),
    "a measure without attack": (["--targets", "diagnosis", "--measure", "ANB"], "--measure: needs --attack"),
    "an iterate of the control": (["--attack", "noise", "--iterate", "best"], "--iterate: for targeted attacks"),
    "an iterate of no attack": (["--iterate", "last"], "--iterate: needs --attack"),
    "a class without diagnosis": (["--attack", 1, "--to", 0], "--to: needs --measure"),
    "a class that there is not": (
        ["--attack", 1, "--targets", "diagnosis", "--measure", "MW", "--to", 2],
        "--to 2: MW can be moved to class 1 (normal), 3 (anterior cross bite), 4 (overjet), up or down",
    ),
    "a class that is no number": (["--attack", 1, "--to", "II"], "argument --to"),
    "unknown attack": (["--attack", "PGD"], "'PGD' is not one of 0, 1"),
    "unknown split": (["--split", "val"], "--split"),
    "unknown argument": (["--epslion", 8], "--epslion"),
    "too many to shift": (["--attack", 0, "--targets", "shift", "--shift-count", 20], "there are 19 landmarks"),
    "neighbours of others": (["--attack", 0, "--neighbours", "free"], "--neighbours: needs --targets shift"),
    "shift too far": (["--attack", 0, "--targets", "shift", "--shift-mm", 900], "image 151 has no room for landmark "),
    "no file of targets": (["--attack", 0, "--targets", "nowhere.csv"], "nowhere.csv: not a readable CSV file"),
    "unknown tag": (["--tag", "large"], "no such run (existing runs: "),
    "path as tag": (["--tag", "../small"], "is not a plain name"),
    "tag of other bytes": (["--tag", "\udcbb"], "is not a plain name"),
    "tag for the terminal": (["--tag", "\x1b[2J"], "is not a plain name"),
    "tag for a spreadsheet": (["--tag", "=1+1"], "is not a plain name"),
    "unknown iteration": (
        ["--iteration", 77],
        "model_epoch_77.pth: no such checkpoint; --iteration takes one of: 1, 2",
    ),
    "unknown image": (["--images", 151, 999], "no image 999 in test (151 .. 301)"),
    "unknown device": (["--device", "tpu"], "--device tpu"),
    "device of a number": (["--device", "cuda:200"], "--device cuda:200"),
    "seed too large": (["--seed", 2**64], "--seed"),
    "seed negative": (["--seed", -1], "--seed"),
    "folder below a file": (["--rand", "runs/small/config.json/bad"], "cannot be used as output folder"),
    "folder of a training": (["--rand", "runs/small"], "runs/small: holds files, but no config.json of test.py"),
    "folder of something else": (["--rand", "."], "holds files, but no config.json of test.py"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case, official, here, run):
    arguments, message = BAD_ARGUMENTS[case]
    before = sorted(here.rglob("*"))
    result = run("test.py", "--tag", "small", "--rand", "bad", "--data", official, *arguments)
    assert_refused(result, message)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("command", [TRAIN, ["test.py", "--tag", "small"]])
def test_cuda_that_is_not_there(command, here, official, run):
    assert_refused(run(*command, "--data", official, "--device", "cuda"), "--device cuda: CUDA finds 0 devices")


BAD_TRAINING = {
    "size": (["--size", 31, 64], "argument --size: 31 is not a whole number from 32 to 16384"),
    "a huge size": (["--size", 64, 10**30], "000 is not a whole number from 32 to 16384"),
    "epochs": (["--epochs", 0], "--epochs"),
    "learning rate": (["--lr", -1], "--lr"),
    "fewer epochs": (
        ["--tag", "small", "--resume", "--epochs", 2, "--checkpoint-every", 2],
        "was begun with --epochs 3",
    ),
    "more epochs on a cosine": (
        ["--tag", "cosine", "--resume", "--schedule", "cosine", "--epochs", 5],
        "runs/cosine: was begun with --epochs 4; --resume takes as many, where --schedule cosine ends; else --init "
        "runs/cosine/model_epoch_3.pth for a new --tag",
    ),
    "used tag": (["--tag", "small"], "this --tag is in use; add --resume"),
    "another configuration": (["--tag", "small", "--resume", "--batch-size", 1], "batch_size was 2, now it is 1"),
    "encoder file": (["--encoder-weights", "nowhere.pth"], "nowhere.pth: no such file"),
    "foreign encoder": (
        ["--encoder-weights", "runs/small/model_epoch_1.pth"],
        "not the state dict of torchvision's vgg19",
    ),
    "init": (["--init", "nowhere.pth"], "nowhere.pth: no such file"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_training_arguments(case, official, here, run):
    arguments, message = BAD_TRAINING[case]
    if "cosine" in arguments:  # as it was begun
        config = json.loads((here / "runs" / "small" / "config.json").read_text())
        config |= {"tag": "cosine", "schedule": "cosine", "epochs": 4, "checkpoint_every": 5}
        (here / "runs" / "cosine").mkdir()
        (here / "runs" / "cosine" / "config.json").write_text(json.dumps(config))
    before = sorted(here.rglob("*"))
    assert_refused(run(TRAIN[0], "--tag", "bad", *TRAIN[3:], "--data", official, *arguments), message)
    assert sorted(here.rglob("*")) == before


def test_resuming_needs_a_tag(official, run):
    assert_refused(run("train.py", *TRAIN[3:], "--data", official, "--resume"), "--resume: needs the --tag")


@pytest.mark.parametrize("kind", ["truncated", "code"])
def test_a_damaged_or_malicious_cache_of_imagenet_weights(kind, official, here, run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    write_checkpoint(kind, tmp_path / "checkpoints" / "vgg19-dcbb9e9d.pth", tmp_path / "trap")
    result = run("train.py", "--tag", "bad", "--data", official)
    assert_refused(result, "nor found intact as", here / "runs" / "bad", tmp_path / "trap")


def test_imagenet_weights_offline_name_both_ways_out(official, here, run, monkeypatch, tmp_path):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    result = run("train.py", "--tag", "bad", "--data", official)
    assert_refused(result, "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", here / "runs" / "bad")
    assert f"{tmp_path / 'checkpoints' / 'vgg19-dcbb9e9d.pth'}" in result[2]
    assert "--encoder-weights PATH" in result[2] and "encoder_from_hed.py" in result[2]
    assert_refused(run("train.py", "--tag", "bad", "--data", "nowhere"), "nowhere")  # the data are looked for first


def test_a_runs_folder_that_cannot_be_made(official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    assert_refused(run(*TRAIN, "--data", official), "cannot be used as output folder")


def write_checkpoint(kind, path, trap):
    if kind == "truncated":
        torch.save(UNet(K).state_dict(), path)
        cut(path, 10_000_000)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        torch.save({"head.bias": Code(trap)}, path)
    elif kind == "bare pickle with code":
        path.write_bytes(pickle.dumps(Code(trap)))
    elif kind == "another network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif kind == "another K":
        torch.save(UNet(5).state_dict(), path)
    elif kind == "not a state dict":
        torch.save([1, 2, 3], path)
    elif kind == "names that are numbers":
        torch.save({1: torch.zeros(2)}, path)
    elif kind == "another width":
        torch.save(UNet(K).state_dict() | {"up1.conv.0.bias": torch.zeros(7)}, path)
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        weights = UNet(K).state_dict()
        torch.save(weights | ODD_WEIGHTS[kind](weights), path)


def one(change, name="head.bias"):
    return lambda weights: {name: change(weights[name])}


ODD_WEIGHTS = {
    "variance": one(lambda value: value - 2, "up3.conv.1.running_var"),
    "too large": one(lambda value: torch.full_like(value, 1e300, dtype=torch.float64)),
    "complex": one(lambda value: value.to(torch.complex64)),
    "bool": one(lambda value: value > 0),
    "int8": one(lambda value: value.to(torch.int8)),
    "a counter in floats": one(torch.Tensor.float, "up1.conv.1.num_batches_tracked"),
    "repeated without end": one(lambda value: value[:1].expand(10**12)),
    "huge": one(lambda value: torch.full_like(value, 1e30), "up5.conv.1.weight"),
    "nothing": lambda weights: {name: torch.zeros_like(value) for name, value in weights.items()},
    "a name for the terminal": lambda weights: {"\x1b[2J\n": torch.zeros(1)},
}


BAD_CHECKPOINTS = {
    "truncated": "not a readable file of weights",
    "empty": "not a readable file of weights",
    "code": "not a readable file of weights",
    "bare pickle with code": "not a readable file of weights",
    "another network": "weights of another network",
    "another K": "weights for 5 landmarks, 19 are needed",
    "not a state dict": "not a state dict",
    "names that are numbers": "not a state dict",
    "another width": "up1.conv.0.bias is torch.float32 (7,), not torch.float32 (256,)",
    "a pipe": "no such file, or no regular one",
    "variance": "or variances below 0: up3.conv.1.running_var",
    "too large": "or variances below 0: head.bias",
    "complex": "head.bias is torch.complex64 (57,)",
    "bool": "head.bias is torch.bool (57,)",
    "int8": "head.bias is torch.int8 (57,)",
    "a counter in floats": "num_batches_tracked is torch.float32 ()",
    "repeated without end": "weights for 3.33333e+11 landmarks",
    "huge": "weights that compute nothing",
    "nothing": "weights that compute nothing",
    "a name for the terminal": "1 names differ, \\x1b[2J is one",
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints(kind, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"size": [64, 48]}))
    write_checkpoint(kind, folder / "model_epoch_0.pth", tmp_path / "trap")
    result = run("test.py", "--tag", "small", "--data", official, "--rand", "bad")
    assert_refused(result, BAD_CHECKPOINTS[kind], tmp_path / "trap", folder / "bad")
    assert "model_epoch_0.pth" in result[2]


def test_a_run_without_a_checkpoint(official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "config.json").write_text('{"size": [64, 48]}')
    assert_refused(run("test.py", "--tag", "small", "--data", official), "runs/small: no checkpoint")


@pytest.mark.parametrize(
    "text",
    [
        *["{", "{}", '{"size": [64]}', '{"size": [8, 8]}', "[]", '{"size": [64, 48], "encoder_batch_norm": 1}'],
        *["[" * 100_000, '{"size": [64.0, 48]}', '{"size": [1%s, 64]}' % ("0" * 30), '{"size": [64, "48"]}'],
        '{"size": [64, 48], "epochs": "many"}',
    ],
)
def test_bad_configuration(text, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    torch.save({}, folder / "model_epoch_0.pth")
    assert_refused(run("test.py", "--tag", "small", "--data", official), "config.json: not ")


def test_a_damaged_resume_state(official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    arguments = [*TRAIN, "--data", official, "--epochs", 1]
    assert run(*arguments)[0] == 0
    cut(tmp_path / "runs" / "small" / "resume.pth", 1000)
    assert_refused(run(*arguments, "--resume"), "resume.pth: not the state of a training")


def test_a_defence_is_named_in_one_way():
    assert [defence(text) for text in ("jpeg:75.0", "blur:1e0", "resize:.50")] == ["jpeg:75", "blur:1", "resize:0.5"]


def test_a_gpu_is_chosen_by_its_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [find_device(name) for name in ("cuda:1", "auto", "cpu")] == [
        torch.device(d) for d in ("cuda:1", "cuda", "cpu")
    ]
    assert chosen == [1, 0]  # set_device takes no "cuda" without a number
