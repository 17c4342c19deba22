import itertools

import numpy as np
import pandas as pd
import pytest
from conftest import K

import report
from dataset import LANDMARKS
from eval import record_attack
from report import correlation, measures_of, neighbour_distances, partial_correlation, permutation_p


def test_tables_of_markdown():
    table = pd.DataFrame({"|T|": [1, 12], "MRE": [0.125, np.nan], "share": ["a|b", ""]})
    assert (
        report.markdown(table) == "| \\|T\\| | MRE | share |\n| --- | --- | --- |\n| 1 | 0.12 | a\\|b |\n| 12 |  |  |\n"
    )


def test_neighbours_by_hand():
    line = np.array([[0.0, 0], [3, 4], [6, 8], [60, 80], [61, 80], [62, 80], [63, 80], [64, 80]])
    nearest, six = neighbour_distances(line[None])[0].T
    assert nearest.tolist() == [5, 5, 5, 1, 1, 1, 1, 1]
    from_first = sorted(np.hypot(*line[1:].T))[:6]
    assert six[0] == pytest.approx(np.mean(from_first))


def test_permutations_against_all_of_them():
    x, y = np.array([1.0, 2, 4, 8, 16]), np.array([1.0, 3, 2, 5, 4])
    r = abs(correlation(x, y))
    exact = np.mean([abs(correlation(x, np.array(p))) >= r - 1e-12 for p in itertools.permutations(y)])
    assert permutation_p(x, y) == pytest.approx(exact, abs=0.01)
    assert np.isnan(permutation_p(x, np.ones(5)))
    assert permutation_p(x, x) == pytest.approx(1 / 120, abs=0.004)  # nothing but itself is as good


def test_a_correlation_that_is_the_others_work_vanishes():
    rng = np.random.default_rng(0)
    way = rng.normal(size=5000)
    near, error = way + rng.normal(size=5000), way + rng.normal(size=5000)  # related by the way only
    assert correlation(near, error) == pytest.approx(0.5, abs=0.05)
    assert partial_correlation(near, error, way) == pytest.approx(0, abs=0.05)


@pytest.fixture
def folder(tmp_path):
    """Records of an attack on three images: landmark 1 ordered 10 mm away, landmark 2 by 20 mm, the others to stay.

    I-FGSM gets landmark 1 of the first image to 3 mm from its target, ATI-FGSM those of all three, and loses landmark
    19 by 5 mm.
    """
    truth = np.zeros((3, K, 2)) + 1000
    targets = np.full((3, K, 2), np.nan)
    targets[:, 0], targets[:, 1] = (1100, 1000), (1000, 1200)
    tables = []
    for method, reached in (("I-FGSM", 1), ("ATI-FGSM", 3)):
        for iteration in (0, 1, 20):
            points = truth.copy()
            if iteration == 20:
                points[:reached, 0, 0] += 70
                points[:, 18, 1] -= 50 * (method == "ATI-FGSM")
            tables.append(record_attack(["151", "152", "153"], points, truth, targets, method, iteration, np.ones(3)))
    pd.concat(tables).to_csv(tmp_path / "predictions.csv", index=False)
    return tmp_path


def test_measures_by_hand(folder):
    records = report.read(folder)
    assert report.last(records).query("method == 'ATI-FGSM' and landmark == 1")["flown_mm"].tolist() == [7, 7, 7]
    i, ati = measures_of(records).to_dict("records")
    assert (i["method"], i["images"], i["targeted"], i["start_mm"]) == ("I-FGSM", 3, 6, 15)
    assert i["targeted_mre_mm"] == pytest.approx((3 + 10 + 10 + 20 * 3) / 6)
    assert i["within_4mm_%"] == pytest.approx(100 / 6) and ati["within_4mm_%"] == 50
    assert i["half_way_%"] == pytest.approx(100 / 6)
    assert (i["within_4mm_%_low"], ati["within_4mm_%_low"], ati["within_4mm_%_high"]) == (0, 50, 50)  # of 3 images
    assert i["stationary_within_4mm_%"] == 100 and ati["stationary_within_4mm_%"] == pytest.approx(100 * 16 / 17)


def test_the_difference_of_the_methods_is_paired(folder, monkeypatch):
    few = report.difference(report.read(folder))
    assert few.count("(too few to tell)") == 4 and few.count(", 3 images\n") == 2
    monkeypatch.setattr(report, "ENOUGH", 3)
    targeted, stationary = report.difference(report.read(folder)).splitlines()[2:]
    # I-FGSM has moved landmark 1 in the first image too: a draw of that image alone finds no difference
    assert targeted.startswith(
        "* targeted: +33.3 points within 4 mm [+0.0, +50.0] (may be chance), -2.3 mm MRE [-3.5, "
    )
    assert stationary.startswith(
        "* stationary: -5.9 points within 4 mm [-5.9, -5.9] (less), +0.3 mm MRE [+0.3, +0.3] (more)"
    )


def test_coupling_finds_what_was_put_in(tmp_path):
    """Errors that follow the distance to the nearest neighbour, at ways of equal length."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(500, 1500, (12, K, 2))
    nearest = neighbour_distances(truth)[..., :1]
    targets = truth + (200, 0)
    left = 10 + nearest  # px0 that remain
    tables = [
        record_attack([f"{i}" for i in range(12)], points, truth, targets, method, iteration, np.ones(12))
        for method in ("I-FGSM", "ATI-FGSM")
        for iteration, points in ((0, truth), (5, targets - left * (1, 0)))
    ]
    pd.concat(tables).to_csv(tmp_path / "predictions.csv", index=False)
    text = report.coupling(tmp_path, {"shift": (tmp_path, "Displacements")})
    found = pd.read_csv(tmp_path / "coupling_shift_correlations.csv")
    first = found[found["error against distance from"] == "its nearest neighbour"]
    assert (first["r over landmarks"] > 0.999).all() and (first["p"] == "< 0.001").all()
    assert first["r over single targets"].str.startswith("+1.00 [+1.00, +1.00]").all()
    points = pd.read_csv(tmp_path / "coupling_shift.csv")
    assert points["name"].tolist() == [*LANDMARKS] * 2 and (points["times_targeted"] == 12).all()
    assert (tmp_path / "coupling_shift.png").stat().st_size > 10000 and "its nearest six" in text


def test_causes_are_compared_on_what_all_answers_have(folder, tmp_path):
    """A second run with one image less, and an iteration more."""
    records = pd.read_csv(folder / "predictions.csv", dtype={"image": str})
    fewer = records[records["image"] != "153"]
    more = fewer[fewer["iteration"] == 20].assign(iteration=30, radial_error_mm=0.0)
    (tmp_path / "other").mkdir()
    pd.concat([fewer, more]).to_csv(tmp_path / "other" / "predictions.csv", index=False)
    text = report.causes(tmp_path, [("size", "small", folder), ("size", "large", tmp_path / "other")])
    table = pd.read_csv(tmp_path / "causes.csv")
    assert (table["images"] == 2).all() and (table["iteration"] == 20).all() and (table["clean_mre_mm"] == 0).all()
    small, large = (table[table["answer"] == answer]["within_4mm_%"].tolist() for answer in ("small", "large"))
    assert small == large == [25, 50]
    assert "* size, large against small: I-FGSM +0.0 points within 4 mm [+0.0, +0.0] (too few to tell)" in text
