"""Attacked images as files."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SIZE0, assert_refused
from PIL import Image

from beyond.stored import largest_change, save_adversarial
from dataset import Cephalograms

pytestmark = pytest.mark.slow

ATTACK = ["--attack", 0, "--steps", 2, "--split", "test1", "--limit", 2, "--batch-size", 2, "--targets", "shift"]


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_both_sizes_hold_the_noise_in_grey_levels(channels, mode, official, tmp_path):
    data = Cephalograms(official, "test1", (60, 48))  # a fifth of the originals
    noise = torch.arange(60 * 48 * channels).reshape(channels, 60, 48) % 9 - 4
    attacked = (data.images[1] + noise + 0.4).clamp(0, 255) / 127.5 - 1
    save_adversarial(tmp_path, "I-FGSM", data.select(["152"]), attacked)
    small, large = (Image.open(tmp_path / f"I-FGSM_{size}" / "152.png") for size in ("input", "original"))
    assert small.mode == large.mode == mode and small.size == (48, 60) and large.size == SIZE0[::-1]
    expected = (data.images[1] + noise).clamp(0, 255).permute(1, 2, 0).squeeze(-1)
    assert np.array_equal(np.asarray(small), expected)
    original = np.asarray(Image.open(data.files[1]), int)
    for y, x in [(0, 0), (4, 4), (5, 4), (142, 101), (299, 239)]:
        change = np.asarray(large, int)[y, x] - original[y, x]
        assert np.array_equal(np.atleast_1d(change), noise[:, y // 5, x // 5])


def test_largest_change(tmp_path):
    clean, attacked = np.array([[0, 200]], np.uint8), np.array([[[0, 3, 0], [200, 200, 193]]], np.uint8)
    Image.fromarray(clean).save(tmp_path / "clean.png")
    Image.fromarray(attacked).save(tmp_path / "attacked.png")
    for before in (clean, tmp_path / "clean.png"):
        assert largest_change(before, tmp_path / "attacked.png") == 7


@pytest.fixture
def attacked(trained, official, monkeypatch, run):
    """An attack's folder; its noise is of less than half a grey level, so that rounding takes it away."""
    monkeypatch.chdir(trained)
    out = trained / "stored"
    if not out.exists():
        arguments = ["--tag", "small", "--data", official, *ATTACK, "--epsilon", 1, "--rand", out.name]
        status, printed, err = run("test.py", *arguments, "--pictures", 0, "--save-adversarial")
        assert status == 0, err
        assert "8-bit original" in printed
    return out


def test_read_back(attacked, official, run):
    table = pd.read_csv(attacked / "read_back.csv", dtype={"image": str})
    assert table["stored"].unique().tolist() == [
        *["in memory", "8-bit input", "JPEG input", "8-bit original", "JPEG original"]
    ]
    predictions = pd.read_csv(attacked / "predictions.csv", dtype={"image": str})
    columns = ["image", "landmark", "x_px0", "y_px0", "role", "target_x_px0", "target_y_px0", "radial_error_mm"]
    parts = {stored: part[columns].reset_index(drop=True) for stored, part in table.groupby("stored")}
    at = {i: part[columns].reset_index(drop=True) for i, part in predictions.groupby("iteration")}
    pd.testing.assert_frame_equal(parts["in memory"], at[2])
    pd.testing.assert_frame_equal(parts["8-bit input"], at[0])  # the noise is gone
    pd.testing.assert_frame_equal(parts["8-bit original"], at[0])
    changes = table.groupby("stored")["largest_change"].max()
    assert changes["in memory"] == pytest.approx(2 * 0.05 * 127.5 / 256, abs=1e-4)  # two steps of 0.05 epsilon
    assert changes["8-bit input"] == changes["8-bit original"] == 0

    arguments = ["--tag", "small", "--data", official, "--split", "test1", "--rand", "again"]
    status, _, err = run("test.py", *arguments, "--adversarial", attacked / "adversarial")
    assert status == 0, err
    again = attacked.parent / "again" / "read_back.csv"
    assert again.read_text() == (attacked / "read_back.csv").read_text()


def test_jpegs_that_replace_the_pngs(attacked, official, tmp_path, run):
    folder = shutil.copytree(attacked / "adversarial", tmp_path / "adversarial")
    for file in folder.rglob("*.png"):
        file.unlink()
    arguments = ["--tag", "small", "--data", official, "--split", "test1", "--rand", "jpegs", "--adversarial", folder]
    assert run("test.py", *arguments)[0] == 0
    expected, found = (pd.read_csv(path / "read_back.csv") for path in (attacked, attacked.parent / "jpegs"))
    kept = expected[~expected["stored"].str.startswith("8-bit")].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, kept)
    assert found["stored"].unique().tolist() == ["in memory", "JPEG input", "JPEG original"]


def test_transfer_to_other_detectors(attacked, trained, official, run):
    """One of the same size sees all stored images, one of another size the originals; equal weights find the same."""
    for tag, size in (("twin", [64, 48]), ("larger", [96, 80])):
        folder = shutil.copytree(trained / "runs" / "small", trained / "runs" / tag, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | {"size": size}
        (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--tag", "small", "--data", official, "--split", "test1", "--rand", "transfer"]
    arguments += ["--adversarial", attacked / "adversarial", "--transfer", "twin", "larger"]
    status, printed, err = run("test.py", *arguments)
    assert status == 0, err
    table = pd.read_csv(attacked.parent / "transfer" / "read_back.csv")
    assert table["radial_error_mm"].notna().all()
    forms = table.groupby("detector")["stored"].unique()
    assert list(forms["twin"]) == ["8-bit input", "JPEG input", "8-bit original", "JPEG original"]
    assert list(forms["larger"]) == ["8-bit original", "JPEG original"]
    points = table.set_index(["detector", "stored", "image", "landmark"])["x_px0"]
    assert points["twin"].equals(points["small"].drop("in memory"))
    assert not points["larger"].equals(points["small"].loc[["8-bit original", "JPEG original"]])
    assert "larger" in printed

    for tag, sizes in (("twin", ("input", "original")), ("larger", ("original",))):
        arguments = ["--tag", tag, "--data", official, "--split", "test1", "--rand", f"by_{tag}"]
        assert run("test.py", *arguments, "--adversarial", attacked / "adversarial")[0] == 0
        table = pd.read_csv(attacked.parent / f"by_{tag}" / "read_back.csv")
        assert table.groupby("stored")["detector"].unique().map(list).to_dict() == {
            "in memory": ["small"],  # of the attack itself
            **{f"{form} {size}": [tag] for form in ("8-bit", "JPEG") for size in sizes},
        }


WRONG = {
    "no such folder": (lambda folder: shutil.rmtree(folder), "in_memory.csv"),
    "a picture is missing": (
        lambda folder: (folder / "I-FGSM_original" / "152.png").unlink(),
        "152.png: no such file",
    ),
    "a picture is of another size": (
        lambda folder: Image.new("L", (99, 99)).save(folder / "I-FGSM_original" / "152.png"),
        "152.png: size (99, 99) (H, W), but the clean image has (300, 240)",
    ),
    "a test's record": (
        lambda folder: shutil.copy(folder.parent / "test.csv", folder / "in_memory.csv"),
        "not the record of an attack",
    ),
    "no record": (
        lambda folder: (folder / "in_memory.csv").write_text("image\n"),
        "in_memory.csv: not a readable record",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders(case, attacked, official, tmp_path, run):
    spoil, message = WRONG[case]
    table = pd.read_csv(attacked / "predictions.csv", dtype=str)
    clean = table[table["iteration"] == "0"].filter(regex="^(image|landmark|name|.*px0|radial_error_mm)$")
    clean.drop(columns=["target_x_px0", "target_y_px0"]).to_csv(tmp_path / "test.csv", index=False)
    folder = shutil.copytree(attacked / "adversarial", tmp_path / "adversarial")
    spoil(folder)
    arguments = ["--tag", "small", "--data", official, "--rand", f"wrong {case}", "--adversarial", folder]
    status, _, err = run("test.py", *arguments)
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (attacked.parent / f"wrong {case}").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--save-adversarial"], "--save-adversarial: needs --attack"),
        (["--transfer", "other"], "--transfer: needs --save-adversarial or --adversarial"),
        (["--attack", 0, "--save-adversarial", "--transfer", "small"], "--transfer: name each run once"),
        (["--attack", 0, "--save-adversarial", "--transfer", "nowhere"], "no such run (existing runs: "),
        (["--attack", 0, "--adversarial", "somewhere"], "--adversarial: tests stored images; omit --attack"),
        (["--adversarial", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments(wrong, message, attacked, official, run):
    result = run("test.py", "--tag", "small", "--data", official, "--rand", "wrong", *wrong)
    assert_refused(result, message, attacked.parent / "wrong")


def test_other_images_than_were_attacked(attacked, official, run):
    arguments = ["--tag", "small", "--data", official, "--split", "test2", "--rand", "other"]
    result = run("test.py", *arguments, "--adversarial", attacked / "adversarial")
    assert_refused(result, "image 151 is not in this --data, --split, --limit, --images", attacked.parent / "other")
