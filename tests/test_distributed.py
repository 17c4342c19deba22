"""Two processes under torchrun against one."""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT

from readers.images import cores
from support import distributed
from support.checkpoints import sha256
from support.distributed import rank, world_size

pytestmark = pytest.mark.slow
TRAIN = ["train.py", "--size", 64, 48, "--encoder-weights", "none", "--lr", 1e-3, "--epochs", 3]
# In float64: in float32, Adam makes much of what differs by rounding, as it does between one thread and two
FLOAT64 = """
import runpy, sys, torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
sys.path.insert(0, {root!r})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def torchrun(processes, *command, folder, script=None):
    """Run a command in so many processes of one thread each: (status, stdout, stderr)."""
    command = [ROOT / command[0], *command[1:]]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", processes, *([script] if script else []), *command]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory, official):
    """Runs of one process and of two, with a batch of which the second process has fewer images, or none."""
    folder = tmp_path_factory.mktemp("work")
    script = folder / "float64.py"
    script.write_text(FLOAT64.format(root=str(ROOT)))
    for processes in (1, 2):
        command = [*TRAIN, "--tag", f"of_{processes}", "--data", official, "--batch-size", 3]
        status, _, err = torchrun(processes, *command, folder=folder, script=script)
        assert status == 0, err
    return folder


def test_two_processes_train_as_one_does(trained):
    one, two = (trained / "runs" / name for name in ("of_1", "of_2"))
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir())
    weights = [torch.load(run / "model_epoch_2.pth", weights_only=True) for run in (one, two)]
    for name, expected in weights[0].items():
        assert expected.dtype in (torch.float64, torch.int64)
        assert (weights[1][name] - expected).double().norm() <= 1e-8 * expected.double().norm(), name
    logs = [pd.read_csv(run / "train_log.csv").drop(columns="seconds") for run in (one, two)]
    pd.testing.assert_frame_equal(*logs, rtol=1e-9)


@pytest.mark.parametrize(
    "attack",
    [
        [],
        ["--attack", 0, 1, "--steps", 3, "--targets", "shift", "--save-adversarial"],
        ["--attack", 1, "noise", "--steps", 2, "--targets", "diagnosis", "--measure", "MW"],
    ],
)
def test_two_processes_find_what_one_does(attack, trained, official, monkeypatch, run):
    monkeypatch.chdir(trained)
    outputs = []
    for processes in (1, 2):
        out = f"{len(attack)}_{processes}"
        command = ["--tag", "of_1", "--data", official, "--batch-size", 1, "--pictures", 1, "--rand", out, *attack]
        alone = processes == 1
        status, _, err = run("test.py", *command) if alone else torchrun(2, "test.py", *command, folder=trained)
        assert status == 0, err
        out = trained / out
        outputs.append({str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*.*")})
        del outputs[-1]["config.json"]  # has the folder's name
    assert outputs[0].keys() == outputs[1].keys() and len(outputs[0]) > 6
    assert [name for name in outputs[0] if outputs[0][name] != outputs[1][name]] == []


def test_wrong_input_is_told_once_and_by_the_first(official, tmp_path):
    status, _, err = torchrun(2, *TRAIN, "--tag", "bad", "--data", "nowhere", folder=tmp_path)
    assert status != 0 and err.count("train.py: error:") == 1
    assert "\ntrain.py: error: nowhere: no such folder" in f"\n{err}"  # beside torchrun's own lines
    assert not (tmp_path / "runs").exists()


TOGETHER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from support import command, distributed
from support.distributed import rank
from support.errors import InputError

def main():
    distributed.start()
    assert distributed.broadcast(10 + rank()) == 10
    assert distributed.any_process(rank() == 1) and not distributed.any_process(False)
    assert distributed.all_reduce(torch.tensor([1.0, rank()])).tolist() == [2, 1]
    assert distributed.shard([0, 1, 2, 3, 4]) == [[0, 2, 4], [1, 3]][rank()]
    if rank() == 1:
        time.sleep(1)
        Path("written by 1").touch()
    assert distributed.on_main(Path("written by 1").exists)
    distributed.require_equal(number=1)
    norm = torch.nn.BatchNorm2d(1)
    norm.running_mean.fill_(5 + rank())
    network = distributed.data_parallel(norm, torch.device("cpu"))
    network(torch.arange(2.0 + 3 * rank()).view(-1, 1, 1, 1)).sum().backward()
    statistics = distributed.gather((norm.running_mean.item(), norm.running_var.item()))
    mean = torch.tensor([0.0, 1, 0, 1, 2, 3, 4]).mean()  # of all processes; and 5 is the main process's
    assert statistics[0] == statistics[1] and abs(statistics[0][0] - (4.5 + 0.1 * mean)) < 1e-6
    {fault}
    print("never here")

command.run(main)
"""


@pytest.mark.parametrize(
    "fault, line",
    [
        (
            "with distributed.guard():\n        if rank() == 1: raise InputError('only the second finds out')",
            "error: only the second finds out",
        ),
        (
            "distributed.require_equal(number=rank())",
            "error: process 1 of 2 has another number than process 0: 1 instead of 0",
        ),
    ],
)
def test_what_goes_wrong_in_one_process_ends_all_with_its_line(fault, line, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TOGETHER.format(root=str(ROOT), fault=fault))
    status, out, err = torchrun(2, script, folder=tmp_path)
    assert status != 0 and "never here" not in out and "Assertion" not in err
    assert f"\nscript.py: {line}" in f"\n{err}" and err.count("script.py: ") == 1


def test_what_several_processes_cannot_do(monkeypatch, official, tmp_path, run):
    monkeypatch.chdir(tmp_path)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for wrong, message in [
        (["--batch-size", 3], "--batch-size 3: fewer images than the 4 processes"),
        (["--compile"], "--compile: not with several processes"),
    ]:
        status, _, err = run(*TRAIN, "--tag", "bad", "--data", official, *wrong)
        assert status == 2 and message in err and err.count("\n") == 1


LAUNCHED = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("value", ["0", "many"])
def test_without_torchrun_its_variables_count_for_nothing(value, monkeypatch):
    for name in LAUNCHED.keys() - {"TORCHELASTIC_RUN_ID"}:
        monkeypatch.setenv(name, value)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert (rank(), world_size(), cores()) == (0, 1, usable)


def test_another_state_on_another_machine(trained, official, monkeypatch, run):
    """Each process reads resume.pth by itself: equal steps are not enough."""
    seen = []
    monkeypatch.chdir(trained)
    monkeypatch.setattr(distributed, "require_equal", lambda **values: seen.append(values))
    arguments = [*TRAIN, "--tag", "of_1", "--data", official, "--batch-size", 3, "--resume", "--epochs", 4]
    assert run(*arguments)[0] == 0
    state = trained / "runs" / "of_1" / "resume.pth"
    assert seen[0]["state"] != sha256(state)  # of before it went on
    assert run(*arguments)[0] == 0 and seen[1]["state"] == sha256(state)


def test_a_lost_process_is_told_in_a_line_and_a_status_of_its_own(monkeypatch, official, tmp_path, run):
    def lose(*_):
        raise RuntimeError("[pair.cc:534] [gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1234")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.optim.Adam, "step", lose)
    status, _, err = run(*TRAIN, "--tag", "lost", "--data", official)
    last = err.splitlines()[-1]
    assert (
        status == 75 and last.startswith("train.py: process 0: lost another process of this run") and "pair.cc" in last
    )
