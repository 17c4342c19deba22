"""Tables of finished runs."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, K, assert_refused, attack_record


def test_runs_are_compared_with_the_first(tmp_path, run):
    """Two runs on 20 images: landmark 1 is targeted 10 mm away; the second run reaches it, and loses landmark 2."""
    truth = np.full((20, K, 2), 1000.0)
    targets = np.full((20, K, 2), np.nan)
    targets[:, 0] = 1100, 1000
    ids = [str(151 + i) for i in range(20)]
    for name, method, reached in (("one", "ATI-FGSM", 0), ("two", "Vote-PGD", 1)):
        points = truth.copy()
        points[:, 0, 0] += 80 * reached
        points[:, 1, 1] += 50 * reached
        tables = [
            attack_record(ids, found, truth, targets, method, iteration)
            for iteration, found in ((0, truth), (9, points))
        ]
        (tmp_path / name).mkdir()
        pd.concat(tables).to_csv(tmp_path / name / "predictions.csv", index=False)
    status, printed, err = run("scripts/tables.py", "attack", tmp_path / "one", tmp_path / "two")
    assert status == 0, err
    assert "| one | ATI-FGSM | 20 |" in printed and "| two | Vote-PGD | 20 |" in printed
    assert "two Vote-PGD minus one ATI-FGSM | targeted | 20 | +100.0 [+100.0, +100.0] (higher) | -8.0" in printed
    assert "two Vote-PGD minus one ATI-FGSM | stationary | 20 | -5.6 [-5.6, -5.6] (lower)" in printed


def test_other_targets_are_refused(tmp_path, run):
    truth, targets = np.full((1, K, 2), 1000.0), np.full((1, K, 2), np.nan)
    for name, landmark in (("one", 0), ("two", 5)):
        aims = targets.copy()
        aims[:, landmark] = 1100, 1000
        (tmp_path / name).mkdir()
        table = attack_record(["151"], truth, truth, aims, "I-FGSM", 9)
        pd.concat([table.assign(iteration=0), table]).to_csv(tmp_path / name / "predictions.csv", index=False)
    result = run("scripts/tables.py", "attack", tmp_path / "one", tmp_path / "two")
    assert_refused(result, "two: other targets than in one")


@pytest.mark.parametrize(
    "words, message",
    [
        (["attack", "nothing"], "nothing/predictions.csv: no such file; finish the run of test.py"),
        (["diagnosis", "nothing", "--out", "out"], "nothing/config.json: not a readable configuration"),
        (["robustness", "nothing", "--out", "out"], "nothing/predictions.csv: no such file"),
        (["defence", "nothing"], "--out: needed, but for attack"),
        (["attack", "nothing", "--out", "out"], "--out: needed, but for attack"),
    ],
)
def test_what_is_refused(words, message, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    assert_refused(run("scripts/tables.py", *words), message, tmp_path / "out")


def test_run_by_its_path_from_anywhere(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "tables.py", "attack", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("tables.py: error: nothing/predictions.csv"), done.stderr
