"""Faults that take minutes to try; those that take seconds are in test_faults.py.

    python tests/faults.py                       # all of it, with a line for each
    python tests/faults.py kills --times 20      # SIGKILL at random moments of a training and of an attack
    python tests/faults.py together              # two equal trainings and two equal attacks at once, one folder each
    python tests/faults.py disk                  # a disk that fills up (a small tmpfs, which only root can mount)
    python tests/faults.py workers               # SIGKILL for one of two processes under torchrun, which restarts them
    python tests/faults.py slurm                 # slurm.sh, between stand-ins for srun and scontrol

Each ends with the weights, logs and records of an unbroken run, or the script with an AssertionError.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
DRAW = "phantom.py --out data --train 4 --test1 4 --test2 0"
TRAIN = "train.py --tag small --size 64 48 --encoder-weights none --batch-size 2 --lr 3e-4 --epochs 5 --resume"
TRAIN += " --checkpoint-every 2 --data ../data"
ATTACK = "test.py --tag small --attack 0 1 --targets shift --steps 8 --batch-size 2 --rand attack --save-adversarial"
ATTACK += " --data ../data"
PARTS = ("kills", "together", "disk", "workers", "slurm")


def start(command, folder, launcher=(), **environment):
    """Start a command in a folder, with one thread a process, so that results don't depend on how many there are."""
    program, *arguments = command.split()
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *launcher, ROOT / program, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """(status, last line on standard error)"""
    _, err = process.communicate()
    return process.returncode, err.strip().splitlines()[-1] if err.strip() else ""


def contents(folder):
    """What a run has left, comparable: weights as tensors, tables without times, else bytes."""
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.suffix == ".pth":
            state = torch.load(file, weights_only=True)
            found[name] = state["model"] if file.name == "resume.pth" else state
        elif file.name == "train_log.csv":
            found[name] = pd.read_csv(file).drop(columns="seconds").to_csv()
        elif file.is_file() and file.name not in ("train_log.png", "config.json"):
            found[name] = file.read_bytes()
        elif file.is_file():
            found[name] = "is there"
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert all(torch.equal(found[name][key], value[key]) for key in value), name
        else:
            assert found[name] == value, name


def train_unbroken(root):
    """Train in ``root``/unbroken: (what it leaves, seconds)."""
    begin = time.perf_counter()
    status, err = finish(start(TRAIN, root / "unbroken"))
    assert status == 0, err
    return contents(root / "unbroken" / "runs"), time.perf_counter() - begin


def kills(root, times):
    """SIGKILL at random moments of a training and of an attack."""
    trained, seconds = train_unbroken(root)
    for n in range(times):
        folder = root / f"training_{n}"
        moment = kill(start(TRAIN, folder), random.uniform(0.1, 1) * seconds)
        left = [str(file) for file in folder.rglob("[!.]*.pth") if torch.load(file, weights_only=True)]  # all readable
        status, err = finish(start(TRAIN, folder))
        assert status == 0, err
        assert_same(contents(folder / "runs"), trained)
        print(
            f"training killed after {moment:.1f} of {seconds:.1f} s, {len(left)} checkpoints: went on to the same end"
        )

    begin = time.perf_counter()
    status, err = finish(start(ATTACK, root / "unbroken"))
    assert status == 0, err
    seconds = time.perf_counter() - begin
    attacked = contents(root / "unbroken" / "attack")
    for n in range(times):
        folder = root / f"training_{n}"
        moment = kill(start(ATTACK, folder), random.uniform(0.3, 1) * seconds)
        left = len(list(folder.glob("attack/records/[!.]*")))
        status, err = finish(start(ATTACK, folder))
        assert status == 0, err
        assert_same(contents(folder / "attack"), attacked)
        print(f"attack killed after {moment:.1f} of {seconds:.1f} s, {left} records: went on to the same end")


def kill(process, seconds):
    """SIGKILL after so many seconds, if it is not done before; how many they were."""
    begin = time.perf_counter()
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return time.perf_counter() - begin


def together(root):
    """Of two equal commands at once, one says that the other is at work, and since when, and that one ends as alone."""
    trained, _ = train_unbroken(root)
    for command, folder in (TRAIN, root / "together"), (ATTACK, root / "unbroken"):
        first, second = (start(command, folder) for _ in range(2))
        ends = sorted([finish(first), finish(second)], key=lambda end: end[0])
        assert [status for status, _ in ends] == [0, 2], ends
        assert re.search(r": in use by process \d+ on .* since 20\d\d-", ends[1][1]), ends
        print(f"together: {ends[1][1]}")
    assert_same(contents(root / "together" / "runs"), trained)
    assert not [*root.rglob(".lock")]


def disk(root):
    """A disk that fills up at the second resume.pth."""
    if os.geteuid() != 0:
        print("disk: left out, only root can mount a tmpfs")
        return
    trained, _ = train_unbroken(root)
    folder = root / "small_disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=450m", "tmpfs", folder], check=True)
    try:
        status, err = finish(start(TRAIN, folder))
        assert status == 2 and "runs/small/resume.pth: cannot be written ([Errno 28] No space left on device" in err, (
            err
        )
        assert not [file for file in (folder / "runs").rglob(".*")]
        assert torch.load(folder / "runs" / "small" / "resume.pth", weights_only=True)["epoch"] == 2
        print(f"full disk: {err}")
        subprocess.run(["mount", "-o", "remount,size=2g", folder], check=True)
        status, err = finish(start(TRAIN, folder))
        assert status == 0, err
        assert_same(contents(folder / "runs"), trained)
        print("full disk: with more room, went on to the same end")
    finally:
        subprocess.run(["umount", folder], check=True)


def workers(root):
    """SIGKILL for one of two processes; torchrun starts them again."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    status, err = finish(start(TRAIN, root / "two", launcher))
    assert status == 0, err
    folder = root / "two_killed"
    process = start(TRAIN, folder, launcher, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # as slurm.sh has it
    while not (folder / "runs" / "small" / "resume.pth").exists():
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(random.choice(children)), signal.SIGKILL)
    status, err = finish(process)
    assert status == 0, err
    assert_same(contents(folder / "runs"), contents(root / "two" / "runs"))
    print("one of two processes killed: started again by torchrun, went on to the same end")


def slurm(root):
    """slurm.sh is signalled before its time is over, gives the job back, and the job's next turn ends it."""
    trained, _ = train_unbroken(root)
    folder, stand_ins = root / "job", root / "bin"
    for path in (folder, stand_ins):
        path.mkdir()
    srun = """#!/bin/bash
        shift 2 # --cpus-per-task N
        setsid "$@" &
        echo $! > step
        trap 'kill -KILL -- -$!' TERM # as the real one does
        wait $!
    """
    (stand_ins / "srun").write_text(srun)
    (stand_ins / "scancel").write_text('#!/bin/sh\n[ "$*" = "--signal=TERM 42" ] && kill -TERM "$(cat step)"\n')
    (stand_ins / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && echo localhost || echo "$@" >> scontrol.log\n')
    (stand_ins / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for file in stand_ins.iterdir():
        file.chmod(0o755)
    (folder / "train.py").symlink_to(ROOT / "train.py")
    environment = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"PATH": f"{stand_ins}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "scripts" / "slurm.sh", *TRAIN.removesuffix(" --resume").split()[1:]]

    def turn():
        return subprocess.Popen(command, cwd=folder, env=os.environ | environment, stderr=subprocess.DEVNULL)

    job = turn()
    while not (folder / "runs" / "small" / "resume.pth").exists():
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait() != 0
    assert (folder / "scontrol.log").read_text() == "requeue 42\n"
    assert not (folder / "runs" / "small" / "model_epoch_4.pth").exists()
    assert turn().wait() == 0
    assert (folder / "scontrol.log").read_text() == "requeue 42\n"
    assert_same(contents(folder / "runs"), trained)
    print("slurm.sh signalled: job given back, went on to the same end in its next turn")


def main():
    parser = argparse.ArgumentParser(description="Faults that take minutes to try.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--times", type=int, default=20, help="how often to kill a training, and an attack")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    random.seed(args.seed)
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as root:
            assert finish(start(DRAW, Path(root)))[0] == 0
            globals()[part](Path(root), *([args.times] if part == "kills" else []))


if __name__ == "__main__":
    main()
