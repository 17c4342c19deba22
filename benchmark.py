"""Time and memory of every part, compared with the bare network.

    python benchmark.py                                                       # 800 x 640, batch 1, fp32
    python benchmark.py --size 200 160 --batch-size 1 4 --weights runs/demo-200x160/model_epoch_7.pth
    python benchmark.py --only training attack --batch-size 1 8 16 --precision fp32 bf16 --compile

The first measure of a group is the limit of the others: the same network, prepared in the same way, at the same size,
batch and precision, with nothing around it: forward, backward and, in training, the optimizer's step; no loading of
images, goal maps, loss, attack step or voting. A measure and its limit take turns, after an untimed call of each.
Images are phantoms; weights are random without --weights.

Writes into --out: table.csv, table.md, config.json.
"""

import contextlib
import copy
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from attack import ATTACKS, goal_maps, last, run
from dataset import Cephalograms, in_batches, to_input
from experiments.markdown import markdown
from model import MIN_SIZE, UNet, compile_network, decode, encode, freeze, load_weights, place
from phantom import draw_patient, image_file
from readers.images import cores
from readers.points import LANDMARKS
from support import command
from support.command import positive_int, progress
from support.files import atomic, make_folder, save_config, write_text
from train import image_order, train_step

PARTS = ("loading", "training", "attack", "test")
PAPER = {"training step": 230 * 150, "I-FGSM, a step": 250 * 300, "ATI-FGSM, a step": 250 * 300}  # images x steps
PHANTOMS = 8  # are drawn; all further images are copies of them


def make_parser():
    parser = command.Parser("Time and memory of every part, compared with the bare network.")
    parser.add_argument(
        "--size", type=positive_int, nargs=2, metavar=("H", "W"), default=[800, 640], help="network input in px"
    )
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1], help="images per batch, one or more")
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32"], help="one or both")
    command.add_device_arguments(parser)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="what to measure")
    parser.add_argument("--repeats", type=positive_int, default=15, help="timed calls; a fifth as many for loading")
    parser.add_argument("--images", type=positive_int, default=150, metavar="N", help="images to load")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint (default: random weights)")
    parser.add_argument("--out", default="runs/benchmark", metavar="DIR", help="folder of the results")
    return parser


def parse_arguments(argv):
    parser = make_parser()
    args = parser.parse_args(argv)
    if min(args.size) < MIN_SIZE:
        parser.error(f"--size: at least {MIN_SIZE} {MIN_SIZE}")
    if args.images < max(args.batch_size):
        parser.error(f"--images {args.images}: fewer than --batch-size {max(args.batch_size)}")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    device, out = command.find_device(args.device), Path(args.out)
    torch.manual_seed(0)
    model = UNet(len(LANDMARKS))
    if args.weights:
        load_weights(model, args.weights)
    make_folder(out)
    (out / "config.json").unlink(missing_ok=True)
    save_config(out / "config.json", {**vars(args), "threads": torch.get_num_threads()}, device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_images(root, args.images)
        data = Cephalograms(root, "train", args.size)
        for group in measure_all(args, model, data, device, root):
            rows += group
            save_table(rows, args.size, out)  # after each group, since a benchmark may be stopped
    print(f"written to {out}/")


def measure_all(args, model, data, device, root):
    """Yield the rows of each group of measures, see ``report``."""
    if "loading" in args.only:
        yield report(first_pass(root, args.size), device, max(3, args.repeats // 5))
    for precision, batch_size in itertools.product(args.precision, args.batch_size):
        label, peak = f"{precision}, {batch_size}", matrix_peak(device, precision)
        image = to_input(data.images[:batch_size], device)
        network = partial(frozen, model, image, precision, args.compile)
        if "training" in args.only:
            group = training_step(model, data, image, precision, args.compile)
            yield report(group, device, args.repeats, label, peak)
        if "attack" in args.only:
            yield report(attack_step(network(), image), device, args.repeats, label, peak)
            yield report(one_step_attack(network(), image), device, args.repeats, label)
        if "test" in args.only:
            yield report(test_batch(network(), data, image), device, args.repeats, label, peak)


def save_table(rows, size, out):
    table = pd.DataFrame(rows)
    table.insert(0, "size", "{} x {}".format(*size))
    with atomic(out / "table.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")
    write_text(out / "table.md", markdown(table, ".4g"))


def draw_images(root, count):
    """The official layout with ``count`` JPEG images for training, copies of a few phantoms."""
    ids = [f"{number:03d}" for number in range(1, count + 1)]
    for id in progress(ids[:PHANTOMS], "drawing", unit="image", leave=False):
        draw_patient((root, "train", id, 0))
        drawn = image_file(root, "train", id)
        Image.open(drawn).save(drawn.with_suffix(".jpg"), quality=95)
        drawn.unlink()
    for number, id in enumerate(ids[PHANTOMS:]):
        for file in list(root.rglob(f"{ids[number % PHANTOMS]}.*")):
            shutil.copy(file, file.with_stem(id))


# --- measuring -------------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """What is timed."""

    name: str
    call: Callable  # of no argument, or of what ``prepare`` returns
    images: int  # per call, counted once for each step
    steps: int = 1  # per call; the time of one is reported
    prepare: Callable | None = None  # called before each call, untimed

    def ready(self):
        """The call without arguments."""
        return self.call if self.prepare is None else partial(self.call, self.prepare())


def report(measures, device, repeats, label="", peak=None):
    """Time a group of measures and print its rows of the table. The first measure is the limit of the others.

    Args:
        measures: list of Timed.
        device: torch.device.
        repeats: timed calls of each.
        label: precision and batch size.
        peak: FLOP/s that the device reaches, see ``matrix_peak``; adds FLOP/s of the limit, and its percentage.

    Returns:
        list of rows (dicts). Times are medians and quartiles in ms; a ratio is the median over pairs of neighbouring
        calls. Hours are those of the paper's whole training or attack at this speed.
    """
    seconds, memory = time_in_turn(measures, device, repeats, label)
    rows, limit = [], measures[0]
    for measure in measures:
        times = pd.Series(seconds[measure.name])
        low, median, high = 1e3 * times.quantile([0.25, 0.5, 0.75])
        row = {"precision, batch": label, "measure": measure.name, "ms": median, "ms 25 %": low, "ms 75 %": high}
        row |= {"images/s": measure.images / measure.steps / median * 1e3, "peak MiB": memory[measure.name]}
        if measure is not limit:
            row["ratio"] = (times / pd.Series(seconds[limit.name])).median()
        elif peak:
            flops = count_flops(measure.ready()) / measure.steps / median * 1e3
            row |= {"TFLOP/s": flops / 1e12, "% of matrix peak": 100 * flops / peak}
        if measure.name in PAPER:
            row["the paper's, extrapolated (h)"] = PAPER[measure.name] / row["images/s"] / 3600
        rows.append(row)
        ratio = f"{row['ratio']:.3f} of {limit.name}" if "ratio" in row else ""
        print(f"{label:8} {measure.name:44} {median:9.1f} ms ({low:.1f} .. {high:.1f})  {ratio}")
    return rows


def time_in_turn(measures, device, repeats, label):
    """Call all measures once, then again, and so on.

    Returns:
        {name: seconds of each timed call's step}, {name: peak memory of the last call in MiB}.
    """
    seconds, memory = {measure.name: [] for measure in measures}, {}
    warm_up = repeats > 1 or device.type == "cuda"  # on a CPU, what is timed only once takes long
    with progress(total=(warm_up + repeats) * len(measures), desc=label, leave=False) as bar:
        for repeat in range(warm_up + repeats):
            for measure in measures:
                bar.set_postfix_str(measure.name)
                call = measure.ready()
                reset_peak_memory(device)
                passed = clock(call, device) / measure.steps
                memory[measure.name] = peak_memory(device)
                if repeat >= warm_up:
                    seconds[measure.name].append(passed)
                bar.update()
    return seconds, memory


def clock(call, device):
    """Seconds that a call takes, by the device's own clock on a GPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # exists on Linux only
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """MiB since the last reset: allocated on a GPU, else of the whole process (nan except on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    return float("nan")


def count_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matrix_peak(device, precision):
    """FLOP/s of a product of two large matrices; on a GPU "fp32" is TF32, as in its convolutions."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    for size in (8192,) if device.type == "cuda" else (256, 512, 1024, 2048):
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        best = min(clock(partial(torch.matmul, a, b), device) for _ in range(12))
        if best > 0.05:  # large enough; a processor that emulates bfloat16 would take minutes for the largest
            break
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * size**3 / best


# --- what is measured ------------------------------------------------------------------------------------------------
# Each function returns a group of measures, their limit first.


def first_pass(root, size):
    """Loading of all images from their files; limit: decoding and resizing by Pillow on all cores."""
    files = sorted(root.rglob("*.jpg"))

    def read(file):
        with Image.open(file) as image:
            return np.asarray(image.convert("L").resize(size[::-1], Image.Resampling.BILINEAR))

    def bare():
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(read, files))

    return [
        Timed(f"bare decoding of {len(files)} images", bare, len(files)),
        Timed("loading, first pass", lambda: Cephalograms(root, "train", size), len(files)),
    ]


def map_shape(image):
    return len(image), 3, len(LANDMARKS), *image.shape[-2:]


def frozen(model, image, precision, compiled):
    """A copy of the model on the image's device, as test.py uses it."""
    model = freeze(place(copy.deepcopy(model), image.device, precision))
    return compile_anew(model, image) if compiled else model


def compile_anew(model, image):
    torch.compiler.reset()  # else the compiler gives up after some variants of the network
    return compile_network(model, image)


def repeated(name, call, image, prepare=None):
    """A Measure of one step; on a GPU of ten in sequence, since each is launched while the one before still runs."""
    steps = 10 if image.device.type == "cuda" else 1

    def calls(*prepared):
        for _ in range(steps):
            call(*prepared)

    return Timed(name, calls, len(image) * steps, steps, prepare)


def training_step(model, data, image, precision, compiled):
    """A step of train.py, and its parts; limit: forward, backward, and the optimizer's step."""
    device, batch_size = image.device, len(image)
    batches = in_batches(image_order(0, 0, len(data)), batch_size)
    images, landmarks = data.images[batches[0]], data.landmarks[batches[0]]
    points = landmarks.to(device)
    model = place(copy.deepcopy(model), device, precision, training=True)
    network = compile_anew(model, image) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)  # random gradients must not change the weights
    gradient = torch.rand(map_shape(image), device=device) / image.numel()

    def bare():
        optimizer.zero_grad()
        network(image).backward(gradient)
        optimizer.step()

    def step():
        goal = encode(landmarks.to(device, non_blocking=True), image.shape[-2:])
        train_step(network, optimizer, to_input(images, device), goal, batch_size)

    def load():
        for batch in batches:
            to_input(data.images[batch], device)

    return [
        repeated("bare training step", bare, image),
        repeated("training step", step, image),
        repeated("encoding", lambda: encode(points, image.shape[-2:]), image),
        Timed("loading, cached", load, len(data), len(batches)),
    ]


def neighbours(network, image):
    """Clean maps, and targets: half of the landmarks at the positions of their neighbours."""
    with torch.no_grad():
        clean = network(image).clone()
    targeted = torch.arange(len(LANDMARKS), device=image.device).expand(len(image), -1) < len(LANDMARKS) // 2
    return clean, decode(clean).roll(1, dims=1), targeted


def attack_step(network, image):
    """A step of the iterative attacks; limit: backward to the image, and forward."""
    clean, *targets = neighbours(network, image)
    gradient = torch.rand(map_shape(image), device=image.device)

    def forward():
        adversarial = image.detach().requires_grad_()
        return [network(adversarial)]

    def bare(maps):  # in the order of an attack's loop
        maps[0].backward(gradient)
        maps[:] = forward()

    def begun(name):
        iterations = run(ATTACKS[name], network, image, *targets, steps=10**9)
        next(iterations)
        return iterations

    return [
        repeated("bare forward, backward to the image", bare, image, forward),
        *(
            repeated(f"{name}, a step", next, image, partial(begun, name))
            for name in ("I-FGSM", "ATI-FGSM", "Vote-PGD")
        ),
        repeated("goal maps", lambda: goal_maps(clean, *targets), image),
    ]


def one_step_attack(network, image):
    """The attacks of one step; limit: forward, and forward, backward, forward."""
    _, *targets = neighbours(network, image)
    gradient = torch.rand(map_shape(image), device=image.device)

    def bare():
        adversarial = image.detach().requires_grad_()
        network(adversarial).backward(gradient)
        with torch.no_grad():
            network(image)
            network(image)

    def whole(name):
        last(run(ATTACKS[name], network, image, *targets))

    names = [name for name, attack in ATTACKS.items() if attack.steps == 1 and attack.loss]
    return [
        repeated("bare forward, forward, backward, forward", bare, image),
        *(repeated(f"{name}, from image to maps", partial(whole, name), image) for name in names),
    ]


def test_batch(network, data, image):
    """A batch of test.py, and its decoding; limit: forward."""
    batch, landmarks = data.images[: len(image)], data.landmarks[: len(image)].to(image.device)
    maps = torch.randn(map_shape(image), device=image.device)
    maps[:, 0] += 10 * encode(landmarks, image.shape[-2:]).heatmap

    @torch.inference_mode()
    def bare():
        network(image)

    @torch.inference_mode()
    def whole():
        decode(network(to_input(batch, image.device)))

    return [
        repeated("bare forward", bare, image),
        repeated("voting", lambda: decode(maps), image),
        repeated("test, from 8-bit images to landmarks", whole, image),
    ]


if __name__ == "__main__":
    command.run(main)
