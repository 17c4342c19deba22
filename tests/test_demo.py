import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import K

import demo
from command import InputError
from eval import record_attack, summarize, summarize_attack


@pytest.fixture
def run_demo(tmp_path, monkeypatch, capfd):
    """Run the demo with other stages in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo, "report", lambda: None)

    def run(*stages):
        monkeypatch.setattr(demo, "stages", lambda: list(stages))
        demo.main()
        return capfd.readouterr().out

    return run


def stage(tmp_path, name, seed=0, train=1):
    source = tmp_path / f"{name}.code"
    if not source.exists():
        source.write_text("first version")
    output = tmp_path / "runs" / name
    return demo.Stage(
        name, output, str(source), f"phantom.py --out {output} --train {train} --test1 0 --test2 0 --seed {seed}"
    )


def test_done_stages_are_skipped_and_changed_ones_done_again(tmp_path, run_demo):
    one, two = stage(tmp_path, "one"), stage(tmp_path, "two")
    images = [tmp_path / "runs" / name / "RawImage" / "TrainingData" / "001.bmp" for name in ("one", "two")]

    def stamps():
        return [image.stat().st_mtime_ns for image in images]

    assert run_demo(one, two).count("done before") == 0
    first = stamps()
    assert run_demo(one, two).count("done before") == 2 and stamps() == first

    (tmp_path / "two.code").write_text("second version")
    assert run_demo(one, two).count("done before") == 1
    second = stamps()
    assert second[0] == first[0] and second[1] > first[1]

    (tmp_path / "one.code").write_text("second version")  # what follows is done again too
    assert run_demo(one, two).count("done before") == 0
    third = stamps()
    assert third[0] > second[0] and third[1] > second[1]

    assert run_demo(one, stage(tmp_path, "two", seed=1)).count("done before") == 1  # another command
    assert stamps()[0] == third[0] and stamps()[1] > third[1]


def test_a_stopped_stage_goes_on(tmp_path, run_demo):
    one = stage(tmp_path, "one", train=2)
    run_demo(one)
    book = tmp_path / "runs" / "demo.json"
    book.write_text(book.read_text().replace("done", "begun"))  # as if it had been stopped before its end
    kept, lost = (tmp_path / "runs" / "one" / "RawImage" / "TrainingData" / f"00{i}.bmp" for i in (1, 2))
    stamp = kept.stat().st_mtime_ns
    os.unlink(lost)
    assert "done before" not in run_demo(one)
    assert lost.exists() and kept.stat().st_mtime_ns == stamp


def test_a_stage_that_fails_ends_the_demo(tmp_path, run_demo):
    with pytest.raises(SystemExit) as stop:
        run_demo(stage(tmp_path, "one", train=1000), stage(tmp_path, "two"))
    assert stop.value.code == 2 and not (tmp_path / "runs" / "two").exists()
    assert "done before" not in run_demo(stage(tmp_path, "one"))


def test_a_damaged_book_is_one_line(tmp_path, run_demo):
    run_demo(stage(tmp_path, "one"))
    (tmp_path / "runs" / "demo.json").write_text("{")
    with pytest.raises(InputError, match="not a readable configuration"):
        run_demo(stage(tmp_path, "one"))


def test_the_real_stages_fit_together():
    draw, coarse, fine, *_ = demo.stages()
    last = int(coarse.command.split("--epochs ")[1].split()[0]) - 1
    assert f"--init {coarse.output}/model_epoch_{last}.pth" in fine.command
    for stage in demo.stages():
        assert all((Path(demo.__file__).parent / source).is_file() for source in stage.sources.split())
        assert f"--data {draw.output} " in stage.command or f"--out {draw.output} " in stage.command


def test_other_peoples_work_is_not_touched(tmp_path, run_demo):
    other = tmp_path / "runs" / "one" / "results.csv"
    other.parent.mkdir(parents=True)
    other.write_text("precious")
    with pytest.raises(InputError, match="not of the demo"):
        run_demo(stage(tmp_path, "one"))
    assert other.read_text() == "precious"


def test_the_report_shows_both_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (demo.FINE / "test").mkdir(parents=True)
    (demo.FINE / "attack" / "pictures").mkdir(parents=True)
    (demo.FINE / "attack" / "pictures" / "151_I-FGSM.png").touch()
    test = summarize(np.full((2, K), 1.25)).rename_axis("landmark")
    test.insert(0, "name", "some landmark")
    test.to_csv(demo.FINE / "test" / "summary.csv")
    truth = np.full((1, K, 2), 500.0)
    targets = np.full((1, K, 2), np.nan)
    targets[0, 0] = 500, 580  # 8 mm away
    tables = [
        record_attack(["151"], truth + (0, 10 * iteration / demo.STEPS), truth, targets, method, iteration, [6.5])
        for method in ("I-FGSM", "ATI-FGSM")
        for iteration in (0, 1, demo.STEPS)
    ]
    summarize_attack(demo.pd.concat(tables)).to_csv(demo.FINE / "attack" / "summary.csv", index=False)
    demo.report()
    lines = capsys.readouterr().out.splitlines()
    assert any("1.25" in line and "100.00" in line for line in lines)
    rows = [line.split() for line in lines if line.strip().startswith(("targeted ", "stationary "))]
    rows = [row for row in rows if row[1] != "landmarks"]  # of the comparison with the paper
    assert len(rows) == 6  # by role: no attack and each method's end
    assert ["targeted", "no", "attack", "0", "1", "8.00", "8.00", "0.00", "6.50"] in rows
    assert ["targeted", "ATI-FGSM", str(demo.STEPS), "1", "7.00", "7.00", "0.00", "6.50"] in rows
    assert lines[-1].endswith("151_I-FGSM.png")
