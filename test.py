"""Test a trained detector, or attack it.

    python test.py --tag baseline --iteration 229                                    # accuracy
    python test.py --tag baseline --iteration 229 --attack 1 --rand temp             # ATI-FGSM; results in temp/
    python test.py --tag baseline --attack 0 1 --targets shift --epsilon 8           # compared, on displacements
    python test.py --tag baseline --attack 1 --rand temp --save-adversarial          # attacked images as PNG and JPEG,
    python test.py --tag other --adversarial temp/adversarial                        # tested on another detector
    python test.py --tag baseline --attack 1 --targets diagnosis --measure ANB       # a diagnosis is changed, see docs/
    python test.py --tag baseline --attack 1 4 --defence jpeg:75 blur:1 --rand safe  # attackers who know of a defence
    python test.py --tag baseline --image mine.png --attack 1 --targets shift        # own images, without annotation
    python test.py --detector mine.py:make --attack 1 --targets shift                # an own detector
    torchrun --nproc-per-node 4 test.py --tag baseline --attack 1 --rand temp        # on four GPUs

Writes into the folder --rand (default: one below runs/<tag>/): config.json, predictions.csv, summary.csv, pictures/,
and records/, from which the same command resumes after a stop; measures.csv and diagnoses.csv, clinical measures and
how often their classes are right or changed; for an attack also line charts.
"""

import argparse
from pathlib import Path

from attack import ATTACKS
from beyond import defences, diagnosis, stored, universal
from dataset import Cephalograms, in_batches, to_input
from detectors import load_detector, load_own
from eval import (
    LABELS,
    accuracy_table,
    attack_batch,
    content_of,
    is_last,
    predict_batches,
    predict_px0,
    read_records,
    record_clean,
    report_clean,
    summarize,
    warn_of_weak_goals,
)
from model import compile_network
from readers.layouts import SPLITS, image_files
from readers.points import LANDMARKS
from support import command, distributed, figures
from support.checkpoints import find_checkpoint, sha256
from support.errors import InputError
from support.files import RUNS, check_same_config, own_folder, run_folder, save_config, write_table
from targets import DRAWN, choose_targets, read_stored_targets, write_targets

# --- arguments -------------------------------------------------------------------------------------------------------


def attack_name(text):
    """An attack by its name, or by its number in the 2020 code (0: I-FGSM, 1: ATI-FGSM)."""
    names = list(ATTACKS)
    by_text = {str(i): name for i, name in enumerate(names[:5])} | {name.lower(): name for name in names}
    if text.lower() not in by_text:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(by_text)}")
    return by_text[text.lower()]


def defence(text):
    """A value of --defence, its number written in one way."""
    _, number = defences.parse_defence(text)
    return f"{text.partition(':')[0]}:{int(number) if number.is_integer() else number}"


def class_or_direction(text):
    """A value of --to."""
    return text if text in diagnosis.DIRECTIONS else command.natural_int(text)


def make_parser():
    parser = command.Parser("Test a trained detector, or attack it.")
    add = parser.add_argument
    add("--tag", type=command.tag, may_change=True, help="the run: runs/TAG/, as trained by train.py")
    own = "instead, an own detector, which the function NAME returns; results below runs/NAME/ (docs/detectors.md)"
    add("--detector", metavar="FILE.py:NAME", may_change=True, help=own)
    epoch = "the checkpoint after this epoch, counted from 0 (default: the newest)"
    add("--iteration", type=command.natural_int, metavar="EPOCH", help=epoch)
    command.add_data_arguments(parser)
    add("--split", choices=SPLITS, default="test", help="images; test: test1 and test2, as far as present")
    add("--limit", type=command.positive_int, metavar="N", help="only the first N images (default: all)")
    add("--images", nargs="+", metavar="ID", help="only these images (default: all)")
    image = "own images without annotation, or folders"
    add("--image", type=image_files, nargs="+", metavar="FILE", may_change=True, help=image)
    rand = "output folder (default: below runs/TAG/, named test, attack or read_back)"
    add("--rand", metavar="DIR", may_change=True, help=rand)
    add_attack_arguments(parser)
    add("--adversarial", metavar="DIR", may_change=True, help="test the images that --save-adversarial stored")
    add("--subpixel", action="store_true", help="subpixel decoding: the mean of the votes near the winner")
    statistics = "batch norms use the statistics of each image, as in the 2020 code, instead of those of the training"
    add("--batch-statistics", action="store_true", help=statistics)
    add("--batch-size", type=command.positive_int, default=4, may_change=True, help="images per batch, in each process")
    pictures = "draw the first N images (default: 4, or every --image)"
    add("--pictures", type=command.natural_int, metavar="N", may_change=True, help=pictures)
    command.add_compute_arguments(parser)
    return parser


def add_attack_arguments(parser):
    """Arguments of attacks, of defences, and of attacked images that are stored."""
    add = parser.add_argument
    names = ", ".join(f"{i} or {name}" if i < 5 else name for i, name in enumerate(ATTACKS))
    attack = f"attack, by one method or several: {names}; see docs/attacks.md"
    add("--attack", type=attack_name, nargs="+", metavar="METHOD", help=attack)
    targets = "random (the paper's protocol), shift (displacements, drawn for each image), common (displacements, one "
    targets += "for all images), diagnosis (see --measure), or a CSV file [image,]landmark,x,y in px of the original"
    add("--targets", default="random", metavar="SOURCE", help=targets)
    add("--measure", choices=diagnosis.MEASURE_NAMES, help="whose class is to change, see docs/diagnoses.md")
    to = "the class that it should become (default: any other); or up, down: how far a movement by --shift-mm drives it"
    add("--to", type=class_or_direction, metavar="CLASS", help=to)
    add("--shift-count", type=command.positive_int, default=5, metavar="N", help="landmarks that shift and common move")
    add("--shift-mm", type=command.positive_float, default=8.0, metavar="MM", help="their displacement")
    neighbours = "the two nearest landmarks of each that shift moves go along with it, or are free to go anywhere "
    neighbours += "(default: they are stationary)"
    add("--neighbours", choices=["along", "free"], help=neighbours)
    epsilon = "L-infinity bound in half grey levels: 8 is 4 of 255 grey levels, 4/255 of an image in [0, 1]"
    add("--epsilon", type=command.half_grey_levels, default=8.0, help=epsilon)
    add("--steps", type=command.positive_int, default=300, help="iterations, draws of random-search, queries of Square")
    iterate = "which counts: the last, or the best one, with most landmarks in place (default: the attack's)"
    add("--iterate", choices=["last", "best"], help=iterate)
    add("--grey", action="store_true", help="the same perturbation in all three channels")
    save = "store attacked images as PNG and JPEG, and test them again"
    add("--save-adversarial", action="store_true", may_change=True, help=save)
    transfer = "test the stored images on these runs too"
    add("--transfer", type=command.tag, nargs="+", metavar="TAG", may_change=True, help=transfer)
    transformations = ", ".join(f"{name} ({valid})" for name, (*_, valid, _) in defences.DEFENCES.items())
    text = "transform the input first, and report accuracy, or attacks made with and without knowledge of it: "
    text += f"{transformations}; see docs/defences.md"
    add("--defence", type=defence, nargs="+", metavar="NAME:NUMBER", may_change=True, help=text)


def parse_arguments(parser, argv):
    args = parser.parse_args(argv)
    attacks = [ATTACKS[name] for name in args.attack or ()]
    if (args.tag is None) == (args.detector is None):
        parser.error("--tag or --detector: one of them is needed")
    if args.detector:
        file, _, args.tag = args.detector.rpartition(":")
        if not (file.endswith(".py") and args.tag.isidentifier()):
            parser.error(f"--detector {args.detector}: FILE.py:NAME is needed")
        own = "iteration", "subpixel", "batch_statistics", "transfer", "measure", "precision", "compile"
        parser.refuse(args, own, "not with --detector")
    if args.image and (args.images or args.limit or args.adversarial):
        parser.error("--image: not with --images, --limit or --adversarial")
    args.image = args.image and [str(file) for files in args.image for file in files]
    if args.iterate and not all(attack.descends for attack in attacks):
        parser.error("--iterate: for targeted attacks by gradients, without a universal one")
    if any(attack.universal for attack in attacks) and (args.targets != "common" or args.image):
        parser.error("--attack: a universal one needs --targets common, and --data to train on")
    if (args.measure is not None) != (args.targets == "diagnosis"):
        parser.error("--measure and --targets diagnosis: neither works without the other")
    if args.neighbours and args.targets != "shift":
        parser.error("--neighbours: needs --targets shift")
    reachable = diagnosis.reachable_classes(args.measure) if args.measure else {}
    if args.measure and args.to not in (None, *reachable, *diagnosis.DIRECTIONS):
        known = ", ".join(f"{number} ({meaning})" for number, meaning in reachable.items())
        parser.error(f"--to {args.to}: {args.measure} can be moved to class {known}, up or down")
    if args.transfer and not (args.save_adversarial or args.adversarial):
        parser.error("--transfer: needs --save-adversarial or --adversarial")
    if len({args.tag, *(args.transfer or ())}) <= len(args.transfer or ()):
        parser.error("--transfer: name each run once, and not that of --tag")
    args.defence = list(dict.fromkeys(args.defence or ()))
    if args.defence and args.image and not args.attack:
        parser.error("--defence: needs an --attack where no accuracy can be measured")
    args.pictures = len(args.image or range(4)) if args.pictures is None else args.pictures
    if args.attack and args.adversarial:
        parser.error("--adversarial: tests stored images; omit --attack")
    if not args.attack:
        parser.refuse(args, ("measure", "grey", "iterate", "save_adversarial"), "needs --attack")
    if not args.measure:
        parser.refuse(args, ("to",), "needs --measure")
    return args


def main(argv=None):
    parser = make_parser()
    args = parse_arguments(parser, argv)
    distributed.start()
    with distributed.guard():
        device = command.find_device(args.device)
        own = args.detector and (None, Path(args.detector.rpartition(":")[0]))
        epoch, checkpoint = own or find_checkpoint(run_folder(args.tag), args.iteration)
        out = Path(args.rand) if args.rand else RUNS / args.tag / default_name(args, epoch)
    with distributed.held_by_main(own_folder(out, "test.py", "--rand", "config.json", "rand")):
        begin(args, parser, device, epoch, checkpoint, out)
    distributed.on_main(print, f"written to {out}/")


def begin(args, parser, device, epoch, checkpoint, out):
    """Load everything, check it, and test or attack."""
    with distributed.guard():
        detector, data = load(checkpoint, args, device)
        checkpoints = {tag: find_checkpoint(run_folder(tag))[1] for tag in args.transfer or []}
        others = [(tag, *load(file, args, device)) for tag, file in checkpoints.items()]
    # nothing is written before all processes have the same
    distributed.require_equal(data=data.sha256, transfer=[sha256(file) for file in checkpoints.values()])
    if args.image and args.attack:
        find_references(args, detector, [data, *(other for *_, other in others)], device)
    targets = None
    if args.attack:
        ids, targets = make_targets(args, detector, data, device, out / "targets.csv")
        data, others = data.select(ids), [(name, other, images.select(ids)) for name, other, images in others]
    with distributed.guard():
        try_attacks(args, detector, data, targets, device)
        training = load_training(args, detector)
        config = vars(args) | {"iteration": epoch, "size": list(data.images.shape[-2:])}
        config |= fingerprints(args, detector, checkpoint, data, targets, training)
        # of a file of targets, targets_sha256 is a hash of the content
        may_change = parser.may_change | ({"targets"} if args.targets not in (*DRAWN, "diagnosis") else set())
        check_same_config(out / "config.json", config, parser.defaults(), may_change, "--rand")
    distributed.require_equal(configuration=config)
    if args.detector and args.attack and not args.image:
        report_clean(detector, args.detector, data, args.batch_size, device)
    if args.compile:
        compiled = compile_network(detector.network, to_input(data.images[: args.batch_size], device))
        detector = detector._replace(network=compiled)

    def read_back(folder):
        defended = [(f"{args.tag}, {name}", defences.defend(detector, name, args.seed), data) for name in args.defence]
        detectors = [(args.tag, detector, data), *defended, *others]
        return stored.predict_stored(detectors, folder, args.batch_size, device)

    table = read_back(Path(args.adversarial)) if args.adversarial else None  # before anything is written
    distributed.on_main(prepare_output, out, config, device, data.ids, are_kept(args) and targets)
    if args.attack:
        attack_all(args, detector, data, targets, training, device, out)
    elif not args.adversarial:
        test(args, detector, data, device, out)
    if args.save_adversarial:
        table = read_back(out / "adversarial")
    if table is not None:
        distributed.on_main(stored.report_stored, table, out)


# --- preparation -----------------------------------------------------------------------------------------------------


def load(checkpoint, args, device):
    """The detector of a checkpoint, and the images at the size of its input."""
    options = device, args.precision, args.batch_statistics, args.subpixel
    detector = load_own(args.detector, device) if args.detector else load_detector(checkpoint, *options)
    return detector, load_data(args, detector.size, detector.names)


def load_data(args, size, names, split=None):
    """The images to test or attack, or those of another split, at an input size (H, W)."""
    options = {"mm_per_px": args.mm_per_px, "progress": command.loading_bar}
    if args.image:
        return Cephalograms.from_files(args.image, size, names, **options)
    chosen = {} if split else {"limit": args.limit, "ids": args.images}
    return Cephalograms(args.data, split or args.split, size, names=names, unusual=args.unusual, **chosen, **options)


def load_training(args, detector):
    """The training images and their targets, on which a universal perturbation is made; None without such an attack."""
    if not any(ATTACKS[name].universal for name in args.attack or ()):
        return None
    data = load_data(args, detector.size, detector.names, "train")
    return data, chosen_targets(args, data)


def chosen_targets(args, data):
    return choose_targets(args.targets, data, args.seed, args.shift_count, args.shift_mm, args.neighbours)


def find_references(args, detector, data, device):
    """The clean predictions as references of own images: by all processes together, since GPUs may round differently.

    Args:
        data: list of dataset.Cephalograms of the same images at several sizes, the first that of ``detector``.
    """
    if args.targets not in (*DRAWN, "diagnosis"):
        chosen_targets(args, data[0])  # a wrong file ends here
    found = predict_px0(detector, data[0], args.batch_size, device).round(decimals=3)  # the same in batches of any size
    for images in data:
        images.reference_px0 = found


def make_targets(args, detector, data, device, file):
    """The ids of the images that are attacked, and their targets.

    For a diagnosis the former are the patients whose class a movement can change. Those that ``are_kept`` are taken
    again from the ``file`` of an earlier call.
    """
    clean = data.reference_px0
    if args.measure and not args.image and not distributed.on_main(file.exists):
        clean = predict_px0(detector, data, args.batch_size, device)

    def find():  # by one process: the least movements of two machines may differ
        ids, stored = read_stored_targets(file, data) if are_kept(args) and file.exists() else (None, None)
        if stored and (args.measure or ids == data.ids):
            return ids, stored
        if args.measure:
            return diagnosis.diagnosis_targets(clean, data, args.measure, args.to, args.shift_mm)
        targets = chosen_targets(args, data)
        return data.ids, targets._replace(places=targets.places.round(decimals=4)) if are_kept(args) else targets

    return distributed.on_main(find)


def are_kept(args):
    """Whether targets are kept in targets.csv: they follow from predictions, of other last bits after a stop.

    Not those with free landmarks, which that file cannot hold.
    """
    return args.measure or (args.image and args.targets in ("shift", "common") and args.neighbours != "free")


def try_attacks(args, detector, data, targets, device):
    """Make a step on one image by each attack that may fail, to refuse it before any work is done."""
    for name in [name for name in args.attack or () if args.detector or ATTACKS[name].votes]:
        try:
            attack_batch(ATTACKS[name], detector, data.select(data.ids[:1]), targets.of([0]), device=device, steps=1)
        except ValueError as error:
            raise InputError(f"--attack {name}: {error}") from None


def default_name(args, epoch):
    what = "attack" if args.attack else "read_back" if args.adversarial else "test"
    first, *others = [Path(file).stem for file in args.image] if args.image else [args.split]
    images = f"{first}_and_{len(others)}_more" if others else first
    return f"{what}_{images}" if args.detector else f"{what}_{images}_{epoch}"


def fingerprints(args, detector, checkpoint, data, targets, training):
    """What the results depend on besides the arguments, mostly as SHA-256."""
    found = {"checkpoint": sha256(checkpoint), "data": data.sha256, "targets": targets and targets.sha256()}
    found["training_data"] = training and training[0].sha256
    found["adversarial"] = args.adversarial and sha256(stored.find_in_memory(Path(args.adversarial)))
    hashes = {f"{name}_sha256": value for name, value in found.items() if value}
    return hashes | {"detector_outputs": detector.fingerprint}


def prepare_output(out, config, device, ids, targets):
    save_config(out / "config.json", config, device)
    if targets:
        write_targets(out / "targets.csv", ids, targets)


def record_file(out, id, method=None, name=None):
    """The record of an image, in an attack by a method and behind the defence of a name."""
    kind = "".join(f"{part}_" for part in (name and name.replace(":", "_"), method) if part)
    return out / "records" / f"{kind}{id}.csv"


def picture_file(out, id, method=None):
    return out / "pictures" / f"{id}{f'_{method}' if method else ''}.png"


def record_files(args, data, out, names=(None,)):
    """{file: its content} of the records, or of those behind defences of some names, see ``eval.read_records``."""
    if not args.attack:
        return {record_file(out, id): {"image": [id]} for id in data.ids}
    each = [(name, ATTACKS[method], id) for name in names for method in args.attack for id in data.ids]
    return {record_file(out, id, a.name, name): content_of(id, a, args.steps, name) for name, a, id in each}


def unfinished(args, data, out, methods):
    """The work of this process: batches in which the files of an image are missing.

    Batches are the same after a stop as before, since the other images of a batch may affect the last bits of a result.

    Returns:
        list of (method, batch of image indices, those of the batch that are unfinished).

    Raises:
        InputError: a record of an earlier call is not whole.
    """

    def is_unfinished(method, i):
        files = [record_file(out, data.ids[i], method, name) for name in (None, *(args.defence if method else ()))]
        if i < args.pictures:
            files.append(picture_file(out, data.ids[i], method))
        if args.save_adversarial:
            files += stored.stored_files(out / "adversarial", method, data.ids[i])
        return not all(file.exists() for file in files)

    def find():
        records = record_files(args, data, out, (None, *args.defence))
        if earlier := {file: content for file, content in records.items() if file.exists()}:
            read_records(earlier, data.names)  # refused before the work, not after it
        batches = in_batches(list(range(len(data))), args.batch_size)
        jobs = [(method, part, [i for i in part if is_unfinished(method, i)]) for method in methods for part in batches]
        return [job for job in jobs if job[-1]]

    return distributed.shard(distributed.on_main(find))


# --- accuracy --------------------------------------------------------------------------------------------------------


def test(args, detector, data, device, out):
    """Accuracy: a record of each image, tables, pictures."""
    missing = {tuple(batch): images for _, batch, images in unfinished(args, data, out, [None])}
    for batch, points, outputs in predict_batches(detector, data.images, list(map(list, missing)), device):
        part = data.select([data.ids[i] for i in batch])
        records = record_clean(detector, part, points, outputs)
        for i in missing[tuple(batch)]:
            id, rows = data.ids[i], records[records["image"] == data.ids[i]]
            write_table(record_file(out, id), rows)
            if i < args.pictures:
                mre = rows["radial_error_mm"].mean()
                title = f"{id}, MRE {mre:.2f} mm" if mre >= 0 else id
                figures.draw(picture_file(out, id), title, data.select([id]), rows)
    distributed.on_main(report_test, args, data, out)
    file = out / "defences_summary.csv"
    if args.defence and not distributed.on_main(defences.is_complete, file, args.defence):
        errors = defences.errors_behind(detector, args.defence, args.seed, data, args.batch_size, device)
        distributed.on_main(defences.report_accuracy, file, out / "summary.csv", errors)


def report_test(args, data, out):
    """predictions.csv, and where there is a ground truth, summary.csv; then the diagnoses."""
    table = read_records(record_files(args, data, out), data.names)
    write_table(out / "predictions.csv", table)
    if table["radial_error_mm"].isna().all():
        print(table[["image", "landmark", "name", "x_px0", "y_px0"]].to_string(index=False, float_format="%.1f"))
    else:
        errors = table["radial_error_mm"].to_numpy().reshape(len(data), -1)
        summary = accuracy_table(errors, data.ids, data.names)
        write_table(out / "summary.csv", summary)
        print(summary.to_string(index=False, float_format="%.2f"))
    if data.names == LANDMARKS:
        diagnosis.report_accuracy(table, data, out)


# --- attack ----------------------------------------------------------------------------------------------------------


def attack_all(args, detector, data, targets, training, device, out):
    """Attack every image by every method, all with the same targets; ``training``: see ``load_training``."""
    attacks = {name: ATTACKS[name].counting(args.iterate) for name in args.attack}
    options = {name: getattr(args, name) for name in ("epsilon", "steps", "seed", "grey")} | {"device": device}
    for name in (name for name, attack in attacks.items() if attack.universal):
        delta = universal.find_perturbation(out, attacks[name], detector, *training, args.batch_size, **options)
        attacks[name] = attacks[name]._replace(delta=delta)
    jobs = unfinished(args, data, out, attacks)
    with command.progress(jobs, desc="attacking", unit="batch", disable=not jobs) as bar:
        for method, batch, missing in bar:
            ids = [data.ids[i] for i in batch]
            bar.set_description(f"{method} on {', '.join(ids) if len(ids) < 5 else f'{ids[0]} .. {ids[-1]}'}", False)
            files = {name: [record_file(out, data.ids[i], method, name) for i in missing] for name in args.defence}
            added = [name for name in files if not all(map(Path.exists, files[name]))]
            defended = defences.both_sides(detector, added, args.seed)
            tables, adversarial = attack_batch(
                attacks[method], detector, data.select(ids), targets.of(batch), defended, **options
            )
            moved = tables[None].query("role in ['targeted', 'untargeted']")
            mre = moved.loc[is_last(moved), "radial_error_mm"].mean()
            bar.set_postfix({f"{moved['role'].iloc[0]} MRE": f"{mre:.1f} mm"}, refresh=False)
            for i in missing:
                write_attacked(args, data.select([data.ids[i]]), i, tables, adversarial[batch.index(i)], out)
    distributed.on_main(report_attack, args, data, out)


def write_attacked(args, data, i, tables, adversarial, out):
    """The files of the i-th image, the only one of ``data``; tables: see ``eval.attack_batch``."""
    (id,), method = data.ids, tables[None]["method"].iloc[0]
    tables = {name: records[records["image"] == id] for name, records in tables.items()}
    if args.save_adversarial:
        stored.save_adversarial(out / "adversarial", method, data, adversarial)
    for name, records in tables.items():
        write_table(record_file(out, id, method, name), records)
    if i < args.pictures:
        title = f"{id}, {method}, epsilon {args.epsilon:g}, iteration {tables[None]['iteration'].max()}"
        figures.draw(picture_file(out, id, method), title, data, tables[None], adversarial)


def report_attack(args, data, out):
    """Tables and charts from the records; with stored images also in_memory.csv."""
    table = read_records(record_files(args, data, out), data.names)
    summary = summarize(table)
    write_table(out / "predictions.csv", table)
    write_table(out / "summary.csv", summary)
    for column, label in LABELS.items():
        name = column.removesuffix("_%").removesuffix("_mm")
        figures.plot_attack(summary, column, label, out / f"{name}.png")
    shown = summary.loc[:, :"largest_change"].rename(columns={"largest_change": "change_of_255"})
    print(shown.to_string(index=False, float_format="%.2f"))
    warn_of_weak_goals(table)
    if data.names == LANDMARKS:
        diagnosis.report_changes(table, args.measure, args.to, out)
    final = is_last(table)
    if args.defence:
        behind = read_records(record_files(args, data, out, args.defence), data.names)
        defences.report_attacks(behind, table[final | (table["iteration"] == 0)], out)
    if args.save_adversarial:
        write_table(out / "adversarial" / stored.IN_MEMORY, table[final].assign(detector=args.tag))


if __name__ == "__main__":
    command.run(main)
