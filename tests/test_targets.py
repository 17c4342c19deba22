"""Which landmarks are attacked, and where to."""

import numpy as np
import pytest
import torch
from conftest import SIZE0, K

from dataset import Cephalograms
from targets import (
    Targets,
    check_inside,
    choose_targets,
    image_rng,
    random_targets,
    read_stored_targets,
    shift_targets,
    with_neighbours,
    write_targets,
)


def test_random_targets_follow_the_papers_protocol():
    counts, places = [], []
    for seed in range(2000):
        targets, chosen = random_targets(np.random.default_rng(seed), 19, (800, 640))
        counts.append(chosen.sum())
        places.append(targets[chosen])
    places = np.concatenate(places)
    assert set(counts) == set(range(1, 18))  # |T| in 1 .. K - 2
    assert np.mean(counts) == pytest.approx(9, abs=0.4)
    assert places[:, 0].min() == pytest.approx(100, abs=0.3) and places[:, 0].max() == pytest.approx(600, abs=0.3)
    assert places[:, 1].min() == pytest.approx(250, abs=0.3) and places[:, 1].max() == pytest.approx(750, abs=0.3)


def test_shifts_are_as_long_as_asked_and_inside():
    landmarks = np.array([[0.0, 0.0], [239.0, 299.0], [120.0, 150.0]])
    for seed in range(50):
        targets, chosen = shift_targets(np.random.default_rng(seed), landmarks, SIZE0, count=2, displacement=80, id="1")
        assert chosen.sum() == 2
        assert np.linalg.norm(targets[chosen] - landmarks[chosen], axis=1) == pytest.approx([80, 80])
        assert (targets[chosen] >= 0).all() and (targets[chosen] <= (239, 299)).all()


def test_targets_depend_on_seed_and_image_alone(official):
    few = Cephalograms(official, "test1", (50, 40), limit=2)
    many = Cephalograms(official, "test", (100, 80))
    for kind in ("random", "shift"):
        one = choose_targets(kind, few, 3, 5, 4.0)
        assert one.sha256() == choose_targets(kind, many, 3, 5, 4.0).of([0, 1]).sha256()
        assert one.sha256() != choose_targets(kind, few, 4, 5, 4.0).sha256()
        assert one.of([0]).sha256() != one.of([1]).sha256()
    assert image_rng(0, "151").random() != image_rng(0, "152").random()


def test_neighbours_go_along_or_are_free(official):
    """Landmarks 1 to 4 and 19 far from the others; 1 and 4 are displaced, 1's nearest are 2 and 3, 4's are 3 and 2."""
    data = Cephalograms(official, "test1", (50, 40), limit=1)
    points = torch.full((1, K, 2), 250.0, dtype=torch.float64)
    points[0, :4, 0] = torch.tensor([10.0, 20, 31, 43], dtype=torch.float64)
    points[0, :4, 1] = 50
    points[0, 18] = torch.tensor([10.0, 80])
    data.reference_px0 = points
    targeted = torch.zeros(1, K, dtype=torch.bool)
    targeted[0, [0, 3]] = True
    start = Targets(torch.where(targeted[..., None], points + torch.tensor([[[0, 5.0]]]), 0), targeted)
    start.places[0, 3] += 4  # displaced by (4, 9)
    free = with_neighbours(start, data, "free")
    assert free.free.nonzero().tolist() == [[0, 1], [0, 2]] and free.targeted.equal(targeted)
    assert free.sha256() != start.sha256() == start._replace(free=None).sha256() and free.of([0]).free.equal(free.free)
    along = with_neighbours(start, data, "along")
    assert along.targeted.nonzero()[:, 1].tolist() == [0, 1, 2, 3] and along.free is None
    assert (along.places - points)[0, :4].tolist() == [[0, 5], [0, 5], [0, 5], [4, 9]]
    data.reference_px0[0, 1] = torch.tensor([1.0, 297])  # which then would leave the image
    start.places[0, 0] = points[0, 0] + torch.tensor([0, 200.0])
    data.reference_px0[0, 0] = torch.tensor([1.0, 90])
    stay = with_neighbours(start, data, "along")
    assert not stay.targeted[0, 1] and stay.targeted[0, [0, 3]].all()
    check_inside(stay, data, "shift")


def test_targets_from_a_file_and_back(official, tmp_path):
    (tmp_path / "targets.csv").write_text("landmark,x,y\n19,10,20.5\n2,0,299\n")
    data = Cephalograms(official, "test1", (50, 40))
    targets = choose_targets(tmp_path / "targets.csv", data, 0, 5, 8.0)
    assert targets.targeted.nonzero().tolist() == [[i, k] for i in range(3) for k in (1, 18)]
    assert targets.places[2, 18].tolist() == [10, 20.5] and targets.places[0, 1].tolist() == [0, 299]
    assert targets.or_nan().isnan().any(-1).sum(-1).tolist() == [17] * 3
    data.ids[:2] = ["a b", " c "]
    write_targets(tmp_path / "stored.csv", data.ids[:2], targets.of([0, 1]))
    ids, stored = read_stored_targets(tmp_path / "stored.csv", data)
    assert ids == data.ids[:2] and stored.sha256() == targets.of([0, 1]).sha256()
