import json

import pandas as pd
import pytest
import torch
from plain import plain_attack
from torch import nn

import attack
from attack import ATTACKS, last


@pytest.mark.slow
def test_benchmark_writes_its_table(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    arguments = ["--size", 32, 32, "--batch-size", 1, 2, "--precision", "fp32", "--repeats", 1]
    status, out, err = run("benchmark.py", *arguments, "--device", "cpu")
    assert status == 0, err
    table = pd.read_csv(tmp_path / "runs" / "benchmark" / "table.csv")
    assert (table["ms"] > 0).all() and table["images/s"].gt(0).all()
    assert table["precision, batch"].unique().tolist() == ["fp32, 1", "fp32, 2"]
    assert not table.duplicated(["precision, batch", "part"]).any()
    limits = table[table["part"].str.startswith("bare")]
    assert len(limits) == 2 * 3 and limits["ratio"].isna().all() and limits["% of matrix peak"].gt(0).all()
    assert table.drop(limits.index)["ratio"].gt(0).all()
    flops = (limits["TFLOP/s"] * limits["ms"]).groupby(limits["part"]).max()
    assert flops["bare forward, backward to the image"] == pytest.approx(2 * flops["bare forward"], rel=0.02)
    step = table[table["part"] == "ATI-FGSM, a step"].iloc[0]
    assert step["the paper's, extrapolated (h)"] == pytest.approx(250 * 300 / step["images/s"] / 3600, rel=1e-2)
    config = json.loads((tmp_path / "runs" / "benchmark" / "config.json").read_text())
    assert config["threads"] == torch.get_num_threads() and config["precision"] == ["fp32"]
    assert "ATI-FGSM, a step" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", 31, 64], "argument --size: 31 is not a whole number from 32 to 16384"),
        (["--only", "loading"], "argument --only: invalid choice: 'loading'"),
    ],
)
def test_benchmark_refuses(arguments, message, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("benchmark.py", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [1, 6])
def test_the_plain_implementation_is_the_same_attack(steps):
    """In float64, where rounding changes no sign of a gradient."""
    torch.manual_seed(0)
    k, size = 4, (48, 40)
    layers = nn.Conv2d(3, 16, 7, padding=3), nn.ReLU(), nn.Conv2d(16, 3 * k, 7, padding=3), nn.Unflatten(1, (3, k))
    model = nn.Sequential(*layers).double()
    image = torch.rand(1, 3, *size, dtype=torch.float64) * 2 - 1
    nan = float("nan")
    targets = torch.tensor([[[5.0, 30.5], [nan, nan], [35.25, 2], [nan, nan]]], dtype=torch.float64)
    plain = plain_attack(model, image, targets, steps, epsilon=8)
    with torch.no_grad():
        clean = model(image)
    assert (clean[:, 0, [1, 3]] > 0).any()  # the stationary landmarks' masks are not empty
    targeted = ~targets.isnan().any(-1)
    _, _, maps = last(attack.run(ATTACKS["ATI-FGSM"], model, image, targets, targeted, epsilon=8, steps=steps))
    assert not torch.allclose(plain, clean) and torch.allclose(plain, maps)
