"""Train the landmark detector.

    python train.py --tag baseline                              # the paper's: 800 x 640, 230 epochs, ImageNet encoder
    python train.py --tag small --size 200 160 --encoder-weights none --epochs 60 --batch-size 4 --schedule cosine
    python train.py --tag baseline --resume                     # with the same arguments: continue after a stop
    python train.py --tag robust --adversarial --init runs/baseline/model_epoch_229.pth --lr 3e-4 --epochs 10
    torchrun --nproc-per-node 4 train.py --tag baseline         # on four GPUs, the same training up to rounding

A training can be resumed after any stop: its whole state is written with each checkpoint, on SIGTERM, and at the step
after which a minute has passed. Its random choices, the initial weights, the order of the images in each epoch and the
starts of attacks on them, follow from --seed. On SIGTERM it exits with status 143.

Writes into runs/<tag>/: config.json, model_epoch_<e>.pth (weights), resume.pth, train_log.csv, train_log.png.
"""

import copy
import math
import time
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

import numpy as np
import pandas as pd
import torch

from attack import last, pgd
from dataset import Cephalograms, check_disjoint, in_batches, to_input
from detectors import detector_of, training_terms
from eval import errors_on, metrics, warn_of_misfits
from model import MAX_SIZE, MIN_SIZE, OUTPUTS, UNet, compile_network, freeze, load_weights, place, total
from readers.layouts import available_splits
from readers.points import LANDMARKS
from support import command, distributed, figures
from support.checkpoints import checked, checkpoint_epochs, checkpoint_path, load_file, sha256, write_tensors
from support.command import bounded, half_grey_levels, positive_float, positive_int, progress
from support.distributed import is_main, world_size
from support.errors import InputError, Stopped
from support.files import RUNS, atomic, check_same_config, own_folder, read_config, results, save_config

SAVE_SECONDS = 60  # between writings of resume.pth, beside those at checkpoints and at SIGTERM
SAVED = ("epoch", "step", "terms", "seconds", "rows", "config")  # of the state, beside weights and moments
WARMUP = 0.05  # fraction of a cosine schedule in which the learning rate rises
side = bounded(int, range(MIN_SIZE, MAX_SIZE + 1).__contains__, f"a whole number from {MIN_SIZE} to {MAX_SIZE}")


def make_parser():
    parser = command.Parser("Train the landmark detector.")
    add = parser.add_argument
    add("--tag", type=command.tag, may_change=True, help="name of the run, in runs/TAG/ (default: the time)")
    command.add_data_arguments(parser)
    add("--size", type=side, nargs=2, metavar=("H", "W"), default=[800, 640], help="network input in px")
    add("--epochs", type=positive_int, default=230, may_change=True, help="passes over the training images")
    add("--batch-size", type=positive_int, default=8, help="images per step, of all processes together")
    add("--lr", type=positive_float, default=1e-3, help="learning rate of Adam")
    add("--schedule", choices=["step", "cosine"], default="step", help="step: lr x 0.1 every 150 epochs, as the paper")
    weights = "imagenet, none, or a file with the state dict of torchvision's vgg19"
    add("--encoder-weights", default="imagenet", metavar="SOURCE", help=weights)
    add("--encoder-batch-norm", action="store_true", help="VGG19-BN as encoder; the paper's is VGG19")
    add("--output", choices=OUTPUTS, default="voting", help="of the network, see docs/detectors.md")
    add("--init", metavar="FILE", help="start from this checkpoint, of any --size, not from --encoder-weights")
    text = "train on images that an attack moves away from the truth"
    add("--adversarial", action="store_const", const="untargeted", help=text)
    add("--epsilon", type=half_grey_levels, default=8.0, help="bound of these attacks, see test.py")
    add("--attack-steps", type=positive_int, default=1, help="their iterations, from a random start")
    add("--checkpoint-every", type=positive_int, default=5, metavar="EPOCHS", help="epochs between checkpoints")
    add("--resume", action="store_true", help="continue from runs/TAG/resume.pth, if it exists")
    command.add_compute_arguments(parser)
    return parser


def parse_arguments(parser, argv):
    args = parser.parse_args(argv)
    if not args.adversarial:
        parser.refuse(args, ("epsilon", "attack_steps"), "needs --adversarial")
    if args.batch_size < world_size():
        parser.error(f"--batch-size {args.batch_size}: fewer images than the {world_size()} processes")
    if args.compile and world_size() > 1:
        parser.error("--compile: not with several processes")
    if args.resume and args.tag is None:
        parser.error("--resume: needs the --tag of the run")
    if args.init:
        args.encoder_weights = "none"
    return args


@dataclass
class State:
    """All that the next step depends on; resume.pth holds it. Learning rate and order of images follow from it."""

    model: UNet
    optimizer: torch.optim.Adam
    epoch: int = 0
    step: int = 0  # within the epoch
    terms: torch.Tensor = field(default_factory=lambda: torch.zeros(3))  # of the loss, summed over the epoch's images
    seconds: float = 0.0  # spent on the epoch
    rows: list = field(default_factory=list)  # of the log
    config: dict = field(default_factory=dict)  # see config.json


# --- training --------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = make_parser()
    args = parse_arguments(parser, argv)
    distributed.start()
    if args.tag is None:
        args.tag = distributed.broadcast(datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        distributed.on_main(print, f"--tag {args.tag}")
    folder = RUNS / args.tag
    with distributed.guard():
        check_folder(folder)
    with distributed.held_by_main(own_folder(folder, "train.py", "--tag", "config.json", "checkpoint_every")):
        begin(args, parser, folder)
    distributed.on_main(print, f"written to {folder}/")


def begin(args, parser, folder):
    """Load everything, check it, and train."""
    with distributed.guard():
        device = command.find_device(args.device)
        if results(folder) and not args.resume:
            raise InputError(f"{folder}: this --tag is in use; add --resume to continue, or choose another")
        data, monitor = load_data(args)
        config = {name: value for name, value in vars(args).items() if name != "resume"} | {"data_sha256": data.sha256}
        if (folder / "config.json").exists():
            check_config(folder, read_config(folder / "config.json"), config, parser)
        state = initial_state(args, folder, device)
        check_config(folder, state.config or config, config, parser)  # config.json may be another run's
        resumed = (folder / "resume.pth").exists() and sha256(folder / "resume.pth")
    # nothing is written before all processes have the same
    distributed.require_equal(data=[data.sha256, monitor and monitor.sha256], state=resumed)
    state.config = config
    distributed.on_main(prepare_folder, folder, config, device, state, args)
    network = distributed.data_parallel(state.model, device)
    if args.compile:
        network = compile_network(state.model, to_input(data.images[: args.batch_size], device))
    with command.late_stop() as stop:
        train(network, state, data, monitor, args, device, folder, stop)
    errors = errors_on(as_detector(state, data), data, args.batch_size, device)
    distributed.on_main(warn_of_misfits, errors, data.ids)


def train(network, state, data, monitor, args, device, folder, stop):
    """The remaining epochs, until ``stop`` is set."""
    done = state.epoch * len(data) + min(state.step * args.batch_size, len(data))
    saved = time.monotonic()

    def pause():
        return distributed.any_process(stop.is_set() or time.monotonic() - saved > SAVE_SECONDS)

    with progress(total=args.epochs * len(data), initial=done, desc="training", unit="image") as bar:
        while state.epoch < args.epochs:
            bar.set_description(f"epoch {state.epoch}", refresh=False)
            finished = train_one_epoch(network, state, data, args, device, bar, pause)
            if finished:
                end_epoch(state, evaluate(state, monitor, args, device), len(data))
                bar.set_postfix({"last loss": f"{state.rows[-1]['loss']:.3f}"}, refresh=False)
            stopping = distributed.any_process(stop.is_set())
            if stopping or not finished or is_checkpoint(state.epoch - 1, args):
                with distributed.guard():
                    save(state, folder, args)
                saved = time.monotonic()
            if stopping:
                raise Stopped(f"stopped by SIGTERM in epoch {state.epoch}, step {state.step}; continue with --resume")


def train_one_epoch(network, state, data, args, device, bar, pause):
    """The remaining steps of an epoch, or those before ``pause()``; returns whether all are.

    The order of the images is random, and the same in every process and after any stop.
    """
    begin = time.perf_counter() - state.seconds
    batches = in_batches(np.random.default_rng([args.seed, state.epoch]).permutation(len(data)), args.batch_size)
    finished, detector = True, detector_of(state.model, data.images.shape[-2:])
    for batch in batches[state.step :]:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.epoch + (state.step + 0.5) / len(batches), args)
        mine = distributed.shard(batch)
        image = to_input(data.images[mine], device)
        landmarks = data.landmarks[mine].to(device, non_blocking=True)
        if args.adversarial:
            rngs = [np.random.default_rng([args.seed, state.epoch, i]) for i in mine]
            image = attack_images(detector, image, landmarks, rngs, args)
        state.terms += train_step(network, detector, state.optimizer, image, landmarks, len(batch))
        state.step += 1
        bar.update(len(batch))
        if pause():
            finished = False
            break
    distributed.all_reduce(state.terms)
    if not finished:
        state.terms *= is_main()  # other processes add their images to the sum so far
    getattr(torch, device.type).synchronize()
    state.seconds = time.perf_counter() - begin
    return finished


def train_step(network, detector, optimizer, image, landmarks, batch_size):
    """One step of Adam on a batch.

    Args:
        network: the detector's, or what distributes or compiles it.
        image: (B, 3, H, W) float in [-1, 1], this process's part of the batch.
        landmarks: (B, K, 2) px, the truth.
        batch_size: number of images of the whole batch.

    Returns:
        (T,) terms of the loss, see ``detectors.training_terms``: mean over landmarks, sum over these images.
    """
    optimizer.zero_grad()
    terms = training_terms(detector, network(image), landmarks).mean(2).sum(1)
    (world_size() * total(terms) / batch_size).backward()  # gradients are averaged over processes
    optimizer.step()
    return terms.detach()


def attack_images(detector, image, landmarks, rngs, args):
    """The images of a batch, attacked from random starts; with one step, "fast" (Wong et al., arXiv 2001.03994).

    Args:
        detector: its network is attacked in evaluation mode, so that the statistics of its batch norms come from the
            training steps alone.
        image: (B, 3, H, W) float in [-1, 1].
        landmarks: (B, K, 2) px, the truth.
        rngs: a numpy random generator for each image, so that its attack depends on no other image.

    Returns:
        (B, 3, H, W)
    """
    bound, steps = args.epsilon / 256, args.attack_steps
    start, generator = image.new_empty(image.shape), torch.Generator(image.device)
    for noise, rng in zip(start, rngs, strict=True):
        noise.uniform_(-bound, bound, generator=generator.manual_seed(int(rng.integers(2**63))))
    step_size = 1.25 if steps == 1 else 2.5 / steps

    def loss(outputs):
        return -total(training_terms(detector, outputs, landmarks)).sum(-1)

    model = detector.network.eval()
    _, attacked, _ = last(pgd(model, image, loss, args.epsilon, steps, step_size, start=start, last_outputs=False))
    model.train()
    return attacked


def learning_rate(epoch, args):
    """Learning rate at an epoch, a real number.

    step: x 0.1 every 150 epochs (paper). cosine: linear warm-up, then a half cosine to zero at the last epoch.
    """
    if args.schedule == "step":
        return args.lr * 0.1 ** (int(epoch) // 150)
    warmup = WARMUP * args.epochs
    if epoch < warmup:
        return args.lr * epoch / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup)))


def is_checkpoint(epoch, args):
    return (epoch + 1) % args.checkpoint_every == 0 or epoch == args.epochs - 1


def evaluate(state, monitor, args, device):
    """{name: metric} on the monitored split after an epoch that gets a checkpoint; else, or without a split, empty."""
    if monitor is None or not is_checkpoint(state.epoch, args):
        return {}
    found = metrics(errors_on(as_detector(state, monitor), monitor, args.batch_size, device))
    return {"monitored_split": monitor.split} | found.loc["all"].to_dict()


def as_detector(state, data):
    """The network as it is, as a detectors.Detector of images."""
    return detector_of(freeze(copy.deepcopy(state.model)), data.images.shape[-2:])


def end_epoch(state, monitored, images):
    """Append the epoch's row to the log and advance the state to the next epoch."""
    terms = (state.terms / images).tolist()
    row = {
        "epoch": state.epoch,
        "loss": total(terms),
        **(dict(zip(("heatmap_bce", "offset_x_l1", "offset_y_l1"), terms, strict=True)) if len(terms) == 3 else {}),
        "lr": state.optimizer.param_groups[0]["lr"],
        "seconds": round(state.seconds, 2),
    }
    state.rows.append(row | monitored)
    state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
    state.terms.zero_()


# --- starting and saving ---------------------------------------------------------------------------------------------


def check_folder(folder):
    """Raise InputError where the run's folder has weights, but cannot be resumed."""
    epochs = checkpoint_epochs(folder)
    if epochs and not (folder / "resume.pth").exists():
        raise InputError(
            f"{folder}: has checkpoints but no resume.pth, so it cannot be resumed; choose another --tag, and "
            f"--init {checkpoint_path(folder, epochs[-1])} to start from its weights"
        )


def initial_state(args, folder, device):
    """The state of a new run, or the one that resume.pth holds."""
    torch.manual_seed(args.seed)
    resume = folder / "resume.pth"
    new = not resume.exists()
    source = args.encoder_weights if new and is_main() else "none"  # data_parallel copies the main process's weights
    model = UNet(len(LANDMARKS), source, args.encoder_batch_norm, args.output)
    if args.init and new and is_main():
        load_weights(model, args.init)
    place(model, device, args.precision, training=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=1e-4, fused=True)
    state = State(model, optimizer, terms=torch.zeros(3 if args.output == "voting" else 1))
    if not new:
        load_state(state, resume)
    state.terms = state.terms.to(device) * is_main()  # other processes add their images to the sum so far
    return state


def load_data(args):
    """The training images, and those of the first test split that exists, or None, for monitoring."""
    options = {name: getattr(args, name) for name in ("mm_per_px", "unusual")}
    load = partial(Cephalograms, args.data, size=args.size, progress=command.loading_bar, **options)
    monitored = next((split for split in available_splits(args.data) if split != "train"), None)
    data, monitor = load("train"), monitored and load(monitored)
    if monitor:
        check_disjoint(data, monitor)
    return data, monitor


def prepare_folder(folder, config, device, state, args):
    save_config(folder / "config.json", config, device, update=["epochs"])
    files = checkpoint_path(folder, state.epoch - 1), folder / "train_log.csv"
    if not all(file.exists() for file in files):  # a kill may have come after resume.pth
        save_results(state, folder, args)


def check_config(folder, kept, config, parser):
    """Raise InputError where the run was begun with other arguments; --epochs may only grow, on a schedule of steps."""
    check_same_config(folder / "config.json", config, parser.defaults(), parser.may_change, "--tag", kept)
    epochs, cosine = kept.get("epochs", config["epochs"]), config["schedule"] == "cosine"
    if epochs > config["epochs"] or (cosine and epochs < config["epochs"]):
        new = f", where --schedule cosine ends; else --init {checkpoint_path(folder, epochs - 1)} for a new --tag"
        more = new if cosine else " or more"
        raise InputError(f"{folder}: was begun with --epochs {epochs}; --resume takes as many{more}")


def save(state, folder, args):
    """Write the checkpoint, resume.pth and the log, unless the training has diverged."""
    if not all(value.isfinite().all() for value in state.model.state_dict().values()):
        diverged = "weights or statistics are nan or inf, the training has diverged; what was saved before is kept"
        raise InputError(f"{folder}: {diverged}; use another --tag and a smaller --lr")
    if not is_main():
        return
    content = {name: getattr(state, name) for name in SAVED} | {"terms": state.terms.cpu()}
    content |= {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    write_tensors(folder / "resume.pth", content)  # first: checkpoints without a state cannot be resumed
    save_results(state, folder, args)


def save_results(state, folder, args):
    """After an epoch that gets them, its checkpoint and the chart of the log; the log, if an epoch is finished."""
    if state.rows:
        log = pd.DataFrame(state.rows)
        with atomic(folder / "train_log.csv") as temporary:
            log.to_csv(temporary, index=False)
        if state.step == 0 and is_checkpoint(state.epoch - 1, args):
            figures.plot_training(log, folder / "train_log.png")
            # last, so that ``prepare_folder`` need not look for the chart
            write_tensors(checkpoint_path(folder, state.epoch - 1), state.model.state_dict())


def load_state(state, path):
    """Read resume.pth into a state.

    Raises:
        InputError: not such a file, or damaged.
    """
    try:
        content = load_file(path)
        state.model.load_state_dict(checked(path, content["model"], state.model.state_dict()))
        state.optimizer.load_state_dict(content["optimizer"])
        for weight, moments in state.optimizer.state.items():  # they may come from another memory layout
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(weight, requires_grad=False).copy_(moments[name])
        for name in SAVED:
            if type(content[name]) is not type(getattr(state, name)):
                raise TypeError(name)
            setattr(state, name, content[name])
    except Exception as error:  # of many types
        raise InputError(f"{path}: not the state of a training ({error!r:.200}); use another --tag") from None


if __name__ == "__main__":
    command.run(main)
