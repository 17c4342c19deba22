"""Every table and figure of the paper: train the detector, test it, attack it in every way, and write a report.

    python reproduce.py --scale paper --data DATA                  # as in the paper; for GPUs
    python reproduce.py --scale cpu --data DATA                    # a quarter of the size; two cores, a few hours
    python reproduce.py --scale quick --data phantoms              # to see it work
    python reproduce.py --scale cpu --data DATA --only epsilon     # one experiment
    torchrun --nproc-per-node 4 reproduce.py --scale paper --data DATA

Every experiment is a list of commands of train.py and test.py, which are printed and can be typed. Repeated after a
stop it goes on, since they do. Writes results/<name>/report.md with its tables and charts; the runs themselves are
runs/<name>-<detector>/.
"""

import os
import shlex
import time
from pathlib import Path
from typing import NamedTuple

import command
import distributed
import report
import test
import train
from command import InputError, is_main
from dataset import available_splits, index, read_image
from runs import RUNS, checkpoint_epochs, make_folder, read_config, write_text

RESULTS = Path("results")
WORD = "MICCAI"
LETTERS = Path(__file__).parent / "letters"  # <letter>.csv, a file of targets for each,
LETTER_SIZE = (2400, 1935)  # on an image of (H0, W0)
BOTH, ADAPTIVE = "I-FGSM ATI-FGSM", "ATI-FGSM"


class Scale(NamedTuple):
    """What the experiments are run with: arguments of train.py and test.py, {runs} for runs/NAME."""

    detectors: dict  # name -> arguments of train.py; trained in this order
    victim: str  # the one that is attacked
    decoding: str  # "--subpixel", or "" for the paper's
    compared: dict  # experiment 2: folder -> (description, arguments)
    epsilons: dict  # experiment 3: targets -> (arguments, epsilons)
    epsilon: str  # and the arguments of all of it
    counts: tuple  # experiment 4: numbers of targeted landmarks,
    count: str  # and arguments
    fancy: str  # experiment 6
    baselines: tuple  # experiment 7: epsilons,
    baseline: str  # and arguments
    causes: tuple  # experiment 8: (question, answer, detector, its epoch or None for the last, arguments or None for
    # the attack on displacements of experiment 2)
    cause: str  # and the arguments of all of it


SHIFTS = {f"{mm} mm": f"--targets shift --shift-mm {mm}" for mm in (2, 4, 8, 16)}
PAPER_EPSILONS = (0.5, 1, 2, 4, 8)
SMALL = "--encoder-weights none --batch-size 4 --schedule cosine"

SCALES = {
    "paper": Scale(
        detectors={
            "800x640": "--size 800 640",
            "400x320": "--size 400 320",
            "200x160": "--size 200 160",
            "batch-norm": "--size 800 640 --encoder-batch-norm",
            "random-encoder": "--size 800 640 --encoder-weights none",
        },
        victim="800x640",
        decoding="",
        compared={
            "random": ("Random targets, epsilon 8", "--targets random --epsilon 8 --steps 300"),
            "shift": ("Displacements of 8 mm, epsilon 8", "--targets shift --shift-mm 8 --epsilon 8 --steps 300"),
        },
        epsilons={
            "random": ("--targets random", PAPER_EPSILONS),
            **{name: (arguments, PAPER_EPSILONS) for name, arguments in SHIFTS.items()},
        },
        epsilon=f"--attack {BOTH} --steps 300 --limit 50",
        counts=(1, 2, 4, 8, 12, 16, 19),
        count=f"--attack {BOTH} --targets shift --shift-mm 8 --epsilon 8 --steps 300 --limit 50",
        fancy=f"--attack {ADAPTIVE} --epsilon 8 --steps 300",
        baselines=PAPER_EPSILONS,
        baseline="",
        causes=(
            ("epochs of training", "10", "800x640", 9, ""),
            ("epochs of training", "50", "800x640", 49, ""),
            ("epochs of training", "230", "800x640", None, None),
            ("batch norm in the encoder", "no", "800x640", None, None),
            ("batch norm in the encoder", "yes", "batch-norm", None, ""),
            ("weights at first", "random", "random-encoder", None, ""),
            ("weights at first", "ImageNet", "800x640", None, None),
            ("channels of the noise", "one", "800x640", None, "--grey"),
            ("channels of the noise", "three", "800x640", None, None),
            ("input size (px)", "200 x 160", "200x160", None, ""),
            ("input size (px)", "400 x 320", "400x320", None, ""),
            ("input size (px)", "800 x 640", "800x640", None, None),
        ),
        cause=f"--attack {BOTH} --targets shift --shift-mm 8 --epsilon 8 --steps 300 --limit 50",
    ),
    "cpu": Scale(
        detectors={
            "100x80": f"--size 100 80 {SMALL} --epochs 24 --checkpoint-every 8",
            "200x160": "--size 200 160 --init {runs}-100x80/model_epoch_23.pth --batch-size 4 --schedule cosine "
            "--lr 5e-4 --epochs 9 --checkpoint-every 3",
            "short": f"--size 100 80 {SMALL} --epochs 6 --checkpoint-every 6",
            "batch-norm": f"--size 100 80 {SMALL} --epochs 6 --checkpoint-every 6 --encoder-batch-norm",
            "50x40": f"--size 50 40 {SMALL} --epochs 12 --checkpoint-every 12",
            "pretrained": "--size 100 80 --init {runs}-50x40/model_epoch_11.pth --batch-size 4 --schedule cosine "
            "--epochs 6 --checkpoint-every 6",
            "400x320": "--size 400 320 --init {runs}-200x160/model_epoch_8.pth --batch-size 4 --schedule cosine "
            "--lr 3e-4 --epochs 1",
        },
        victim="200x160",
        decoding="--subpixel",
        compared={
            "shift": (
                "Displacements of 8 mm, epsilon 16",
                "--targets shift --shift-mm 8 --epsilon 16 --steps 50 --limit 10",
            ),
            "random": ("Random targets, epsilon 128", "--targets random --epsilon 128 --steps 50 --limit 5"),
        },
        epsilons={
            "random": ("--targets random", (*PAPER_EPSILONS, 32, 128)),
            "2 mm": (SHIFTS["2 mm"], PAPER_EPSILONS),
            "4 mm": (SHIFTS["4 mm"], PAPER_EPSILONS),
            "8 mm": (SHIFTS["8 mm"], (*PAPER_EPSILONS, 32)),
            "16 mm": (SHIFTS["16 mm"], (*PAPER_EPSILONS, 32, 128)),
        },
        epsilon=f"--attack {ADAPTIVE} --steps 20 --limit 3",
        counts=(1, 2, 5, 10, 19),
        count=f"--attack {ADAPTIVE} --targets shift --shift-mm 8 --epsilon 16 --steps 20 --limit 5",
        fancy=f"--attack {ADAPTIVE} --epsilon 128 --steps 40",
        baselines=(*PAPER_EPSILONS, 16, 32, 64, 128),
        baseline="--limit 5",
        causes=(
            ("epochs of training", "6", "short", None, ""),
            ("epochs of training", "24", "100x80", None, ""),
            ("batch norm in the encoder", "no", "short", None, ""),
            ("batch norm in the encoder", "yes", "batch-norm", None, ""),
            ("weights at first", "random", "short", None, ""),
            ("weights at first", "of 50 x 40", "pretrained", None, ""),
            ("channels of the noise", "one", "100x80", None, "--grey"),
            ("channels of the noise", "three", "100x80", None, ""),
            ("epsilon", "8", "100x80", None, "--epsilon 8"),
            ("epsilon", "16", "100x80", None, ""),
            ("epsilon", "32", "100x80", None, "--epsilon 32"),
            ("input size (px)", "100 x 80", "100x80", None, ""),
            ("input size (px)", "200 x 160", "200x160", None, None),
            ("fine-tuned at (px)", "200 x 160", "200x160", None, None),
            ("fine-tuned at (px)", "400 x 320", "400x320", None, "--limit 3 --steps 20"),
        ),
        cause=f"--attack {BOTH} --targets shift --shift-mm 8 --epsilon 16 --steps 30 --limit 10",
    ),
}
SCALES["quick"] = SCALES["cpu"]._replace(
    detectors={
        "50x40": f"--size 50 40 {SMALL} --epochs 16 --checkpoint-every 16",
        "100x80": "--size 100 80 --init {runs}-50x40/model_epoch_15.pth --batch-size 4 --schedule cosine --epochs 6 "
        "--checkpoint-every 6",
        "short": f"--size 50 40 {SMALL} --epochs 6 --checkpoint-every 6",
        "batch-norm": f"--size 50 40 {SMALL} --epochs 16 --checkpoint-every 16 --encoder-batch-norm",
    },
    victim="100x80",
    compared={
        "shift": (
            "Displacements of 8 mm, epsilon 16",
            "--targets shift --shift-mm 8 --epsilon 16 --steps 30 --limit 4",
        ),
        "random": ("Random targets, epsilon 128", "--targets random --epsilon 128 --steps 30 --limit 4"),
    },
    epsilons={
        "random": ("--targets random", (8, 32, 128)),
        **{name: (arguments, (2, 8)) for name, arguments in SHIFTS.items()},
    },
    epsilon=f"--attack {ADAPTIVE} --steps 20 --limit 3",
    counts=(1, 19),
    count=f"--attack {ADAPTIVE} --targets shift --shift-mm 8 --epsilon 16 --steps 20 --limit 3",
    fancy=f"--attack {ADAPTIVE} --epsilon 128 --steps 30",
    baselines=(8, 32, 128),
    causes=(
        ("epochs of training", "6", "short", None, ""),
        ("epochs of training", "16", "50x40", None, ""),
        ("batch norm in the encoder", "no", "50x40", None, ""),
        ("batch norm in the encoder", "yes", "batch-norm", None, ""),
        ("channels of the noise", "one", "50x40", None, "--grey"),
        ("channels of the noise", "three", "50x40", None, ""),
        ("input size (px)", "50 x 40", "50x40", None, ""),
        ("input size (px)", "100 x 80", "100x80", None, None),
    ),
    cause=f"--attack {BOTH} --targets shift --shift-mm 8 --epsilon 16 --steps 30 --limit 4",
)


class Plan(NamedTuple):
    """What is run at which scale, on which data, under which name."""

    scale: Scale
    name: str
    data: str
    options: tuple  # for every command

    @property
    def out(self):
        return RESULTS / self.name

    def run(self, detector=None):
        """The folder of a detector, or of the victim."""
        return RUNS / f"{self.name}-{detector or self.scale.victim}"

    def common(self, detector):
        return ["--tag", self.run(detector).name, "--data", self.data, *self.options]

    def train(self, detector):
        """The command that trains a detector."""
        words = [word.format(runs=RUNS / self.name) for word in self.scale.detectors[detector].split()]
        return ["train.py", *self.common(detector), *words, "--resume"]

    def test(self, folder, *arguments, detector=None):
        """The command that tests a detector, or attacks it, and writes into ``folder`` of its run."""
        words = " ".join([*arguments, "--pictures 0"]).split()
        return ["test.py", *self.common(detector), *words, "--rand", folder]

    def attack(self, folder, *arguments, detector=None):
        return self.test(folder, *arguments, self.scale.decoding, detector=detector)


# --- experiments -----------------------------------------------------------------------------------------------------
# Each returns its commands, and a function that makes its section of the report of what they have written.


def detection(plan):
    """The detector, trained and tested, with the paper's decoding and below a pixel."""
    names = list(plan.scale.detectors)
    commands = [plan.train(name) for name in names[: names.index(plan.scale.victim) + 1]]
    runs = {}
    for split in available_splits(plan.data):
        if split != "train":
            for decoding, argument in (("voting", ""), ("subpixel", "--subpixel")):
                folder = f"detection/{split}_{decoding}"
                commands.append(plan.test(folder, f"--split {split}", argument))
                runs[split, decoding] = plan.run() / folder
    if not runs:
        raise InputError(f"{plan.data}: no images of test1 or test2 to test and to attack")
    return commands, lambda: report.detection(
        plan.out, runs, plan.data, "subpixel" if plan.scale.decoding else "voting"
    )


def attack(plan):
    """I-FGSM against ATI-FGSM."""
    commands = [
        plan.attack(f"attack/{name}", "--attack", BOTH, arguments)
        for name, (_, arguments) in plan.scale.compared.items()
    ]
    return commands, lambda: report.attack(plan.out, compared(plan))


def compared(plan):
    """{name: (folder, description)} of experiment 2."""
    return {name: (plan.run() / "attack" / name, description) for name, (description, _) in plan.scale.compared.items()}


def epsilon(plan):
    """Success against epsilon."""
    commands, runs = [], {}
    for targets, (arguments, epsilons) in plan.scale.epsilons.items():
        for value in epsilons:
            folder = f"epsilon/{targets.replace(' ', '_')}_{value:g}"
            commands.append(plan.attack(folder, plan.scale.epsilon, arguments, f"--epsilon {value:g}"))
            runs[targets, value] = plan.run() / folder
    return commands, lambda: report.epsilon(plan.out, runs)


def count(plan):
    """Success against the number of targeted landmarks."""
    commands = [plan.attack(f"count/{n}", plan.scale.count, f"--shift-count {n}") for n in plan.scale.counts]
    runs = {n: plan.run() / "count" / str(n) for n in plan.scale.counts}
    return commands, lambda: report.count(plan.out, runs, compared(plan)["random"][0])


def coupling(plan):
    """Neighbours, or the way to go? Nothing to run: it looks at the attacks of experiment 2."""
    return [], lambda: report.coupling(plan.out, compared(plan))


def fancy(plan):
    """All landmarks onto the strokes of letters, each letter on another image."""
    ids, commands, runs = [], [], []
    for entry in index(plan.data, "test")[: len(WORD)]:
        _, size = read_image(entry.image, None)
        if size != LETTER_SIZE:
            raise InputError(
                f"{entry.image}: of {size} px (H, W), and the letters are drawn for {LETTER_SIZE}; leave fancy out by "
                "--only"
            )
        ids.append(entry.id)
    for place, letter in enumerate(WORD):
        folder, id = f"fancy/{place + 1}_{letter}", ids[place % len(ids)]
        targets = os.path.relpath(LETTERS / f"{letter}.csv")
        attack = plan.attack(folder, plan.scale.fancy, "--save-adversarial")
        commands.append([*attack, "--images", id, "--targets", targets])
        runs.append((letter, id, plan.run() / folder))
    return commands, lambda: report.fancy(plan.out, runs, plan.data, ADAPTIVE)


def baselines(plan):
    """One step, targeted and untargeted."""
    commands = [
        plan.attack(
            f"baselines/{value:g}", "--attack FGSM untargeted-FGSM", plan.scale.baseline, f"--epsilon {value:g}"
        )
        for value in plan.scale.baselines
    ]
    runs = {value: plan.run() / "baselines" / f"{value:g}" for value in plan.scale.baselines}
    return commands, lambda: report.baselines(plan.out, runs)


def causes(plan):
    """What makes a detector easy or hard to attack, one cause at a time."""
    runs, attacks = [], {name: [] for name in plan.scale.detectors}
    for question, answer, detector, epoch, arguments in plan.scale.causes:
        if arguments is None:
            folder = compared(plan)["shift"][0]
        else:
            arguments += f" --iteration {epoch}" if epoch is not None else ""
            folder = "causes/" + ("_".join(word.strip("-") for word in arguments.split()) or "plain")
            attacks[detector].append(plan.attack(folder, plan.scale.cause, arguments, detector=detector))
            folder = plan.run(detector) / folder
        runs.append((question, answer, folder))
    names = list(plan.scale.detectors)
    commands = []
    for place, name in enumerate(names):
        if place > names.index(plan.scale.victim):
            commands.append(plan.train(name))
        commands += [command for i, command in enumerate(attacks[name]) if command not in attacks[name][:i]]
    return commands, lambda: report.causes(plan.out, runs)


EXPERIMENTS = {  # in order, with what the report says of them
    "detection": (
        detection,
        "Detection",
        "Radial errors without an attack, on images that were not trained on. *voting* is the paper's decoding, to a "
        "whole pixel; *subpixel* is the mean of the votes around it. MRE and SD are means over the 19 landmarks.",
    ),
    "attack": (
        attack,
        "I-FGSM against ATI-FGSM",
        "Both methods on the same images and targets. Errors of targeted landmarks are distances from the target, of "
        "stationary ones from the truth.",
    ),
    "epsilon": (
        epsilon,
        "Epsilon",
        "Success against the bound of the noise, for random targets and for displacements from the truth. Most "
        "targets 2 mm away, and many 4 mm away, are within 4 mm of the prediction at once, so *over half way* "
        "counts the landmarks whose distance from the target has become less than half of what it was.",
    ),
    "count": (
        count,
        "Number of targeted landmarks",
        "Success against the number |T| of landmarks that are moved at once; the others shall stay.",
    ),
    "coupling": (
        coupling,
        "Coupling",
        "Are landmarks with close neighbours harder to move? And is it the neighbours, or the length of the way?",
    ),
    "fancy": (
        fancy,
        f"The fancy attack: {WORD}",
        "All 19 landmarks moved onto the strokes of a letter by ATI-FGSM, each letter on another image.",
    ),
    "baselines": (
        baselines,
        "Untargeted and one-step FGSM",
        "One step of full length: how far landmarks fly from where the detector found them; towards random "
        "targets those that have one, while the others shall stay, or all of them away from the clean prediction.",
    ),
    "causes": (
        causes,
        "What makes the attack weak or strong",
        "The same displacements by 8 mm, on detectors or by noise that differ in one thing; each question on the "
        "images and at the iteration that all its answers have. Detectors of different input size differ in their "
        "training too: the larger goes on from the smaller. The detector's MRE is that on the clean images of the "
        "attack.",
    ),
}


NOTE = (
    "In brackets 95 % confidence intervals, by a bootstrap over images; from fewer than ten images they are too "
    "narrow, and where of few images no landmark succeeds, or all do, they vanish. All data are in the CSV files beside"
    " this report."
)


# --- all of it -------------------------------------------------------------------------------------------------------


def parse_arguments():
    parser = command.Parser("Run the paper's experiments and write a report of them.")
    parser.add_argument(
        "--scale", choices=SCALES, required=True, help="paper: as published; cpu, quick: what two cores can"
    )
    parser.add_argument("--data", default="data", help="folder with the ISBI 2015 data, or of phantom.py")
    parser.add_argument(
        "--only", nargs="+", choices=EXPERIMENTS, metavar="EXPERIMENT", help=f"some of {', '.join(EXPERIMENTS)}"
    )
    parser.add_argument("--name", type=command.tag, help="of results/NAME/ and the runs NAME-... (default: the scale)")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="of the network (default: fp32 for paper, else the faster one here)",
    )
    return parser.parse_args()


def main():
    args = parse_arguments()
    distributed.start()
    precision = args.precision or ("fp32" if args.scale == "paper" else command.fast_precision())
    options = ("--precision", precision) + (() if args.device == "auto" else ("--device", args.device))
    plan = Plan(SCALES[args.scale], args.name or args.scale, args.data, options)
    chosen = [name for name in EXPERIMENTS if name in (args.only or EXPERIMENTS)]
    with distributed.together():
        check_order(plan, chosen)
        experiments = {name: EXPERIMENTS[name][0](plan) for name in chosen}
        if is_main():
            make_folder(plan.out)
    for name, (commands, section) in experiments.items():
        start = time.perf_counter()
        say(f"\n=== {EXPERIMENTS[name][1]} ({name}), {len(commands)} commands")
        for program, *arguments in commands:
            say(f"\npython {program} {shlex.join(arguments)}")
            {"train.py": train, "test.py": test}[program].main(arguments)
        with distributed.together():
            if is_main():
                shown = "\n".join(f"python {program} {shlex.join(arguments)}" for program, *arguments in commands)
                text = section() + (f"\nCommands:\n\n```\n{shown}\n```\n" if commands else "")
                write_text(plan.out / f"{name}.md", text)
                write_report(plan, args.scale)
        say(f"{name}: {(time.perf_counter() - start) / 60:.1f} minutes")
    say(f"written to {plan.out}/report.md")


def check_order(plan, chosen):
    """Refuse experiments that build on others which have not been run."""
    needed = {}
    if not is_trained(plan.run()):
        needed |= {name: "detection" for name in EXPERIMENTS}
    if not all((folder / "predictions.csv").exists() for folder, _ in compared(plan).values()):
        needed |= {name: "attack" for name in ("count", "coupling", "causes")}
    for name in chosen:
        if needed.get(name, name) not in chosen:
            raise InputError(f"--only {name}: builds on {needed[name]}, which has not been run; name it too")


def is_trained(folder):
    """Whether a detector's training has come to its end."""
    config = folder / "config.json"
    return config.exists() and read_config(config).get("epochs", 0) - 1 in checkpoint_epochs(folder)


def say(text):
    if is_main():
        print(text, flush=True)


def write_report(plan, scale):
    """Put the sections together that there are."""
    config = read_config(plan.run() / "config.json")
    versions = config["versions"]
    machine = versions["gpu"] or f"{os.cpu_count()} CPU cores"
    parts = [
        f"# Reproduction at the scale `{scale}`\n\n"
        f"{machine}, PyTorch {versions['torch']}, {config['precision']}. {NOTE}\n"
    ]
    for number, (name, (_, title, words)) in enumerate(EXPERIMENTS.items(), 1):
        file = plan.out / f"{name}.md"
        text = file.read_text(encoding="utf-8") if file.exists() else f"\nNot run yet: `--only {name}`.\n"
        parts.append(f"\n## {number}. {title}\n\n{words}\n\n{text.lstrip()}")
    write_text(plan.out / "report.md", "".join(parts))


if __name__ == "__main__":
    command.run(main)
