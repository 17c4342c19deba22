"""What may happen to a long run: signals, a full disk, lost data, damaged files. See also tests/faults.py."""

import os
import pickle
import resource
import shutil
import signal
from contextlib import contextmanager
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SIZE0, TRAIN, Code, K, assert_refused, attack_record, damage, write_kaggle, write_points

import eval
import model
import train
from eval import read_records
from model import UNet, load_detector
from readers.images import read_image
from readers.layouts import Entry
from readers.points import read_doctors, read_kaggle, read_targets
from readers.spacing import read_spacing
from support import figures
from support.errors import InputError

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

    original = model.encode
    with monkeypatch.context() as context:
        context.setattr(model, "encode", encode)
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
    assert saved == [(1, 0), (2, 0), (4, 0), (5, 0)]  # the first epoch and the checkpoints


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
    with files_up_to(200 << 20):  # enough for a checkpoint, not for resume.pth
        status, _, err = run(*TRAIN, "--data", official, "--epochs", 3, "--checkpoint-every", 1)
    assert status == 2 and err.splitlines()[-1].startswith(
        "train.py: error: runs/small/resume.pth: cannot be written ([Errno 27] File too"
    )
    assert "Traceback" not in err
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model_epoch_0.pth"]
    assert run("test.py", "--tag", "small", "--data", official, "--limit", 1)[0] == 0

    shutil.rmtree(folder)
    with sigterm_at_step(2, monkeypatch):
        assert run(*TRAIN, "--data", official, *EPOCHS)[0] == 143
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


def test_weights_that_are_no_numbers(official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"size": [64, 48]}')
    torch.save(UNet(K).state_dict() | {"head.bias": torch.full((3 * K,), torch.nan)}, folder / "model_epoch_0.pth")
    result = run("test.py", "--tag", "small", "--data", official)
    assert_refused(result, "model_epoch_0.pth: weights that are nan or inf: head.bias", folder / "test_test_0")


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
        read = partial(read_targets, file, ["151"], K)
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


def test_a_record_that_is_empty(trained, official, monkeypatch, run):
    monkeypatch.chdir(trained)
    arguments = ["test.py", "--tag", "small", "--data", official, "--rand", "emptied", "--limit", 2, "--pictures", 0]
    assert run(*arguments)[0] == 0
    summary = (trained / "emptied" / "summary.csv").read_bytes()
    (trained / "emptied" / "records" / "152.csv").write_bytes(b"")
    assert_refused(run(*arguments), "emptied/records/152.csv: not a readable record")
    assert (trained / "emptied" / "summary.csv").read_bytes() == summary
    (trained / "emptied" / "records" / "152.csv").unlink()
    assert run(*arguments)[0] == 0


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


# --- files that carry code


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_resume_state_that_carries_code(save, official, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    save({"epoch": Code(tmp_path / "trap")}, folder / "resume.pth")
    result = run(*TRAIN, "--data", official, "--resume")
    assert_refused(result, "resume.pth: not the state of a training", tmp_path / "trap", folder / "config.json")
