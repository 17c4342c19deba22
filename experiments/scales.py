"""What is run at each scale: for each experiment a list of runs, which are commands.

A scale is a function of the splits to test on and of the ids of the images to attack; the demo draws its own.
"""

import os
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from beyond.diagnosis import DIRECTIONS, MEASURE_NAMES

WORD = "MICCAI"
DEMO_IMAGES = "154", "153", "151", "157"  # on which the demo writes its letters
INPUT_DEFENCES = "jpeg:75", "blur:1", "bits:4", "median:3", "resize:0.5", "noise:4"
LETTERS = Path(__file__).parent / "letters"  # <letter>.csv: targets
PAPER = "I-FGSM", "ATI-FGSM"
BEST = *PAPER, "Vote-PGD"
ADAPTIVE = "ATI-FGSM", "Vote-PGD"
TARGETS = {"random": {"targets": "random"}}
TARGETS |= {f"{mm} mm": {"targets": "shift", "shift_mm": mm} for mm in (2, 4, 8, 16)}
NEAR, FAR = TARGETS["8 mm"], TARGETS["random"]
EPSILONS = 0.5, 1, 2, 4, 8  # the paper's
CONTROLS = "random-search", "FGSM"
LOSSES_AND_SCHEDULES = tuple(f"{loss}-{schedule}" for loss in ("I", "ATI", "Vote") for schedule in ("FGSM", "PGD"))
EQUAL = *BEST, "ATI-PGD", "Vote-FGSM", "MI-FGSM", "APGD", "CosPGD", *CONTROLS  # attacks of as many passes, and controls
# The images of which claims are made: of Test1's 201 to 300, without those that are training images or of 151 to 200
# under other ids, 50 drawn at random, in random order. The attacks were developed on images before 201, and the first
# ones are no random sample: 60 % of the first 30 have an overjet of class 3, of all 150 42 %.
EVALUATION = (
    "210 204 246 233 224 235 245 219 242 268 227 259 257 248 298 249 263 203 225 250 231 201 220 238 232 217 244 288 "
    "211 207 280 300 218 241 299 252 274 272 228 205 230 273 234 226 215 286 253 216 221 258"
)
SMALL = {"batch_size": 4, "schedule": "cosine"}


class Checkpoint(NamedTuple):
    """Weights of a detector after an epoch, as a value of --init."""

    detector: str
    epoch: int


class Run(NamedTuple):
    """One command."""

    program: str  # phantom.py, train.py or test.py
    detector: str = ""  # which is trained, tested or attacked
    options: dict = {}  # noqa: RUF012 never changed; arguments of the program by name, True stands for a flag
    labels: dict = {}  # noqa: RUF012 never changed; columns of the experiment's table
    experiment: str = ""  # that makes it; "": the one that lists it
    name: str = ""  # of its results: <experiment>/<name> below the detector's folder


class Scale(NamedTuple):
    victim: str  # the detector that most experiments attack
    experiments: dict  # name -> list of Run


def arguments(options):
    """Options as a list of arguments: {"shift_mm": 8, "grey": True} -> ["--shift-mm", "8", "--grey"]."""
    tokens = []
    for name, value in options.items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        tokens += [f"--{name.replace('_', '-')}", *map(str, values)]
    return tokens


# --- runs ------------------------------------------------------------------------------------------------------------


def to_attack(ids):
    """Of the test images those to attack, in order: the ``EVALUATION`` ones, if all are there."""
    chosen = EVALUATION.split()
    return tuple(chosen if {*chosen} <= {*ids} else ids)


def train(detector, **options):
    return Run("train.py", detector, options)


def test(detector, experiment, name, labels, **options):
    return Run("test.py", detector, {"pictures": 0, **options}, labels, experiment, name)


def detection(detector, splits):
    """Tests of both decodings on each split."""
    return [
        test(detector, "detection", f"{split}_{by}", {"images": split, "landmarks by": by}, split=split, **options)
        for split in splits
        for by, options in (("voting", {}), ("subpixel", {"subpixel": True}))
    ]


def shift_and_random(attack, experiment="attack"):
    """An attack on near and on far targets."""
    shift = attack(experiment, "shift", {"description": "Displacements of 8 mm, epsilon 8"}, **NEAR, epsilon=8)
    return shift, attack(experiment, "random", {"description": "Random targets, epsilon 8"}, **FAR, epsilon=8)


def sweep_epsilon(attack, epsilons):
    """An attack at several epsilons; ``epsilons``: {name of targets: values}."""
    runs = []
    for targets, values in epsilons.items():
        for value in values:
            name, labels = f"{targets.replace(' ', '_')}_{value:g}", {"targets": targets, "epsilon": value}
            runs.append(attack("epsilon", name, labels, **TARGETS[targets], epsilon=value))
    return runs


def sweep_count(attack, counts):
    """An attack on several numbers of landmarks."""
    return [attack("count", f"{count}", {"|T|": count}, **NEAR, shift_count=count) for count in counts]


def diagnosis(attack, aims, suffix=""):
    """Attacks on the diagnosis; ``aims``: options of each, which are labels too."""
    return [
        attack("diagnosis", "_".join(map(str, aim.values())) + suffix, aim, targets="diagnosis", **aim) for aim in aims
    ]


def sweep_diagnosis(attack, epsilons, measures=MEASURE_NAMES, suffix=""):
    """Attacks on the diagnosis by each clinical measure at several epsilons."""
    aims = [{"measure": measure, "epsilon": value} for value, measure in product(epsilons, measures)]
    return diagnosis(attack, aims, suffix)


def deliver_diagnosis(attack, epsilon, measures):
    """The same by an attacker who has a grey file: stored, with one perturbation for all channels, and read again."""
    runs = sweep_diagnosis(partial(attack, grey=True, save_adversarial=True), (epsilon,), measures, "_stored")
    return [run._replace(labels=run.labels | {"delivered": True}) for run in runs]


def drive_diagnosis(attack, strengths, measures=MEASURE_NAMES):
    """Attacks that raise and lower each clinical measure; ``strengths``: list of (epsilon, movement in mm)."""
    aims = [
        {"measure": measure, "to": to, "epsilon": epsilon, "shift_mm": mm}
        for (epsilon, mm), measure, to in product(strengths, measures, DIRECTIONS)
    ]
    return diagnosis(attack, aims, "_mm")


def sweep_defence(plain, few, training, split, epsilons, more_steps, inputs=INPUT_DEFENCES):
    """Input defences of a detector, adversarial training beside a clean one as long, checks for masked gradients.

    Args:
        plain: the detector.
        few: options of the attacks: their steps and images.
        training: options of both trainings.
        more_steps: of an attack.
    """
    robust, longer = f"{plain}-adversarial", f"{plain}-longer"
    run = partial(test, experiment="defence", labels={})
    accuracy = partial(run, name="accuracy", split=split, subpixel=True)
    attack = partial(run, **few, **NEAR, subpixel=True)
    return [
        train(robust, adversarial=True, **training),
        train(longer, **training),
        accuracy(plain, defence=inputs),
        *map(accuracy, (robust, longer)),
        attack(plain, name="input", epsilon=8, attack=ADAPTIVE, defence=inputs, save_adversarial=True, transfer=robust),
        attack(plain, name="evasive", epsilon=8, attack="evasive-Vote-PGD"),
        *(attack(robust, name=f"{epsilon:g}", attack=ADAPTIVE, epsilon=epsilon) for epsilon in epsilons),
        attack(longer, name="8", attack=ADAPTIVE, epsilon=8),
        attack(robust, name="more_steps", attack=ADAPTIVE, epsilon=8, steps=more_steps),
        attack(robust, name="random_search", attack="random-search", epsilon=8),
    ]


def spell(attack, ids, word=WORD):
    """An attack for each letter of a word, each on another image as far as there are enough."""
    runs = []
    for place, letter in enumerate(word):
        labels = {"letter": letter, "image": ids[place % len(ids)]}
        options = {"images": labels["image"], "targets": os.path.relpath(LETTERS / f"{letter}.csv")}
        runs.append(attack("fancy", f"{place + 1}_{letter}", labels, save_adversarial=True, **options))
    return runs


def causes(options, shift, table):
    """Attacks that answer questions about causes.

    Args:
        options: of the attacks.
        shift: an attack that is an answer itself.
        table: {question: {answer: (detector, {option: changed value}), or None for ``shift``}}; a list of detectors
            that differ in the seed of their training is one answer.
    """
    runs = []
    for question, answers in table.items():
        for answer, other in answers.items():
            labels = {"question": question, "answer": answer}
            if other is None:
                runs.append(shift._replace(labels=labels))
            else:
                detectors, changes = other
                name = "_".join(word.strip("-") for word in arguments(changes)) or "plain"
                for seed, detector in enumerate([detectors] if isinstance(detectors, str) else detectors):
                    runs.append(test(detector, "causes", name, labels | {"seed": seed}, **{**options, **changes}))
    return runs


# --- scales ----------------------------------------------------------------------------------------------------------


def paper(splits, ids):
    """As published, for GPUs; in bf16 an hour at half of an H200's peak."""
    victim, few = "800x640", {"steps": 100, "images": ids[:50]}
    attack = partial(test, victim)
    diagnose = partial(attack, attack="Vote-PGD", images=ids[:20], subpixel=True)
    shift, random = shift_and_random(partial(attack, attack=BEST, steps=100))
    random = [  # the paper's attacks with its 300 iterations
        random._replace(options=random.options | {"attack": PAPER, "steps": 300}),
        random._replace(options=random.options | {"attack": "Vote-PGD"}, name="random_vote"),
    ]
    robust = {"size": (800, 640), "init": Checkpoint(victim, 229), "lr": 3e-4, "schedule": "cosine", "epochs": 30}
    experiments = {
        "detection": [train(victim, size=(800, 640)), *detection(victim, splits)],
        "attack": [*random, shift],
        "robustness": shift_and_random(partial(attack, attack=EQUAL, steps=100, images=ids[:25]), "robustness"),
        "epsilon": sweep_epsilon(partial(attack, attack=BEST, **few), {"random": EPSILONS, "8 mm": EPSILONS}),
        "count": sweep_count(partial(attack, attack=PAPER, epsilon=8, **few), (1, 2, 4, 8, 12, 16, 19)),
        "fancy": spell(partial(attack, attack=ADAPTIVE, epsilon=8), ids),
        "causes": [
            train("400x320", size=(400, 320)),
            train("200x160", size=(200, 160)),
            train("random-encoder", size=(800, 640), encoder_weights="none"),
            *causes({"attack": BEST, **NEAR, "epsilon": 8, **few}, shift, questions(victim) | PAPER_CAUSES),
        ],
        "diagnosis": [
            *sweep_diagnosis(
                partial(attack, attack=("Vote-PGD", "noise"), steps=50, images=ids[:40], subpixel=True), EPSILONS
            ),
            *drive_diagnosis(partial(diagnose, steps=25), [(4, 8)]),
            *deliver_diagnosis(partial(diagnose, steps=50), 4, ("ANB",)),
        ],
        "defence": sweep_defence(victim, {"steps": 100, "images": ids[:30]}, robust, splits[0], (2, 4, 8, 16, 32), 300),
    }
    return Scale(victim, experiments)


def neighbours(detector):
    """Answers to the question of what the neighbours of a displaced landmark do."""
    held = {"attack": ADAPTIVE, "shift_count": 1}
    return {"held": (detector, held), **{do: (detector, {**held, "neighbours": do}) for do in ("along", "free")}}


def questions(victim):
    """Questions of every scale with their answers, see ``causes``."""
    return {
        "encoder's initial weights": {"random": ("random-encoder", {}), "as given": None},
        "statistics of batch norm": {"of the training": None, "of the image": (victim, {"batch_statistics": True})},
        "channels of the perturbation": {"one": (victim, {"grey": True}), "three": None},
        "neighbours of a displaced landmark": neighbours(victim),
    }


PAPER_CAUSES = {
    "epochs of training": {"10": ("800x640", {"iteration": 9}), "60": ("800x640", {"iteration": 59}), "230": None},
    "input size (px)": {"200 x 160": ("200x160", {}), "400 x 320": ("400x320", {}), "800 x 640": None},
}


def cpu(splits, ids):
    """A quarter of the paper's input size, 50 epochs: two cores, two nights."""
    victim, few = "200x160", {"images": ids[:20], "steps": 30}
    learn = partial(train, size=(200, 160), epochs=50, schedule="cosine", checkpoint_every=50)
    attack = partial(test, victim, subpixel=True)
    diagnose = partial(attack, attack="Vote-PGD", steps=10)
    # as many steps as ``shift``: an attack with falling steps has not ended before
    longer = {**few, "steps": 100, "subpixel": True}
    equal = {"steps": 100, "images": ids[:50]}
    shift, random = shift_and_random(partial(attack, attack=EQUAL, **equal), "robustness")
    asked = questions(victim) | {"encoder's initial weights": ARMS}
    robust = {"size": (200, 160), "init": Checkpoint(victim, 49), **SMALL, "lr": 3e-4, "epochs": 10}
    experiments = {
        "detection": [learn(victim), *detection(victim, splits)],
        "attack": [
            run._replace(name=f"{run.name}_{by}", labels=run.labels | {"prefix": f"{by} "})
            for by in ("last", "best")
            for run in shift_and_random(partial(attack, attack=LOSSES_AND_SCHEDULES, iterate=by, **equal))
        ],
        "robustness": [shift, random],
        "epsilon": sweep_epsilon(partial(attack, attack=ADAPTIVE, **few), {"random": EPSILONS, "8 mm": EPSILONS}),
        "count": sweep_count(partial(attack, epsilon=8, attack="ATI-FGSM", **few), (1, 2, 5, 10, 19)),
        "fancy": spell(partial(attack, epsilon=8, attack=ADAPTIVE, steps=100), ids),
        "causes": [
            *(learn(name, **{"epochs": 20, "batch_size": 4, "lr": 5e-4, **start}) for name, start in STARTS.items()),
            learn("heatmap", output="heatmap"),
            learn("coordinates", output="coordinates"),
            *causes({"attack": BEST, **NEAR, "epsilon": 8, **longer}, shift, asked),
            *causes({"attack": "Vote-PGD", **longer}, None, OUTPUTS),
        ],
        "diagnosis": [
            *sweep_diagnosis(partial(attack, images=ids[:30], attack=("Vote-PGD", "noise"), steps=10), EPSILONS),
            # steps of 0.05 epsilon take 20 iterations to the bound
            *sweep_diagnosis(partial(attack, images=ids[:30], attack=PAPER, steps=20), (4,), suffix="_paper"),
            *drive_diagnosis(partial(diagnose, images=ids[:20]), [(2, 8), (4, 8), (8, 8), (4, 2)]),
            *deliver_diagnosis(partial(diagnose, images=ids[:50]), 4, ("ANB", "SNB")),
        ],
        "defence": sweep_defence(victim, few, robust, splits[0], (2, 4, 8, 16, 32), 100),
    }
    return Scale(victim, experiments)


STARTS = {f"given-{seed}": {"seed": seed} for seed in range(3)}
STARTS |= {f"brief-{seed}": {"seed": seed, "epochs": 8} for seed in range(3)}
STARTS |= {f"random-{seed}": {"seed": seed, "encoder_weights": "none"} for seed in range(3)}
STARTS |= {f"batch-norm-{seed}": STARTS[f"random-{seed}"] | {"encoder_batch_norm": True} for seed in range(3)}
ARMS = {start: ([f"{start}-{seed}" for seed in range(3)], {}) for start in ("given", "brief", "random", "batch-norm")}
OUTPUTS = {
    f"output of the network, {name}, epsilon {epsilon}": {
        output: (detector, {**TARGETS[name], "epsilon": epsilon})
        for output, detector in {"voting": "200x160", "heatmap": "heatmap", "coordinates": "coordinates"}.items()
    }
    for name in ("8 mm", "random")
    for epsilon in (8, 4)
}


def quick(splits, ids):
    """To see that everything works, on phantoms for example."""
    victim, few = "100x80", ids[:4]
    learn = partial(train, size=(100, 80), **SMALL, epochs=16, checkpoint_every=16)
    attack = partial(test, victim, subpixel=True, images=few)
    shift, random = shift_and_random(partial(attack, attack=BEST, steps=30))
    vary = {"attack": PAPER, **NEAR, "epsilon": 8, "steps": 30, "images": few, "subpixel": True}
    robust = {"size": (100, 80), "init": Checkpoint(victim, 15), **SMALL, "lr": 3e-4, "epochs": 3}
    experiments = {
        "detection": [learn(victim), *detection(victim, splits)],
        "attack": [shift, random],
        "robustness": shift_and_random(partial(attack, attack=EQUAL, steps=10), "robustness"),
        "epsilon": sweep_epsilon(partial(attack, attack="ATI-FGSM", steps=20), dict.fromkeys(TARGETS, (2, 8, 32))),
        "count": sweep_count(partial(attack, attack="ATI-FGSM", steps=20, epsilon=8), (1, 19)),
        "fancy": spell(partial(attack, attack="Vote-PGD", epsilon=8, steps=200), ids),
        "causes": [learn("random-encoder", encoder_weights="none"), *causes(vary, shift, questions(victim))],
        "diagnosis": [
            *sweep_diagnosis(partial(attack, attack=(*BEST, "noise"), steps=10), (4, 16), ("ANB", "MW")),
            *drive_diagnosis(partial(attack, attack="Vote-PGD", steps=10), [(8, 8)], ("MW",)),
        ],
        "defence": sweep_defence(victim, {"steps": 10, "images": few}, robust, splits[0], (8, 32), 30),
    }
    return Scale(victim, experiments)


def demo(encoder_weights="none"):
    """Phantoms, a detector trained on them, tested and attacked: two cores, twenty minutes.

    From random weights a detector learns so fast only with batch norm in its encoder.
    """
    victim = "400x320"
    norm = {"encoder_batch_norm": True} if encoder_weights == "none" else {}
    learn = partial(train, checkpoint_every=16, **SMALL, **norm)  # coarse to fine
    near = {"attack": BEST, **NEAR, "epsilon": 8, "steps": 20, "limit": 3, "pictures": 3}
    spell_one = partial(test, victim, attack="Vote-PGD", epsilon=8, steps=50)
    experiments = {
        "detection": [
            Run("phantom.py", options={"train": 80, "test1": 20, "test2": 0}),  # the data of the scale
            learn("100x80", size=(100, 80), epochs=16, lr=1e-3),
            learn("200x160", size=(200, 160), init=Checkpoint("100x80", 15), epochs=8, lr=5e-4),
            learn(victim, size=(400, 320), init=Checkpoint("200x160", 7), epochs=3, lr=3e-4, batch_size=2),
            detection(victim, ["test1"])[0],
        ],
        "attack": [test(victim, "attack", "shift", {"description": "Displacements of 8 mm, epsilon 8"}, **near)],
        "fancy": spell(spell_one, DEMO_IMAGES, "MISS"),
    }
    return Scale(victim, experiments)


SCALES = {"paper": paper, "cpu": cpu, "quick": quick, "demo": demo}
