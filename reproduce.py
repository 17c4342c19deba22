"""Run the paper's experiments: train the detector, test it, attack it in every way, and write a report.

    python reproduce.py --scale paper                       # as published; for GPUs
    python reproduce.py --scale cpu                         # a quarter of the size; two cores, two nights
    python reproduce.py --scale quick --data phantoms       # to see that everything works
    python reproduce.py --scale demo                        # on phantoms that it draws; two cores, twenty minutes
    python reproduce.py --scale cpu --only epsilon          # one experiment
    torchrun --nproc-per-node 4 reproduce.py --scale paper

An experiment is a list of commands of train.py and test.py, which are printed. Finished trainings and attacks are not
repeated: the same command resumes after a stop. Writes results/<name>/report.md with its tables and charts; the
detectors and their results are in runs/<name>-<detector>/.
"""

import hashlib
import shlex
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

import phantom
import test
import train
from benchmark import time_steps
from experiments import demo, report
from experiments.costs import COLUMNS, attack_cost, training_cost
from experiments.results import Result
from experiments.scales import SCALES, Scale, arguments, to_attack
from readers.layouts import IDS, available_splits, index
from readers.points import read_doctors
from support import command, distributed
from support.checkpoints import checkpoint_epochs, checkpoint_path
from support.errors import InputError
from support.files import RUNS, check_same_config, own_folder, read_config, write_json

RESULTS = Path("results")
PROGRAMS = {"phantom.py": phantom, "train.py": train, "test.py": test}


def parse_arguments():
    parser = command.Parser("Run the paper's experiments and write a report of them.")
    add = parser.add_argument
    scales = "paper: as published; cpu: a quarter of its size; quick: to see that everything works; demo: needs no data"
    add("--scale", choices=SCALES, required=True, help=scales)
    command.add_data_arguments(parser)
    some = f"some of {', '.join(report.EXPERIMENTS)} (default: all of the scale)"
    add("--only", nargs="+", choices=report.EXPERIMENTS, metavar="EXPERIMENT", help=some)
    weights = "imagenet, none, or a file, see train.py (default: imagenet; quick, demo: none)"
    add("--encoder-weights", metavar="SOURCE", help=weights)
    add("--list", action="store_true", help="show the commands, and what they would take on this machine; run nothing")
    add("--name", type=command.tag, help="of results/NAME/ and runs/NAME-... (default: the scale)")
    add("--device", default="auto", help="auto (cuda if available), cpu, cuda, cuda:1, ...")
    precision = "of the network (default: fp32 for the scale paper, else the faster one on this machine)"
    add("--precision", choices=["fp32", "bf16"], help=precision)
    args = parser.parse_args()
    args.name = args.name or args.scale
    args.encoder_weights = args.encoder_weights or ("none" if args.scale in ("quick", "demo") else "imagenet")
    if args.scale == "demo":
        if args.data != parser.get_default("data"):
            parser.error("--scale demo: draws its own data; omit --data")
        if args.only:
            parser.error("--only: not with --scale demo, which has one report")
        args.data = str(RUNS / f"{args.name}-phantoms")
    return args


def main():
    args = parse_arguments()
    distributed.start()
    with distributed.guard():
        command.find_device(args.device)
        args.precision = args.precision or ("fp32" if args.scale == "paper" else command.fast_precision(args.device))
        plan = make_plan(args)
    if args.list or (args.scale == "paper" and not torch.cuda.is_available()):
        distributed.on_main(show_costs, plan, args)
    if args.list:
        return
    with distributed.held_by_main(own_folder(plan.out, "reproduce.py", "--name", "config.json", "scale")):
        distributed.on_main(keep_config, plan.out / "config.json", args)
        for number, name in enumerate(plan.chosen, 1):
            start = time.perf_counter()
            commands = plan.commands(name)
            title = f"{number} of {len(plan.chosen)}: {report.describe(name)[0]} ({name})"
            distributed.on_main(print, f"\n=== {title}, {len(commands)} commands")
            for program, *argv in commands:
                distributed.on_main(print, f"\npython {program} {shlex.join(argv)}")
                PROGRAMS[program].main(argv)
            shown = [f"python {shlex.join(line)}" for line in commands]
            distributed.on_main(report.publish, name, plan.results(name), plan.data, shown, plan.out)
            victim = plan.folder(plan.scale.victim)
            if args.scale != "demo":
                distributed.on_main(report.assemble, args.scale, plan.scale.experiments, victim, plan.out)
            elif name == "fancy":
                distributed.on_main(demo.publish, *map(plan.results, plan.chosen), plan.out)
            distributed.on_main(print, f"{name}: {(time.perf_counter() - start) / 60:.1f} minutes")
    distributed.on_main(print, f"\nwritten to {plan.out}/report.md")


def keep_config(path, args):
    """Write what all sections of a report must share; refuse to go on with another scale, precision or data."""
    config = {name: getattr(args, name) for name in ("scale", "encoder_weights", "precision", "mm_per_px")}
    if args.scale != "demo":
        marks = [read_doctors(entry, (np.inf, np.inf)).tobytes() for entry in index(args.data, "test")]
        config["data_sha256"] = hashlib.sha256(b"".join(marks)).hexdigest()
    check_same_config(path, config, {}, (), "--name")
    write_json(path, config)


def show_costs(plan, args):
    """Print what the plan takes on this machine, with --list after its commands, else as a warning."""
    device = command.find_device(args.device)
    costs = estimate(plan, device)
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    if not args.list:
        hours, disk = costs["hours"].sum(), costs["disk (GiB)"].sum()
        text = f"about {hours:,.0f} hours, {disk:.0f} GiB of disk; --list shows the parts"
        warnings.warn(f"--scale {args.scale} without a GPU, on {here}: {text}", stacklevel=2)
        return
    for name in plan.chosen:
        print(f"\n{name}", *(f"python {shlex.join(line)}" for line in plan.commands(name)), sep="\n")
    groups = pd.concat([costs, costs.assign(experiment="all")]).groupby("experiment", sort=False, as_index=False)
    table = groups.agg(dict.fromkeys(COLUMNS[1:], "sum") | {"memory (GiB)": "max"})
    print(f"\nFrom one timed step on {here}; nothing was run. Disk: of weights.\n")
    print(table.to_string(index=False, float_format="%.1f"))


def estimate(plan, device):
    """``COLUMNS`` of each command, from a step of the attacked detector; by default, images are the official ones."""
    parsed = [
        (name, program, PROGRAMS[program].make_parser().parse_args(argv))
        for name in plan.scale.experiments
        for program, *argv in plan.commands(name)
    ]
    sizes = {args.tag: args.size for _, program, args in parsed if program == "train.py"}
    size, counts = sizes[plan.folder(plan.scale.victim).name], {part: len(ids) for part, ids in IDS.items()}
    command.say(f"timing a step of training and one of an attack at {size[0]} x {size[1]} px ...")
    step, rows = time_steps(size, device, plan.options["precision"], 8 if device.type == "cuda" else 1), []
    for name, program, args in parsed:
        row = {"experiment": name, "commands": 1}
        if program == "phantom.py":
            counts = vars(args)
        elif program == "train.py":
            row |= training_cost(args, step, counts["train"])
        else:
            row |= attack_cost(args, sizes[args.tag], step, counts)
        rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS).fillna(0).astype(dict.fromkeys(COLUMNS[1:4], int))
    return table[table["experiment"].isin(plan.chosen)]


# --- plan ------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is run, on which data, under which name."""

    scale: Scale
    chosen: list  # names of experiments, in order
    name: str
    data: str  # folder
    encoder_weights: str
    options: dict  # of every train.py and test.py

    @property
    def out(self):
        return RESULTS / self.name

    def folder(self, detector):
        """The folder of a detector."""
        return RUNS / f"{self.name}-{detector}"

    def result(self, run):
        """The folder of a run's results."""
        return self.folder(run.detector) / run.experiment / run.name

    def commands(self, experiment):
        """The command lines (program, argument, ...) of an experiment, each once; not those of other experiments."""
        runs = self.scale.experiments[experiment]
        return list(dict.fromkeys(self.command(run) for run in runs if run.experiment in ("", experiment)))

    def command(self, run):
        options = dict(run.options)
        if "init" in options:
            options["init"] = checkpoint_path(self.folder(options["init"].detector), options["init"].epoch)
        if "transfer" in options:
            options["transfer"] = self.folder(options["transfer"]).name
        common = {"tag": self.folder(run.detector).name, "data": self.data, **self.options}
        if run.program == "phantom.py":
            options = {"out": self.data, **options}
        elif run.program == "train.py":
            start = {} if "init" in options else {"encoder_weights": self.encoder_weights}
            options = {**common, **start, **options, "resume": True}
        else:
            options = {**common, **options, "rand": self.result(run)}
        return run.program, *arguments(options)

    def results(self, experiment):
        """What an experiment reports on, as results.Result."""
        return [Result(run.labels, self.result(run)) for run in self.scale.experiments[experiment] if run.name]


def make_plan(args):
    """The plan of the arguments, checked.

    Raises:
        InputError: the data do not suit, or an experiment depends on another that has not been run.
    """
    scale = SCALES[args.scale](*([args.encoder_weights] if args.scale == "demo" else find_images(args)))
    chosen = [name for name in report.EXPERIMENTS if name in (args.only or scale.experiments)]
    for name in chosen:
        if name not in scale.experiments:
            raise InputError(f"--only {name}: not part of --scale {args.scale}; {', '.join(scale.experiments)} are")
    options = {name: getattr(args, name) for name in ("precision", "device", "mm_per_px", "unusual")}
    options = {name: value for name, value in options.items() if value not in ("auto", None, False)}
    plan = Plan(scale, chosen, args.name, args.data, args.encoder_weights, options)
    if not args.list:
        check_order(plan)
    return plan


def find_images(args):
    """The splits to test on, and the ids of the images to attack; with --list, without data, the official ones."""
    if args.list and not Path(args.data).exists():
        return ["test1", "test2"], to_attack([str(id) for id in IDS["test1"]])
    splits = [split for split in available_splits(args.data) if split != "train"]
    if not splits:
        raise InputError(f"{args.data}: no images of test1 or test2 to test and attack")
    return splits, to_attack([entry.id for entry in index(args.data, "test")])


def check_order(plan):
    """Refuse experiments that depend on others which have not been run."""
    config = plan.folder(plan.scale.victim) / "config.json"
    trained = config.exists() and read_config(config).get("epochs", 0) - 1 in checkpoint_epochs(config.parent)
    for name in plan.chosen:
        needed = [] if trained or name == "detection" else ["detection"]
        runs = [run for run in plan.scale.experiments[name] if run.name]
        needed += [run.experiment for run in runs if not (plan.result(run) / "predictions.csv").exists()]
        for other in needed:
            if other not in plan.chosen:
                raise InputError(f"--only {name}: depends on {other}, which has not been run; name it too")


if __name__ == "__main__":
    command.run(main)
