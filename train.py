"""Train the landmark detector.

    python train.py --tag baseline                              # the paper's: 800 x 640, 230 epochs, ImageNet encoder
    python train.py --tag small --size 200 160 --encoder-weights none --epochs 60 --batch-size 4 --schedule cosine
    python train.py --tag baseline --resume                     # with the same arguments: go on after a stop
    torchrun --nproc-per-node 4 train.py --tag baseline         # on four GPUs, the same training

Any end may be followed by --resume. Nothing is random but the first weights and each epoch's order of images, both of
--seed. After SIGTERM the step is finished and saved, and the exit status is 143.

Writes into runs/<tag>/: config.json, model_epoch_<e>.pth (weights), resume.pth, train_log.csv, train_log.png.
"""

import copy
import math
import signal
import threading
import time

import numpy as np
import pandas as pd
import torch

import command
import distributed
from command import InputError, Stopped, is_main, positive_float, positive_int, progress, world_size
from dataset import LANDMARKS, Cephalograms, available_splits, in_batches, to_input
from eval import plot_training, predict, radial_errors, summarize
from model import LAMBDA, MIN_SIZE, UNet, compile_network, encode, freeze, load_file, load_weights, loss_terms, place
from runs import RUNS, check_same_config, checkpoint_path, make_folder, save_config, write, write_tensors

WARMUP = 0.05  # share of a cosine schedule in which the learning rate rises


def parse_arguments(argv):
    parser = command.Parser("Train the landmark detector.")
    parser.add_argument("--tag", type=command.tag, required=True, help="name of the run: its files go to runs/TAG/")
    parser.add_argument("--data", default="data", help="folder with the ISBI 2015 data")
    parser.add_argument(
        "--size", type=positive_int, nargs=2, metavar=("H", "W"), default=[800, 640], help="px of the network input"
    )
    parser.add_argument("--epochs", type=positive_int, default=230, help="passes over the training images")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images a step, of all processes together")
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="learning rate of Adam")
    parser.add_argument(
        "--schedule", choices=["step", "cosine"], default="step", help="step: lr x 0.1 every 150 epochs, as the paper"
    )
    parser.add_argument(
        "--encoder-weights", default="imagenet", metavar="SOURCE", help="imagenet, none, or a VGG19 state dict's path"
    )
    parser.add_argument("--encoder-batch-norm", action="store_true", help="batch norm in the encoder too: VGG19-BN")
    parser.add_argument("--init", metavar="FILE", help="start from this checkpoint, of any input size, instead")
    parser.add_argument(
        "--checkpoint-every", type=positive_int, default=5, metavar="EPOCHS", help="write weights so often"
    )
    parser.add_argument("--resume", action="store_true", help="go on from runs/TAG/resume.pth, if it is there")
    command.add_compute_arguments(parser)
    args = parser.parse_args(argv)
    if min(args.size) < MIN_SIZE:
        parser.error(f"--size: at least {MIN_SIZE} {MIN_SIZE}")
    if args.batch_size < world_size():
        parser.error(f"--batch-size {args.batch_size}: fewer images than the {world_size()} processes")
    if args.compile and world_size() > 1:
        parser.error("--compile: not with several processes")
    if args.init:
        args.encoder_weights = "none"
    return args


def learning_rate(epoch, lr, epochs, schedule):
    """Learning rate at an epoch, fractions of it included."""
    if schedule == "step":
        return lr * 0.1 ** (int(epoch) // 150)
    warmup = WARMUP * epochs
    if epoch < warmup:
        return lr * epoch / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def image_order(seed, epoch, count):
    """The order of images in an epoch, the same in every process and after any stop: (count,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def main(argv=None):
    args = parse_arguments(argv)
    distributed.start()
    with distributed.together():
        device = command.find_device(args.device)
        folder = RUNS / args.tag
        if folder.is_dir() and any(folder.iterdir()) and not args.resume:
            raise InputError(f"{folder}: this --tag has been used; add --resume to go on, or choose another")
        resume = folder / "resume.pth"
        from_scratch = not resume.exists()
        monitored = next((split for split in available_splits(args.data) if split != "train"), None)
        torch.manual_seed(args.seed)
        begins = from_scratch and is_main()  # the other processes get the first one's weights
        model = UNet(len(LANDMARKS), args.encoder_weights if begins else "none", args.encoder_batch_norm)
        if args.init and begins:
            load_weights(model, args.init)

        data = Cephalograms(args.data, "train", args.size)
        monitor = Cephalograms(args.data, monitored, args.size) if monitored else None
        config = {name: value for name, value in vars(args).items() if name != "resume"} | {"data_sha256": data.sha256}
        if (folder / "config.json").exists():
            check_same_config(folder / "config.json", config, ["device", "data", "compile"], "--tag")

        place(model, device, args.precision)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=1e-4, fused=True)
        state = {"epoch": 0, "step": 0, "terms": torch.zeros(3), "seconds": 0.0, "rows": []}
        if not from_scratch:
            state = load_resume(resume, model, optimizer)
    with distributed.together():  # before this, nothing has been written
        seen = data.sha256, monitor.sha256 if monitor else None
        distributed.check_same(data=seen, state_to_go_on_from=(state["epoch"], state["step"]))
        if is_main():
            make_folder(folder)
            save_config(folder / "config.json", config, device)
            save_log(folder, state["rows"], chart=True)  # a stop may have come between the last state and its log

    model.train()
    network = distributed.share_training(model, device)
    if args.compile:
        network = compile_network(model, to_input(data.images[: args.batch_size], device))
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    first, step, seconds, rows = (state[name] for name in ("epoch", "step", "seconds", "rows"))
    terms = state["terms"].to(device) * is_main()  # of the loss, summed over the epoch's images in this process

    def save(epoch, step):
        """All that the next step depends on. Learning rate and order of images follow from epoch and step."""
        passed = time.perf_counter() - start if step else 0.0
        state = {"epoch": epoch, "step": step, "terms": terms.cpu(), "seconds": passed, "rows": rows}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if is_main():
            write_tensors(resume, state)

    done = first * len(data) + step * args.batch_size
    bar = progress(total=args.epochs * len(data), initial=done, desc="training", unit="image")
    for epoch in range(first, args.epochs):
        start = time.perf_counter() - seconds
        batches = in_batches(image_order(args.seed, epoch, len(data)), args.batch_size)
        while step < len(batches):
            batch = batches[step]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch + (step + 0.5) / len(batches), args.lr, args.epochs, args.schedule)
            mine = distributed.share(batch)
            terms += update(network, optimizer, data.images[mine], data.landmarks[mine], len(batch), device)
            step += 1
            bar.update(len(batch))
            if distributed.any_of(stop.is_set()):
                distributed.add(terms)
                with distributed.together():
                    check_finite(model, terms.sum(), epoch, folder)
                    save(epoch, step)
                raise Stopped(f"stopped by SIGTERM in epoch {epoch}, step {step}; go on with --resume")
        cross_entropy, l1_x, l1_y = (distributed.add(terms) / len(data)).tolist()
        row = {
            "epoch": epoch,
            "loss": LAMBDA * cross_entropy + l1_x + l1_y,
            "heatmap_bce": cross_entropy,
            "offset_x_l1": l1_x,
            "offset_y_l1": l1_y,
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - start, 2),
        }
        bar.set_postfix(epoch=epoch, loss=f"{row['loss']:.3f}")

        is_checkpoint = (epoch + 1) % args.checkpoint_every == 0 or epoch == args.epochs - 1
        with distributed.together():
            check_finite(model, row["loss"], epoch, folder)
            if is_checkpoint and is_main():
                write_tensors(checkpoint_path(folder, epoch), model.state_dict())
            if is_checkpoint and monitor:
                save(epoch, step)  # monitoring may take minutes
        if is_checkpoint and monitor:
            points = predict(freeze(copy.deepcopy(model)), monitor.images, args.batch_size, device)
            metrics = summarize(radial_errors(points, monitor).numpy()).loc["all"]
            row |= {"monitored_split": monitored} | metrics.to_dict()
        rows.append(row)
        step, seconds = 0, 0.0
        terms.zero_()
        with distributed.together():
            save(epoch + 1, step)
            if is_main():
                save_log(folder, rows, chart=is_checkpoint)
        if epoch + 1 < args.epochs and distributed.any_of(stop.is_set()):
            raise Stopped(f"stopped by SIGTERM after epoch {epoch}; go on with --resume")
    bar.close()
    signal.signal(signal.SIGTERM, before)
    if distributed.any_of(stop.is_set()):
        raise Stopped("stopped by SIGTERM after the last epoch; training is finished")
    if is_main():
        print(f"written to {folder}/")


def update(model, optimizer, images, points, batch_size, device):
    """One step of training on a batch.

    Args:
        images: (B, H, W) uint8, this process's part of the batch.
        points: (B, K, 2) float32 x, y in px.
        batch_size: images of the whole batch.

    Returns:
        (3,) terms of the loss, as ``model.loss_terms``, mean over landmarks, sum over these images.
    """
    optimizer.zero_grad()
    goal = encode(points.to(device, non_blocking=True), images.shape[-2:])
    terms = loss_terms(model(to_input(images, device)), goal).mean(2).sum(1)
    loss = (LAMBDA * terms[0] + terms[1] + terms[2]) / batch_size
    (world_size() * loss).backward()  # of the processes' gradients the mean is taken
    optimizer.step()
    return terms.detach()


def check_finite(model, loss, epoch, folder):
    """Refuse to go on from, or to save, a training that has failed."""
    if not math.isfinite(loss) or not all(weight.isfinite().all() for weight in model.parameters()):
        raise InputError(
            f"{folder}: the loss of epoch {epoch} is {loss:g}, and weights of that epoch are no use; what was saved "
            "before is kept; train under another --tag with a smaller --lr"
        )


def save_log(folder, rows, chart):
    """train_log.csv and, if wanted, its chart; nothing before the first epoch."""
    if rows:
        log = pd.DataFrame(rows)
        write(folder / "train_log.csv", lambda path: log.to_csv(path, index=False))
        if chart:
            write(folder / "train_log.png", lambda path: plot_training(log, path))


def load_resume(path, model, optimizer):
    """Put the saved weights and optimizer back; return the rest of the state."""
    try:
        state = load_file(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return {name: state[name] for name in ("epoch", "step", "terms", "seconds", "rows")}
    except Exception as error:  # of any type, see load_file
        raise InputError(
            f"{path}: not a state to go on from, or damaged ({type(error).__name__}); use another --tag"
        ) from None


if __name__ == "__main__":
    command.run(main)
