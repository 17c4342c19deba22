"""Tables of finished attacks, and the ablation of Vote-PGD."""

import numpy as np
import pandas as pd
import pytest
from conftest import K

import attack
from eval import record_attack
from experiments import ablation, compare
from support.errors import InputError


def test_runs_are_compared_with_the_first(tmp_path, capsys):
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
    compare.main([str(tmp_path / "one"), str(tmp_path / "two")])
    printed = capsys.readouterr().out
    assert "| one | ATI-FGSM | 20 |" in printed and "| two | Vote-PGD | 20 |" in printed
    assert "two Vote-PGD minus one ATI-FGSM | targeted | 20 | +100.0 [+100.0, +100.0] (higher) | -8.0" in printed
    assert "two Vote-PGD minus one ATI-FGSM | stationary | 20 | -5.6 [-5.6, -5.6] (lower)" in printed


def test_other_targets_are_refused(tmp_path):
    truth, targets = np.full((1, K, 2), 1000.0), np.full((1, K, 2), np.nan)
    for name, landmark in (("one", 0), ("two", 5)):
        aims = targets.copy()
        aims[:, landmark] = 1100, 1000
        (tmp_path / name).mkdir()
        table = attack_record(["151"], truth, truth, aims, "I-FGSM", 9)
        pd.concat([table.assign(iteration=0), table]).to_csv(tmp_path / name / "predictions.csv", index=False)
    with pytest.raises(InputError, match="two: other targets than in one"):
        compare.main([str(tmp_path / "one"), str(tmp_path / "two")])


@pytest.mark.slow
def test_every_variant_runs_and_leaves_the_attack_as_it_was(trained, official, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = dict(vars(attack)), dict(attack.ATTACKS)
    options = ["--tag", "small", "--data", str(official), "--limit", "1", "--steps", "3", "--epsilon", "128"]
    options += ["--targets", "shift", "--shift-count", "19"]  # nothing to keep in place: the last iterate is as good
    ablation.main(["--out", "ablation", "--", *options])
    assert (dict(vars(attack)), attack.ATTACKS) == before
    printed = capsys.readouterr().out
    found = {name: pd.read_csv(f"ablation/{name}/predictions.csv") for name in ablation.VARIANTS}
    for name in ("constant_step", "paper_loss"):
        assert not found[name].equals(found["Vote-PGD"])
    assert "paper_loss Vote-PGD minus Vote-PGD Vote-PGD" in printed

    options += ["--restarts", "2"]
    ablation.main(["--out", "restarted", "--only", "paper_loss", "Vote-PGD", "--", *options])
    assert "paper_loss Vote-PGD minus Vote-PGD Vote-PGD" in capsys.readouterr().out  # not in the order of --only
    ends = [pd.read_csv(f"restarted/{name}/predictions.csv")["iteration"].max() for name in ("paper_loss", "Vote-PGD")]
    assert ends == [6, 6]


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing/predictions\.csv: no such file; finish the run of test.py"):
        compare.main([str(tmp_path / "nothing")])
