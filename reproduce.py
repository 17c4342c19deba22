"""Run the paper's experiments: train the detector, test it, attack it in every way, and write a report.

    python reproduce.py --scale paper                       # as published; for GPUs
    python reproduce.py --scale cpu                         # a quarter of the size; two cores, a night
    python reproduce.py --scale cpu-full                    # then at full size, on few images; another night
    python reproduce.py --scale quick --data phantoms       # to see that everything works
    python reproduce.py --scale demo                        # on phantoms that it draws; two cores, ten minutes
    python reproduce.py --scale cpu --only epsilon          # one experiment
    torchrun --nproc-per-node 4 reproduce.py --scale paper

An experiment is a list of commands of train.py and test.py, which are printed. Finished trainings and attacks are not
repeated: the same command resumes after a stop. Writes results/<name>/report.md with its tables and charts; the
detectors and their results are in runs/<name>-<detector>/.
"""

import shlex
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import phantom
import test
import train
from experiments import fancy, report
from experiments.results import Result
from experiments.scales import SCALES, Scale, arguments
from readers.images import read_image
from readers.layouts import available_splits, index
from support import command, distributed
from support.checkpoints import checkpoint_epochs, checkpoint_path
from support.distributed import is_main
from support.errors import InputError
from support.files import RUNS, make_folder, read_config

RESULTS = Path("results")
PROGRAMS = {"phantom.py": phantom, "train.py": train, "test.py": test}


def parse_arguments():
    parser = command.Parser("Run the paper's experiments and write a report of them.")
    add = parser.add_argument
    scales = "paper: as published; cpu: a quarter of its size; cpu-full: from there to its size, few images; quick: to "
    scales += "see that everything works; demo: detection and attack on phantoms, needs no data"
    add("--scale", choices=SCALES, required=True, help=scales)
    command.add_data_arguments(parser)
    some = f"some of {', '.join(report.EXPERIMENTS)} (default: all of the scale)"
    add("--only", nargs="+", choices=report.EXPERIMENTS, metavar="EXPERIMENT", help=some)
    weights = "imagenet, none, or a file, see train.py; not for cpu-full (default: imagenet; quick, demo: none)"
    add("--encoder-weights", metavar="SOURCE", help=weights)
    add("--name", type=command.tag, help="of results/NAME/ and runs/NAME-... (default: the scale)")
    add("--device", default="auto", help="auto (cuda if available), cpu, cuda, cuda:1, ...")
    precision = "of the network (default: fp32 for the scale paper, else the faster one on this machine)"
    add("--precision", choices=["fp32", "bf16"], help=precision)
    args = parser.parse_args()
    args.name = args.name or args.scale
    if args.scale == "cpu-full" and args.encoder_weights:
        parser.error("--scale cpu-full: starts from the detector of --scale cpu; omit --encoder-weights")
    args.encoder_weights = args.encoder_weights or ("none" if args.scale in ("quick", "demo") else "imagenet")
    if args.scale == "demo":
        if args.data != parser.get_default("data"):
            parser.error("--scale demo: draws its own data; omit --data")
        if distributed.world_size() > 1:
            parser.error("--scale demo: runs in one process; start it without torchrun")
        args.data = str(RUNS / f"{args.name}-phantoms")
    args.precision = args.precision or ("fp32" if args.scale == "paper" else command.fast_precision())
    return args


def main():
    args = parse_arguments()
    distributed.start()
    with distributed.guard():
        plan = make_plan(args)
    distributed.on_main(make_folder, plan.out)
    for name in plan.chosen:
        start = time.perf_counter()
        commands = plan.commands(name)
        say(f"\n=== {report.EXPERIMENTS[name].TITLE} ({name}), {len(commands)} commands")
        for program, *argv in commands:
            say(f"\npython {program} {shlex.join(argv)}")
            PROGRAMS[program].main(argv)
        shown = [f"python {shlex.join(line)}" for line in commands]
        distributed.on_main(report.publish, name, plan.results(name), plan.data, shown, plan.out)
        victim = plan.folder(plan.scale.victim)
        distributed.on_main(report.assemble, args.scale, plan.scale.experiments, victim, plan.out)
        say(f"{name}: {(time.perf_counter() - start) / 60:.1f} minutes")
    if args.scale == "demo" and "attack" in plan.chosen:
        show_demo(plan)
    say(f"\nwritten to {plan.out}/report.md")


def say(text):
    if is_main():
        print(text, flush=True)


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

    def folder(self, detector, scale=None):
        """The folder of a detector of this scale, or of another."""
        return RUNS / f"{scale or self.name}-{detector}"

    def result(self, run):
        """The folder of a run's results."""
        return self.folder(run.detector, run.scale) / run.experiment / run.name

    def commands(self, experiment):
        """The command lines (program, argument, ...) of an experiment, each once; not those of other experiments."""
        runs = self.scale.experiments[experiment]
        made = [run for run in runs if run.scale is None and run.experiment in ("", experiment)]
        return list(dict.fromkeys(map(self.command, made)))

    def command(self, run):
        options = dict(run.options)
        if "init" in options:
            options["init"] = self.weights(options["init"])
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

    def weights(self, checkpoint):
        """The file of a Checkpoint."""
        return checkpoint_path(self.folder(checkpoint.detector, checkpoint.scale), checkpoint.epoch)

    def results(self, experiment):
        """What an experiment reports on, as results.Result."""
        return [Result(run.labels, self.result(run)) for run in self.scale.experiments[experiment] if run.name]


def make_plan(args):
    """The plan of the arguments, checked.

    Raises:
        InputError: the data do not suit, or an experiment depends on another that has not been run.
    """
    if args.scale == "demo":
        scale = SCALES["demo"]()
    else:
        splits = [split for split in available_splits(args.data) if split != "train"]
        if not splits:
            raise InputError(f"{args.data}: no images of test1 or test2 to test and attack")
        scale = SCALES[args.scale](splits, [entry.id for entry in index(args.data, "test")])
    chosen = [name for name in report.EXPERIMENTS if name in (args.only or scale.experiments)]
    for name in chosen:
        if name not in scale.experiments:
            raise InputError(f"--only {name}: not part of --scale {args.scale}; {', '.join(scale.experiments)} are")
    options = {name: getattr(args, name) for name in ("precision", "device", "mm_per_px", "unusual")}
    options = {name: value for name, value in options.items() if value not in ("auto", None, False)}
    plan = Plan(scale, chosen, args.name, args.data, args.encoder_weights, options)
    check_order(plan)
    if "fancy" in chosen:
        check_sizes(plan)
    return plan


def check_order(plan):
    """Refuse experiments that depend on others, or on another scale, which have not been run."""
    trained = is_trained(plan.folder(plan.scale.victim))
    for name in plan.chosen:
        needed = [] if trained or name == "detection" else ["detection"]
        for run in plan.scale.experiments[name]:
            init = run.options.get("init")
            file = plan.weights(init) if init else plan.result(run) / "predictions.csv"
            if (init or run).scale and not file.exists():
                raise InputError(f"--only {name}: {file} of another scale is missing; run that scale first")
            if run.name and not file.exists():
                needed.append(run.experiment)
            elif run.name and (run.scale or run.experiment not in plan.chosen):
                check_precision(plan, name, plan.result(run))
        for other in needed:
            if other not in plan.chosen:
                raise InputError(f"--only {name}: depends on {other}, which has not been run; name it too")


def check_precision(plan, name, folder):
    """Refuse to compare with results of another precision; its default depends on the machine."""
    found, precision = read_config(folder / "config.json").get("precision"), plan.options["precision"]
    if found != precision:
        raise InputError(
            f"--only {name}: compares with {folder}, which is of --precision {found}, not {precision}; add --precision "
            f"{found}"
        )


def is_trained(folder):
    """Whether a detector's training is finished."""
    config = folder / "config.json"
    return config.exists() and read_config(config).get("epochs", 0) - 1 in checkpoint_epochs(folder)


def check_sizes(plan):
    """Refuse images of another size than the letters are drawn for."""
    used = {result.labels["image"] for result in plan.results("fancy")}
    for entry in index(plan.data, "test"):
        if entry.id in used:
            _, size = read_image(entry.image, None)
            if size != fancy.SIZE0:
                raise InputError(
                    f"{entry.image}: size {size} px (H, W), but the letters of the experiment fancy are drawn for "
                    f"{fancy.SIZE0}; omit fancy by --only"
                )


# --- demo ------------------------------------------------------------------------------------------------------------


def show_demo(plan):
    """Print the tables of the detection and of the attack, and where the pictures are."""
    tested, attacked = (plan.results(name)[0].folder for name in ("detection", "attack"))
    detection = pd.read_csv(tested / "summary.csv").iloc[-1:, 1:]
    attack = pd.read_csv(attacked / "summary.csv").loc[:, :"largest_change"]  # without the intervals
    attack.loc[attack["iteration"] == 0, "method"] = "no attack"
    attack = attack[attack["iteration"].isin([0, attack["iteration"].max()])].drop_duplicates(["role", "method"])
    print(f"\nDetection\n\n{detection.to_string(index=False, float_format='%.2f')}")
    print("\nTargeted attack; errors are distances from the target or from the truth\n")
    print(attack.to_string(index=False, float_format="%.2f"))
    print("\nPictures: clean prediction, attacked prediction with targets, perturbation\n")
    print(*sorted((attacked / "pictures").glob("*.png")), sep="\n")


if __name__ == "__main__":
    command.run(main)
