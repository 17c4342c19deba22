"""Clinical measures and classes by hand, and the least movement that changes a class."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REAL, K, attack_record, images

from beyond.diagnosis import (
    MEASURE_NAMES,
    MEASURES,
    challenge_score,
    changed_diagnoses,
    classes,
    diagnose,
    diagnosis_targets,
    least_movement,
    measures,
    reachable_classes,
    steepest_movement,
    summarize_changes,
    summarize_diagnoses,
)
from dataset import Cephalograms
from eval import record
from experiments.diagnosis import find_patient
from phantom import SHAPE
from readers.layouts import index
from readers.points import read_doctors


def patient(**landmarks):
    """(1, 19, 2): the named landmarks (L1 .. L19) at given places, the others at random ones."""
    points = np.random.default_rng(0).uniform(200, 1800, (K, 2))
    for name, place in landmarks.items():
        points[int(name[1:]) - 1] = place
    return torch.tensor(points)[None]


def polar(degrees, length, origin=(0, 0)):
    """The place at a distance from an origin, in a direction measured from the x axis towards y (down)."""
    angle = math.radians(degrees)
    return np.add(origin, (length * math.cos(angle), length * math.sin(angle)))


def plausible(count=1, seed=0):
    """(N, 19, 2) float64 landmarks of drawn patients: those of the phantoms' mean shape, jittered by 2 mm."""
    mean = torch.tensor(json.loads(SHAPE.read_text())["mean"], dtype=torch.float64)
    return mean + torch.randn(count, K, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 20


NASION = (1000, 500)


@pytest.mark.parametrize(
    "name, landmarks, value",
    [
        ("SNA", {"L1": polar(180, 500, NASION), "L2": NASION, "L5": polar(100, 600, NASION)}, 80),
        ("SNB", {"L1": polar(180, 500, NASION), "L2": NASION, "L6": polar(-100, 600, NASION)}, 80),  # unsigned
        (
            "ANB",
            {"L1": polar(180, 9, NASION), "L2": NASION, "L5": polar(100, 6, NASION), "L6": polar(104, 9, NASION)},
            4,
        ),
        (
            "ODI",
            {"L8": (0, 0), "L10": (10, 0), "L6": (0, 0), "L5": polar(70, 5), "L4": (0, 0), "L3": (9, 0)}
            | {"L17": (5, 5), "L18": polar(5, 10, (5, 5))},
            75,
        ),
        (
            "ODI",
            {"L8": (0, 0), "L10": (10, 0), "L6": (0, 0), "L5": polar(70, 5), "L4": (0, 0), "L3": (9, 0)}
            | {"L17": (5, 5), "L18": polar(-5, 10, (5, 5))},
            65,
        ),
        (
            "APDI",
            {"L3": (9, 0), "L4": (0, 0), "L2": (20, 0), "L7": polar(100, 9, (20, 0)), "L5": (0, 0), "L6": polar(103, 9)}
            | {"L17": (5, 5), "L18": polar(2, 10, (5, 5))},
            79,  # 80 - 3 + 2
        ),
        ("FHI", {"L1": (0, 0), "L10": (30, 40), "L2": (100, 0), "L8": (100, 100)}, 0.5),
        ("FMA", {"L1": (0, 0), "L2": (10, 0), "L10": (4, 4), "L9": polar(30, 7, (4, 4))}, 30),
        ("MW", {"L11": (0, 0), "L12": (30, -40)}, 5),
        ("MW", {"L11": (0, 0), "L12": (-30, -40)}, -5),
    ],
)
def test_measures_by_hand(name, landmarks, value):
    found = measures(patient(**landmarks), 0.1)[0, MEASURE_NAMES.index(name)]
    assert found.item() == pytest.approx(value, abs=1e-9)


def test_classes_at_the_thresholds():
    for j, measure in enumerate(MEASURES):
        low, high = measure.normal
        values = torch.zeros(4, 8, dtype=torch.float64)
        values[:, j] = torch.tensor([low - 1e-6, low, high, high + 1e-6], dtype=torch.float64)
        assert classes(values)[:, j].tolist() == [measure.below, 1, 1, measure.above], measure.name
        assert set(measure.words) >= {1, measure.below, measure.above}
    overjet = torch.zeros(4, 8, dtype=torch.float64)
    overjet[:, MEASURE_NAMES.index("MW")] = torch.tensor([-0.1, 0, 0.1, 1.9])
    assert classes(overjet)[:, MEASURE_NAMES.index("MW")].tolist() == [3, 2, 3, 3]  # as the official code has it


def test_invariance():
    points = plausible(5)
    values = measures(points, 0.1)
    assert torch.allclose(measures(points + torch.tensor([30.0, -70.0]), 0.1), values)
    scaled = measures(points * 1.5, 0.1)
    others = torch.tensor([name != "MW" for name in MEASURE_NAMES])
    assert torch.allclose(scaled[:, others], values[:, others])
    assert torch.allclose(scaled[:, ~others], 1.5 * values[:, ~others])
    turn = torch.tensor([[math.cos(0.3), math.sin(0.3)], [-math.sin(0.3), math.cos(0.3)]], dtype=torch.float64)
    assert torch.allclose(measures(points @ turn, 0.1)[:, others], values[:, others])  # the sign of MW is that of x


def mirrored(points):
    return points * np.array([-1, 1]) + np.array([1934, 0])


def test_measures_of_a_head_that_faces_left_by_hand():
    """The measures of the mirrored patient; the lower incisor is 3 mm right of the upper one: an overjet of 3 mm."""
    truth = overjets(-3, 3, 6)
    assert (mirrored(truth)[:, 11, 0] - mirrored(truth)[:, 10, 0]).round().tolist() == [30, -30, -60]
    found = diagnose(record(images(["1", "2", "3"], mirrored(truth)), mirrored(truth + 5)))
    mw = found[found["measure"] == "MW"]
    assert mw["true_value"].tolist() == pytest.approx([-3, 3, 6]) and mw["true_class"].tolist() == [3, 1, 4]
    assert mw["value"].tolist() == pytest.approx([-3, 3, 6])
    right = diagnose(record(images(["1", "2", "3"], truth), truth + 5))
    pd.testing.assert_frame_equal(found, right)
    doctors = torch.tensor(np.stack([truth, overjets(3, 3, 3)], axis=1))
    spacing = torch.full((3,), 0.1)
    summaries = [
        summarize_diagnoses(right, marks, spacing) for marks in (doctors, torch.tensor(mirrored(doctors.numpy())))
    ]
    pd.testing.assert_frame_equal(*summaries)


@pytest.mark.parametrize("known", [True, False])
def test_no_attacked_landmark_turns_a_head(known):
    """Where a head faces follows from the truth, else from the clean prediction, though an attack mirrors the head."""
    for head in (overjets(3), mirrored(overjets(3))):
        truth, clean = (head, mirrored(head)) if known else (np.full_like(head, np.nan), head)
        attack = {0: clean, 20: mirrored(head)}
        records = pd.concat(attack_record(["1"], points, truth, None, "I-FGSM", i) for i, points in attack.items())
        table = diagnose(records)
        assert table[table["measure"] == "MW"]["value"].tolist() == pytest.approx([-3, -3] if known else [3, -3])


@pytest.mark.parametrize("to", [3, "up"])
def test_targets_of_a_head_that_faces_left_are_the_mirrored_ones(to):
    found = {}
    for name, place in (
        ("right", lambda points: points),
        ("left", lambda points: torch.tensor(mirrored(points.numpy()))),
    ):
        points = place(plausible(6))
        data = Cephalograms.__new__(Cephalograms)
        vars(data).update(vars(images([*"abcdef"], points.numpy())), sizes=torch.tensor([[2400, 1935]] * 6))
        ids, targets = diagnosis_targets(points, data, "APDI", to, 8.0)
        found[name] = ids, place(targets.places), targets.targeted
    assert found["right"][0] == found["left"][0] and len(found["left"][0]) >= 3
    assert torch.allclose(found["right"][1], found["left"][1], atol=2e-4)
    assert torch.equal(found["right"][2], found["left"][2])


def test_gradients_against_finite_differences():
    points = plausible(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda points: measures(points, 0.1), points)


def test_the_challenges_score_by_hand():
    truth, found = torch.tensor([1, 1, 1, 1, 2, 2, 3]), torch.tensor([1, 1, 1, 3, 2, 1, 1])
    assert challenge_score(truth, found) == pytest.approx(100 * (3 / 4 + 1 / 2 + 0) / 3)


@pytest.mark.skipif(not REAL.exists(), reason="no real data")
def test_the_official_classes_and_the_doctors_agreement():
    """Published with the challenge: the classes of patient 001 by the senior doctor; the doctors' on Test1."""
    senior = [read_doctors(entry, (2400, 1935))[0] for entry in index(REAL, "train")[:1]]
    assert classes(measures(torch.tensor(np.array(senior)), 0.1)).tolist() == [[3, 3, 2, 3, 3, 1, 2, 3]]
    marks = torch.tensor(np.array([read_doctors(entry, (2400, 1935)) for entry in index(REAL, "test1")]))
    senior, junior = (classes(measures(points, 0.1)) for points in marks.unbind(1))
    agreement = 100 * (senior == junior).double().mean(0)
    assert agreement.tolist() == pytest.approx([73.3, 78.0, 66.7, 80.0, 82.7, 80.0, 81.3, 89.3], abs=0.05)


# --- the least movement ----------------------------------------------------------------------------------------------


def test_the_least_movement_of_the_overjet_by_hand():
    """Both incisors move by the same amount along their line: each by half of 1.5 mm and of the margin, sqrt(2) mm."""
    points = plausible()
    points[0, 10], points[0, 11] = torch.tensor([1000.0, 1500.0]), torch.tensor([1018.0, 1524.0])  # 3 mm
    found, moved, _ = least_movement(points, torch.tensor([0.1]), MEASURE_NAMES.index("MW"), to=4)
    assert moved.nonzero().tolist() == [[0, 10], [0, 11]]
    step = 10 * (1.5 + math.sqrt(2)) / 2 * torch.tensor([0.6, 0.8])
    assert torch.allclose(found[0, [10, 11]] - points[0, [10, 11]], torch.stack([-step, step]).double(), atol=0.05)


@pytest.mark.parametrize("measure", range(len(MEASURES)))
def test_the_least_movement_changes_one_class_and_is_least(measure):
    points, mm = plausible(12), torch.full((12,), 0.1)
    before = classes(measures(points, 0.1))
    places, moved, _ = least_movement(points, mm, measure)
    possible = moved.any(1)
    assert possible.sum() >= 6 and torch.equal(places[~possible], points[~possible])
    after = classes(measures(places, 0.1))
    others = torch.arange(len(MEASURES)) != measure
    assert (after[possible, measure] != before[possible, measure]).all()
    assert (after[:, others] == before[:, others]).all()
    # at a least movement, it is a combination of the measures' gradients (Karush, Kuhn, Tucker)
    movement = ((places - points) * 0.1)[possible].flatten(1)
    gradients = torch.func.vmap(torch.func.jacrev(measures))(places, mm.double())[possible].flatten(-2)
    fit = torch.linalg.lstsq(gradients.mT, movement[..., None]).solution
    left = (movement - (gradients.mT @ fit)[..., 0]).norm(dim=-1)
    assert (left < 0.25).all() and (left < 0.1 * movement.norm(dim=-1)).float().mean() > 0.5  # small ones are left out


def test_no_movement_where_none_is_needed_or_possible():
    points, mm = plausible(12), torch.full((12,), 0.1)
    before = classes(measures(points, 0.1))[:, 0]
    _, moved, _ = least_movement(points, mm, 0, to=1)
    assert not moved[before == 1].any() and (before == 1).any()
    points[0, 10] = points[0, 11]  # the angle and the distance of coinciding landmarks have no gradient
    points[1, :] = 500
    _, moved, _ = least_movement(points, mm, MEASURE_NAMES.index("MW"))
    assert not moved[:2].any() and moved[2:].any(1).all()
    # retrognathic maxilla, prognathic mandible: ANB is below 0.7 degrees whatever moves
    contradiction = patient(L1=(500, 500), L2=NASION, L5=polar(105, 600, NASION), L6=polar(99, 900, NASION))
    assert classes(measures(contradiction, 0.1))[0, :3].tolist() == [3, 3, 3]
    assert not least_movement(contradiction, mm[:1], 0).targeted.any()


@pytest.mark.parametrize("name", MEASURE_NAMES)
def test_a_measure_is_driven_as_far_as_a_movement_can(name):
    """Of movements of 1 mm, none of a hundred random ones changes it more."""
    start, mm, measure = plausible(), torch.tensor([0.1]), MEASURE_NAMES.index(name)
    before = measures(start, mm)[0, measure]
    rng = np.random.default_rng(0)
    for direction, sign in (("up", 1), ("down", -1)):
        found = steepest_movement(start, mm, measure, direction, 1.0)
        movement = (found.places - start)[0]
        assert 0.1 * movement.norm() == pytest.approx(1, abs=0.02) and (movement[~found.targeted[0]] == 0).all()
        change = sign * (measures(found.places, mm)[0, measure] - before)
        for _ in range(100):
            other = torch.from_numpy(rng.normal(size=(19, 2)))
            assert sign * (measures(start + 10 * other / other.norm(), mm)[0, measure] - before) < change
    start[:, 10] = start[:, 11]
    assert not steepest_movement(start, mm, MEASURE_NAMES.index("MW"), "up", 1.0).targeted.any()


def test_classes_to_aim_at():
    assert reachable_classes("MW") == {1: "normal", 3: "anterior cross bite", 4: "overjet"}
    assert list(reachable_classes("SNB")) == [1, 2, 3]


# --- tables ----------------------------------------------------------------------------------------------------------


def overjets(*values):
    """(N, 19, 2) of equal patients but for MW in mm."""
    points = plausible().repeat(len(values), 1, 1)
    points[:, 11] = points[:, 10] + 10 * torch.tensor([[value, 0.0] for value in values], dtype=torch.float64)
    return points.numpy()


def test_how_far_measures_are_from_the_truth():
    truth, found = overjets(1, 3, 3, 6), overjets(3, 3, 4, 7)
    table = diagnose(record(images(["1", "2", "3", "4"], truth), found))
    assert table[table["measure"] == "MW"]["meaning"].tolist() == ["normal", "normal", "normal", "overjet"]
    doctors = torch.tensor(np.stack([truth, overjets(1, 3, 1, 3)], axis=1))
    summary = summarize_diagnoses(table, doctors, torch.full((4,), 0.1)).set_index("measure")
    row = summary.loc["MW"]
    assert row[["mean_difference", "agreement_%"]].tolist() == pytest.approx([1, 75])
    assert row["challenge_score_%"] == pytest.approx(100 * (0 + 1 + 1) / 3)
    assert row[["doctors_mean_difference", "doctors_agreement_%"]].tolist() == pytest.approx([1.25, 50])
    assert row["doctors_challenge_score_%"] == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert summary.loc["SNA", ["agreement_%", "doctors_agreement_%"]].tolist() == [100, 100]
    assert summary.loc["all", "agreement_%"] == pytest.approx((7 * 100 + 75) / 8)


def test_changed_diagnoses_by_hand():
    clean, attacked = overjets(3, 3, 3, 6), overjets(5, 3, 5, 1)
    attacked[2, 4] += 400  # subspinale: further classes change
    targets = np.full((4, K, 2), np.nan)
    records = pd.concat(
        attack_record(["1", "2", "3", "4"], points, clean, targets, "I-FGSM", iteration)
        for iteration, points in ((0, clean), (20, attacked))
    )
    table = diagnose(records)
    changed = changed_diagnoses(table, "MW").loc["I-FGSM", 20]
    assert changed["MW"].tolist() == changed["intended"].tolist() == [True, False, True, True]
    assert changed["only intended"].tolist() == [True, False, False, True]
    assert changed["any"].tolist() == [True, False, True, True]
    assert not changed_diagnoses(table).loc["I-FGSM", 0].any(axis=None)
    four = changed_diagnoses(table, "MW", to=4).loc["I-FGSM", 20]
    assert four["intended"].tolist() == [True, False, True, False]
    share = summarize_changes(changed_diagnoses(table, "MW")).set_index(["iteration", "measure"])["changed_%"]
    assert share[20, "only intended"] == 50 and share[20, "MW"] == 75 and share[0, "any"] == 0

    # of the two whose intended diagnosis alone has changed, the picture shows the one whose measure changed more
    final = changed_diagnoses(table, "MW").query("iteration > 0").reset_index().assign(epsilon=4.0, measure="MW")
    _, after, *_, texts = find_patient([(records.assign(epsilon=4.0), final)])
    assert set(after["image"]) == {"4"} and texts == ["MW 6 mm, overjet", "MW 1 mm, anterior cross bite"]


@pytest.mark.skipif(not REAL.exists(), reason="no real data")
def test_a_selection_of_images_keeps_what_belongs_to_them():
    data = Cephalograms(REAL, "test1", (40, 32), limit=3)
    part = data.select(["153", "151"])
    assert part.ids == ["153", "151"] and len(part) == 2 and len(data) == 3 and part.sha256 == data.sha256
    for name in ("images", "doctors_px0", "landmarks_px0", "landmarks", "reference_px0", "sizes", "mm_per_px0"):
        assert torch.equal(getattr(part, name), getattr(data, name)[[2, 0]]), name
