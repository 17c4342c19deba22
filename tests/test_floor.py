"""scripts/floor.py: radiographs that the data has twice, on drawn data of which two images are repeated."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import REAL, ROOT, assert_refused, images, write_official
from PIL import Image

from dataset import Cephalograms
from eval import record
from scripts.floor import compare

SHIFT, MOVED = np.array([1, 0]), np.array([3, 4])  # px0: of an image that is repeated, and of its senior's marks there


@pytest.fixture
def repeated(drawn, tmp_path):
    """002 is also 152, shifted and as JPEG; 151 is also 153. A detector's predictions lie 30 px0 below the truth."""
    image, senior, junior = drawn["train"]["002"]
    shifted = Image.fromarray(np.roll(np.asarray(image), SHIFT[::-1], (0, 1)))
    again = {"152": (shifted, senior + SHIFT + MOVED, junior + SHIFT), "153": drawn["test1"]["151"]}
    drawn = drawn | {"test1": drawn["test1"] | again}
    write_official(tmp_path / "data", drawn)
    file = tmp_path / "data" / "RawImage" / "Test1Data" / "152.bmp"
    shifted.save(file.with_suffix(".jpg"), quality=95)
    file.unlink()
    truth = np.stack([(senior + junior) / 2 for _, senior, junior in drawn["test1"].values()])
    (tmp_path / "clean").mkdir()
    record(images([*drawn["test1"]], truth), truth + (0, 30)).to_csv(tmp_path / "clean/predictions.csv", index=False)
    return drawn


def test_repeated_images_by_hand(repeated, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed, err = run("scripts/floor.py", "--data", "data", "--out", "out", "clean")
    assert status == 0, err
    assert printed == "2 pairs, their truths 0.12 mm apart; written to out/\n"
    pairs = pd.read_csv("out/pairs.csv", dtype={"image": str, "test1": str})
    assert pairs.iloc[:, :5].values.tolist() == [["train", "002", "152", 1, 0], ["test1", "151", "153", 0, 0]]
    assert 10 < pairs["equal_%"][0] < 100 and 0 < pairs["levels"][0] < 3  # JPEG
    assert pairs[["equal_%", "levels"]].values.tolist()[1] == [100, 0]
    assert pairs["truths_mm"].tolist() == [0.25, 0]  # half of the senior's 5 px0
    table = pd.read_csv("out/distances.csv").set_index(["between", "images", "landmark"])
    doctors = [np.linalg.norm(senior - junior, axis=1) / 10 for _, senior, junior in repeated["test1"].values()]
    expected = {
        ("truths", "pairs"): (2, 0.125),
        ("truths", "train"): (1, 0.25),
        ("exact", "pairs"): (2, 0.125 / 2**0.5),
        ("senior", "pairs"): (2, 0.25),
        ("junior", "pairs"): (2, 0),
        ("doctors", "pairs"): (2, np.mean(doctors[1:])),
        ("doctors", "test1"): (3, np.mean(doctors)),
        ("clean", "test1"): (3, 3),
        ("clean", "without train"): (2, 3),
        ("clean", "once"): (1, 3),
        ("clean", "train truth"): (1, np.hypot(1.5, 32) / 10),
        ("clean", "test1 truth"): (1, 3),
    }
    found = table.xs("all landmarks", level="landmark")
    assert [*found.index] == [*expected]
    for (count, mean), (_, row) in zip(expected.values(), found.iterrows(), strict=True):
        assert row["count"] == count and row["mre_mm"] == pytest.approx(mean, abs=1e-4), row.name
        assert row["mre_mm_low"] <= row["mre_mm"] <= row["mre_mm_high"]
    assert found.loc["clean", "test1"].filter(regex="sdr.*%$").tolist() == [0, 0, 100, 100]  # 3 mm are within 3 mm
    sella = table.loc["doctors", "test1", "sella"]
    assert sella["mre_mm"] == pytest.approx(np.mean([each[0] for each in doctors]), abs=1e-4)


@pytest.mark.parametrize(
    "data, folder, message",
    [
        ("official", [], "no image of test1 is repeated, in train or in test1"),
        ("kaggle", [], "the marks of two doctors are needed"),
        ("official", ["none"], "none/predictions.csv: no such file"),
    ],
)
def test_what_is_refused(data, folder, message, tmp_path, monkeypatch, request, run):
    monkeypatch.chdir(tmp_path)
    result = run("scripts/floor.py", "--data", request.getfixturevalue(data), "--out", "out", *folder)
    assert_refused(result, message, tmp_path / "out")


def test_predictions_of_some_images_are_refused(repeated, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    pd.read_csv("clean/predictions.csv").iloc[19:].to_csv("clean/predictions.csv", index=False)
    assert_refused(run("scripts/floor.py", "--data", "data", "--out", "out", "clean"), "not 19 rows", tmp_path / "out")


@pytest.mark.skipif(not REAL.exists(), reason="no real data")
@pytest.mark.parametrize("one, other, shift, apart", [("080", "282", [-3, 3], 1.14), ("144", "173", [0, 0], 0.5)])
def test_a_real_pair(one, other, shift, apart):
    train, test = (Cephalograms(REAL, *of, (80, 64), ids=[id]) for *of, id in (("train", one), ("test1", other)))
    row = compare(train, 0, test, 0)
    assert [row["x_px0"], row["y_px0"]] == shift and row["truths_mm"] == pytest.approx(apart, abs=0.005)
    assert (row["equal_%"] == 100) == (shift == [0, 0])


def test_the_measured_pairs_are_those_of_the_documentation():
    rows = re.findall(r"\| Test1 \|(.*)\|\n.*\n\| is \|(.*)\|", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"))
    stated = {tuple(map(int, pair)) for row in rows for pair in zip(*(part.split("|") for part in row), strict=True)}
    pairs = pd.read_csv(ROOT / "docs" / "results" / "floor" / "pairs.csv")
    assert stated == set(pairs[["test1", "image"]].itertuples(index=False, name=None)) and len(pairs) == 19
