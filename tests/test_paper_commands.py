"""The commands of the paper's repository, typed as in its README."""

from PIL import Image


def test_the_paper_repositorys_commands(official, tmp_path, monkeypatch, run):
    """As in the README of 2020: data in dataset/, results of an attack in temp/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").symlink_to(official)
    small = ["--size", 64, 48, "--encoder-weights", "none", "--epochs", 1, "--batch-size", 2]
    assert run("train.py", "--tag", "baseline", *small)[0] == 0
    assert run("test.py", "--tag", "baseline", "--iteration", 0)[0] == 0
    attack = ["--attack", 1, "--rand", "temp", "--steps", 2]
    assert run("test.py", "--tag", "baseline", "--iteration", 0, *attack)[0] == 0
    names = {file.name for file in (tmp_path / "temp").iterdir()}
    assert {"predictions.csv", "summary.csv", "mre.png", "median.png", "within_4mm.png"} < names
    for chart in ("mre.png", "within_4mm.png"):
        assert Image.open(tmp_path / "temp" / chart).size[0] > 500
    assert (tmp_path / "runs" / "baseline" / "test_test_0" / "summary.csv").exists()
