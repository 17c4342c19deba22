"""What a GPU computes against a CPU, and that no step waits for it. Skipped where there is none.

    python -m pytest tests/test_cuda.py
    TEST_DEVICE=cpu python -m pytest tests/test_cuda.py      # all but the memory on a CPU, to try the tests themselves

Tolerances are a little more than what bfloat16 changes on a CPU.
"""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ENVIRONMENT, GPUS, ROOT, write_official
from steps import NAMES, TRAINING

from attack import ATTACKS

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not GPUS, reason="no GPU; TEST_DEVICE=cpu runs these on the CPU")

PROCESSES = GPUS if DEVICE == "cuda" else 2
TRAIN = ["train.py", "--size", 64, 48, "--encoder-weights", "none", "--checkpoint-every", 30]
TRAIN += ["--batch-size", max(2, PROCESSES)]
TEST = ["test.py", "--tag", "reference", "--split", "train", "--pictures", 0, "--batch-size", 2]
ATTACK = ["--attack", *ATTACKS, "--targets", "common", "--shift-mm", 4, "--epsilon", 16, "--steps", 10]
VARIANTS = {  # arguments, and the number of processes
    "fp32": ([], 1),
    "bf16": (["--precision", "bf16"], 1),
    "compiled": (["--precision", "bf16", "--compile"], 1),
    "torchrun": ([], PROCESSES),
}
STEP = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from steps import make_step
from support.command import find_device
device = find_device({device!r})
"""


def python(*arguments, folder):
    """Run Python in a process that sees the GPUs: its standard output."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "continuing without" not in done.stderr, done.stderr
    return done.stdout


def in_script(code, folder):
    """Run a code after STEP."""
    return python("-c", STEP.format(root=str(ROOT), tests=str(ROOT / "tests"), device=DEVICE) + code, folder=folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory, drawn):
    """A folder with a detector trained on a CPU, its test and its attacks."""
    folder = tmp_path_factory.mktemp("work")
    write_official(folder / "dataset", drawn)
    for command in ([*TRAIN, "--tag", "reference", "--epochs", 60], [*TEST, "--rand", "test"], [*TEST, *ATTACK]):
        attacking = ["--rand", "attack"] if "--attack" in command else []
        python(ROOT / command[0], *command[1:], *attacking, "--device", "cpu", folder=folder)
    return folder


def on_device(variant, *command, folder):
    arguments, processes = VARIANTS[variant]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes] if variant == "torchrun" else []
    script, *words = command
    python(*launcher, ROOT / script, *words, *arguments, "--device", DEVICE, folder=folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_with_a_stop(variant, work):
    for epochs in (30, 60):
        on_device(variant, *TRAIN, "--tag", variant, "--epochs", epochs, "--resume", folder=work)
    log, reference = (pd.read_csv(work / "runs" / tag / "train_log.csv") for tag in (variant, "reference"))
    assert log["epoch"].tolist() == list(range(60)) and log["seconds"].gt(0).all()
    assert log["loss"][0] == pytest.approx(reference["loss"][0], rel=0.05)  # two steps
    assert log["loss"][59] == pytest.approx(reference["loss"][59], rel=0.3)
    assert log["mre_mm"][59] == pytest.approx(reference["mre_mm"][59], abs=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy(variant, work):
    on_device(variant, *TEST, "--rand", f"test_{variant}", folder=work)
    found, expected = (pd.read_csv(work / f"test{of}" / "predictions.csv") for of in (f"_{variant}", ""))
    moved = np.hypot(found["x_px0"] - expected["x_px0"], found["y_px0"] - expected["y_px0"])
    assert moved.quantile(0.9) <= 5.01  # a pixel of the input
    assert (found["heatmap_peak"] - expected["heatmap_peak"]).abs().max() < 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_attacks(variant, work):
    on_device(variant, *TEST, *ATTACK, "--rand", f"attack_{variant}", folder=work)
    found, expected = (
        pd.read_csv(work / f"attack{of}" / "summary.csv").set_index(["method", "role", "iteration"])
        for of in (f"_{variant}", "")
    )
    assert set(found.index.get_level_values("method")) == set(ATTACKS)
    assert found.index.equals(expected.index)
    assert (found["mre_mm"] - expected["mre_mm"]).abs().max() <= 1
    assert found["largest_change"].max() == pytest.approx(16 * 127.5 / 256, abs=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits(precision, tmp_path):
    code = f"""
for name in {NAMES}:
    step = make_step(name, device, precision={precision!r})
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    step(), step()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    print(name)
"""
    assert in_script(code, tmp_path).splitlines() == [*NAMES]


@pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU")
@pytest.mark.parametrize("name, gib", [(TRAINING[0], 20), ("ATI-FGSM", 14), ("Vote-PGD", 14)])
def test_memory_of_a_batch_at_the_papers_size(name, gib, tmp_path):
    """Estimated from a CPU: 1.3 GiB an image in training, 1 GiB in an attack, and what a step needs for a while."""
    code = f"""
make_step({name!r}, device, (800, 640), 8, "bf16")()
print(torch.cuda.max_memory_allocated() / 2**30)
"""
    assert float(in_script(code, tmp_path)) <= gib
