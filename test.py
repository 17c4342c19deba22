"""Test a trained detector, or attack it.

    python test.py --tag baseline --iteration 229                                    # accuracy
    python test.py --tag baseline --iteration 229 --attack 1 --rand temp             # ATI-FGSM
    python test.py --tag baseline --attack 0 1 --targets shift --epsilon 8           # compared, on displacements
    python test.py --tag baseline --attack 1 --rand temp --save-adversarial          # attacked images as 8-bit PNG,
    python test.py --tag baseline --adversarial runs/baseline/temp/adversarial       # read back
    torchrun --nproc-per-node 4 test.py --tag baseline --attack 1 --rand temp        # on four GPUs, the same results

Writes into runs/<tag>/<rand>/: config.json, predictions.csv, summary.csv, pictures/, and records/, from which the same
command goes on after a stop; for an attack also charts and adversarial/.
"""

import argparse
import hashlib
from pathlib import Path

import pandas as pd
import torch

import command
import distributed
from adversarial import SIZES, find_in_memory, in_memory_file, read_back, save_adversarial, stored_file
from attack import ATTACKS, ONE_STEP, UNTARGETED, choose_targets, goal_maps, grey_model
from command import InputError, is_main, natural_int, positive_float, positive_int, progress
from dataset import LANDMARKS, SPLITS, Cephalograms, in_batches, rescale, to_input
from eval import (
    draw,
    plot_attack,
    read_records,
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
    write_table,
)

RECORDED = (0, 1, 5, 10, 20, 30, 50, 99, 150, 200, 250, 299)  # reported, as in the paper and more; the last too


def attack_name(text):
    """An attack by its number (0: I-FGSM, 1: ATI-FGSM, as in the 2020 code) or name."""
    names = list(ATTACKS)
    by_text = {str(i): name for i, name in enumerate(names)} | {name.lower(): name for name in names}
    if text.lower() not in by_text:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(by_text)}")
    return by_text[text.lower()]


def parse_arguments(argv):
    parser = command.Parser("Test a trained detector, or attack it.")
    parser.add_argument("--tag", type=command.tag, required=True, help="name of the run: runs/TAG/")
    parser.add_argument(
        "--iteration", type=natural_int, metavar="EPOCH", help="checkpoint of this epoch (default: the newest)"
    )
    parser.add_argument("--data", default="data", help="folder with the ISBI 2015 data")
    parser.add_argument("--split", choices=SPLITS, default="test", help="test: what there is of test1 and test2")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images (default: all)")
    parser.add_argument("--images", nargs="+", metavar="ID", help="only these images (default: all)")
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
    parser.add_argument(
        "--save-adversarial", action="store_true", help="also write the attacked images, as 8-bit PNG at both sizes"
    )
    parser.add_argument("--adversarial", metavar="DIR", help="test the attacked images of a folder adversarial/")
    parser.add_argument(
        "--subpixel", action="store_true", help="landmarks between pixels: the mean of the votes around the paper's"
    )
    parser.add_argument("--batch-size", type=positive_int, default=4, help="images at once, in each process")
    parser.add_argument("--pictures", type=natural_int, default=4, metavar="N", help="draw the first N images")
    command.add_compute_arguments(parser)
    args = parser.parse_args(argv)
    if args.shift_count > len(LANDMARKS):
        parser.error(f"--shift-count: there are {len(LANDMARKS)} landmarks")
    if args.attack and args.adversarial:
        parser.error("--adversarial: reads attacked images; leave --attack out")
    for name in ("grey", "save_adversarial"):
        if getattr(args, name) and not args.attack:
            parser.error(f"--{name.replace('_', '-')}: needs an --attack")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    distributed.start()
    with distributed.together():
        device = command.find_device(args.device)
        run = run_folder(args.tag)
        epoch, checkpoint = find_checkpoint(run, args.iteration)
        size, encoder_batch_norm = read_detector(run / "config.json")
        model = UNet(len(LANDMARKS), encoder_batch_norm=encoder_batch_norm)
        load_weights(model, checkpoint)
        freeze(place(model, device, args.precision))
        data = Cephalograms(args.data, args.split, size, args.limit, args.images)

        what = "attack" if args.attack else "read_back" if args.adversarial else "test"
        out = run / (args.rand or f"{what}_{args.split}_{epoch}")
        config = vars(args) | {"iteration": epoch, "size": size}
        config |= {"checkpoint_sha256": sha256(checkpoint), "data_sha256": data.sha256}
        if args.attack:
            targets = choose_targets(args.targets, data, args.seed, args.shift_count, args.shift_mm)
            config["targets_sha256"] = hashlib.sha256(targets.numpy().tobytes()).hexdigest()
        if args.adversarial:
            config["adversarial_sha256"] = sha256(find_in_memory(Path(args.adversarial)))
        if (out / "config.json").exists():
            same_results = ["device", "data", "batch_size", "rand", "pictures", "compile"]
            same_results += ["save_adversarial", "adversarial"]
            check_same_config(out / "config.json", config, same_results, "--rand")
    with distributed.together():
        distributed.check_same(configuration=config)
    if args.compile:
        model = compile_network(model, to_input(data.images[: args.batch_size], device))
    if args.adversarial:
        table = read_back(Path(args.adversarial), model, data, args.batch_size, device, args.subpixel)
    with distributed.together():  # before this, nothing has been written
        if is_main():
            make_folder(out)
            save_config(out / "config.json", config, device)

    if args.attack:
        attack(args, model, data, targets, device, out)
    elif args.adversarial:
        report_read_back(out, table)
    else:
        test(args, model, data, device, out)
    if is_main():
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


def read_detector(path):
    """The (H, W) in px that a run was trained at, and whether its encoder has batch norm."""
    config = read_config(path)
    size, encoder_batch_norm = config.get("size"), config.get("encoder_batch_norm", False)
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n >= MIN_SIZE for n in size)):
        raise InputError(f'{path}: not the configuration of a run: "size" should be two numbers of px')
    if not isinstance(encoder_batch_norm, bool):
        raise InputError(f'{path}: not the configuration of a run: "encoder_batch_norm" should be true or false')
    return tuple(size), encoder_batch_norm


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unfinished(out, methods, count, batch_size, files_of):
    """The batches in which something is not done, shared out among the processes.

    Batches are the same after a stop as before, since a result may depend on its company in the last bits.

    Args:
        count: number of images.
        files_of: function of method and image index to the files that are there when it is done.

    Returns:
        list of (method, batch of image indices, those of the batch that are not done).
    """
    there = set(out.rglob("*"))
    jobs = [
        (method, batch, [i for i in batch if not there.issuperset(files_of(method, i))])
        for method in methods
        for batch in in_batches(list(range(count)), batch_size)
    ]
    return distributed.share(distributed.agree([job for job in jobs if job[-1]]))


def test(args, model, data, device, out):
    """Accuracy on a split: a record of each image, from which a stopped test goes on, then tables; pictures."""

    def record_file(i):
        return out / "records" / f"{data.ids[i]}.csv"

    def picture_file(i):
        return out / "pictures" / f"{data.ids[i]}.png"

    def files_of(_, i):
        return [record_file(i), picture_file(i)] if i < args.pictures else [record_file(i)]

    todo = unfinished(out, ["test"], len(data), args.batch_size, files_of)
    for _, batch, missing in progress(todo, "testing", unit="batch", leave=False):
        with torch.inference_mode():
            points = decode(model(to_input(data.images[batch], device)), args.subpixel).cpu()
        table = record(
            [data.ids[i] for i in batch], to_px0(points, data, batch).numpy(), data.landmarks_px0[batch].numpy()
        )
        for i, found, (_, rows) in zip(batch, points, table.groupby("image", sort=False), strict=True):
            if i not in missing:
                continue
            if i < args.pictures:
                title = f"{data.ids[i]}, MRE {rows['radial_error_mm'].mean():.2f} mm"
                image = to_input(data.images[[i]], "cpu")[0].numpy()
                parts = image, data.landmarks[i].numpy(), found.numpy()
                write(picture_file(i), lambda path: draw(path, title, *parts))
            write_table(record_file(i), rows)
    distributed.wait()
    with distributed.together():
        if is_main():
            report_test(out, [record_file(i) for i in range(len(data))])


def report_test(out, files):
    """Gather the records of a test: predictions.csv, summary.csv."""
    table = read_records(files)
    write_table(out / "predictions.csv", table)
    errors = table["radial_error_mm"].to_numpy().reshape(len(files), len(LANDMARKS))
    summary = summarize(errors).rename_axis("landmark").reset_index()
    summary.insert(1, "name", [*LANDMARKS, "all landmarks"])
    write_table(out / "summary.csv", summary)
    print(summary.to_string(index=False, float_format="%.2f"))


def attack(args, model, data, targets_px0, device, out):
    """Attack every image by every method on the same targets (N, K, 2) px0, nan for stationary landmarks.

    The files of an image are written as soon as its batch is done, its record last; what has them all is not attacked
    again.
    """
    size = data.images.shape[-2:]
    targets = rescale(targets_px0, data.sizes[:, None], size).float()
    methods = list(dict.fromkeys(args.attack))
    steps = {method: 1 if method in ONE_STEP else args.steps for method in methods}
    victim = grey_model(model) if args.grey else model
    stored = out / "adversarial"

    def record_file(method, i):
        return out / "records" / f"{method}_{data.ids[i]}.csv"

    def picture_file(method, i):
        return out / "pictures" / f"{data.ids[i]}_{method}.png"

    def files_of(method, i):
        files = [stored_file(stored, method, size, data.ids[i]) for size in SIZES] if args.save_adversarial else []
        return [*files, record_file(method, i), *([picture_file(method, i)] if i < args.pictures else [])]

    todo = unfinished(out, methods, len(data), args.batch_size, files_of)
    total = sum(steps[method] * len(batch) for method, batch, _ in todo)
    bar = progress(total=total, desc="attacking", unit="step", disable=not todo)
    for method, batch, missing in todo:
        ids = [data.ids[i] for i in batch]
        names = ", ".join(ids) if len(ids) < 5 else f"{ids[0]} .. {ids[-1]}"
        bar.set_description(f"{method} on {names}")
        image = to_input(data.images[batch], device)
        if args.grey:
            image = image[:, :1]
        with torch.no_grad():
            clean = victim(image)
        if method == UNTARGETED:
            aims_px0 = None
            goal = encode(decode(clean), size)
        else:
            aims_px0 = targets_px0[batch].numpy()
            aims = targets[batch].to(device)
            goal = goal_maps(clean, aims.nan_to_num(), ~aims.isnan().any(-1))
        options = {} if method in ONE_STEP else {"steps": args.steps}

        # landmarks and greatest noise of each recorded iteration stay on the device: nothing in this loop waits
        found, noise = {}, {}
        for iteration, adversarial, maps in ATTACKS[method](victim, image, goal, args.epsilon, **options):
            bar.update(len(batch) if iteration else 0)
            if iteration in RECORDED or iteration == steps[method]:
                found[iteration] = decode(maps, args.subpixel)
                noise[iteration] = (adversarial - image).abs().amax((1, 2, 3))

        truth_px0, tables = data.landmarks_px0[batch].numpy(), []
        for iteration, points in found.items():
            points_px0, change = to_px0(points.cpu(), data, batch).numpy(), noise[iteration].cpu().numpy() * 127.5
            tables.append(record_attack(ids, points_px0, truth_px0, aims_px0, method, iteration, change))
        moved = tables[-1][tables[-1]["role"] != "stationary"]
        bar.set_postfix({f"{moved['role'].iloc[0]} MRE": f"{moved['radial_error_mm'].mean():.1f} mm"})
        for b, (i, (_, rows)) in enumerate(zip(batch, pd.concat(tables).groupby("image", sort=False), strict=True)):
            if i not in missing:
                continue
            if i < args.pictures:
                title = f"{ids[b]}, {method}, epsilon {args.epsilon:g}, iteration {iteration}"
                clean_image, attacked_image = image[b].expand(3, -1, -1), adversarial[b].expand(3, -1, -1)
                parts = [clean_image, data.landmarks[i], found[0][b], attacked_image, found[iteration][b]]
                parts += [] if method == UNTARGETED else [targets[i]]
                parts = [part.cpu().numpy() for part in parts]
                write(picture_file(method, i), lambda path: draw(path, title, *parts))
            if args.save_adversarial:
                save_adversarial(stored, method, data, i, adversarial[b])
            write_table(record_file(method, i), rows)
    bar.close()
    distributed.wait()
    with distributed.together():
        if is_main():
            table = report_attack(out, [record_file(method, i) for method in methods for i in range(len(data))])
            if args.save_adversarial:
                last = table["iteration"] == table["method"].map(steps)
                write_table(in_memory_file(stored), table[last])
    if args.save_adversarial:
        report_read_back(out, read_back(stored, model, data, args.batch_size, device, args.subpixel))


def report_attack(out, files):
    """Gather the records of an attack: predictions.csv, summary.csv, charts. Returns the predictions."""
    table = read_records(files)
    write_table(out / "predictions.csv", table)
    summary = summarize_attack(table)
    write_table(out / "summary.csv", summary)
    for name, column, label in [
        ("mre", "mre_mm", "MRE (mm)"),
        ("median", "median_mm", "median radial error (mm)"),
        ("within_4mm", "within_4mm_%", "within 4 mm (%)"),
    ]:
        write(out / f"{name}.png", lambda path: plot_attack(summary, column, label, path))
    print(summary.to_string(index=False, float_format="%.2f"))
    return table


def report_read_back(out, table):
    """What stored images do when they are read back, beside what they did in memory: read_back.csv and its summary."""
    with distributed.together():
        if is_main():
            write_table(out / "read_back.csv", table)
            summary = summarize_attack(table, by="stored")
            write_table(out / "read_back_summary.csv", summary)
            print(summary.to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    command.run(main)
