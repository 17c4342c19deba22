"""Time and memory of training, attack and test, compared with the bare network.

    python benchmark.py                                                       # 800 x 640, batch 1, fp32
    python benchmark.py --only training attack --batch-size 1 8 16 --precision fp32 bf16 --compile

The first part of a group is the limit of the others: the same network, prepared in the same way, at the same size,
batch and precision, with nothing around it: forward, backward from the maps' sum and, in training, the optimizer's
step; no copy of images, goal maps, loss, attack step or voting. A part and its limit take turns, after an untimed call
of each.

Images and weights are random.

Writes into --out: table.csv, config.json.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from attack import ATTACKS, run
from dataset import to_input
from detectors import voting
from experiments.costs import Step
from model import UNet, compile_network, decode, encode, freeze, place
from readers.points import LANDMARKS
from support import command
from support.command import positive_int, progress
from support.files import own_folder, save_config, write_text
from train import side, train_step

PAPER = {"training step": 230 * 150, "I-FGSM, a step": 250 * 300, "ATI-FGSM, a step": 250 * 300}  # images x steps


def make_parser():
    parser = command.Parser("Time and memory of training, attack and test, compared with the bare network.")
    add = parser.add_argument
    add("--size", type=side, nargs=2, metavar=("H", "W"), default=[800, 640], help="network input in px")
    add("--batch-size", type=positive_int, nargs="+", default=[1], help="images per batch, one or more")
    add("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32"], help="one or both")
    command.add_device_arguments(parser)
    add("--only", choices=GROUPS, nargs="+", default=list(GROUPS), help="what to time")
    add("--repeats", type=positive_int, default=15, help="timed calls")
    add("--images", type=positive_int, help=argparse.SUPPRESS)  # of older versions, without effect
    add("--out", default="runs/benchmark", metavar="DIR", help="folder of the results")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    device, out = command.find_device(args.device), Path(args.out)
    torch.manual_seed(0)
    config = {**vars(args), "threads": torch.get_num_threads()}
    tables = []
    with own_folder(out, "benchmark.py", "--out", "config.json", "repeats"):
        save_config(out / "config.json", config, device, update=[*config, "versions"])
        for table in time_all(args, device):
            table.insert(0, "size", "{} x {}".format(*args.size))
            tables.append(table)
            table = pd.concat(tables)  # written after each group, since a benchmark may be stopped
            write_text(out / "table.csv", table.to_csv(index=False, float_format="%.4g"))
    print(f"written to {out}/")


def time_all(args, device):
    """Yield the table of each group of parts, see ``report``."""
    model = UNet()
    for precision, batch_size in itertools.product(args.precision, args.batch_size):
        peak, images = matrix_peak(device, precision), torch.randint(256, (batch_size, *args.size), dtype=torch.uint8)
        for name in args.only:
            network = prepared(model, images, device, precision, args.compile, name)
            group = GROUPS[name](network, images, to_input(images, device))
            yield report(group, batch_size, device, args.repeats, f"{precision}, {batch_size}", peak)


# --- timing ----------------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """What is timed."""

    name: str
    call: Callable  # of what ``prepare`` returns
    prepare: Callable = tuple  # returns the arguments of the next call, by default none; untimed


def report(group, images, device, repeats, label, peak):
    """Time a group of parts and print their medians. The first part is the limit of the others.

    Args:
        group: list of Timed.
        images: per call.
        device: torch.device.
        repeats: timed calls of each.
        label: precision and batch size.
        peak: FLOP/s that the device reaches, see ``matrix_peak``.

    Returns:
        DataFrame, a row for each part. Times are medians and quartiles in ms; a ratio is the median over pairs of
        neighbouring calls. Hours are those of the paper's whole training or attack at this speed.
    """
    seconds, memory = time_in_turn(group, device, repeats, label)
    limit, *others = seconds
    table = pd.DataFrame({"precision, batch": label, "ms": 1e3 * seconds.median()})
    table["ms 25 %"], table["ms 75 %"] = 1e3 * seconds.quantile(0.25), 1e3 * seconds.quantile(0.75)
    table["images/s"], table["peak MiB"] = 1e3 * images / table["ms"], memory
    table["ratio"] = seconds[others].div(seconds[limit], axis=0).median()
    with FlopCounterMode(display=False) as counter:
        group[0].call()
    table.loc[limit, "TFLOP/s"] = counter.get_total_flops() / seconds[limit].median() / 1e12
    table["% of matrix peak"] = 100 * 1e12 * table["TFLOP/s"] / peak
    table["the paper's, extrapolated (h)"] = pd.Series(PAPER) / table["images/s"] / 3600
    table.insert(1, "part", table.index)
    print(table[["precision, batch", "part", "ms", "ratio"]].to_string(index=False, float_format="%.4g", na_rep=""))
    return table


def time_in_turn(group, device, repeats, label):
    """Call all parts once, untimed, then again, and so on.

    Returns:
        DataFrame of the seconds of each timed call, with a column for each part; Series of peak memory in the last call
        of each, in MiB.
    """
    seconds, memory = {timed.name: [] for timed in group}, {}
    turns = progress((1 + repeats) * group, label, leave=False)
    for timed in turns:
        turns.set_postfix_str(timed.name)
        call = partial(timed.call, *timed.prepare())
        peak_memory(device)
        seconds[timed.name].append(clock(call, device))
        memory[timed.name] = peak_memory(device)
    return pd.DataFrame(seconds)[1:], pd.Series(memory)


def clock(call, device):
    """Seconds of a call; on a GPU of ten in sequence, since each is launched while the one before still runs."""
    calls, wait = (10, torch.cuda.synchronize) if device.type == "cuda" else (1, torch.cpu.synchronize)
    wait()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - begin) / calls


def peak_memory(device):
    """Peak in MiB since the last call of this: allocated on a GPU, else of the whole process (nan except on Linux)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # reset
    except OSError:
        return float("nan")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def matrix_peak(device, precision):
    """FLOP/s of a product of two large matrices; on a GPU "fp32" is TF32, as in its convolutions."""
    size, dtype = 8192 if device.type == "cuda" else 2048, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(clock(partial(torch.matmul, a, b), device) for _ in range(5))


def time_steps(size, device, precision, batch_size):
    """What one image takes of a training step and of an attack step of the bare network, from the second call of each.

    Args:
        size: (H, W) px.
        batch_size: images of a call.

    Returns:
        experiments.costs.Step.
    """
    images = torch.zeros(batch_size, *size, dtype=torch.uint8)
    model, seconds = UNet(), {}
    for name in ("attack", "training"):
        network = prepared(model, images, device, precision, False, name)
        bare = GROUPS[name](network, images, to_input(images, device))[0].call
        bare()
        peak_memory(device)
        seconds[name] = clock(bare, device) / batch_size
    fixed = 4 * sum(weight.nbytes for weight in model.parameters())
    image_bytes = max(peak_memory(device) * 2**20 - fixed, 0) / batch_size  # of the training
    return Step(tuple(size), seconds["training"], seconds["attack"], fixed, image_bytes)


# --- what is timed ---------------------------------------------------------------------------------------------------
# Each function returns a group of parts, their limit first.


def prepared(model, images, device, precision, compiled, group):
    """A copy of the model on a device, as train.py or test.py uses it."""
    model = place(copy.deepcopy(model), device, precision, training=group == "training")
    if group != "training":
        freeze(model)
    if compiled:
        torch.compiler.reset()  # else the compiler gives up after some variants of the network
        model = compile_network(model, to_input(images, device))
    return model


def training_step(network, images, image):
    """A step of train.py, and its parts; limit: forward, backward, and the optimizer's step."""
    device, size = image.device, image.shape[-2:]
    landmarks = torch.rand(len(images), len(LANDMARKS), 2) * (torch.tensor(size).flip(0) - 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0, fused=True)  # the weights do not change
    detector = voting(network, size=size)

    def bare():
        optimizer.zero_grad()
        network(image).sum().backward()
        optimizer.step()

    def step():
        aims = landmarks.to(device, non_blocking=True)
        train_step(network, detector, optimizer, to_input(images, device), aims, len(image))

    return [
        Timed("bare training step", bare),
        Timed("training step", step),
        Timed("encoding", partial(encode, landmarks.to(device), size)),
    ]


def neighbours(network, image):
    """Clean maps, and targets: half of the landmarks at the positions of their neighbours."""
    with torch.no_grad():
        clean = network(image).clone()
    targeted = torch.arange(len(LANDMARKS), device=image.device).expand(len(image), -1) < len(LANDMARKS) // 2
    return clean, decode(clean).roll(1, dims=1), targeted


def attack_step(network, images, image):
    """A step of the iterative attacks; limit: forward, and backward to the image."""
    _, *targets = neighbours(network, image)

    def bare():
        adversarial = image.detach().requires_grad_()
        network(adversarial).sum().backward()

    def begun(attack):
        iterations = run(attack, network, image, *targets, steps=10**9)
        next(iterations)
        return [iterations]

    names = "I-FGSM", "ATI-FGSM", "Vote-PGD"
    return [
        Timed("bare forward, backward to the image", bare),
        *(Timed(f"{name}, a step", next, partial(begun, ATTACKS[name])) for name in names),
    ]


def test_batch(network, images, image):
    """A batch of test.py, and its decoding; limit: forward."""
    clean, *_ = neighbours(network, image)

    def whole():
        return decode(network(to_input(images, image.device)))

    return [
        Timed("bare forward", torch.inference_mode()(partial(network, image))),
        Timed("voting", partial(decode, clean)),
        Timed("test, from 8-bit images to landmarks", torch.inference_mode()(whole)),
    ]


GROUPS = {"training": training_step, "attack": attack_step, "test": test_batch}

if __name__ == "__main__":
    command.run(main)
