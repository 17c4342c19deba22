"""What may happen to a long run: signals, a full disk, lost data, damaged files. See also tests/faults.py."""

import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SIZE0, TRAIN, Code, K, assert_refused, attack_record, damage, write_kaggle, write_points
from PIL import Image

import detectors
import eval
import train
from attack import ATTACKS
from beyond.stored import read_in_memory
from detectors import load_detector
from eval import content_of, read_records
from model import UNet
from readers.images import read_image
from readers.layouts import Entry
from readers.points import read_doctors, read_kaggle, read_targets
from readers.spacing import read_spacing
from support import command, figures, files
from support.errors import InputError, Stopped
from support.files import write_table

pytestmark = pytest.mark.slow

EPOCHS = ["--epochs", 3, "--checkpoint-every", 2]


def assert_same_training(run, unbroken):
    expected, found = (torch.load(r / "model_epoch_2.pth", weights_only=True) for r in (unbroken, run))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logs = [pd.read_csv(r / "train_log.csv").drop(columns="seconds") for r in (unbroken, run)]
    pd.testing.assert_frame_equal(*logs)
    names = [sorted(file.name for file in r.glob("*.*")) for r in (unbroken, run)]
    assert names[0] == names[1]


# --- stops


@contextmanager
def sigterm_at_step(step, monkeypatch):
    """SIGTERM in the middle of the step of this number, from 1."""
    steps = []

    def encode(points, size):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(points, size)

    original = detectors.encode
    with monkeypatch.context() as context:
        context.setattr(detectors, "encode", encode)
        yield


@pytest.mark.parametrize("step", [2, 3])  # of two an epoch: at the end of one, in the middle of one
def test_sigterm_saves_the_step_and_resuming_ends_the_same(step, trained, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    epoch, steps = (step - 1) // 2, (step - 1) % 2 + 1
    with sigterm_at_step(step, monkeypatch):
        status, _, err = run(*TRAIN, "--data", official, *EPOCHS)
    assert status == 143
    assert (
        err.splitlines()[-1] == f"train.py: stopped by SIGTERM in epoch {epoch}, step {steps}; continue with --resume"
    )
    folder = tmp_path / "runs" / "small"
    state = torch.load(folder / "resume.pth", weights_only=True)
    assert (state["epoch"], state["step"]) == (epoch, steps)
    status, _, err = run(*TRAIN, "--data", official, *EPOCHS, "--resume")
    assert status == 0, err
    assert_same_training(folder, trained / "runs" / "small")


def test_sigterm_ends_an_attack_in_a_line(trained, official, monkeypatch, run):
    def terminate(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(trained)
    with monkeypatch.context() as context:
        context.setattr(figures, "draw", terminate)
        arguments = [
            "test.py",
            "--tag",
            "small",
            "--data",
            official,
            "--attack",
            0,
            "--steps",
            2,
            "--rand",
            "terminated",
        ]
        status, _, err = run(*arguments)
    assert status == 143 and err.splitlines()[-1] == "test.py: stopped by SIGTERM; finished work is kept"
    assert run(*arguments)[0] == 0
    assert not list(trained.rglob("*.part*"))


def test_a_stopped_test_goes_on_and_ends_the_same(trained, official, monkeypatch, run):
    monkeypatch.chdir(trained)
    arguments = ["test.py", "--tag", "small", "--data", official, "--batch-size", 2, "--rand", "tested"]
    assert run(*arguments)[0] == 0
    out = trained / "tested"
    before = {file: file.read_bytes() for file in out.rglob("*.*")}
    kept, lost = out / "records" / "151.csv", out / "records" / "152.csv"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    (out / "pictures" / "301.png").unlink()
    (out / "summary.csv").unlink()
    assert run(*arguments)[0] == 0
    assert {file: file.read_bytes() for file in out.rglob("*.*")} == before
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("step", [2, 4])  # of two an epoch: in the middle of one, and of one after a checkpoint
def test_a_kill_loses_what_came_after_the_last_minute(step, trained, official, tmp_path, monkeypatch):
    """As if a minute passed with every step: the state of the step before the kill is there."""

    class Killed(BaseException):
        pass

    def killed(*arguments):
        steps.append(1)
        if len(steps) == step:
            raise Killed
        return original(*arguments)

    steps, original = [], train.train_step
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    arguments = [str(word) for word in (*TRAIN[1:], "--data", official, *EPOCHS)]
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(train, "train_step", killed)
        train.main(arguments)
    state = torch.load("runs/small/resume.pth", weights_only=True)
    assert (state["epoch"], state["step"]) == divmod(step - 1, 2)
    train.main([*arguments, "--resume"])
    assert_same_training(tmp_path / "runs" / "small", trained / "runs" / "small")


def test_between_checkpoints_nothing_is_written_within_a_minute(official, tmp_path, monkeypatch):
    saved = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "save", lambda state, *_: saved.append((state.epoch, state.step)))
    train.main([str(word) for word in (*TRAIN[1:], "--data", official, "--epochs", 5, "--checkpoint-every", 2)])
    assert saved == [(2, 0), (4, 0), (5, 0)]  # at the checkpoints


@pytest.mark.parametrize("moment", ["monitoring", "saving"])
def test_sigterm_after_the_last_step_is_not_lost(moment, trained, official, tmp_path, monkeypatch):
    """All is written, but what called train.main does not go on."""

    def terminate(first, *arguments, **options):
        if getattr(first, "rows", True):  # the log has a row
            os.kill(os.getpid(), signal.SIGTERM)
        return original(first, *arguments, **options)

    monkeypatch.chdir(tmp_path)
    name = {"monitoring": "errors_on", "saving": "save_results"}[moment]
    original = getattr(train, name)
    monkeypatch.setattr(train, name, terminate)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        train.main([str(word) for word in (*TRAIN[1:], "--data", official, "--epochs", 1)])
    assert (tmp_path / "runs" / "small" / "model_epoch_0.pth").exists()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_counts_as_sigterm_but_after_nohup(ignored, monkeypatch, capfd):
    def main():
        with command.late_stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.is_set() != ignored

    monkeypatch.setattr(sys, "argv", ["train.py"])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        if ignored:
            command.run(main)
        else:
            with pytest.raises(SystemExit, match=str(command.STOPPED)):
                command.run(main)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capfd.readouterr().err == ("" if ignored else "train.py: stopped by SIGTERM; finished work is kept\n")


def test_a_kill_between_the_state_and_its_checkpoint(trained, tmp_path, official, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    unbroken, folder = trained / "runs" / "small", tmp_path / "runs" / "renamed"  # of another name, too
    shutil.copytree(unbroken, folder)
    for name in ("model_epoch_2.pth", "train_log.png"):
        (folder / name).unlink()
    for name in (".config.part.json", ".0123456789ab.part.pth"):  # of older versions, and of this one
        (folder / name).touch()
    arguments = [*TRAIN[:2], "renamed", *TRAIN[3:], "--data", official, *EPOCHS, "--resume"]
    assert run(*arguments)[0] == 0
    assert_same_training(folder, unbroken)
    assert (folder / "train_log.png").exists()
    assert run("test.py", "--tag", "renamed", "--data", official, "--rand", "tested", "--limit", 1)[0] == 0
    folder.rename(folder.with_name("again"))
    assert run("test.py", "--tag", "again", "--data", official, "--rand", "tested", "--limit", 1)[0] == 0


@pytest.mark.parametrize("change", [["--seed", 7], ["--lr", 1e-5], ["--epochs", 2]])
def test_a_state_is_resumed_by_its_own_configuration(change, trained, tmp_path, official, monkeypatch, run):
    """resume.pth holds it; what is in config.json may be another run's."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(trained / "runs" / "small", tmp_path / "runs" / "small")
    arguments = [*TRAIN, "--data", official, *EPOCHS, "--resume", *change]
    config = files.read_config(folder / "config.json")
    name, value = change[0].strip("-"), change[1]
    files.write_json(folder / "config.json", config | {name: value})
    assert_refused(run(*arguments), f"{name} was" if name != "epochs" else "was begun with --epochs 3")
    (folder / "config.json").unlink()
    assert_refused(run(*arguments), "runs/small: holds files, but no config.json of train.py", folder / "config.json")


# --- folders


def hold(folder, held):
    with files.own_folder(folder, "a.py", "--out", "config.json"):
        held.set()
        time.sleep(600)


@contextmanager
def held_by_another(folder):
    """A process that uses the folder; its id. It is killed at the end."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(folder, held))
    process.start()
    assert held.wait(30)
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("program", ["train.py", "test.py", "benchmark.py", "phantom.py"])
def test_two_processes_in_one_folder(program, trained, official, tmp_path, monkeypatch, run):
    """The second is refused, and says since when; what a killed one leaves is no obstacle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(trained / "runs")
    folder, arguments = {
        "train.py": (trained / "runs" / "held", [*TRAIN[1:2], "held", *TRAIN[3:], "--data", official]),
        "test.py": (tmp_path / "held", ["--tag", "small", "--data", official, "--rand", "held"]),
        "benchmark.py": (tmp_path / "held", ["--out", "held"]),
        "phantom.py": (tmp_path / "held", ["--out", "held"]),
    }[program]
    with held_by_another(folder) as pid:
        result = run(program, *arguments)
        assert_refused(result, f"held: in use by process {pid} on ")
        assert f" since {time.strftime('%Y-%m-')}" in result[2]
        with files.own_folder(folder.with_name("beside"), "a.py", "--out", "config.json"):
            pass
    assert [file.name for file in folder.iterdir()] == [files.LOCK]
    with files.own_folder(folder, "a.py", "--out", "config.json"):
        assert files.results(folder) == []
    assert not list(folder.iterdir()) and not folder.with_name("beside").exists()  # nothing was written


def test_a_folder_of_another_command(trained, official, tmp_path, monkeypatch, run):
    """Whatever would be written into the folder of a training, it stays as it is."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(trained / "runs" / "small", tmp_path / "results" / "small")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    (tmp_path / "runs").symlink_to(tmp_path / "results")
    for program, *arguments in (
        ("benchmark.py", "--out", folder),
        ("test.py", "--tag", "small", "--data", official, "--rand", folder),
        ("phantom.py", "--out", folder),
        ("reproduce.py", "--scale", "quick", "--data", official, "--name", "small", "--only", "detection"),
    ):
        assert_refused(run(program, *arguments), "small: holds files, but no ")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_temporary_files_and_links(tmp_path):
    """Nothing is written through a link; what a kill left is removed, but where another command works."""
    precious, folder = tmp_path / "precious", tmp_path / "out"
    precious.write_text("precious")
    (folder / "busy").mkdir(parents=True)
    (folder / "records").mkdir()
    for name in (".predictions.part.csv", "predictions.csv"):
        (folder / name).symlink_to(precious)
    (folder / "config.json").write_text('{"rand": null}')
    (folder / "records" / ".0123456789ab.part.csv").touch()
    with files.own_folder(folder / "busy", "test.py", "--rand", "config.json", "rand"):
        (folder / "busy" / ".0123456789ab.part.csv").touch()
        with files.own_folder(folder, "test.py", "--rand", "config.json", "rand"):
            files.write_text(folder / "predictions.csv", "new")
    assert precious.read_text() == "precious" and (folder / "predictions.csv").read_text() == "new"
    left = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
    assert left == ["busy/.0123456789ab.part.csv", "config.json", "predictions.csv"]


def test_a_linked_folder_of_records(trained, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(trained / "runs")
    arguments = ["test.py", "--tag", "small", "--data", official, "--rand", "out", "--pictures", 0]
    assert run(*arguments)[0] == 0
    (tmp_path / "out" / "records").rename(tmp_path / "scratch")
    (tmp_path / "out" / "records").symlink_to(tmp_path / "scratch")
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "scratch").iterdir()}
    assert run(*arguments)[0] == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "scratch").iterdir()} == stamps and len(stamps) == 4


# --- the disk, the data, the numbers


@contextmanager
def files_up_to(size):
    """No file may become longer: for the one who writes, like a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_state_to_go_on_from(trained, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "small"
    with files_up_to(200 << 20):  # enough for a checkpoint, not for resume.pth, which comes first
        status, _, err = run(*TRAIN, "--data", official, *EPOCHS)
    assert status == 2 and err.splitlines()[-1].startswith(
        "train.py: error: runs/small/resume.pth: cannot be written ([Errno 27] File too"
    )
    assert "Traceback" not in err
    assert sorted(file.name for file in folder.iterdir()) == ["config.json"]
    with sigterm_at_step(2, monkeypatch):
        assert run(*TRAIN, "--data", official, *EPOCHS, "--resume")[0] == 143
    saved = (folder / "resume.pth").read_bytes()
    with files_up_to(50 << 20):
        assert run(*TRAIN, "--data", official, *EPOCHS, "--resume")[0] == 2
    assert (folder / "resume.pth").read_bytes() == saved and not list(folder.glob(".*"))
    assert run(*TRAIN, "--data", official, *EPOCHS, "--resume")[0] == 0
    assert_same_training(folder, trained / "runs" / "small")


def test_a_full_disk_in_an_attack(trained, official, monkeypatch, run):
    monkeypatch.chdir(trained)
    arguments = ["test.py", "--tag", "small", "--data", official, "--attack", 0, "--steps", 2, "--rand", "full"]
    with files_up_to(2000):
        status, _, err = run(*arguments)
    assert status == 2 and "full/" in err.splitlines()[-1] and "cannot be written" in err and "Traceback" not in err
    assert not list(trained.rglob("*.part*"))
    assert run(*arguments)[0] == 0


def test_originals_lost_during_an_attack(data, trained, monkeypatch, run):
    def attack_batch(*arguments, **options):
        shutil.rmtree(data / "RawImage", ignore_errors=True)  # after loading
        return original(*arguments, **options)

    original = eval.attack_batch
    monkeypatch.chdir(trained)
    monkeypatch.setattr(eval, "attack_batch", attack_batch)
    arguments = ["--attack", 0, "--steps", 2, "--rand", "lost", "--split", "test1", "--save-adversarial"]
    status, _, err = run("test.py", "--tag", "small", "--data", data, *arguments, "--pictures", 0)
    assert status == 2 and "151.bmp: no such file" in err.splitlines()[-1] and "Traceback" not in err
    assert not (trained / "lost" / "records").exists()


def test_a_loss_that_is_no_number_spoils_nothing(official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    arguments = [*TRAIN[:-1], 1e30, "--data", official, "--epochs", 2, "--checkpoint-every", 1]
    status, _, err = run(*arguments)
    folder = tmp_path / "runs" / "small"
    assert status == 2 and "the training has diverged" in err.splitlines()[-1] and "Traceback" not in err
    assert sorted(file.name for file in folder.iterdir()) == ["config.json"]


def test_statistics_that_overflow(official, tmp_path, monkeypatch, run):
    """Batch norm divides by them, so that weights and loss stay finite."""

    def forward(self, image):
        if self.training:
            self.up1.conv[1].running_var.fill_(torch.inf)
        return original(self, image)

    original = UNet.forward
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(UNet, "forward", forward)
    status, _, err = run(*TRAIN, "--data", official, "--epochs", 1)
    assert status == 2 and "the training has diverged" in err.splitlines()[-1]
    assert not (tmp_path / "runs" / "small" / "resume.pth").exists()


def test_weights_that_are_no_numbers(official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"size": [64, 48]}')
    torch.save(UNet(K).state_dict() | {"head.bias": torch.full((3 * K,), torch.nan)}, folder / "model_epoch_0.pth")
    result = run("test.py", "--tag", "small", "--data", official)
    assert_refused(
        result,
        "model_epoch_0.pth: weights that are nan or inf, or variances below 0: head.bias",
        folder / "test_test_0",
    )


# --- damaged files: generated


def outcome(read, *arguments):
    """Whether damaged content is read, or refused in a line; any other exception is a failure."""
    try:
        read(*arguments)
    except InputError as error:
        assert "\n" not in str(error)
        return "refused"
    return "read"


@pytest.mark.parametrize("kind", ["annotation", "image", "kaggle", "targets", "spacing", "records"])
def test_damaged_data(kind, drawn, tmp_path):
    """Fifty files with faults: some can still be read, the others are refused, and nothing else happens."""
    image, senior, _ = drawn["test1"]["152"]
    file = tmp_path / {"annotation": "152.txt", "image": "152.bmp", "spacing": "spacing.txt"}.get(kind, f"{kind}.csv")
    if kind == "annotation":
        write_points(file, senior)
        read = partial(read_doctors, Entry("152", None, (file,)), SIZE0)
    elif kind == "image":
        image.save(file)
        read = partial(read_image, file, (64, 48))
    elif kind == "kaggle":
        write_kaggle(tmp_path, drawn)
        (tmp_path / "test1_senior.csv").rename(file)
        read = partial(read_kaggle, file)
    elif kind == "targets":
        file.write_text("landmark,x,y\n3,100,200\n8,130,190\n")
        read = partial(read_targets, file, ["151"])
    elif kind == "spacing":
        file.write_text("0.125\n")
        read = partial(read_spacing, tmp_path, ["151"])
    else:
        attack_record(["151"], np.ones((1, K, 2)), np.ones((1, K, 2)), None, "FGSM", 1).to_csv(file, index=False)
        read = partial(read_records, [file])
    whole, found = file.read_bytes(), []
    for seed in range(50):
        file.write_bytes(damage(np.random.default_rng(seed), whole))
        found.append(outcome(read))
    assert {*found} == {"read", "refused"}


def fields(change, lines=slice(1, None)):
    """A record with other fields in some lines: change(fields, by name) -> None."""

    def spoil(text):
        header, *rows = [line.split(",") for line in text.splitlines()]
        for i, row in enumerate(rows[lines.start - 1 : lines.stop], lines.start - 1):
            named = dict(zip(header, row, strict=True))
            change(named)
            rows[i] = list(named.values())
        return "\n".join(",".join(row) for row in [header, *rows]) + "\n"

    return spoil


def column(name, value, line=None):
    return fields(lambda row: row.update({name: value}), slice(1, None) if line is None else slice(line, line))


def lines(*chosen):
    return lambda text: "".join(line for part in chosen for line in text.splitlines(keepends=True)[part])


DAMAGED_RECORDS = {  # of an attack: a header, then 19 lines for each of three iterations
    "empty": lambda text: "",
    "a header": lines(slice(1)),
    "garbage": lambda text: "garbage\n",
    "an iteration less": lines(slice(39)),
    "an iteration in the middle less": lines(slice(20), slice(39, None)),
    "an iteration twice": lines(slice(None), slice(39, None)),
    "a line less": lines(slice(29), slice(30, None)),
    "a line twice": lines(slice(30), slice(29, None)),
    "two lines exchanged": lines(slice(28), slice(29, 30), slice(28, 29), slice(30, None)),
    "cut within a line": lambda text: text[:-30],
    "a spreadsheet's": lambda text: text.replace(",", ";").replace(".", ","),
    "a leading zero lost": column("image", "51"),
    "another image": column("image", "152"),
    "another image in a line": column("image", "152", 30),
    "another method": column("method", "ATI-FGSM"),
    "another iteration": column("iteration", "1", 45),
    "no such role": column("role", "", 30),
    "no position": column("x_px0", "", 30),
    "an infinite position": column("y_px0", "1e999", 30),
    "a text": column("y_px0", "12;5", 30),
    "no error": column("radial_error_mm", ""),
    "no truth in a line": column("true_x_px0", "", 30),
    "no target": column("target_x_px0", "", 30),
    "a target of a stationary landmark": fields(lambda row: row.update(target_x_px0="1", target_y_px0="1")),
    "no norm": column("largest_change", "", 30),
    "a norm that is a text": column("largest_change", "many", 30),
    "no column": lambda text: text.replace("role", "roles", 1),
    "NUL": lambda text: text.replace("1", "\0", 9),
}
READ_AS_THE_SAME = {
    "as it is": lambda text: text,
    "Windows line ends": lambda text: text.replace("\n", "\r\n"),
    "byte order mark": lambda text: "\ufeff" + text,
}


@pytest.fixture
def record_text(tmp_path):
    """The text of an attack's record, of landmarks at (1, 1) of which every second is targeted, and its content."""
    truth, targets = np.ones((1, K, 2)), np.full((1, K, 2), np.nan)
    targets[:, ::2] = 5
    steps = [attack_record(["0051"], truth, truth, targets, "I-FGSM", iteration) for iteration in (0, 1, 2)]
    write_table(tmp_path / "0051.csv", pd.concat(steps))
    return (tmp_path / "0051.csv").read_text(), content_of("0051", ATTACKS["I-FGSM"], 2)


@pytest.mark.parametrize("case", DAMAGED_RECORDS)
def test_what_is_no_whole_record_is_refused_by_name(case, record_text, tmp_path):
    text, content = record_text
    file = tmp_path / "record.csv"
    file.write_text(DAMAGED_RECORDS[case](text), newline="")
    message = re.escape(f"{file}: not a readable record; remove it and repeat the command (")
    with pytest.raises(InputError, match=message):
        read_records({file: content})


@pytest.mark.parametrize("case", READ_AS_THE_SAME)
def test_records_read_as_the_same(case, record_text, tmp_path):
    text, content = record_text
    file = tmp_path / "record.csv"
    file.write_text(READ_AS_THE_SAME[case](text), newline="", encoding="utf-8")
    table = read_records({file: content})
    expected = read_records({tmp_path / "0051.csv": content})
    pd.testing.assert_frame_equal(table[[*expected]], expected)


def test_a_table_of_several_records_is_whole(tmp_path):
    """Without being told what it holds: each method and iteration has the same images."""
    truth = np.ones((3, K, 2))
    steps = [attack_record(["1", "2", "3"], truth, truth, None, "noise", iteration) for iteration in (0, 1)]
    file = tmp_path / "predictions.csv"
    pd.concat(steps).to_csv(file, index=False)
    assert len(read_records([file])) == 6 * K
    pd.concat(steps)[: 5 * K].to_csv(file, index=False)
    with pytest.raises(InputError, match=r"predictions\.csv: not a readable record; remove it"):
        read_records([file])


@pytest.mark.parametrize("kind", ["test", "attack", "defence"])
def test_a_damaged_record_is_refused_before_the_work(kind, trained, official, monkeypatch, run):
    def attack_batch(*_, **__):
        raise AssertionError("nothing is to be computed")

    monkeypatch.chdir(trained)
    out = trained / f"damaged_{kind}"
    arguments = ["test.py", "--tag", "small", "--data", official, "--rand", out, "--limit", 2, "--pictures", 0]
    arguments += {"test": [], "attack": ["--attack", 1], "defence": ["--attack", 1, "--defence", "blur:1"]}[kind]
    arguments += ["--steps", 2, "--batch-size", 1] if kind != "test" else []
    assert run(*arguments)[0] == 0
    names = {"test": "{}", "attack": "ATI-FGSM_{}", "defence": "blur_1_ATI-FGSM_{}"}
    first, file = (out / "records" / f"{names[kind].format(id)}.csv" for id in ("151", "152"))
    before, whole = (out / "summary.csv").read_bytes(), file.read_bytes()
    (out / "summary.csv").unlink()
    first.unlink()  # so that there is work to be done
    file.write_bytes(b"" if kind == "test" else b"".join(whole.splitlines(keepends=True)[:-K]))
    with monkeypatch.context() as context:
        context.setattr(eval, "attack_batch", attack_batch)
        result = run(*arguments)
    assert_refused(
        result, f"{file}: not a readable record; remove it and repeat the command", first, out / "summary.csv"
    )
    file.unlink()
    assert run(*arguments)[0] == 0
    assert (out / "summary.csv").read_bytes() == before and file.read_bytes() == whole


# --- names, pictures, output


NAMES = ("x$1_$", "a$b$c", "$\\frac$", "患者", "^_{", '"', "NA", "a,b", "a;b", "#1", "'", " a ", "_")


def test_names_as_they_are(trained, official, monkeypatch, tmp_path, run):
    monkeypatch.chdir(trained)
    source, out = official / "RawImage" / "Test1Data" / "151.bmp", tmp_path / "out"
    images = [shutil.copy(source, tmp_path / f"{name}.bmp") for name in NAMES]
    arguments = ["test.py", "--tag", "small", "--image", *images, "--mm-per-px", 0.1, "--attack", 2, "--rand", out]
    for _ in range(2):  # the records are read again
        status, _, err = run(*arguments, "--targets", "shift")
        assert status == 0 and "Glyph" not in err, err
    assert {*read_records([out / "predictions.csv"])["image"]} == {*NAMES}
    assert {file.name for file in (out / "pictures").iterdir()} == {f"{name}_FGSM.png" for name in NAMES}


def picture(path, title, labels=("a",), save=figures.save):
    figure, (panel,) = figures.panels(1)
    figure.suptitle(title)
    for label in labels:
        panel.plot([1, 100], [1, 100], label=label)
    panel.set(xscale="log", yscale="log")
    panel.legend()
    save(figure, path)
    return np.asarray(Image.open(path))


def test_texts_are_no_formulas_but_labels_of_logarithmic_ticks_are(tmp_path):
    def escaped(figure, path):
        figure.savefig(path, dpi=120)

    plain = picture(tmp_path / "a.png", "a$b$c", ["$x$"])
    assert np.array_equal(plain, picture(tmp_path / "b.png", r"a\$b\$c", [r"\$x\$"], escaped))
    assert not np.array_equal(plain, picture(tmp_path / "c.png", "a$b$c", [r"\$x\$"], escaped))


def test_output_that_cannot_show_a_name(tmp_path):
    program = "from support import command; command.run(lambda: print('written to 患/'))"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout.strip() == b"written to ?/", done.stderr.decode()


@pytest.mark.parametrize("name", ["config.json", "model_epoch_2.pth"])
def test_a_damaged_run(name, trained, tmp_path):
    for file in ("config.json", "model_epoch_2.pth"):
        (tmp_path / file).symlink_to(trained / "runs" / "small" / file)
    whole, found = (tmp_path / name).read_bytes(), []
    (tmp_path / name).unlink()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        if name == "config.json":
            (tmp_path / name).write_bytes(damage(rng, whole))
        else:  # a few of its bytes, in what names and places its tensors
            place = rng.choice([rng.integers(2000), len(whole) - 1 - rng.integers(2000)])
            (tmp_path / name).write_bytes(whole[:place] + rng.bytes(8) + whole[place + 8 :])
        found.append(outcome(load_detector, tmp_path / "model_epoch_2.pth"))
    assert "refused" in found


@pytest.mark.parametrize("seed", range(3))
def test_damaged_phantoms(seed, tmp_path, run):
    """Annotations and images are only looked at by their names; what has been drawn with is checked."""
    (tmp_path / "phantoms").mkdir()
    config = b'{"train": 1, "test1": 0, "test2": 0, "seed": 0, "program_sha256": "0"}'
    (tmp_path / "phantoms" / "phantom.json").write_bytes(damage(np.random.default_rng(seed), config))
    counts = ["--train", 1, "--test1", 0, "--test2", 0]
    result = run("phantom.py", "--out", tmp_path / "phantoms", *counts)
    assert_refused(result, "phantom", tmp_path / "phantoms" / "RawImage")


@pytest.mark.parametrize("text", ["", "\n", "defence\n", "other,b\n1,2\n", "\0", '"'])
def test_a_table_of_an_earlier_call(text, tmp_path):
    file = tmp_path / "defences_summary.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=r"defences_summary.csv: not a readable table; remove it"):
        files.load_table(file, ["defence"])
    file.write_text("defence,mre_mm\nnone,1\n")
    assert files.load_table(file, ["defence"])["defence"].tolist() == ["none"]


def test_the_names_of_attacks_are_no_paths(tmp_path):
    record = attack_record(["151"], np.ones((1, K, 2)), np.ones((1, K, 2)), None, "../../elsewhere", 1)
    record.to_csv(tmp_path / "in_memory.csv", index=False)
    with pytest.raises(InputError, match=r"in_memory.csv: not the record of an attack"):
        read_in_memory(tmp_path, SimpleNamespace(names=range(K)))


# --- files that carry code


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_resume_state_that_carries_code(save, trained, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    save({"epoch": Code(tmp_path / "trap")}, folder / "resume.pth")
    shutil.copy(trained / "runs" / "small" / "config.json", folder)
    result = run(*TRAIN, "--data", official, *EPOCHS, "--resume")
    assert_refused(result, "resume.pth: not the state of a training", tmp_path / "trap", folder / ".lock")
