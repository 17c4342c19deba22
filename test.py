"""Test a trained detector, or attack it.

    python test.py --tag baseline --iteration 229                                    # accuracy
    python test.py --tag baseline --iteration 229 --attack 1 --rand temp             # ATI-FGSM; results in temp/
    python test.py --tag baseline --attack 0 1 --targets shift --epsilon 8           # compared, on displacements
    python test.py --tag baseline --attack 1 --rand temp --save-adversarial          # attacked images as PNG and JPEG,
    python test.py --tag other --adversarial temp/adversarial                        # tested on another detector
    python test.py --tag baseline --attack 1 4 --restarts 2 --rand strong            # Vote-PGD beside ATI-FGSM
    python test.py --tag baseline --attack 1 --targets diagnosis --measure ANB       # a diagnosis is changed, see docs/
    python test.py --tag baseline --attack 1 4 --defence jpeg:75 blur:1 --rand safe  # attackers who know of a defence
    python test.py --tag baseline --image mine.png --attack 1 --targets shift        # own images, without annotation
    torchrun --nproc-per-node 4 test.py --tag baseline --attack 1 --rand temp        # on four GPUs, the same results

Writes into the folder --rand (default: one below runs/<tag>/): config.json, predictions.csv, summary.csv, pictures/,
and records/, from which the same command resumes after a stop; measures.csv and diagnoses.csv, clinical measures and
how often their classes are right or changed; for an attack also line charts and adversarial/.
"""

import argparse
import hashlib
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from attack import (
    ATTACKS,
    BY_VOTES,
    ONE_STEP,
    UNTARGETED,
    choose_targets,
    generator,
    grey_model,
    make_goal,
    uniform_noise,
    universal_vote_pgd,
    vote_goal_at,
)
from dataset import LANDMARKS, SPLITS, Cephalograms, in_batches, read_targets, rescale, to_input
from defences import DEFENCES, DRAWS, confidence, defend, parse_defence
from diagnosis import NAMES, least_movement, reachable_classes
from eval import (
    SUCCESS_MM,
    changed_diagnoses,
    diagnose,
    draw,
    plot_attack,
    predict,
    predict_batches,
    radial_errors,
    read_records,
    record,
    summarize,
    summarize_attack,
    summarize_changes,
    summarize_diagnoses,
    to_px0,
)
from model import MIN_SIZE, UNet, compile_network, freeze, load_weights, place
from observe import (
    Observer,
    find_in_memory,
    in_memory_file,
    observe,
    observe_defended,
    save_adversarial,
    shown,
    stored_files,
)
from readers.tables import read_table
from support import command, distributed
from support.checkpoints import find_checkpoint, load_file, sha256, write_tensors
from support.command import half_grey_levels, natural_int, positive_float, positive_int, progress
from support.distributed import is_main
from support.errors import InputError
from support.files import (
    atomic,
    check_same_config,
    make_folder,
    read_config,
    run_folder,
    save_config,
    write_table,
)

UNIVERSAL = "universal-Vote-PGD"
NOISE = "noise"
METHODS = ("I-FGSM", "ATI-FGSM", "FGSM", "untargeted-FGSM", "Vote-PGD", UNIVERSAL, NOISE)  # by their numbers
METHODS += ("evasive-Vote-PGD", "random-search")


def attack_name(text):
    """An attack by its number (0: I-FGSM, 1: ATI-FGSM) or name."""
    by_text = {str(i): name for i, name in enumerate(METHODS)} | {name.lower(): name for name in METHODS}
    if text.lower() not in by_text:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(by_text)}")
    return by_text[text.lower()]


def defence(text):
    """A value of --defence."""
    try:
        parse_defence(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(error) from None
    return text


def class_or_any(text):
    """A value of --to."""
    return None if text == "any" else natural_int(text)


def make_parser():
    parser = command.Parser("Test a trained detector, or attack it.")
    parser.add_argument("--tag", type=command.tag, required=True, help="the run: runs/TAG/, as trained by train.py")
    parser.add_argument(
        "--iteration", type=natural_int, metavar="EPOCH", help="checkpoint to use, from 0 (default: the newest)"
    )
    command.add_data_arguments(parser)
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="images; test: test1 and test2, as far as present"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images (default: all)")
    parser.add_argument("--images", nargs="+", metavar="ID", help="only these images (default: all)")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="own images without annotation, instead of --data")
    parser.add_argument(
        "--rand", metavar="DIR", help="output folder (default: below runs/TAG/, named test, attack or read_back)"
    )
    add_attack_arguments(parser)
    parser.add_argument("--adversarial", metavar="DIR", help="test the images that --save-adversarial stored")
    parser.add_argument(
        "--defence",
        type=defence,
        nargs="+",
        metavar="NAME:NUMBER",
        help="transform the input first, and report accuracy, or attacks made with and without knowledge of it: "
        f"{', '.join(f'{name} ({valid})' for name, (*_, valid, _) in DEFENCES.items())}; see docs/defences.md",
    )
    parser.add_argument(
        "--subpixel", action="store_true", help="subpixel decoding: the mean of the votes near the winner"
    )
    parser.add_argument(
        "--batch-statistics",
        action="store_true",
        help="batch norms use the statistics of each image, as in the 2020 code, instead of those of the training",
    )
    parser.add_argument("--batch-size", type=positive_int, default=4, help="images per batch, in each process")
    parser.add_argument(
        "--pictures", type=natural_int, metavar="N", help="draw the first N images (default: 4, or every --image)"
    )
    command.add_compute_arguments(parser)
    return parser


def add_attack_arguments(parser):
    """Arguments of attacks and of attacked images that are stored."""
    parser.add_argument(
        "--attack",
        type=attack_name,
        nargs="+",
        metavar="METHOD",
        help=f"attack, by one method or several: {', '.join(f'{i} or {name}' for i, name in enumerate(METHODS))}; "
        "noise and random-search are the controls, one uniform draw and the best of --steps; see docs/attacks.md",
    )
    parser.add_argument(
        "--targets",
        default="random",
        metavar="SOURCE",
        help="random (the paper's protocol), shift (displacements, drawn for each image), common (displacements, one "
        "for all images), diagnosis (the least movement that changes the class by --measure and no other), or a CSV "
        "file [image,]landmark,x,y in px of the original",
    )
    parser.add_argument("--measure", choices=NAMES, help="whose class is to change, see docs/diagnoses.md")
    parser.add_argument(
        "--to", type=class_or_any, metavar="CLASS", help="the class that it should become (default: any other)"
    )
    parser.add_argument(
        "--shift-count", type=positive_int, default=5, metavar="N", help="landmarks that shift and common target"
    )
    parser.add_argument("--shift-mm", type=positive_float, default=8.0, metavar="MM", help="their displacement")
    parser.add_argument(
        "--epsilon", type=half_grey_levels, default=8.0, help="L-infinity bound in half grey levels (8: 4 of 255)"
    )
    parser.add_argument(
        "--steps", type=positive_int, default=300, help="iterations of iterative attacks, draws of random-search"
    )
    parser.add_argument(
        "--restarts", type=positive_int, default=1, metavar="N", help="starts of Vote-PGD; the best is kept"
    )
    parser.add_argument("--grey", action="store_true", help="the same perturbation in all three channels")
    parser.add_argument(
        "--save-adversarial", action="store_true", help="store attacked images as PNG and JPEG, and test them again"
    )
    parser.add_argument(
        "--transfer", type=command.tag, nargs="+", metavar="TAG", help="test the stored images on these runs too"
    )


def parse_arguments(parser, argv):
    args = parser.parse_args(argv)
    if args.shift_count > len(LANDMARKS):
        parser.error(f"--shift-count: there are {len(LANDMARKS)} landmarks")
    if args.image and (args.images or args.limit or args.adversarial):
        parser.error("--image: not with --images, --limit or --adversarial")
    if UNIVERSAL in (args.attack or ()) and (args.targets != "common" or args.image):
        parser.error(f"--attack {UNIVERSAL}: needs --targets common, and --data to train on")
    if (args.measure is not None) != (args.targets == "diagnosis"):
        parser.error("--measure and --targets diagnosis: neither works without the other")
    if args.measure is None and args.to is not None:
        parser.error("--to: needs --targets diagnosis")
    if args.measure and not args.attack:
        parser.error("--measure: needs an --attack")
    if args.measure and args.to not in (None, *(reachable := reachable_classes(args.measure))):
        known = ", ".join(f"{number} ({meaning})" for number, meaning in reachable.items())
        parser.error(f"--to {args.to}: {args.measure} can be moved to class {known}, or any")
    if args.transfer and not (args.save_adversarial or args.adversarial):
        parser.error("--transfer: needs --save-adversarial or --adversarial")
    if len({args.tag, *(args.transfer or ())}) <= len(args.transfer or ()):
        parser.error("--transfer: name each run once, and not that of --tag")
    if args.restarts > 1 and "Vote-PGD" not in (args.attack or ()):
        parser.error("--restarts: needs --attack Vote-PGD")
    args.defence = list(dict.fromkeys(args.defence or ()))
    if args.defence and args.image and not args.attack:
        parser.error("--defence: needs an --attack where no accuracy can be measured")
    if args.pictures is None:
        args.pictures = len(args.image) if args.image else 4
    if args.attack and args.adversarial:
        parser.error("--adversarial: tests stored images; omit --attack")
    for name in ("grey", "save_adversarial"):
        if getattr(args, name) and not args.attack:
            parser.error(f"--{name.replace('_', '-')}: needs an --attack")
    if args.attack and 0 < args.epsilon * 127.5 / 256 < 0.5:
        warnings.warn(
            f"--epsilon {args.epsilon:g} is less than half a grey level, of which 8-bit images keep nothing; it counts "
            "half grey levels: 8/255 of an image in [0, 1] is --epsilon 16",
            stacklevel=2,
        )
    return args


def main(argv=None):
    parser = make_parser()
    args = parse_arguments(parser, argv)
    distributed.start()
    with distributed.guard() as same:  # prepare: nothing is written before all processes have the same
        device = command.find_device(args.device)
        run = run_folder(args.tag)
        epoch, checkpoint = find_checkpoint(run, args.iteration)
        size, encoder_batch_norm = read_architecture(run / "config.json")
        data = load_data(args, size)
        model = load_detector(checkpoint, encoder_batch_norm, args, device)
        others = [load_other(run_folder(tag), args, device) for tag in args.transfer or []]
        same |= {"data": data.sha256}
    out = Path(args.rand) if args.rand else run / default_name(args, epoch)
    if args.image:  # not predicted by each process alone: GPUs may round differently
        data.reference_px0 = to_px0(predict(model, data.images, args.batch_size, device, args.subpixel), data)
        for _, _, other in others:
            other.reference_px0 = data.reference_px0
    targets = None
    if args.attack:
        ids, targets = make_targets(args, model, data, device, out / "targets.csv")
        data, others = data.select(ids), [(name, other, images.select(ids)) for name, other, images in others]
    with distributed.guard() as same:
        training = load_training(args, size) if UNIVERSAL in (args.attack or ()) else None
        config = vars(args) | {"iteration": epoch, "size": size}
        config |= fingerprints(args, checkpoint, data, targets, training)
        check_output(out, config, parser.defaults())
        same |= {"configuration": config}
    if args.compile:
        model = compile_network(model, to_input(data.images[: args.batch_size], device))
    detectors = [
        (args.tag, model, data),
        *((f"{args.tag}, {name}", defend(model, name, args.seed), data) for name in args.defence),
    ]
    observe_stored = partial(
        observe, [*detectors, *others], batch_size=args.batch_size, device=device, subpixel=args.subpixel
    )
    table = observe_stored(Path(args.adversarial)) if args.adversarial else None  # before anything is written
    with distributed.guard():
        if is_main():
            make_folder(out)
            save_config(out / "config.json", config, device)
            if args.measure:
                write_targets(out / "targets.csv", data.ids, targets)

    if args.attack:
        attack(args, model, data, targets, training, device, out)
    elif not args.adversarial:
        test(args, model, data, device, out)
    if args.save_adversarial:
        table = observe_stored(out / "adversarial")
    if table is not None:
        with distributed.guard():  # publish
            report_stored(table, out)
    if is_main():
        print(f"written to {out}/")


# --- preparation -----------------------------------------------------------------------------------------------------


def load_data(args, size):
    """The images to test or attack, at an input size (H, W)."""
    options = {"mm_per_px": args.mm_per_px, "progress": command.loading_bar}
    if args.image:
        return Cephalograms.from_files(args.image, size, **options)
    return Cephalograms(args.data, args.split, size, args.limit, args.images, unusual=args.unusual, **options)


def make_targets(args, model, data, device, stored):
    """The images that are attacked, and their targets.

    For a diagnosis the former are the patients whose class a movement can change. Targets that an earlier call stored
    are taken again: predictions may differ in their last bits.

    Args:
        stored: path of targets.csv in the output folder.

    Returns:
        ids, and targets (n, K, 2) float64 px0, nan for stationary landmarks.

    Raises:
        InputError: see ``choose_targets``; nobody's diagnosis can be changed; or the stored targets are of others.
    """
    clean = None
    if args.targets == "diagnosis" and not distributed.broadcast(stored.exists()):
        clean = data.reference_px0
        if not args.image:
            clean = to_px0(predict(model, data.images, args.batch_size, device, args.subpixel), data)
    found = None
    with distributed.guard():
        if is_main():  # the least movements of two machines may differ
            if args.targets != "diagnosis":
                targets = choose_targets(args.targets, data, args.seed, args.shift_count, args.shift_mm)
                found = data.ids, targets
            elif clean is None:
                found = read_stored_targets(stored, data)
            else:
                found = diagnosis_targets(clean, data, args.measure, args.to)
    return distributed.broadcast(found)


def diagnosis_targets(clean, data, measure, to):
    """Ids and targets of the patients whose class by a measure can be changed; ``clean`` (N, K, 2) px0 are found."""
    targets = least_movement(clean, data.mm_per_px0, NAMES.index(measure), to).round(decimals=4)  # as stored
    outside = (targets < 0) | (targets > data.sizes.flip(-1)[:, None] - 1)
    possible = ~targets.isnan().all(-1).all(-1) & ~outside.any(-1).any(-1)
    ids = [id for id, attacked in zip(data.ids, possible.tolist(), strict=True) if attacked]
    wanted = f"{measure} to {'another class' if to is None else f'class {to}'}"
    if not ids:
        raise InputError(f"--targets diagnosis: no patient has or can get {wanted} while the other classes stay")
    if len(ids) < len(data):
        warnings.warn(
            f"{len(data) - len(ids)} of {len(data)} patients are not attacked: they have the class already, or no "
            f"movement of landmarks is found that takes {wanted}, by a margin, while the other classes stay",
            stacklevel=2,
        )
    return ids, targets[possible]


def read_stored_targets(file, data):
    """Ids and targets of ``write_targets``."""
    rows = read_table(file, ["image", "landmark", "x", "y"], "image,landmark,x,y")
    ids = list(dict.fromkeys(row["image"] for _, row in rows))
    if unknown := [id for id in ids if id not in data.ids]:
        raise InputError(f"{file}: has targets of image {unknown[0]}, which is not attacked; choose another --rand")
    return ids, torch.from_numpy(read_targets(file, ids, len(LANDMARKS)))


def write_targets(file, ids, targets):
    """Targets as a file for --targets."""
    image, landmark = (~targets.isnan().any(-1)).nonzero().T
    x, y = targets[image, landmark].T
    write_table(file, pd.DataFrame({"image": [ids[i] for i in image], "landmark": landmark + 1, "x": x, "y": y}))


def load_training(args, size):
    """The training split and its common targets (N, K, 2) px0, on which the universal perturbation is made."""
    options = {"split": "train", "limit": None, "images": None}
    data = load_data(argparse.Namespace(**(vars(args) | options)), size)
    return data, choose_targets("common", data, args.seed, args.shift_count, args.shift_mm)


def load_detector(checkpoint, encoder_batch_norm, args, device):
    """The frozen network of a checkpoint."""
    with torch.device("meta"):  # no initial weights: the checkpoint has them all
        model = UNet(len(LANDMARKS), encoder_batch_norm=encoder_batch_norm)
    model.to_empty(device="cpu")
    load_weights(model, checkpoint)
    return freeze(place(model, device, args.precision), args.batch_statistics)


def load_other(run, args, device):
    """Another detector, its newest checkpoint, as (name, model, the images at its size)."""
    _, checkpoint = find_checkpoint(run)
    size, encoder_batch_norm = read_architecture(run / "config.json")
    return run.name, load_detector(checkpoint, encoder_batch_norm, args, device), load_data(args, size)


def read_architecture(path):
    """The input size (H, W) in px of a run, and whether its encoder has batch norm."""
    config = read_config(path)
    size, encoder_batch_norm = config.get("size"), config.get("encoder_batch_norm", False)
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n >= MIN_SIZE for n in size)):
        raise InputError(f'{path}: not the configuration of a run: "size" should be two numbers of px')
    if not isinstance(encoder_batch_norm, bool):
        raise InputError(f'{path}: not the configuration of a run: "encoder_batch_norm" should be true or false')
    return tuple(size), encoder_batch_norm


def default_name(args, epoch):
    what = "attack" if args.attack else "read_back" if args.adversarial else "test"
    return f"{what}_{'image' if args.image else args.split}_{epoch}"


def fingerprints(args, checkpoint, data, targets, training):
    """SHA-256 of what the results depend on besides the arguments."""
    found = {"checkpoint_sha256": sha256(checkpoint), "data_sha256": data.sha256}
    if targets is not None:
        found["targets_sha256"] = hashlib.sha256(targets.numpy().tobytes()).hexdigest()
    if training is not None:
        found["training_data_sha256"] = training[0].sha256
    if args.adversarial:
        found["adversarial_sha256"] = sha256(find_in_memory(Path(args.adversarial)))
    return found


def check_output(out, config, defaults):
    """Raise InputError where the output folder holds anything but earlier results of the same configuration."""
    if (out / "config.json").exists():
        no_effect = ["device", "compile", "data", "image", "unusual", "batch_size", "rand", "pictures"]
        no_effect += ["save_adversarial", "adversarial", "transfer", "defence"]  # these add files
        # a file, of whose content targets_sha256 is a hash
        if config["targets"] not in ("random", "shift", "common", "diagnosis"):
            no_effect.append("targets")
        check_same_config(out / "config.json", config, defaults, no_effect, "--rand")
    elif out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: holds other files than results of test.py; choose another --rand")


# --- work and its files ----------------------------------------------------------------------------------------------


def record_file(out, data, i, method=None, defence=None):
    kind = "".join(f"{name}_" for name in (defence and defence.replace(":", "_"), method) if name)
    return out / "records" / f"{kind}{data.ids[i]}.csv"


def picture_file(out, data, i, method=None):
    return out / "pictures" / f"{data.ids[i]}{f'_{method}' if method else ''}.png"


def unfinished(args, data, out, methods):
    """The work of this process: batches in which the files of an image are missing.

    Batches are the same after a stop as before, since the other images of a batch may affect the last bits of a result.

    Returns:
        list of (method, batch of image indices, those of the batch that are unfinished).
    """
    existing = set(out.rglob("*"))

    def is_unfinished(method, i):
        files = [record_file(out, data, i, method)]
        files += [record_file(out, data, i, method, name) for name in args.defence if method]
        if i < args.pictures:
            files.append(picture_file(out, data, i, method))
        if args.save_adversarial:
            files += stored_files(out / "adversarial", method, data.ids[i])
        return not existing.issuperset(files)

    jobs = [
        (method, batch, [i for i in batch if is_unfinished(method, i)])
        for method in methods
        for batch in in_batches(list(range(len(data))), args.batch_size)
    ]
    return distributed.shard(distributed.broadcast([job for job in jobs if job[-1]]))


# --- accuracy --------------------------------------------------------------------------------------------------------


def test(args, model, data, device, out):
    """Accuracy: a record of each image, tables, pictures."""
    missing = {tuple(batch): images for _, batch, images in unfinished(args, data, out, [None])}
    batches = list(map(list, missing))
    for batch, points, maps in predict_batches(model, data.images, batches, device, args.subpixel):
        points, peak, share = (values.cpu() for values in (points, *confidence(maps, points)))
        for b in [b for b, i in enumerate(batch) if i in missing[tuple(batch)]]:
            write_tested(args, data, batch[b], points[b], peak[b], share[b], out)
    distributed.barrier()
    with distributed.guard():  # publish
        if is_main():
            report_test(out, data)
    if args.defence:
        test_defended(args, model, data, device, out)


def test_defended(args, model, data, device, out):
    """The accuracy behind each defence, below that without: defences_summary.csv."""
    rows = {}
    file = out / "defences_summary.csv"
    if distributed.broadcast(file.exists() and {"none", *args.defence} == {*pd.read_csv(file)["defence"]}):
        return
    for name in args.defence:
        points = predict(defend(model, name, args.seed), data.images, args.batch_size, device, args.subpixel)
        rows[name] = summarize(radial_errors(points, data).numpy()).loc["all"]
    with distributed.guard():  # publish
        if is_main():
            plain = pd.read_csv(out / "summary.csv", index_col="landmark").loc["all"].drop("name")
            summary = pd.DataFrame({"none": plain.astype(float), **rows}).T.rename_axis("defence").reset_index()
            write_table(file, summary)
            print(f"\n{summary.to_string(index=False, float_format='%.2f')}")


def write_tested(args, data, i, points, peak, share, out):
    """The files of one image; points (K, 2) px, peak and share (K,) see ``defences.confidence``."""
    rows = record(
        [data.ids[i]],
        to_px0(points[None], data, [i]).numpy(),
        data.landmarks_px0[[i]].numpy(),
        mm_per_px0=data.mm_per_px0[i].item(),
    ).assign(heatmap_peak=peak, vote_share=share)
    if i < args.pictures:
        mre = rows["radial_error_mm"].mean()
        title = f"{data.ids[i]}, MRE {mre:.2f} mm" if mre >= 0 else data.ids[i]
        image = to_input(data.images[[i]], "cpu")[0].numpy()
        with atomic(picture_file(out, data, i)) as temporary:
            draw(temporary, title, image, data.landmarks[i].numpy(), points.numpy())
    write_table(record_file(out, data, i), rows)


def report_test(out, data):
    """predictions.csv, measures.csv and, where there is a ground truth, summary.csv and diagnoses.csv."""
    table = read_records([record_file(out, data, i) for i in range(len(data))])
    diagnoses = diagnose(table)
    write_table(out / "predictions.csv", table)
    write_table(out / "measures.csv", diagnoses)
    if table["radial_error_mm"].isna().all():
        print(table[["image", "landmark", "name", "x_px0", "y_px0"]].to_string(index=False, float_format="%.1f"))
        print(f"\n{diagnoses.to_string(index=False, float_format='%.2f')}")
        return
    errors = table["radial_error_mm"].to_numpy().reshape(len(data), len(LANDMARKS))
    summary = summarize(errors).rename_axis("landmark").reset_index()
    summary.insert(1, "name", [*LANDMARKS, "all landmarks"])
    write_table(out / "summary.csv", summary)
    print(summary.to_string(index=False, float_format="%.2f"))
    summary = summarize_diagnoses(diagnoses, data.doctors_px0, data.mm_per_px0)
    write_table(out / "diagnoses.csv", summary)
    print(f"\n{summary.to_string(index=False, float_format='%.2f', na_rep='')}")


# --- attack ----------------------------------------------------------------------------------------------------------


def attack(args, model, data, targets_px0, training, device, out):
    """Attack every image by every method, all with the same targets (N, K, 2) px0, nan for stationary landmarks.

    ``training``: see ``load_training``; None without a universal attack.
    """
    size = data.images.shape[-2:]
    targets = rescale(targets_px0, data.sizes[:, None], size).float()
    methods = list(dict.fromkeys(args.attack))
    steps = {method: 1 if method in (*ONE_STEP, NOISE) else args.steps for method in methods}
    steps |= {"Vote-PGD": args.steps * args.restarts}
    victim = grey_model(model) if args.grey else model
    options = {"epsilon": args.epsilon, "steps": args.steps, "restarts": args.restarts, "seed": args.seed}
    if UNIVERSAL in methods:
        delta = universal_perturbation(args, victim, training, device, out / "universal_perturbation.pth")
    todo = unfinished(args, data, out, methods)
    runs = {method: 1 if method in (UNIVERSAL, NOISE) else 1 + len(args.defence) for method in methods}
    total = sum(runs[method] * steps[method] * len(batch) for method, batch, _ in todo)
    with progress(total=total, desc="attacking", unit="step", disable=not todo) as bar:
        for method, batch, missing in todo:
            ids = [data.ids[i] for i in batch]
            bar.set_description(f"{method} on {', '.join(ids) if len(ids) < 5 else f'{ids[0]} .. {ids[-1]}'}")
            image = to_input(data.images[batch], device)[:, : 1 if args.grey else 3]
            observer, done = Observer(image, steps[method], args.subpixel), 0
            if method == UNIVERSAL:
                iterates = shown(victim, image, (image + delta).clamp(-1, 1), args.steps)
            elif method == NOISE:
                noise = uniform_noise(image, args.epsilon, [generator(args.seed, id) for id in ids])
                iterates = shown(victim, image, (image + noise).clamp(-1, 1), 1)
            else:
                iterates = run_attack(method, victim, image, targets[batch].to(device), **options)
            for found in iterates:
                observer.observe(*found)
                bar.update(len(batch) * (found[0] - done))
                done = found[0]
            aims = None if method == UNTARGETED else targets_px0[batch].numpy()
            records = observer.records(data, batch, aims, method)
            bar.set_postfix(progress_figure(records))
            tables = {None: records}
            for name in args.defence:
                bar.update(len(batch) * steps[method] * (runs[method] > 1))
                if all(record_file(out, data, i, method, name).exists() for i in missing):
                    continue  # another defence was added
                judged, attacked = defend(model, name, args.seed), defend(model, name, args.seed + 1, DRAWS)
                if args.grey:
                    judged, attacked = grey_model(judged), grey_model(attacked)
                adaptive = ()
                if runs[method] > 1:
                    adaptive = run_attack(method, attacked, image, targets[batch].to(device), **options)
                tables[name] = pd.concat(
                    seen.records(data, batch, aims, method).assign(defence=name, attacker=attacker)
                    for attacker, seen in observe_defended(judged, observer, adaptive)
                )
            for i in missing:
                write_attacked(args, data, i, batch.index(i), observer, targets[i], method, tables, out)
    distributed.barrier()
    with distributed.guard():  # publish
        if is_main():
            report_attack(args, data, methods, steps, out)


def run_attack(method, victim, image, targets, epsilon, steps, **options):
    """What an attack yields, by its name, see ``attack.pgd``; targets (B, K, 2) px, nan for stationary landmarks.

    ``options``: restarts and seed.
    """
    with torch.no_grad():
        goal = make_goal(method, victim(image), targets)
    taken = {"Vote-PGD": ("restarts", "seed"), "random-search": ("seed",)}.get(method, ())
    options = {name: options[name] for name in taken} | ({} if method in ONE_STEP else {"steps": steps})
    return ATTACKS[method](victim, image, goal, epsilon, **options)


def universal_perturbation(args, victim, training, device, file):
    """The perturbation (1, C, H, W) of ``universal_vote_pgd`` on ``load_training``, kept in a file."""
    with distributed.guard():
        if is_main() and not file.exists():
            zeros = torch.zeros(1, 1 if args.grey else 3, *training[0].images.shape[-2:], device=device)
            batches = training_batches(args, victim, *training, device)
            iterates = universal_vote_pgd(victim, zeros, batches, args.epsilon, args.steps)
            for _, found, _ in progress(iterates, desc="universal perturbation", total=args.steps + 1, unit="step"):
                delta = found  # no list of iterates: each has the maps of a batch
            write_tensors(file, {"delta": delta.cpu()})
    return load_file(file)["delta"].to(device)


def training_batches(args, victim, data, targets_px0, device):
    """Batches (image, goal) of training images in random order, without end."""
    size, channels = data.images.shape[-2:], 1 if args.grey else 3
    clean = partial(predict_batches, lambda image: victim(image[:, :channels]), data.images, subpixel=True)
    batches = in_batches(list(range(len(data))), args.batch_size)
    found = torch.cat([points.cpu() for _, points, _ in clean(batches=batches, device=device)])
    targets = rescale(targets_px0, data.sizes[:, None], size).float()
    targeted = ~targets.isnan().any(-1)
    places = torch.where(targeted[..., None], targets, found)
    rng = np.random.default_rng(args.seed)
    while True:
        for batch in in_batches(rng.permutation(len(data)).tolist(), args.batch_size):
            goal = vote_goal_at(places[batch].to(device), targeted[batch].to(device), size)
            yield to_input(data.images[batch], device)[:, :channels], goal


def progress_figure(records):
    """{name: MRE} of the landmarks that were attacked, at the last iteration."""
    rows = records[(records["iteration"] == records["iteration"].max()) & (records["role"] != "stationary")]
    return {f"{rows['role'].iloc[0]} MRE": f"{rows['radial_error_mm'].mean():.1f} mm"}


def write_attacked(args, data, i, b, observer, targets, method, tables, out):
    """The files of image i, number b of its batch; ``tables`` are records by defence, those of None without one."""
    if i < args.pictures:
        title = f"{data.ids[i]}, {method}, epsilon {args.epsilon:g}, iteration {observer.steps}"
        images = [image[b].expand(3, -1, -1).cpu().numpy() for image in (observer.image, observer.adversarial)]
        clean, attacked = (observer.points[iteration][b].cpu().numpy() for iteration in (0, observer.steps))
        aims = None if method == UNTARGETED else targets.numpy()
        with atomic(picture_file(out, data, i, method)) as temporary:
            draw(temporary, title, images[0], data.landmarks[i].numpy(), clean, images[1], attacked, aims)
    if args.save_adversarial:
        save_adversarial(out / "adversarial", method, data, i, observer.adversarial[b])
    for name, records in tables.items():
        write_table(record_file(out, data, i, method, name), records[records["image"] == data.ids[i]])


def report_attack(args, data, methods, steps, out):
    """Tables and charts from the records; with stored images also in_memory.csv."""
    table = read_records([record_file(out, data, i, method) for method in methods for i in range(len(data))])
    write_table(out / "predictions.csv", table)
    summary = summarize_attack(table)
    write_table(out / "summary.csv", summary)
    for name, column, label in [
        ("mre", "mre_mm", "MRE (mm)"),
        ("median", "median_mm", "median radial error (mm)"),
        ("within_4mm", "within_4mm_%", f"within {SUCCESS_MM} mm (%)"),
    ]:
        with atomic(out / f"{name}.png") as temporary:
            plot_attack(summary, column, label, temporary)
    print(summary.to_string(index=False, float_format="%.2f"))
    warn_of_weak_goals(table)
    diagnoses = diagnose(table)
    changes = summarize_changes(changed_diagnoses(diagnoses, args.measure, args.to))
    write_table(out / "measures.csv", diagnoses)
    write_table(out / "diagnoses.csv", changes)
    final = changes[changes["iteration"] == changes["method"].map(steps)]
    shown = final.pivot(index=["method", "patients"], columns="measure", values="changed_%")[final["measure"].unique()]
    print(f"\nPatients with another class than on the clean image (%)\n\n{shown.to_string(float_format='%.1f')}")
    if args.defence:
        report_defended(args, data, {method: steps[method] for method in methods}, table, out)
    if args.save_adversarial:
        last = table[table["iteration"] == table["method"].map(steps)]
        write_table(in_memory_file(out / "adversarial"), last.assign(detector=args.tag))


def report_defended(args, data, steps, undefended, out):
    """defences.csv, defences_summary.csv: every defence against an attacker who knows it and one who does not."""
    files = [
        record_file(out, data, i, method, name) for name in args.defence for method in steps for i in range(len(data))
    ]
    table = read_records(files)
    last = undefended.groupby("method")["iteration"].transform("max")
    ends = undefended[(undefended["iteration"] == 0) | (undefended["iteration"] == last)]
    table = pd.concat([ends.assign(defence="none", attacker="adaptive"), table])
    write_table(out / "defences.csv", table)
    summary = summarize_attack(table, by=["defence", "attacker", "iteration"])
    write_table(out / "defences_summary.csv", summary)
    role = summary["role"].iloc[0]
    reached = summary[(summary["iteration"] > 0) & (summary["role"] == role)]
    reached = reached.pivot(index=["defence", "attacker"], columns="method", values="within_4mm_%")
    print(f"\nWithin {SUCCESS_MM} mm (%), {role} landmarks\n\n{reached.to_string(float_format='%.1f')}")


def warn_of_weak_goals(table):
    """Say how many stationary landmarks the paper's goal maps constrain by the heatmap term alone."""
    paper = ~table["method"].isin([*BY_VOTES, UNIVERSAL, NOISE])
    clean = table[paper & (table["iteration"] == 0) & (table["role"] == "stationary")]
    clean = clean.drop_duplicates(["image", "landmark"])
    weak = (clean.get("heatmap_peak", pd.Series(dtype=float)) <= 0.5).sum()
    if weak:
        warnings.warn(
            f"the clean heatmaps of {weak} of {len(clean)} stationary landmarks nowhere exceed 0.5 (heatmap_peak in "
            "predictions.csv): the goal maps of the paper's attacks leave their offsets free",
            stacklevel=2,
        )


def report_stored(table, out):
    """read_back.csv and read_back_summary.csv of what ``observe`` returns."""
    if is_main():
        write_table(out / "read_back.csv", table)
        summary = summarize_attack(table, by=["detector", "stored"])
        write_table(out / "read_back_summary.csv", summary)
        print(summary.to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    command.run(main)
