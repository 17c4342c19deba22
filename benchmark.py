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
import io
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from attack import STEP_SIZE, ati_fgsm, choose_targets, fgsm, goal_maps, i_fgsm, untargeted_fgsm, vote_goal, vote_pgd
from dataset import LANDMARKS, Cephalograms, cores, in_batches, rescale, to_input
from eval import to_px0
from experiments.markdown import markdown
from model import LAMBDA, MIN_SIZE, UNet, compile_network, decode, encode, freeze, load_weights, place, radius_of
from phantom import draw_patient, image_file
from support import command
from support.command import positive_int, progress
from support.files import atomic, make_folder, save_config, write_text
from test import run_attack, test
from train import image_order, train_step

PARTS = ("loading", "training", "attack", "test", "whole-test", "whole-attack")
PAPER = {"training step": 230 * 150, "I-FGSM, a step": 250 * 300, "ATI-FGSM, a step": 250 * 300}  # images x steps
PHANTOMS = 8  # are drawn; all further images are copies of them
ATTACKED = 4  # images of the whole attack
EPSILON, STEPS, SHIFT_COUNT, SHIFT_MM = 16, 50, 5, 8.0  # options of the whole attack


def make_parser():
    parser = command.Parser("Time and memory of every part, compared with the bare network.")
    parser.add_argument(
        "--size", type=positive_int, nargs=2, metavar=("H", "W"), default=[800, 640], help="network input in px"
    )
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1], help="images per batch, one or more")
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32"], help="one or both")
    command.add_device_arguments(parser)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="what to measure")
    parser.add_argument(
        "--repeats", type=positive_int, default=15, help="timed calls; a fifth as many for loading and whole-test"
    )
    parser.add_argument("--images", type=positive_int, default=150, metavar="N", help="images to load and to test")
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
    few = max(3, args.repeats // 5)
    if "loading" in args.only:
        yield report(first_pass(root, args.size), device, few)
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
        if "whole-test" in args.only:
            yield report(whole_test(network(), data, image, root / "out"), device, few, label)
    if "whole-attack" in args.only:
        yield whole_attack(model, data, device, args.precision)


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


class Measure(NamedTuple):
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
        measures: list of Measure.
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
        Measure(f"bare decoding of {len(files)} images", bare, len(files)),
        Measure("loading, first pass", lambda: Cephalograms(root, "train", size), len(files)),
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

    return Measure(name, calls, len(image) * steps, steps, prepare)


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
        Measure("loading, cached", load, len(data), len(batches)),
    ]


def attack_goal(network, image, make=goal_maps):
    """A function that makes goal maps: half of the landmarks are targeted at the positions of their neighbours."""
    with torch.no_grad():
        clean = network(image).clone()
    landmarks = decode(clean)
    targeted = torch.arange(len(LANDMARKS), device=image.device).expand(len(image), -1) < len(LANDMARKS) // 2
    return partial(make, clean, landmarks.roll(1, dims=1), targeted)


def attack_step(network, image):
    """A step of the iterative attacks; limit: backward to the image, and forward."""
    make_goal = attack_goal(network, image)
    goal, gradient = make_goal(), torch.rand(map_shape(image), device=image.device)

    def forward():
        adversarial = image.detach().requires_grad_()
        return [network(adversarial)]

    def bare(maps):  # in the order of an attack's loop
        maps[0].backward(gradient)
        maps[:] = forward()

    def begun(attack, goal=goal):
        iterations = attack(network, image, goal, steps=10**9)
        next(iterations)
        return iterations

    return [
        repeated("bare forward, backward to the image", bare, image, forward),
        repeated("I-FGSM, a step", next, image, partial(begun, i_fgsm)),
        repeated("ATI-FGSM, a step", next, image, partial(begun, ati_fgsm)),
        repeated("Vote-PGD, a step", next, image, partial(begun, vote_pgd, attack_goal(network, image, vote_goal)())),
        repeated("goal maps", make_goal, image),
    ]


def one_step_attack(network, image):
    """The attacks of one step; limit: forward, backward to the image, and forward."""
    goal = attack_goal(network, image)()
    gradient = torch.rand(map_shape(image), device=image.device)

    def bare():
        adversarial = image.detach().requires_grad_()
        network(adversarial).backward(gradient)
        with torch.no_grad():
            network(image)

    def whole(attack):
        for _ in attack(network, image, goal):
            pass

    return [
        repeated("bare forward, backward, forward", bare, image),
        repeated("FGSM, from image to maps", partial(whole, fgsm), image),
        repeated("untargeted-FGSM, from image to maps", partial(whole, untargeted_fgsm), image),
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


def whole_test(network, data, image, out):
    """All images with the tables and pictures of test.py; limit: forward of each."""
    args = SimpleNamespace(batch_size=len(image), pictures=4, subpixel=False, save_adversarial=False, defence=[])

    @torch.inference_mode()
    def bare():
        for batch in data.images.split(len(image)):
            network(image[: len(batch)])

    def whole():
        shutil.rmtree(out, ignore_errors=True)  # test.py does not repeat what exists
        with contextlib.redirect_stdout(io.StringIO()):
            test(args, network, data, image.device, out)

    return [
        Measure(f"bare forward of {len(data)} images", bare, len(data)),
        Measure("test.py, tables and pictures included", whole, len(data)),
    ]


# --- a whole attack --------------------------------------------------------------------------------------------------


def whole_attack(model, data, device, precisions, steps=STEPS):
    """Rows of the table: some images attacked by ATI-FGSM, one by one, by test.py; limit: ``plain_attack``.

    Targets are displacements from the ground truth.
    """
    targets_px0 = choose_targets("shift", data, 0, SHIFT_COUNT, SHIFT_MM)
    targets = rescale(targets_px0, data.sizes[:, None], data.images.shape[-2:]).float()
    images = list(range(min(ATTACKED, len(data))))
    mre_mm = {}

    def measure(name, attack, network):
        def call():
            maps = (attack(network, to_input(data.images[[i]], device), targets[[i]].to(device), steps) for i in images)
            points = torch.cat([decode(attacked).cpu() for attacked in maps])
            errors = (to_px0(points, data, images) - targets_px0[images]).norm(dim=-1) * data.mm_per_px0[images, None]
            mre_mm[name] = errors.nanmean().item()  # nan: stationary

        return Measure(name, call, len(images), len(images))

    plain = copy.deepcopy(model).to(device).eval()
    measures = [measure(f"ATI-FGSM, {steps} steps, the plain way", plain_attack, plain)]
    for precision in precisions:
        network = freeze(place(copy.deepcopy(model), device, precision))
        measures.append(measure(f"ATI-FGSM, {steps} steps, {precision}", attack_of_test, network))
    rows = report(measures, device, repeats=1)
    for row, precision in zip(rows, ["fp32", *precisions], strict=True):
        row |= {"precision, batch": f"{precision}, 1", "targeted MRE (mm)": mre_mm[row["measure"]]}
        print(f"{row['measure']}: targeted MRE {row['targeted MRE (mm)']:.2f} mm")
    return rows


def attack_of_test(network, image, targets, steps):
    """The same as ``plain_attack``, by test.py."""
    for _, _, maps in run_attack("ATI-FGSM", network, image, targets, EPSILON, steps):
        attacked = maps
    return attacked


def plain_attack(model, image, targets, steps):
    """A plain implementation of ATI-FGSM: one image, float32, weight gradients, full maps, loops over landmarks.

    Args:
        model: a ``UNet`` that is not frozen.
        image: (1, 3, H, W) float in [-1, 1].
        targets: (1, K, 2) x, y in px, nan for stationary landmarks.
        steps: iterations.

    Returns:
        (1, 3, K, H, W) maps of the attacked image.
    """
    image, bound = image.contiguous(), EPSILON / 256
    with torch.no_grad():
        goal = plain_goal(model(image)[0], targets[0].tolist())
    delta = torch.zeros_like(image)
    for _ in range(steps):
        adversarial = (image + delta).clamp(-1, 1).requires_grad_()
        losses = plain_losses(model(adversarial)[0], goal)
        mean = sum(loss.item() for loss in losses) / len(losses)
        model.zero_grad()
        sum(loss.item() / mean * loss for loss in losses).backward()
        delta = (delta - STEP_SIZE * bound * adversarial.grad.sign()).clamp(-bound, bound)
    with torch.no_grad():
        return model((image + delta).clamp(-1, 1))


def plain_goal(clean, targets):
    """For each landmark of clean maps (3, K, H, W) its goal: heatmap (H, W), offset (2, H, W), mask (H, W)."""
    height, width = clean.shape[-2:]
    radius = radius_of((height, width))
    rows, columns = torch.meshgrid(torch.arange(height).to(clean), torch.arange(width).to(clean), indexing="ij")
    goal = []
    for k, (x, y) in enumerate(targets):
        if math.isnan(x):
            heatmap, offset = clean[0, k].sigmoid(), clean[1:, k]
            mask = (heatmap > 0.5).to(clean)
        else:
            offset = torch.stack([x - columns, y - rows]) / radius
            squared = offset.square().sum(0)
            mask = (squared < 1).to(clean)
            heatmap = torch.exp(-squared / 2) * mask
        goal.append((heatmap, offset, mask))
    return goal


def plain_losses(maps, goal):
    """The loss of each landmark, maps (3, K, H, W)."""
    losses = []
    for k, (heatmap, offset, mask) in enumerate(goal):
        loss = LAMBDA * F.binary_cross_entropy_with_logits(maps[0, k], heatmap)
        for axis in (0, 1):
            difference = (maps[1 + axis, k] - offset[axis]).abs() * mask
            loss = loss + difference.sum() / mask.sum().clamp(min=1)
        losses.append(loss)
    return losses


if __name__ == "__main__":
    command.run(main)
