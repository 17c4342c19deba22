import json
import os

import numpy as np
import pytest
from conftest import K

import phantom
from dataset import Cephalograms
from phantom import (
    ATLAS,
    HEIGHT,
    INCISORS,
    SHAPE,
    STEP,
    UNIT,
    WIDTH,
    curve,
    draw_film,
    draw_parts,
    sample_landmarks,
    spline,
    warps,
)
from support import command

COUNTS = ["--train", 2, "--test1", 1, "--test2", 1]
FEWER = ["--train", 1, "--test1", 0, "--test2", 0]


@pytest.fixture(scope="module")
def shape():
    return json.loads(SHAPE.read_text())


@pytest.fixture(scope="module")
def atlas():
    return json.loads(ATLAS.read_text())


def die(seed, file):
    os._exit(9)


def test_a_drawing_process_that_is_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(phantom, "draw_patient", die)
    arguments = ["--out", tmp_path / "drawn", *COUNTS]
    with pytest.raises(SystemExit) as exit:
        command.run(lambda: phantom.main([*map(str, arguments)]))
    assert exit.value.code == 75 and "run it again" in capfd.readouterr().err


def test_population_follows_the_shape_model(shape):
    patients = [sample_landmarks(np.random.default_rng(seed), shape) for seed in range(400)]
    landmarks, senior, junior = (np.array(part) for part in zip(*patients, strict=True))
    assert np.abs(landmarks.mean(0) - shape["mean"]).max() < 40  # three standard errors of the first mode
    assert np.abs((senior + junior) / 2 - landmarks).max() <= 0.5  # the truth is the doctors' mean
    distance = np.linalg.norm(senior - junior, axis=-1) * 0.1
    assert distance.mean() == pytest.approx(2.15, abs=0.6)  # mm, the real doctors'
    first = np.tensordot(landmarks - landmarks.mean(0), shape["modes"][0], 2)
    assert first.std() == pytest.approx(shape["mode_std"][0], rel=0.2)


def test_a_curve_goes_through_its_points():
    points = np.array([(0, 0), (10, 5), (20, -5), (5, -20)])
    assert np.allclose(curve(points)[[0, 6, 12, 18]], points)
    assert np.allclose(curve(points, closed=True)[[0, 6, 12, 18, 24]], points[[0, 1, 2, 3, 0]])


def test_a_spline_goes_through_its_points_and_becomes_affine_with_stiffness():
    rng = np.random.default_rng(0)
    places, moved = rng.uniform(0, 100, (2, 9, 2))
    assert np.allclose(spline(places, moved, stiffness=0)(places), moved)
    turn = np.array([[0.8, 0.6], [-0.6, 0.8]])
    assert np.allclose(spline(places, places @ turn + (3, 4))(places + 50), (places + 50) @ turn + (3, 4))
    stiff = spline(places, moved, stiffness=1e12)
    assert np.allclose(stiff((places[:1] + places[1:2]) / 2), (stiff(places[:1]) + stiff(places[1:2])) / 2, atol=1e-3)


def test_the_warped_atlas_has_the_landmarks_where_the_patient_has_them(shape, atlas):
    mean = np.array(shape["mean"])
    distances = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        landmarks, _, _ = sample_landmarks(rng, shape)
        left, right = warps(rng, landmarks, mean, atlas["anchors"])
        found = (left(mean / UNIT) + right(mean / UNIT)) / 2
        distances.append(np.linalg.norm(found - landmarks, axis=-1) * 0.1)
    distances = np.delete(np.array(distances), INCISORS, 1)  # they are drawn where they are, outside the atlas
    assert np.median(distances) < 0.2 and distances.max() < 1.5  # mm


def test_every_part_of_the_atlas_shows(shape, atlas):
    """No outline lies outside the film or is empty."""
    for part in atlas["parts"]:
        film = np.zeros((HEIGHT // STEP, WIDTH // STEP), np.float32)
        draw_parts(film, np.random.default_rng(0), lambda points: points * UNIT, lambda points: points * UNIT, [part])
        assert np.abs(film).max() > 0.25 * abs(part["amount"]), part["name"]


def test_the_drawing_follows_the_landmarks(shape, atlas):
    """Landmarks displaced by 60 px0 displace the structures around them by 60 px0."""
    mean = np.array(shape["mean"])
    landmarks, _, _ = sample_landmarks(np.random.default_rng(0), shape)
    here = draw_film(np.random.default_rng(1), landmarks, mean, atlas).astype(float)
    there = draw_film(np.random.default_rng(1), landmarks + (60, 0), mean, atlas).astype(float)
    face = np.s_[1100:2000, 900:1400]
    moved = np.s_[1100:2000, 960:1460]
    assert np.corrcoef(here[face].ravel(), there[moved].ravel())[0, 1] > 0.9
    assert np.corrcoef(here[face].ravel(), there[face].ravel())[0, 1] < 0.8


@pytest.mark.slow
def test_same_seed_same_bytes_in_the_official_layout(tmp_path, run):
    for folder, counts, seed in (("one", COUNTS, 3), ("two", COUNTS, 3), ("three", FEWER, 4)):
        status, _, err = run("phantom.py", "--out", tmp_path / folder, *counts, "--seed", seed)
        assert status == 0, err
    files = {
        folder: {
            str(file.relative_to(tmp_path / folder)): file.read_bytes()
            for file in sorted(tmp_path.glob(f"{folder}/**/*.*"))
        }
        for folder in ("one", "two", "three")
    }
    assert len(files["one"]) == 4 * 3 + 1
    assert files["one"] == files["two"]
    assert len(files["three"]) == 3 + 1
    assert not any(files["one"][name] == files["three"][name] for name in files["three"])

    lost = tmp_path / "two" / "RawImage" / "Test1Data" / "151.bmp"  # after a stop, the repeated command continues
    kept = tmp_path / "two" / "RawImage" / "Test2Data" / "301.bmp"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    assert run("phantom.py", "--out", tmp_path / "two", *COUNTS, "--seed", 3)[0] == 0
    assert lost.read_bytes() == files["one"]["RawImage/Test1Data/151.bmp"] and kept.stat().st_mtime_ns == stamp
    status, _, err = run("phantom.py", "--out", tmp_path / "two", *COUNTS, "--seed", 4)
    assert status == 2 and "seed was 3, now it is 4" in err

    data = Cephalograms(tmp_path / "one", "test", (100, 80))
    assert data.ids == ["151", "301"] and data.landmarks.shape == (2, K, 2)
    assert data.sizes.tolist() == [[2400, 1935]] * 2
    assert data.images.float().std() > 30  # a picture, not a blank


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "taken"], "taken: holds files, but no phantom.json of phantom.py"),
        (["--out", "file"], "file: cannot be used as output folder"),
        (["--out", "file/new"], "cannot be used as output folder"),
        (["--out", "new", "--train", 151], "--train: 151 is not a whole number from 0 to 150"),
        (["--out", "new", "--train", -1], "--train"),
        ([], "--out"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    (tmp_path / "file").touch()
    status, _, err = run("phantom.py", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()
