"""Train the landmark detector.

    python train.py --tag baseline                              # the paper's: 800 x 640, 230 epochs, ImageNet encoder
    python train.py --tag small --size 200 160 --encoder-weights none --epochs 60 --batch-size 4 --schedule cosine
    python train.py --tag baseline --resume                     # with the same arguments: go on after a stop

Writes into runs/<tag>/: config.json, model_epoch_<e>.pth (weights), resume.pth, train_log.csv, train_log.png.
"""

import copy
import math
import time

import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import command
from command import InputError, positive_float, positive_int
from dataset import LANDMARKS, Cephalograms, available_splits, to_input
from eval import plot_training, predict, radial_errors, summarize
from model import LAMBDA, MIN_SIZE, UNet, compile_network, encode, freeze, load_weights, loss_terms, place
from runs import RUNS, check_same_config, checkpoint_path, make_folder, save_config, write

WARMUP = 0.05  # share of a cosine schedule in which the learning rate rises


def parse_arguments():
    parser = command.Parser("Train the landmark detector.")
    parser.add_argument("--tag", type=command.tag, required=True, help="name of the run: its files go to runs/TAG/")
    parser.add_argument("--data", default="data", help="folder with the ISBI 2015 data")
    parser.add_argument(
        "--size", type=positive_int, nargs=2, metavar=("H", "W"), default=[800, 640], help="px of the network input"
    )
    parser.add_argument("--epochs", type=positive_int, default=230, help="passes over the training images")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images a step")
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="learning rate of Adam")
    parser.add_argument(
        "--schedule", choices=["step", "cosine"], default="step", help="step: lr x 0.1 every 150 epochs, as the paper"
    )
    parser.add_argument(
        "--encoder-weights", default="imagenet", metavar="SOURCE", help="imagenet, none, or a VGG19 state dict's path"
    )
    parser.add_argument("--init", metavar="FILE", help="start from this checkpoint, of any input size, instead")
    parser.add_argument(
        "--checkpoint-every", type=positive_int, default=5, metavar="EPOCHS", help="write weights so often"
    )
    parser.add_argument("--resume", action="store_true", help="go on from runs/TAG/resume.pth, if it is there")
    command.add_compute_arguments(parser)
    args = parser.parse_args()
    if min(args.size) < MIN_SIZE:
        parser.error(f"--size: at least {MIN_SIZE} {MIN_SIZE}")
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


def main():
    args = parse_arguments()
    device = command.find_device(args.device)
    folder = RUNS / args.tag
    if folder.is_dir() and any(folder.iterdir()) and not args.resume:
        raise InputError(f"{folder}: this --tag has been used; add --resume to go on, or choose another")

    torch.manual_seed(args.seed)
    data = Cephalograms(args.data, "train", args.size)
    monitored = next((split for split in available_splits(args.data) if split != "train"), None)
    monitor = Cephalograms(args.data, monitored, args.size) if monitored else None
    config = {name: value for name, value in vars(args).items() if name != "resume"} | {"data_sha256": data.sha256}
    if (folder / "config.json").exists():
        check_same_config(folder / "config.json", config, ["device", "data", "compile"], "--tag")

    resume = folder / "resume.pth"
    from_scratch = not resume.exists()
    model = UNet(len(LANDMARKS), args.encoder_weights if from_scratch else "none")
    if args.init and from_scratch:
        load_weights(model, args.init)
    place(model, device, args.precision)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=1e-4, fused=True)
    shuffle = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(data, args.batch_size, shuffle=True, generator=shuffle, pin_memory=device.type == "cuda")
    first, rows = (0, []) if from_scratch else load_resume(resume, model, optimizer, shuffle)
    make_folder(folder)
    save_config(folder / "config.json", config, device)
    save_log(folder, rows, chart=True)  # a stop may have come between the last state and its log

    model.train()
    network = compile_network(model, to_input(data.images[: args.batch_size], device)) if args.compile else model
    bar = tqdm(total=args.epochs * len(data), initial=first * len(data), desc="training", unit="image")
    for epoch in range(first, args.epochs):
        start = time.perf_counter()
        total = torch.zeros(3, device=device)
        for step, (images, points, _, _) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch + (step + 0.5) / len(loader), args.lr, args.epochs, args.schedule)
            total += update(network, optimizer, images, points, device) * len(images)
            bar.update(len(images))
        cross_entropy, l1_x, l1_y = (total / len(data)).tolist()
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
        if not math.isfinite(row["loss"]):
            raise InputError(
                f"{folder}: the loss of epoch {epoch} is {row['loss']}; train under another --tag with a smaller --lr"
            )

        is_checkpoint = (epoch + 1) % args.checkpoint_every == 0 or epoch == args.epochs - 1
        if is_checkpoint:
            write(checkpoint_path(folder, epoch), lambda path: torch.save(model.state_dict(), path))
            if monitor:
                points = predict(freeze(copy.deepcopy(model)), monitor, args.batch_size, device)
                metrics = summarize(radial_errors(points, monitor).numpy()).loc["all"]
                row |= {"monitored_split": monitored} | metrics.to_dict()
        rows.append(row)
        write(resume, lambda path: save_resume(path, epoch + 1, rows, model, optimizer, shuffle))
        save_log(folder, rows, chart=is_checkpoint)
    bar.close()
    print(f"written to {folder}/")


def update(model, optimizer, images, points, device):
    """One step of training on a batch.

    Args:
        images: (B, H, W) uint8.
        points: (B, K, 2) float32 x, y in px.

    Returns:
        (3,) terms of the loss, as ``model.loss_terms``, mean over images and landmarks.
    """
    optimizer.zero_grad()
    goal = encode(points.to(device, non_blocking=True), images.shape[-2:])
    terms = loss_terms(model(to_input(images, device)), goal).mean((1, 2))
    (LAMBDA * terms[0] + terms[1] + terms[2]).backward()
    optimizer.step()
    return terms.detach()


def save_log(folder, rows, chart):
    """train_log.csv and, if wanted, its chart; nothing before the first epoch."""
    if rows:
        log = pd.DataFrame(rows)
        write(folder / "train_log.csv", lambda path: log.to_csv(path, index=False))
        if chart:
            write(folder / "train_log.png", lambda path: plot_training(log, path))


def save_resume(path, epoch, rows, model, optimizer, shuffle):
    """All that the next epoch depends on."""
    state = {"epoch": epoch, "rows": rows, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"shuffle": shuffle.get_state(), "random": torch.get_rng_state()}, path)


def load_resume(path, model, optimizer, shuffle):
    """Put the saved state back; return the epoch to go on with and the log's rows so far."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        shuffle.set_state(state["shuffle"])
        torch.set_rng_state(state["random"])
        return state["epoch"], state["rows"]
    except Exception as error:  # torch.load raises a dozen types on damaged files
        raise InputError(f"{path}: not a state to go on from ({type(error).__name__}); use another --tag") from None


if __name__ == "__main__":
    command.run(main)
