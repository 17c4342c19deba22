"""Defences: transformations of the input, scores, adversarial training, and the commands that use them."""

import argparse
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TRAIN, assert_refused, attack_record
from torch import nn

import train
from attack import random_perturbations
from beyond.defences import (
    DEFENCES,
    DRAWS,
    SHAPE,
    bits,
    blur,
    defend,
    jpeg,
    median,
    noise,
    resize,
    shape_distance,
    shape_model,
)
from dataset import to_input
from detectors import voting
from experiments.defence import auc, check, compute_masking, plot
from experiments.results import Result
from model import UNet, confidence, decode, encode, landmark_loss, place
from support.errors import InputError
from support.files import write_table

EXAMPLES = [example for *_, example in DEFENCES.values()]


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(0)
    smooth = nn.functional.interpolate(torch.rand(2, 3, 6, 5) * 2 - 1, (48, 40), mode="bicubic").clamp(-1, 1)
    return ((smooth + 1) * 127.5).round() / 127.5 - 1


# --- transformations -------------------------------------------------------------------------------------------------


def test_jpeg_rounds_more_at_a_lower_quality(image):
    high, low = ((jpeg(image, quality) - image).abs().mean() * 127.5 for quality in (95, 10))
    assert 0.1 < high < 3 and low > 2 * high
    grey = image[:, :1].expand(-1, 3, -1, -1)
    assert (jpeg(grey, 95).diff(dim=1) == 0).all()  # stays grey
    levels = (jpeg(image, 50) + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3)


def test_bits_by_hand():
    grey = torch.tensor([-1, -0.9, -0.1, 0.2, 1]).view(1, 1, 1, 5)
    assert bits(grey, 1).flatten().tolist() == [-1, -1, -1, 1, 1]
    assert torch.allclose(bits(grey, 2).flatten(), torch.tensor([-1, -1, -1 / 3, 1 / 3, 1]))
    levels = torch.arange(256).view(1, 1, 16, 16) / 127.5 - 1
    assert torch.allclose(bits(levels, 8), levels, atol=1e-6)


def test_median_removes_a_single_pixel_and_keeps_an_edge():
    image = torch.zeros(1, 3, 9, 9)
    image[..., 5:] = 1
    spotted = image.clone()
    spotted[..., 4, 2] = 1
    assert torch.equal(median(spotted, 3), image)


def test_smoothing_keeps_the_mean_and_removes_detail(image):
    flat = torch.full_like(image, 0.3)
    for transformation, parameter in ((blur, 1.5), (resize, 0.5)):
        assert torch.allclose(transformation(flat, parameter), flat, atol=1e-6)
        rough = image + 0.2 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
        assert transformation(rough, parameter).diff(dim=-1).std() < 0.5 * rough.diff(dim=-1).std()


def test_noise_has_its_standard_deviation_and_is_drawn_anew():
    grey, generator = torch.zeros(1, 3, 64, 64), torch.Generator().manual_seed(0)
    first, second = noise(grey, 4, generator), noise(grey, 4, generator)
    assert (first * 127.5).std() == pytest.approx(4, rel=0.05) and not torch.equal(first, second)


def test_noise_is_independent_of_the_random_starts_of_the_same_seed(image):
    seen = []
    detector = voting(lambda image: seen.append(image) or image)
    defend(detector, "noise:4", seed=5).network(image)
    _, (_, drawn, _) = random_perturbations(lambda image: image, image, None, 8, 1, seed=5)
    pair = torch.stack([(seen[0] - image).flatten(), (drawn - image).flatten()])
    assert pair.corrcoef()[0, 1].abs() < 0.05  # 0.34 where both come from one stream


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_defence_passes_a_gradient_and_leaves_the_shape(name, image):
    def model(image):
        return image.flatten(2).unflatten(1, (3, 1)).unsqueeze(-1)

    shown = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(defend(voting(model), name).network(shown)[:, 0].sum(), shown)
    # every transformation keeps the sum of a channel, but for rounding, clipping and borders
    assert gradient[:, 0].mean() == pytest.approx(1, abs=0.1) and (gradient[:, 1:] == 0).all()
    with torch.no_grad():
        seen = defend(voting(model), name).network(image)
    assert seen.shape == model(image).shape and 0 < (seen - model(image)).abs().mean() < 0.1


def test_a_random_defence_is_judged_by_one_draw_and_attacked_by_new_ones():
    def model(image):
        sizes.append(len(image))
        return image[:, :, None]

    sizes, grey = [], torch.zeros(2, 3, 32, 32)
    judged, attacked = (defend(voting(model), "noise:8", seed=1, draws=draws).network for draws in (1, DRAWS))
    once, again, first, second = judged(grey), judged(grey[:1]), attacked(grey), attacked(grey)
    assert sizes == [2, 1, 2 * DRAWS, 2 * DRAWS]
    assert torch.equal(once[:1], again) and torch.equal(once[0], once[1]) and not torch.equal(first, second)
    assert first.std().item() == pytest.approx(once.std().item() / DRAWS**0.5, rel=0.1)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_confidence_by_hand():
    """R = 2: 12 voters. Nine of them vote for (10, 12), three for (20, 12)."""
    maps = torch.full((1, 3, 1, 40, 32), -5.0)
    maps[:, 1:] = 0
    voters = [(8 + i % 4, 11 + i // 4) for i in range(12)]
    for n, (x, y) in enumerate(voters):
        goal = (10, 12) if n < 9 else (20, 12)
        maps[0, :, 0, y, x] = torch.tensor([n / 10, (goal[0] - x) / 2, (goal[1] - y) / 2])
    points = decode(maps)
    assert points.tolist() == [[[10, 12]]]
    peak, share = confidence(maps, points).values()
    assert peak.item() == pytest.approx(torch.tensor(1.1).sigmoid().item()) and share.item() == 9 / 12


def test_shape_distance_grows_with_displaced_landmarks_and_knows_spacing():
    mean, modes, std, _ = shape_model()
    common = mean.unflatten(0, (19, 2))
    along = (mean + 2 * std[0] * modes[0]).unflatten(0, (19, 2))
    spacing = torch.full((2,), 0.1, dtype=torch.float64)
    assert torch.allclose(shape_distance(torch.stack([common, along]), spacing), torch.tensor([0, 4.0]).double())
    odd = common.clone()
    odd[3, 0] += 80
    assert shape_distance(odd[None], spacing[:1]).item() > 10
    assert torch.allclose(shape_distance(odd[None] / 2, 2 * spacing[:1]), shape_distance(odd[None], spacing[:1]))


def test_shape_distance_is_that_of_mahalanobis():
    """Shapes drawn from the population have the mean of chi squared, 38, whichever dimensions they differ in."""
    mean, modes, std, _ = shape_model()
    residual_std = json.loads(SHAPE.read_text())["residual_std"]  # in each coordinate
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 38, generator=rng, dtype=torch.float64)
    rest = noise - noise @ modes.T @ modes
    rest *= residual_std / rest.square().mean().sqrt()
    shapes = mean + torch.randn(4000, 10, generator=rng, dtype=torch.float64) * std @ modes + rest
    found = shape_distance(shapes.unflatten(1, (19, 2)), torch.full((4000,), 0.1, dtype=torch.float64))
    assert found.mean().item() == pytest.approx(38, abs=1)


# --- adversarial training --------------------------------------------------------------------------------------------


def attacked(model, image, landmarks, indices, **changes):
    options = {"adversarial": "untargeted", "epsilon": 8.0, "attack_steps": 1} | changes
    rngs = [np.random.default_rng([0, 0, i]) for i in indices]
    detector = voting(model, size=image.shape[-2:])
    return train.attack_images(detector, image, landmarks, rngs, argparse.Namespace(**options))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model = place(UNet(19), "cpu", training=True)
    images = (torch.rand(2, 40, 32) * 255).byte()
    return model, to_input(images, "cpu"), torch.rand(2, 19, 2) * 30


def test_training_attacks_stay_in_the_ball_and_leave_the_network_as_it_was(detector):
    model, image, landmarks = detector
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = attacked(model, image, landmarks, [0, 1], attack_steps=2)
    assert 0 < (found - image).abs().max() <= 8 / 256 + 1e-6 and found.abs().max() <= 1
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())  # statistics too


def test_training_attacks_raise_the_loss_and_depend_on_no_other_image(detector):
    model, image, landmarks = detector
    found = attacked(model, image, landmarks, [0, 1], attack_steps=3)
    start = attacked(lambda_free(model), image, landmarks, [0, 1])
    goal = encode(landmarks, image.shape[-2:])
    model.eval()
    with torch.no_grad():
        clean, worse, by_noise = (landmark_loss(model(x), goal).sum(-1) for x in (image, found, start))
    model.train()
    assert (worse > clean).all() and (worse > by_noise).all()
    both, alone = attacked(model, image, landmarks, [0, 1]), attacked(model, image[1:], landmarks[1:], [1])
    assert torch.isclose(both[1:], alone).float().mean() > 0.99  # but for the sign of gradients near zero
    assert torch.isclose(both, attacked(model, image, landmarks, [2, 3])).float().mean() < 0.5


def lambda_free(model):
    """A network whose gradient is zero: what is left of the attack is its random start."""
    flat = nn.Module()
    flat.forward = lambda image: model(image).detach() + 0 * image.sum()
    return flat


@pytest.mark.slow
def test_adversarial_training_resumes_exactly(official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    options = ["--data", official, "--adversarial", "--checkpoint-every", 1]
    whole, parts = ([*TRAIN[:2], tag, *TRAIN[3:], *options] for tag in ("whole", "parts"))
    assert run(*whole, "--epochs", 2)[0] == 0
    assert run(*parts, "--epochs", 1)[0] == 0 and run(*parts, "--epochs", 2, "--resume")[0] == 0
    clean = [*TRAIN[:2], "clean", *TRAIN[3:], "--data", official, "--epochs", 2]
    assert run(*clean)[0] == 0
    weights = [
        torch.load(tmp_path / "runs" / tag / "model_epoch_1.pth", weights_only=True)["head.weight"]
        for tag in ("whole", "parts", "clean")
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--epsilon", 4], "--epsilon: needs --adversarial"),
        (["--attack-steps", 2], "--attack-steps: needs --adversarial"),
        (["--adversarial", "--epsilon", "8/255"], "4/255 of an image in [0, 1] is --epsilon 8"),
        (["--adversarial", "backwards"], "unrecognized arguments: backwards"),
    ],
)
def test_wrong_arguments_of_training(words, message, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*TRAIN, "--data", official, *words), message, tmp_path / "runs")


# --- test.py ---------------------------------------------------------------------------------------------------------

ATTACK = ["test.py", "--tag", "small", "--split", "test1", "--steps", 2, "--pictures", 0]


def test_defences_as_conditions_of_an_attack(trained, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(trained)
    command = [*ATTACK, "--data", official, "--attack", 1, "noise", "--targets", "shift", "--rand", tmp_path / "out"]
    status, out, err = run(*command, "--defence", "blur:1", "noise:8", "--save-adversarial")
    assert status == 0, err
    table = pd.read_csv(tmp_path / "out" / "defences.csv", dtype={"image": str})
    found = table.groupby(["method", "defence", "attacker"])["iteration"].agg(lambda column: sorted(set(column)))
    assert found.to_dict() == {
        ("ATI-FGSM", "none", "adaptive"): [0, 2],
        ("noise", "none", "adaptive"): [0, 1],
        **{("ATI-FGSM", d, a): [0, 2] for d in ("blur:1", "noise:8") for a in ("oblivious", "adaptive")},
        **{("noise", d, "oblivious"): [0, 1] for d in ("blur:1", "noise:8")},
    }
    plain = pd.read_csv(tmp_path / "out" / "predictions.csv", dtype={"image": str})
    assert "defence" not in plain and {"heatmap_peak", "vote_share"} <= set(plain)
    assert plain["vote_share"].between(0, 1).all() and plain["heatmap_peak"].between(0, 1).all()
    summary = pd.read_csv(tmp_path / "out" / "defences_summary.csv")
    assert len(summary) == 3 * 2 * (2 + 4 + 2) and "blur:1" in out
    stored = pd.read_csv(tmp_path / "out" / "read_back_summary.csv")
    assert {"small", "small, blur:1", "small, noise:8"} == set(stored["detector"])

    records = {path: path.read_bytes() for path in (tmp_path / "out" / "records").iterdir()}
    lost = tmp_path / "out" / "records" / "noise_8_ATI-FGSM_152.csv"
    lost.unlink()
    assert run(*command, "--defence", "blur:1", "noise:8", "--save-adversarial")[0] == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "records").iterdir()} == records

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "records").glob("noise_8_*")}
    assert run(*command, "--defence", "noise:8", "bits:4")[0] == 0  # an added one does not repeat the others
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert set(pd.read_csv(tmp_path / "out" / "defences.csv")["defence"]) == {"none", "noise:8", "bits:4"}


def test_accuracy_behind_defences(trained, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(trained)
    command = ["test.py", "--tag", "small", "--split", "test1", "--data", official, "--pictures", 0]
    assert run(*command, "--defence", "bits:1", "jpeg:95", "--rand", tmp_path / "out")[0] == 0
    table = pd.read_csv(tmp_path / "out" / "defences_summary.csv", index_col="defence")
    tested = pd.read_csv(tmp_path / "out" / "summary.csv", index_col="landmark").loc["all"]
    assert table.index.tolist() == ["none", "bits:1", "jpeg:95"]
    assert table.loc["none", "mre_mm"] == pytest.approx(tested["mre_mm"], abs=1e-3)
    assert table.loc["bits:1", "mre_mm"] != table.loc["none", "mre_mm"]
    monkeypatch.setattr("beyond.defences.errors_behind", None)  # measured once
    assert run(*command, "--defence", "bits:1", "jpeg:95", "--rand", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("sharpen:1", "is not a defence NAME:NUMBER"),
        ("jpeg", "jpeg takes a quality from 1 to 100, as in jpeg:75"),
        ("jpeg:0", "jpeg takes a quality"),
        ("jpeg:75.5", "jpeg takes a quality"),
        ("median:4", "median takes 3, 5, 7 or 9 px"),
        ("blur:nan", "blur takes a standard deviation"),
        ("resize:1", "resize takes a factor below 1"),
    ],
)
def test_wrong_defences(text, message, trained, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(trained)
    result = run(*ATTACK, "--data", official, "--defence", text, "--rand", tmp_path / "out")
    assert_refused(result, message, tmp_path / "out")


# --- the experiment --------------------------------------------------------------------------------------------------


def test_area_under_the_curve_by_hand():
    assert auc(np.array([[0, 1], [1, 2]])) == 3.5 / 4  # clean 0 and 1, attacked 1 and 2: one tie
    assert auc(np.array([[0, 5], [1, 6]])) == 1 and auc(np.array([[5, 0], [6, 1]])) == 0
    assert np.isnan(auc(np.array([[np.nan, np.nan]])))


def test_checks_for_masked_gradients_by_hand():
    rows = [
        ("plain", 8, 30, "Vote-PGD", 60),
        ("robust", 8, 30, "Vote-PGD", 10),
        ("robust", 8, 100, "Vote-PGD", 15),
        ("robust", 16, 30, "Vote-PGD", 8),  # a larger epsilon that succeeds less
        ("robust", 8, 30, "random-search", 1),
        ("robust", 8, 30, "noise", 0),  # the best of many noises may succeed more
        ("robust", 8, 30, "untargeted-FGSM", np.nan),
    ]
    attacks = pd.DataFrame(rows, columns=["detector", "epsilon", "steps", "method", "within_4mm_%"])
    attacks = attacks.assign(defence="none", attacker="adaptive")
    blur = attacks[:1].assign(defence="blur:1")
    attacks = pd.concat(
        [attacks, blur.assign(attacker="oblivious", **{"within_4mm_%": 50}), blur.assign(**{"within_4mm_%": 30})]
    )
    transfer = pd.DataFrame([{"from": "plain", "to": "robust", "epsilon": 8, "method": "Vote-PGD", "within_4mm_%": 4}])
    for table in (attacks, transfer):
        table["within_4mm_%_low"], table["within_4mm_%_high"] = table["within_4mm_%"] - 5, table["within_4mm_%"] + 5
    table = pd.DataFrame(compute_masking(attacks, transfer)).set_index("check")
    assert table["holds"].to_dict() == {
        "steps 30 against 100, epsilon 8": "yes",
        "epsilon 8 against 16, steps 30": "within intervals",
        "random search of 30 against 30 steps, epsilon 8": "yes",
        "transfer from plain against white box, epsilon 8": "yes",
        "oblivious against adaptive, blur:1, epsilon 8": "no",
    }
    assert table["first_%"].tolist() == [10, 10, 1, 4, 50] and table["second_%"].tolist() == [15, 8, 10, 10, 30]


def test_the_chart_of_methods_behind_different_defences(monkeypatch):
    rows = [("I-FGSM", "jpeg:75"), ("ATI-FGSM", "blur:1"), ("ATI-FGSM", "bits:4")]
    table = pd.DataFrame(rows, columns=["method", "defence"]).assign(detector="plain", epsilon=8, steps=30)
    table = table.assign(attacker="adaptive", **dict.fromkeys(["within_4mm_%", "within_4mm_%_low"], 5.0))
    figures = []
    monkeypatch.setattr("experiments.defence.save", lambda figure, path: figures.append(figure))
    plot(table.assign(**{"within_4mm_%_high": 6.0}), "nowhere")
    assert [axes.get_title() for axes in figures[0].axes] == ["ATI-FGSM"]  # with most of them


def test_only_comparable_runs_are_tabled_together(tmp_path):
    truth = np.full((1, 19, 2), 50.0)

    def made(name, image="1", **changes):
        config = {"tag": "plain", "epsilon": 8.0, "steps": 30, "attack": ["Vote-PGD"], "measure": None}
        folder = tmp_path / name
        folder.mkdir()
        config |= {"targets_sha256": "a"} | changes
        (folder / "config.json").write_text(json.dumps(config))
        records = [attack_record([image], truth, truth, truth, method, 1) for method in config["attack"]]
        write_table(folder / "predictions.csv", pd.concat(records))
        return Result({}, folder)

    first, ati, larger = made("first"), made("ati", attack=["ATI-FGSM", "I-FGSM"]), made("larger", epsilon=16.0)
    check([first, ati, larger])
    with pytest.raises(InputError, match=r"both: the same kind of run as .*first"):
        check([first, made("both", attack=["ATI-FGSM", "Vote-PGD"])])
    with pytest.raises(InputError, match=r"far: other images or targets than in .*first"):
        check([first, made("far", epsilon=4.0, targets_sha256="b")])
    with pytest.raises(InputError, match=r"other: other images or targets than in .*first"):
        check([first, made("other", image="2", epsilon=4.0)])
    with pytest.raises(InputError, match="retrained: another checkpoint or decoding of plain than in the others"):
        check([first, made("retrained", epsilon=4.0, checkpoint_sha256="b")])
