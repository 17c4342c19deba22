"""Measure every part against the limit that the bare network sets; memory; a table.

    python benchmark.py                                                       # 800 x 640, batch 1, fp32
    python benchmark.py --size 200 160 --batch-size 1 4 --precision fp32 bf16 --weights runs/demo/model_epoch_7.pth
    python benchmark.py --only training attack --batch-size 1 8 16 --precision fp32 bf16 --compile

The limit is the same network, made ready in the same way, at the same size, batch and precision, with nothing around
it: forward, backward and, in training, the optimizer; no images to load, no maps to make, no loss, no attacker's step,
no votes. A measure and its limit take turns, after a call of each that is not timed. Images are phantoms, drawn on the
spot; weights are random unless --weights names some.

Writes into --out: table.csv, table.md, config.json.
"""

import contextlib
import copy
import io
import itertools
import os
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
from tqdm import tqdm

import command
from attack import ETA, ati_fgsm, choose_targets, fgsm, goal_maps, i_fgsm, untargeted_fgsm
from command import positive_int
from dataset import LANDMARKS, MM_PER_PX0, Cephalograms, in_batches, rescale, to_input
from eval import to_px0
from model import LAMBDA, MIN_SIZE, UNet, compile_network, decode, encode, freeze, load_weights, place, radius_of
from phantom import draw_patient, image_file
from runs import make_folder, save_config, write, write_text
from test import test
from train import image_order, update

PARTS = ("loading", "training", "attack", "test", "whole-test", "whole-attack")
PAPER = {"training step": 230 * 150, "I-FGSM, a step": 250 * 300, "ATI-FGSM, a step": 250 * 300}  # images x steps
PHANTOMS = 8  # different ones; the images are copies of them
EPSILON, STEPS, SHIFT_COUNT, SHIFT_MM = 16, 50, 5, 8.0  # of the whole attack
WHOLE_ATTACKS = 4  # images that are attacked, one by one


def parse_arguments():
    parser = command.Parser("Measure every part against the limit that the bare network sets.")
    parser.add_argument(
        "--size", type=positive_int, nargs=2, metavar=("H", "W"), default=[800, 640], help="px of the network input"
    )
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1], help="images at once, one or more")
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32"], help="one or both")
    command.add_device_arguments(parser)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="what to measure")
    parser.add_argument("--repeats", type=positive_int, default=15, help="timed calls; of the longest a fifth")
    parser.add_argument("--images", type=positive_int, default=150, metavar="N", help="how many to load and to test")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint to measure on (default: random weights)")
    parser.add_argument("--out", default="runs/benchmark", metavar="DIR", help="where the table goes")
    args = parser.parse_args()
    if min(args.size) < MIN_SIZE:
        parser.error(f"--size: at least {MIN_SIZE} {MIN_SIZE}")
    if args.images < max(args.batch_size):
        parser.error(f"--images {args.images}: a batch needs {max(args.batch_size)}")
    return args


def main():
    args = parse_arguments()
    device, out = command.find_device(args.device), Path(args.out)
    torch.manual_seed(0)
    model = UNet(len(LANDMARKS))
    if args.weights:
        load_weights(model, args.weights)
    make_folder(out)
    config = {**vars(args), "threads": torch.get_num_threads()}
    (out / "config.json").unlink(missing_ok=True)
    save_config(out / "config.json", config, device)
    rows = []

    def add(new_rows):  # what is measured is written at once
        rows.extend(new_rows)
        table = pd.DataFrame(rows)
        table.insert(0, "size", "{} x {}".format(*args.size))
        write(out / "table.csv", lambda path: table.to_csv(path, index=False, float_format="%.4g"))
        write_text(out / "table.md", to_markdown(table))

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_images(root, args.images)
        data = Cephalograms(root, "train", args.size)
        few = max(3, args.repeats // 5)
        if "loading" in args.only:
            add(report(first_pass(root, args.size), device, few))
        for precision, batch_size in itertools.product(args.precision, args.batch_size):
            setting = model, data, device, precision, batch_size, args.compile
            label, peak = f"{precision}, {batch_size}", matrix_peak(device, precision)
            if "training" in args.only:
                add(report(training_step(*setting), device, args.repeats, label, peak))
            if "attack" in args.only:
                add(report(attack_step(*setting), device, args.repeats, label, peak))
                add(report(one_step_attack(*setting), device, args.repeats, label))
            if "test" in args.only:
                add(report(test_batch(*setting), device, args.repeats, label, peak))
            if "whole-test" in args.only:
                add(report(whole_test(*setting, root), device, few, label))
        if "whole-attack" in args.only:
            add(whole_attack(model, data, device, args.precision))
    print(f"written to {out}/")


def to_markdown(table):
    rows = [["" if pd.isna(x) else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in table.values]
    return "".join(f"| {' | '.join(row)} |\n" for row in [table.columns, ["---"] * len(table.columns), *rows])


# --- measuring -------------------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    name: str
    call: Callable  # of no argument, or of what ``prepare`` returns
    images: int  # that a call deals with
    steps: int = 1  # that a call does; the time of one is reported
    prepare: Callable | None = None  # called before each call, and not timed

    def ready(self):
        """The call without arguments."""
        return self.call if self.prepare is None else partial(self.call, self.prepare())


def report(measures, device, repeats, label="", peak=None):
    """Time measures in turn and print their rows of the table. The first is the limit of the others.

    Args:
        repeats: timed calls of each.
        label: precision and batch size.
        peak: FLOP/s that the device can do; the limit's share of it is reported.

    Returns:
        rows (dicts). Times are medians and quartiles in ms; ratios are the medians of those of neighbouring calls.
        Hours are what the paper's whole training or attack would take at this pace.
    """
    seconds, memory = {measure.name: [] for measure in measures}, {}
    warm_up = repeats > 1 or device.type == "cuda"  # on a CPU, what is done only once is long
    with tqdm(total=(warm_up + repeats) * len(measures), desc=label, leave=False) as bar:
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
    rows, limit = [], measures[0].name
    for measure in measures:
        times = pd.Series(seconds[measure.name])
        low, median, high = 1e3 * times.quantile([0.25, 0.5, 0.75])
        row = {"precision, batch": label, "measure": measure.name, "ms": median, "ms 25 %": low, "ms 75 %": high}
        row |= {"images/s": measure.images / measure.steps / median * 1e3, "peak MiB": memory[measure.name]}
        if measure.name != limit:
            row["ratio"] = (times / pd.Series(seconds[limit])).median()
        elif peak:
            call = measure.ready()
            with FlopCounterMode(display=False) as counter:
                call()
            row["TFLOP/s"] = counter.get_total_flops() / measure.steps / median / 1e9
            row["% of matrix peak"] = 1e14 * row["TFLOP/s"] / peak
        if measure.name in PAPER:
            row["the paper's, extrapolated (h)"] = PAPER[measure.name] / row["images/s"] / 3600
        rows.append(row)
        ratio = f"{row['ratio']:.3f} of {limit}" if "ratio" in row else ""
        print(f"{label:8} {measure.name:44} {median:9.1f} ms ({low:.1f} .. {high:.1f})  {ratio}")
    return rows


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
        with contextlib.suppress(OSError):  # there is none but on Linux
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """MiB since the last reset: allocated on a GPU, else of the whole process (nan but on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    return float("nan")


def matrix_peak(device, precision):
    """FLOP/s of a product of two large matrices; on a GPU "fp32" is TF32, as in its convolutions."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    for size in (8192,) if device.type == "cuda" else (256, 512, 1024, 2048):
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        best = min(clock(lambda: a @ b, device) for _ in range(12))
        if best > 0.05:  # large enough; a processor that imitates bfloat16 would take minutes for the largest
            break
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * size**3 / best


# --- what is measured ------------------------------------------------------------------------------------------------
# Each returns measures that belong together, their limit first.


def draw_images(root, count):
    """The official layout with ``count`` JPEG images for training, copies of a few phantoms."""
    ids = [f"{number:03d}" for number in range(1, count + 1)]
    for folder in ("RawImage/TrainingData", "AnnotationsByMD/400_senior", "AnnotationsByMD/400_junior"):
        (root / folder).mkdir(parents=True)
    for id in tqdm(ids[:PHANTOMS], "drawing", unit="image", leave=False):
        draw_patient((root, "train", id, 0))
        drawn = image_file(root, "train", id)
        Image.open(drawn).save(drawn.with_suffix(".jpg"), quality=95)
        drawn.unlink()
    for number, id in enumerate(ids[PHANTOMS:]):
        for file in list(root.rglob(f"{ids[number % PHANTOMS]}.*")):
            shutil.copy(file, file.with_stem(id))


def first_pass(root, size):
    """All images from their files, against their decoding and resizing by Pillow on all cores."""
    files = sorted(root.rglob("*.jpg"))

    def read(file):
        with Image.open(file) as image:
            return np.asarray(image.convert("L").resize(size[::-1], Image.Resampling.BILINEAR))

    def bare():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(read, files))

    return [
        Measure(f"bare decoding of {len(files)} images", bare, len(files)),
        Measure("loading, first pass", lambda: Cephalograms(root, "train", size), len(files)),
    ]


def map_shape(image):
    return len(image), 3, len(LANDMARKS), *image.shape[-2:]


def frozen(model, image, device, precision, compiled):
    """A copy of the model on the device, as test.py uses it."""
    model = freeze(place(copy.deepcopy(model), device, precision))
    return compile_anew(model, image) if compiled else model


def compile_anew(model, image):
    torch.compiler.reset()  # else the compiler gives up after some variants of the network
    return compile_network(model, image)


def repeated(name, call, batch_size, device, prepare=None):
    """A measure of one step: on a GPU of ten on end, since there each is launched while the last still runs."""
    steps = 10 if device.type == "cuda" else 1

    def calls(*prepared):
        for _ in range(steps):
            call(*prepared)

    return Measure(name, calls, batch_size * steps, steps, prepare)


def training_step(model, data, device, precision, batch_size, compiled):
    batches = in_batches(image_order(0, 0, len(data)), batch_size)
    images, points = data.images[batches[0]], data.landmarks[batches[0]]
    image, landmarks = to_input(images, device), points.to(device)
    model = place(copy.deepcopy(model), device, precision).train()
    network = compile_anew(model, image) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)  # random gradients must not spoil the weights
    gradient = torch.rand(map_shape(image), device=device) / image.numel()

    def bare():
        optimizer.zero_grad()
        network(image).backward(gradient)
        optimizer.step()

    def load():
        for batch in batches:
            to_input(data.images[batch], device)

    measure = partial(repeated, batch_size=batch_size, device=device)
    return [
        measure("bare training step", bare),
        measure("training step", lambda: update(network, optimizer, images, points, len(images), device)),
        measure("encoding", lambda: encode(landmarks, image.shape[-2:])),
        Measure("loading, cached", load, len(data), len(batches)),
    ]


def attack_goal(network, image):
    """Half of the landmarks are sent to their neighbours' places."""
    with torch.no_grad():
        clean = network(image).clone()
    landmarks = decode(clean)
    targeted = torch.arange(len(LANDMARKS), device=image.device).expand(len(image), -1) < len(LANDMARKS) // 2
    return partial(goal_maps, clean, landmarks.roll(1, dims=1), targeted)


def attack_step(model, data, device, precision, batch_size, compiled):
    image = to_input(data.images[:batch_size], device)
    network = frozen(model, image, device, precision, compiled)
    make_goal = attack_goal(network, image)
    goal, gradient = make_goal(), torch.rand(map_shape(image), device=device)

    def forward():
        adversarial = image.detach().requires_grad_()
        return [network(adversarial)]

    def bare(maps):  # backward, then forward, in the order of an attack's loop
        maps[0].backward(gradient)
        maps[:] = forward()

    def begun(attack):
        loop = attack(network, image, goal, steps=10**9)
        next(loop)
        return loop

    measure = partial(repeated, batch_size=batch_size, device=device)
    return [
        measure("bare forward, backward to the image", bare, prepare=forward),
        measure("I-FGSM, a step", next, prepare=partial(begun, i_fgsm)),
        measure("ATI-FGSM, a step", next, prepare=partial(begun, ati_fgsm)),
        measure("goal maps", make_goal),
    ]


def one_step_attack(model, data, device, precision, batch_size, compiled):
    image = to_input(data.images[:batch_size], device)
    network = frozen(model, image, device, precision, compiled)
    goal = attack_goal(network, image)()
    gradient = torch.rand(map_shape(image), device=device)

    def bare():
        adversarial = image.detach().requires_grad_()
        network(adversarial).backward(gradient)
        with torch.no_grad():
            network(image)

    def whole(attack):
        for _ in attack(network, image, goal):
            pass

    measure = partial(repeated, batch_size=batch_size, device=device)
    return [
        measure("bare forward, backward, forward", bare),
        measure("FGSM, from image to maps", partial(whole, fgsm)),
        measure("untargeted-FGSM, from image to maps", partial(whole, untargeted_fgsm)),
    ]


def test_batch(model, data, device, precision, batch_size, compiled):
    batch = data.images[:batch_size]
    image = to_input(batch, device)
    network = frozen(model, image, device, precision, compiled)
    maps = torch.randn(map_shape(image), device=device)
    maps[:, 0] += 10 * encode(data.landmarks[:batch_size].to(device), image.shape[-2:]).heatmap

    @torch.inference_mode()
    def bare():
        network(image)

    @torch.inference_mode()
    def whole():
        decode(network(to_input(batch, device)))

    measure = partial(repeated, batch_size=batch_size, device=device)
    return [
        measure("bare forward", bare),
        measure("voting", lambda: decode(maps)),
        measure("test, from 8-bit images to landmarks", whole),
    ]


def whole_test(model, data, device, precision, batch_size, compiled, root):
    """All images with tables and pictures as test.py writes them, against a forward pass of each."""
    image = to_input(data.images[:batch_size], device)
    network = frozen(model, image, device, precision, compiled)
    options = SimpleNamespace(batch_size=batch_size, pictures=4, subpixel=False)
    out = root / "out"

    @torch.inference_mode()
    def bare():
        for batch in data.images.split(batch_size):
            network(image[: len(batch)])

    def whole():
        shutil.rmtree(out, ignore_errors=True)  # what is there is not done again
        with contextlib.redirect_stdout(io.StringIO()):
            test(options, network, data, device, out)

    return [
        Measure(f"bare forward of {len(data)} images", bare, len(data)),
        Measure("test.py, tables and pictures included", whole, len(data)),
    ]


# --- a whole attack, and the plain way to do it ----------------------------------------------------------------------


def whole_attack(model, data, device, precisions):
    """Rows of the table: some images attacked by ATI-FGSM, one by one, as test.py does, against the plain way.

    Targets are displacements from the truth.
    """
    aims_px0 = choose_targets("shift", data, 0, SHIFT_COUNT, SHIFT_MM)
    aims = rescale(aims_px0, data.sizes[:, None], data.images.shape[-2:]).float()
    images = range(min(WHOLE_ATTACKS, len(data)))
    plain = copy.deepcopy(model).to(device).eval()
    reached = {}

    def measure(name, attack):
        def call():
            errors = []
            for i in images:
                targeted = ~aims[i].isnan().any(-1)
                maps = attack(to_input(data.images[[i]], device), aims[[i]].nan_to_num().to(device), targeted[None])
                distance = (to_px0(decode(maps).cpu(), data, [i])[0] - aims_px0[i]).norm(dim=-1)[targeted] * MM_PER_PX0
                errors.append(distance.mean())
            reached[name] = torch.stack(errors).mean().item()

        return Measure(name, call, len(images), len(images))

    def as_test_does(network, image, targets, targeted):
        with torch.no_grad():
            goal = goal_maps(network(image), targets, targeted.to(device))
        for _, _, maps in ati_fgsm(network, image, goal, EPSILON, STEPS):
            pass
        return maps

    def plainly(image, targets, targeted):
        return plain_attack(plain, image.contiguous(), targets, targeted)

    measures = [measure(f"ATI-FGSM, {STEPS} steps, the plain way", plainly)]
    for precision in precisions:
        network = freeze(place(copy.deepcopy(model), device, precision))
        measures.append(measure(f"ATI-FGSM, {STEPS} steps, {precision}", partial(as_test_does, network)))
    rows = report(measures, device, 1)
    for row, precision in zip(rows, ["fp32", *precisions], strict=True):
        row |= {"precision, batch": f"{precision}, 1", "targeted MRE (mm)": reached[row["measure"]]}
        print(f"{row['measure']}: targeted MRE {row['targeted MRE (mm)']:.2f} mm")
    return rows


def plain_attack(model, image, targets, targeted):
    """ATI-FGSM as one writes it first: one image, float32, weight gradients, full maps, a loop over landmarks.

    Returns:
        (1, 3, K, H, W) maps of the attacked image.
    """
    height, width = image.shape[-2:]
    radius = radius_of((height, width))
    with torch.no_grad():
        clean = model(image)[0]
    rows, columns = torch.meshgrid(torch.arange(height).to(clean), torch.arange(width).to(clean), indexing="ij")
    heatmaps, offsets, masks = [], [], []
    for k, (x, y) in enumerate(targets[0].tolist()):
        if targeted[0, k]:
            dx, dy = (x - columns) / radius, (y - rows) / radius
            masks.append((dx**2 + dy**2 < 1).to(clean))
            heatmaps.append(torch.exp(-(dx**2 + dy**2) / 2) * masks[k])
            offsets.append(torch.stack([dx, dy]))
        else:
            heatmaps.append(clean[0, k].sigmoid())
            masks.append((heatmaps[k] > 0.5).to(clean))
            offsets.append(clean[1:, k])

    epsilon = EPSILON / 256
    noise = torch.zeros_like(image)
    for _ in range(STEPS):
        adversarial = (image - noise).clamp(-1, 1).requires_grad_()
        maps = model(adversarial)[0]
        losses = []
        for k in range(len(masks)):
            loss = LAMBDA * F.binary_cross_entropy_with_logits(maps[0, k], heatmaps[k])
            for axis in (0, 1):
                difference = (maps[1 + axis, k] - offsets[k][axis]).abs() * masks[k]
                loss = loss + difference.sum() / masks[k].sum().clamp(min=1)
            losses.append(loss)
        mean = sum(loss.item() for loss in losses) / len(losses)
        model.zero_grad()
        sum(loss.item() / mean * loss for loss in losses).backward()
        noise = (noise + ETA * epsilon * adversarial.grad.sign()).clamp(-epsilon, epsilon)
    with torch.no_grad():
        return model((image - noise).clamp(-1, 1))


if __name__ == "__main__":
    command.run(main)
