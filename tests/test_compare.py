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
    status, _, err = run(
        "scripts/tables.py", "attack", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "tables"
    )
    assert status == 0, err
    differences = pd.read_csv(tmp_path / "tables" / "attack_one_differences.csv")
    assert differences["methods"].tolist() == ["Vote-PGD minus ATI-FGSM"] * 3
    assert differences["within_4mm_points"].tolist() == pytest.approx([100, -100 / 18, 0], abs=1e-3)
    assert differences["mre_mm"].tolist() == pytest.approx([-8, 5 / 18, -5], abs=1e-3)  # the worst: from 10 to 5 mm
    text = (tmp_path / "tables" / "attack.md").read_text()
    assert "| targeted | 20 | +100.0 [+100.0, +100.0] (higher) | -8.0" in text
    assert "| stationary | 20 | -5.6 [-5.6, -5.6] (lower)" in text and "![MRE (mm)](attack_one_mre_mm.png)" in text


def test_other_targets_are_refused(tmp_path, run):
    truth, targets = np.full((1, K, 2), 1000.0), np.full((1, K, 2), np.nan)
    for name, landmark in (("one", 0), ("two", 5)):
        aims = targets.copy()
        aims[:, landmark] = 1100, 1000
        (tmp_path / name).mkdir()
        table = attack_record(["151"], truth, truth, aims, "I-FGSM", 9)
        pd.concat([table.assign(iteration=0), table]).to_csv(tmp_path / name / "predictions.csv", index=False)
    result = run("scripts/tables.py", "attack", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "tables")
    assert_refused(result, f"two: other targets than in {tmp_path}/one", tmp_path / "tables")


def test_other_images_are_refused(tmp_path, run):
    truth = np.full((1, K, 2), 1000.0)
    for name, image in (("one", "151"), ("two", "152")):
        (tmp_path / name).mkdir()
        table = attack_record([image], truth, truth, truth, "I-FGSM", 9)
        pd.concat([table.assign(iteration=0), table]).to_csv(tmp_path / name / "predictions.csv", index=False)
    result = run("scripts/tables.py", "attack", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "tables")
    assert_refused(result, f"two: other images than in {tmp_path}/one", tmp_path / "tables")


def test_an_untargeted_run_alone_and_beside_a_targeted_one(tmp_path, run):
    truth = np.full((2, K, 2), 1000.0)
    targets = np.where(np.arange(K)[:, None] == 0, truth + (100, 0), np.nan)
    for name, method, aims in (("one", "untargeted-FGSM", None), ("two", "FGSM", targets)):
        tables = [attack_record(["151", "152"], truth + (5 * i, 0), truth, aims, method, i) for i in (0, 1)]
        (tmp_path / name).mkdir()
        pd.concat(tables).to_csv(tmp_path / name / "predictions.csv", index=False)
    for folders in ((tmp_path / "one",), (tmp_path / "one", tmp_path / "two")):
        status, _, err = run("scripts/tables.py", "attack", *folders, "--out", tmp_path / f"tables_{len(folders)}")
        assert status == 0, err
    assert "Differences" not in (tmp_path / "tables_1" / "attack.md").read_text()


def test_methods_of_several_runs_are_named_with_them(tmp_path, run):
    truth = np.full((2, K, 2), 1000.0)
    targets = np.where(np.arange(K)[:, None] == 0, truth + (100, 0), np.nan)
    for name, way in (("one", 0), ("two", 80)):
        points = truth + (way, 0) * (np.arange(K)[:, None] == 0)
        tables = [
            attack_record(["151", "152"], found, truth, targets, "I-FGSM", i) for i, found in ((0, truth), (9, points))
        ]
        (tmp_path / name).mkdir()
        pd.concat(tables).to_csv(tmp_path / name / "predictions.csv", index=False)
    assert run("scripts/tables.py", "attack", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "tables")[0] == 0
    table = pd.read_csv(tmp_path / "tables" / "attack_one.csv").query("iteration == 9 and role == 'targeted'")
    assert dict(zip(table["method"], table["mre_mm"], strict=True)) == {"one I-FGSM": 10, "two I-FGSM": 2}


@pytest.mark.parametrize(
    "words, message",
    [
        (["attack", "nothing", "--out", "out"], "nothing/predictions.csv: no such file; finish the run of test.py"),
        (["diagnosis", "nothing", "--out", "out"], "nothing/config.json: not a readable configuration"),
        (["robustness", "nothing", "--out", "out"], "nothing/predictions.csv: no such file"),
        (["attack", "nothing"], "the following arguments are required: --out"),
    ],
)
def test_what_is_refused(words, message, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    assert_refused(run("scripts/tables.py", *words), message, tmp_path / "out")


def test_run_by_its_path_from_anywhere(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "tables.py", "attack", "nothing", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("tables.py: error: nothing/predictions.csv"), done.stderr
