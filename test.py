"""Test a trained detector, or attack it.

    python test.py --tag baseline --iteration 229                                    # accuracy
    python test.py --tag baseline --iteration 229 --attack 1 --rand temp             # ATI-FGSM
    python test.py --tag baseline --attack 0 1 --targets shift --epsilon 8           # compared, on displacements

Writes into runs/<tag>/<rand>/: config.json, predictions.csv, summary.csv, pictures/, for an attack also charts and
records/, from which the same command goes on after a stop.
"""

import argparse
import hashlib

import pandas as pd
import torch
from tqdm import tqdm

import command
from attack import ATTACKS, ONE_STEP, UNTARGETED, choose_targets, goal_maps, grey_model
from command import InputError, natural_int, positive_float, positive_int
from dataset import LANDMARKS, SPLITS, Cephalograms, rescale, to_input
from eval import (
    draw,
    plot_attack,
    predict,
    radial_errors,
    record,
    record_attack,
    summarize,
    summarize_attack,
    to_px0,
)
from model import MIN_SIZE, UNet, compile_network, decode, encode, freeze, load_weights, place
from runs import (
    check_same_config,
    checkpoint_epochs,
    checkpoint_path,
    make_folder,
    read_config,
    run_folder,
    save_config,
    write,
)

RECORDED = (0, 1, 20, 50, 99, 150, 200, 250, 299)  # iterations reported, as in the paper, and the last


def attack_name(text):
    """An attack by its number (0: I-FGSM, 1: ATI-FGSM, as in the 2020 code) or name."""
    names = list(ATTACKS)
    by_text = {str(i): name for i, name in enumerate(names)} | {name.lower(): name for name in names}
    if text.lower() not in by_text:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(by_text)}")
    return by_text[text.lower()]


def parse_arguments():
    parser = command.Parser("Test a trained detector, or attack it.")
    parser.add_argument("--tag", type=command.tag, required=True, help="name of the run: runs/TAG/")
    parser.add_argument(
        "--iteration", type=natural_int, metavar="EPOCH", help="checkpoint of this epoch (default: the newest)"
    )
    parser.add_argument("--data", default="data", help="folder with the ISBI 2015 data")
    parser.add_argument("--split", choices=SPLITS, default="test", help="test: what there is of test1 and test2")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images (default: all)")
    parser.add_argument(
        "--rand",
        type=command.subfolder,
        metavar="DIR",
        help="output folder below runs/TAG/ (default: named by what is done)",
    )
    parser.add_argument(
        "--attack",
        type=attack_name,
        nargs="+",
        metavar="METHOD",
        help=f"attack, by one method or several: {', '.join(f'{i} or {name}' for i, name in enumerate(ATTACKS))}",
    )
    parser.add_argument(
        "--targets",
        default="random",
        metavar="SOURCE",
        help="random (the paper's protocol), shift (displacements), or a CSV file landmark,x,y in px of the original",
    )
    parser.add_argument("--shift-count", type=positive_int, default=5, metavar="N", help="landmarks moved by shift")
    parser.add_argument("--shift-mm", type=positive_float, default=8.0, metavar="MM", help="how far shift moves them")
    parser.add_argument(
        "--epsilon", type=positive_float, default=8.0, help="bound of the noise in half grey levels (8: 4 of 255)"
    )
    parser.add_argument("--steps", type=positive_int, default=300, help="iterations of I-FGSM and ATI-FGSM")
    parser.add_argument("--grey", action="store_true", help="the same noise in all three channels")
    parser.add_argument("--batch-size", type=positive_int, default=4, help="images at once")
    parser.add_argument("--pictures", type=natural_int, default=4, metavar="N", help="draw the first N images")
    command.add_compute_arguments(parser)
    args = parser.parse_args()
    if args.shift_count > len(LANDMARKS):
        parser.error(f"--shift-count: there are {len(LANDMARKS)} landmarks")
    return args


def main():
    args = parse_arguments()
    device = command.find_device(args.device)
    run = run_folder(args.tag)
    epoch, checkpoint = find_checkpoint(run, args.iteration)
    size = read_size(run / "config.json")
    model = UNet(len(LANDMARKS))
    load_weights(model, checkpoint)
    freeze(place(model, device, args.precision))
    data = Cephalograms(args.data, args.split, size, args.limit)

    what = "attack" if args.attack else "test"
    out = run / (args.rand or f"{what}_{args.split}_{epoch}")
    config = vars(args) | {"iteration": epoch, "size": size}
    config |= {"checkpoint_sha256": sha256(checkpoint), "data_sha256": data.sha256}
    if args.attack:
        targets = choose_targets(args.targets, data, args.seed, args.shift_count, args.shift_mm)
        config["targets_sha256"] = hashlib.sha256(targets.numpy().tobytes()).hexdigest()
    if (out / "config.json").exists():
        same_results = ["device", "data", "batch_size", "rand", "pictures", "compile"]
        check_same_config(out / "config.json", config, same_results, "--rand")
    make_folder(out / "pictures")
    if args.attack:
        make_folder(out / "records")
    save_config(out / "config.json", config, device)

    if args.compile:
        model = compile_network(model, to_input(data.images[: args.batch_size], device))
    if args.attack:
        attack(args, model, data, targets, device, out)
    else:
        test(args, model, data, device, out)
    print(f"written to {out}/")


def find_checkpoint(run, epoch):
    """(epoch, path) of the checkpoint wanted, of the newest for None."""
    epochs = checkpoint_epochs(run)
    if not epochs:
        raise InputError(f"{run}: no checkpoint model_epoch_<e>.pth yet; go on training by train.py --resume")
    if epoch is None:
        epoch = max(epochs)
    path = checkpoint_path(run, epoch)
    if epoch not in epochs:
        raise InputError(f"{path}: no such checkpoint; --iteration takes one of: {', '.join(map(str, epochs))}")
    return epoch, path


def read_size(path):
    """The (H, W) in px that a run was trained at."""
    size = read_config(path).get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n >= MIN_SIZE for n in size)):
        raise InputError(f'{path}: not the configuration of a run: "size" should be two numbers of px')
    return tuple(size)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test(args, model, data, device, out):
    """Accuracy on a split: predictions.csv, summary.csv, pictures."""
    points = predict(model, data, args.batch_size, device)
    errors = radial_errors(points, data)
    table = record(data.ids, to_px0(points, data).numpy(), data.landmarks_px0.numpy())
    table["radial_error_mm"] = errors.numpy().ravel()
    write(out / "predictions.csv", lambda path: table.to_csv(path, index=False, float_format="%.3f"))
    for i in range(min(args.pictures, len(data))):
        image = to_input(data.images[i : i + 1], "cpu")[0].numpy()
        title = f"{data.ids[i]}, MRE {errors[i].mean():.2f} mm"
        picture = out / "pictures" / f"{data.ids[i]}.png"
        write(picture, lambda path: draw(path, title, image, data.landmarks[i].numpy(), points[i].numpy()))
    summary = summarize(errors.numpy()).rename_axis("landmark")
    summary.insert(0, "name", [*LANDMARKS, "all landmarks"])
    write(out / "summary.csv", lambda path: summary.to_csv(path, float_format="%.3f"))
    print(summary.to_string(float_format="%.2f"))


def attack(args, model, data, targets_px0, device, out):
    """Attack every image by every method on the same targets (N, K, 2) px0, nan for stationary landmarks.

    The record of an image is written as soon as its batch is done, and what has a record is not attacked again.
    """
    size = data.images.shape[-2:]
    targets = rescale(targets_px0, data.sizes[:, None], size).float()
    methods = list(dict.fromkeys(args.attack))
    steps = {method: 1 if method in ONE_STEP else args.steps for method in methods}
    if args.grey:
        model = grey_model(model)

    def record_file(method, i):
        return out / "records" / f"{method}_{data.ids[i]}.csv"

    def picture_file(method, i):
        return out / "pictures" / f"{data.ids[i]}_{method}.png"

    def is_done(method, i):
        return record_file(method, i).exists() and (i >= args.pictures or picture_file(method, i).exists())

    todo = {method: [i for i in range(len(data)) if not is_done(method, i)] for method in methods}
    batches = [(method, batch) for method in methods for batch in in_batches(todo[method], args.batch_size)]
    bar = tqdm(total=sum(steps[method] * len(batch) for method, batch in batches), desc="attacking", unit="step")
    for method, batch in batches:
        ids = [data.ids[i] for i in batch]
        bar.set_description(f"{method} on {', '.join(ids)}" if len(ids) < 5 else f"{method} on {ids[0]} .. {ids[-1]}")
        image = to_input(data.images[batch], device)
        if args.grey:
            image = image[:, :1]
        with torch.no_grad():
            clean = model(image)
        if method == UNTARGETED:
            aims_px0 = None
            goal = encode(decode(clean), size)
        else:
            aims_px0 = targets_px0[batch].numpy()
            aims = targets[batch].to(device)
            goal = goal_maps(clean, aims.nan_to_num(), ~aims.isnan().any(-1))
        options = {} if method in ONE_STEP else {"steps": args.steps}

        found = {}  # landmarks at each recorded iteration, left on the device: nothing in this loop waits for it
        for iteration, adversarial, maps in ATTACKS[method](model, image, goal, args.epsilon, **options):
            bar.update(len(batch) if iteration else 0)
            if iteration in RECORDED or iteration == steps[method]:
                found[iteration] = decode(maps)

        truth_px0, tables = data.landmarks_px0[batch].numpy(), []
        for iteration, points in found.items():
            points_px0 = to_px0(points.cpu(), data, batch).numpy()
            tables.append(record_attack(ids, points_px0, truth_px0, aims_px0, method, iteration))
        moved = tables[-1][tables[-1]["role"] != "stationary"]
        bar.set_postfix({f"{moved['role'].iloc[0]} MRE": f"{moved['radial_error_mm'].mean():.1f} mm"})
        for b, i in enumerate(batch):
            if i < args.pictures:
                title = f"{ids[b]}, {method}, epsilon {args.epsilon:g}, iteration {iteration}"
                clean_image, attacked_image = image[b].expand(3, -1, -1), adversarial[b].expand(3, -1, -1)
                parts = [clean_image, data.landmarks[i], found[0][b], attacked_image, found[iteration][b]]
                parts += [] if method == UNTARGETED else [targets[i]]
                parts = [part.cpu().numpy() for part in parts]
                write(picture_file(method, i), lambda path: draw(path, title, *parts))
        for i, (_, rows) in zip(batch, pd.concat(tables).groupby("image", sort=False), strict=True):
            write(record_file(method, i), lambda path: rows.to_csv(path, index=False, float_format="%.4f"))
    bar.close()
    report_attack(out, [record_file(method, i) for method in methods for i in range(len(data))])


def in_batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def report_attack(out, files):
    """Gather the records of an attack: predictions.csv, summary.csv, charts."""
    table = pd.concat([pd.read_csv(file, dtype={"image": str}) for file in files])
    write(out / "predictions.csv", lambda path: table.to_csv(path, index=False, float_format="%.4f"))
    summary = summarize_attack(table)
    write(out / "summary.csv", lambda path: summary.to_csv(path, index=False, float_format="%.3f"))
    for name, column, label in [
        ("mre", "mre_mm", "MRE (mm)"),
        ("median", "median_mm", "median radial error (mm)"),
        ("within_4mm", "within_4mm_%", "within 4 mm (%)"),
    ]:
        write(out / f"{name}.png", lambda path: plot_attack(summary, column, label, path))
    print(summary.to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    command.run(main)
