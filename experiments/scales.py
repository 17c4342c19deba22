"""What is run at each scale: for each experiment a list of runs, which are commands.

A scale is a function of the splits to test on and of the ids of the test images; the demo draws its own.
"""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from diagnosis import NAMES

WORD = "MICCAI"
INPUT_DEFENCES = "jpeg:75", "blur:1", "bits:4", "median:3", "resize:0.5", "noise:4"
LETTERS = Path(__file__).parent / "letters"  # <letter>.csv: targets


class Checkpoint(NamedTuple):
    """Weights of a detector after an epoch; "cpu/200x160" is a detector of the scale cpu."""

    detector: str
    epoch: int


class Tags(NamedTuple):
    """The run of a detector, as a value of --transfer."""

    detector: str


class Run(NamedTuple):
    """One command.

    Attributes:
        program: phantom.py, train.py or test.py.
        detector: which is trained, tested or attacked.
        folder: of the results of test.py, <experiment>/<name> below the detector's folder.
        options: arguments of the program by name; True stands for a flag.
        labels: columns of the experiment's table.
    """

    program: str
    detector: str
    folder: str
    options: dict
    labels: dict


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


def draw(**options):
    """Phantoms, which are then the data of the scale."""
    return Run("phantom.py", "", "", options, {})


def train(detector, **options):
    return Run("train.py", detector, "", options, {})


def refine(detector, size, init, lr, epochs):
    """Coarse to fine: a short training from the weights of a smaller input, with a checkpoint at its end."""
    return train(detector, size=size, init=init, **SMALL, lr=lr, epochs=epochs, checkpoint_every=epochs)


def test(detector, folder, labels, **options):
    return Run("test.py", detector, folder, {"pictures": 0, **options}, labels)


def detection(detector, splits):
    """Tests of both decodings on each split."""
    runs = []
    for split in splits:
        for decoding, options in (("voting", {}), ("subpixel", {"subpixel": True})):
            labels = {"images": split, "landmarks by": decoding}
            runs.append(test(detector, f"detection/{split}_{decoding}", labels, split=split, **options))
    return runs


def sweep_epsilon(attack, epsilons):
    """An attack at several epsilons; ``epsilons``: {name of targets: values}."""
    return [
        attack(
            f"epsilon/{targets.replace(' ', '_')}_{value:g}",
            {"targets": targets, "epsilon": value},
            **TARGETS[targets],
            epsilon=value,
        )
        for targets, values in epsilons.items()
        for value in values
    ]


def sweep_count(attack, counts):
    """An attack on several numbers of landmarks."""
    return [attack(f"count/{count}", {"|T|": count}, shift_count=count) for count in counts]


def sweep_one_step(attack, epsilons):
    """The one-step attacks at several epsilons."""
    attack = partial(attack, attack=("FGSM", "untargeted-FGSM"))
    return [attack(f"baselines/{value:g}", {"epsilon": value}, epsilon=value) for value in epsilons]


def sweep_diagnosis(attack, epsilons, measures=NAMES, suffix=""):
    """Attacks on the diagnosis by each clinical measure at several epsilons."""
    return [
        attack(
            f"diagnosis/{measure}_{value:g}{suffix}",
            {"measure": measure, "epsilon": value},
            targets="diagnosis",
            measure=measure,
            epsilon=value,
        )
        for value in epsilons
        for measure in measures
    ]


def sweep_defence(attack, training, splits, epsilons, more_steps, measure="ANB", inputs=INPUT_DEFENCES):
    """Input defences and adversarial training, and the checks for masked gradients.

    ``attack`` has its number of steps and images; ``training`` are the options of the adversarial one.
    """
    plain, robust = attack.args[0], f"{attack.args[0]}-adversarial"
    near = {**TARGETS["8 mm"], "subpixel": True}
    methods = "ATI-FGSM", "Vote-PGD"
    defended = partial(attack, attack=methods, **near, epsilon=8, defence=inputs)
    harden = partial(test, robust, **attack.keywords, **near)
    diagnosis = {"targets": "diagnosis", "measure": measure, "epsilon": 4, "steps": 10, "subpixel": True}
    accuracy = {"split": splits[0], "subpixel": True}
    return [
        train(robust, adversarial=True, **training),
        test(plain, "defence/accuracy", {}, **accuracy, defence=inputs),
        test(robust, "defence/accuracy", {}, **accuracy),
        defended("defence/input", {}, save_adversarial=True, transfer=Tags(robust)),
        attack("defence/evasive", {}, **near, epsilon=8, attack="evasive-Vote-PGD"),
        *(harden(f"defence/{epsilon:g}", {}, attack=methods, epsilon=epsilon) for epsilon in epsilons),
        harden("defence/more_steps", {}, attack=methods, epsilon=8, **more_steps),
        harden("defence/random_search", {}, attack="random-search", epsilon=8),
        test(plain, "defence/diagnosis", {}, attack="Vote-PGD", **diagnosis, limit=30, defence=inputs),
        test(robust, "defence/diagnosis", {}, attack="Vote-PGD", **diagnosis, limit=30),
    ]


def spell(attack, ids, word=WORD):
    """An attack for each letter of a word, each on another image as far as there are enough."""
    runs = []
    for place, letter in enumerate(word):
        labels = {"letter": letter, "image": ids[place % len(ids)]}
        targets = os.path.relpath(LETTERS / f"{letter}.csv")
        runs.append(
            attack(
                f"fancy/{place + 1}_{letter}", labels, save_adversarial=True, images=labels["image"], targets=targets
            )
        )
    return runs


def variant(options, question, answer, detector, **changes):
    """An attack that answers a question about causes: ``options`` with ``changes``, on a detector."""
    folder = "causes/" + ("_".join(word.strip("-") for word in arguments(changes)) or "plain")
    return test(detector, folder, {"question": question, "answer": answer}, **{**options, **changes})


def reuse(run, question, answer):
    """A run of another experiment that answers a question about causes."""
    return run._replace(labels={"question": question, "answer": answer})


# --- scales ----------------------------------------------------------------------------------------------------------

PAPER = "I-FGSM", "ATI-FGSM"
BEST = *PAPER, "Vote-PGD"
ALL = *BEST, "noise"
TARGETS = {"random": {"targets": "random"}}
TARGETS |= {f"{mm} mm": {"targets": "shift", "shift_mm": mm} for mm in (2, 4, 8, 16)}
EPSILONS = 0.5, 1, 2, 4, 8  # the paper's
SMALL = {"batch_size": 4, "schedule": "cosine"}


def paper(splits, ids):
    """As published, for GPUs."""
    attack = partial(test, "800x640", steps=300)
    near, far, few = TARGETS["8 mm"], TARGETS["random"], {"limit": 50}
    random = attack("attack/random", {"description": "Random targets, epsilon 8"}, attack=BEST, **far, epsilon=8)
    shift = attack("attack/shift", {"description": "Displacements of 8 mm, epsilon 8"}, attack=BEST, **near, epsilon=8)
    vary = partial(variant, {"attack": BEST, **near, "epsilon": 8, "steps": 300, **few})
    experiments = {
        "detection": [train("800x640", size=(800, 640)), *detection("800x640", splits)],
        "attack": [random, shift],
        "epsilon": sweep_epsilon(partial(attack, attack=BEST, **few), dict.fromkeys(TARGETS, EPSILONS)),
        "count": [
            *sweep_count(partial(attack, attack=PAPER, **near, epsilon=8, **few), (1, 2, 4, 8, 12, 16, 19)),
            random,
        ],
        "coupling": [random, shift],
        "fancy": spell(partial(attack, attack=("ATI-FGSM", "Vote-PGD"), epsilon=8), ids),
        "baselines": sweep_one_step(partial(test, "800x640"), EPSILONS),
        "causes": [
            train("400x320", size=(400, 320)),
            train("200x160", size=(200, 160)),
            train("random-encoder", size=(800, 640), encoder_weights="none"),
            train("batch-norm", size=(800, 640), encoder_weights="none", encoder_batch_norm=True),
            vary("encoder's initial weights", "random", "random-encoder"),
            reuse(shift, "encoder's initial weights", "as given"),
            vary("epochs of training", "10", "800x640", iteration=9),
            vary("epochs of training", "60", "800x640", iteration=59),
            reuse(shift, "epochs of training", "230"),
            vary("input size (px)", "200 x 160", "200x160"),
            vary("input size (px)", "400 x 320", "400x320"),
            reuse(shift, "input size (px)", "800 x 640"),
            reuse(shift, "statistics of batch norm", "of the training"),
            vary("statistics of batch norm", "of the image", "800x640", batch_statistics=True),
            vary("batch norm in the encoder, from random weights", "no", "random-encoder"),
            vary("batch norm in the encoder, from random weights", "yes", "batch-norm"),
            vary("channels of the perturbation", "one", "800x640", grey=True),
            reuse(shift, "channels of the perturbation", "three"),
        ],
        "diagnosis": sweep_diagnosis(partial(test, "800x640", attack=ALL, steps=50, subpixel=True, **few), EPSILONS),
        "defence": sweep_defence(
            partial(test, "800x640", steps=100, **few),
            {"size": (800, 640), "init": Checkpoint("800x640", 229), "lr": 3e-4, "schedule": "cosine", "epochs": 30},
            splits,
            (*EPSILONS, 16, 32),
            {"steps": 300},
        ),
    }
    return Scale("800x640", experiments)


def cpu(splits, ids):
    """The paper's schedule at a quarter of its input size: two cores, a night."""
    measured = partial(test, "200x160", subpixel=True)
    attack = partial(measured, epsilon=8)
    near, far, few = TARGETS["8 mm"], TARGETS["random"], {"limit": 20, "steps": 30}
    compare = partial(attack, attack=BEST, steps=100, limit=50)
    shift = compare("attack/shift", {"description": "Displacements of 8 mm, epsilon 8"}, **near)
    random = compare("attack/random", {"description": "Random targets, epsilon 8"}, **far)
    longer = {"steps": 300, "limit": 10}  # another schedule of Vote-PGD, not a continuation
    ati = partial(attack, attack="ATI-FGSM", **few)
    vary = partial(variant, {"attack": PAPER, **near, "epsilon": 8, **few, "subpixel": True})
    experiments = {
        "detection": [train("200x160", size=(200, 160), checkpoint_every=10), *detection("200x160", splits)],
        "attack": [
            shift,
            random,
            compare("attack/shift_300", {"description": "Displacements of 8 mm, 300 iterations"}, **near, **longer),
            compare("attack/random_300", {"description": "Random targets, 300 iterations"}, **far, **longer),
        ],
        "epsilon": sweep_epsilon(
            partial(measured, attack=("ATI-FGSM", "Vote-PGD"), **few),
            {"random": EPSILONS, "8 mm": EPSILONS},
        ),
        "count": [*sweep_count(partial(ati, **near), (1, 2, 5, 10, 19)), random],
        "coupling": [shift, random],
        "fancy": spell(partial(attack, attack=("ATI-FGSM", "Vote-PGD"), steps=100), ids),
        "baselines": sweep_one_step(partial(measured, limit=20), (*EPSILONS, 16, 32, 64, 128)),
        "causes": [
            train("random-encoder", size=(200, 160), encoder_weights="none", epochs=60, checkpoint_every=10),
            vary("encoder's initial weights", "random", "random-encoder"),
            vary("encoder's initial weights", "as given", "200x160", iteration=59),
            vary("epochs of training", "10", "200x160", iteration=9),
            vary("epochs of training", "60", "200x160", iteration=59),
            reuse(shift, "epochs of training", "230"),
            reuse(shift, "statistics of batch norm", "of the training"),
            vary("statistics of batch norm", "of the image", "200x160", batch_statistics=True),
            vary("channels of the perturbation", "one", "200x160", grey=True),
            reuse(shift, "channels of the perturbation", "three"),
        ],
        "diagnosis": [
            *sweep_diagnosis(partial(measured, attack=("Vote-PGD", "noise"), steps=10, limit=30), EPSILONS),
            # steps of 0.05 epsilon take 20 iterations to the bound
            *sweep_diagnosis(partial(measured, attack=PAPER, steps=20, limit=30), (4,), suffix="_paper"),
        ],
        "defence": sweep_defence(
            partial(test, "200x160", **few),
            {"size": (200, 160), "init": Checkpoint("200x160", 229), **SMALL, "lr": 3e-4, "epochs": 10},
            splits,
            (2, 4, 8, 16, 32),
            {"steps": 100},
        ),
    }
    return Scale("200x160", experiments)


def cpu_full(splits, ids):
    """800 x 640 px, coarse to fine from the detector of the scale cpu: two cores, another night."""
    attack = partial(test, "800x640", attack=BEST, epsilon=8, steps=100, limit=10, subpixel=True, batch_size=1)
    near, far = TARGETS["8 mm"], TARGETS["random"]
    shift = attack("attack/shift", {"description": "Displacements of 8 mm, epsilon 8"}, **near)
    random = attack("attack/random", {"description": "Random targets, epsilon 8"}, **far)
    medium = {"attack": BEST, **near, "epsilon": 8, "steps": 100, "limit": 20, "subpixel": True}
    experiments = {
        "detection": [
            train("400x320", size=(400, 320), init=Checkpoint("cpu/200x160", 229), **SMALL, lr=3e-4, epochs=10),
            train("800x640", size=(800, 640), init=Checkpoint("400x320", 9), **SMALL, lr=3e-4, epochs=3),
            *detection("800x640", splits),
        ],
        "attack": [shift, random],
        "coupling": [shift, random],
        "fancy": spell(
            partial(test, "400x320", subpixel=True, attack=("ATI-FGSM", "Vote-PGD"), epsilon=8, steps=100), ids
        ),
        "causes": [
            reuse(test("cpu/200x160", "attack/shift", {}), "input size (px)", "200 x 160"),
            variant(medium, "input size (px)", "400 x 320", "400x320"),
            reuse(shift, "input size (px)", "800 x 640"),
        ],
    }
    return Scale("800x640", experiments)


def quick(splits, ids):
    """To see that everything works, on phantoms for example."""
    attack = partial(test, "100x80", subpixel=True)
    ati, near, far = partial(attack, attack="ATI-FGSM"), TARGETS["8 mm"], TARGETS["random"]
    comparison = partial(attack, attack=BEST, epsilon=8, steps=30, limit=4)
    shift = comparison("attack/shift", {"description": "Displacements of 8 mm, epsilon 8"}, **near)
    random = comparison("attack/random", {"description": "Random targets, epsilon 8"}, **far)
    vary = partial(variant, {"attack": PAPER, **near, "epsilon": 8, "steps": 30, "limit": 4, "subpixel": True})
    start = {**SMALL, "epochs": 16, "checkpoint_every": 16}
    coarse = {"size": (50, 40), **start}
    experiments = {
        "detection": [train("100x80", size=(100, 80), **start), *detection("100x80", splits)],
        "attack": [shift, random],
        "epsilon": sweep_epsilon(partial(ati, steps=20, limit=3), dict.fromkeys(TARGETS, (2, 8, 32))),
        "count": [*sweep_count(partial(ati, **near, epsilon=8, steps=20, limit=3), (1, 19)), random],
        "coupling": [shift, random],
        "fancy": [
            refine("200x160", (200, 160), Checkpoint("100x80", 15), lr=5e-4, epochs=8),
            refine("400x320", (400, 320), Checkpoint("200x160", 7), lr=3e-4, epochs=4),
            *spell(partial(test, "400x320", subpixel=True, attack="Vote-PGD", epsilon=8, steps=200), ids),
        ],
        "baselines": sweep_one_step(partial(attack, limit=5), (8, 32, 128)),
        "causes": [
            train("50x40", **coarse),
            train("random-encoder", **coarse, encoder_weights="none"),
            train("batch-norm", **coarse, encoder_weights="none", encoder_batch_norm=True),
            vary("encoder's initial weights", "random", "random-encoder"),
            vary("encoder's initial weights", "as given", "50x40"),
            vary("batch norm in the encoder, from random weights", "no", "random-encoder"),
            vary("batch norm in the encoder, from random weights", "yes", "batch-norm"),
            vary("statistics of batch norm", "of the training", "50x40"),
            vary("statistics of batch norm", "of the image", "50x40", batch_statistics=True),
            vary("channels of the perturbation", "one", "50x40", grey=True),
            vary("channels of the perturbation", "three", "50x40"),
            vary("input size (px)", "50 x 40", "50x40"),
            reuse(shift, "input size (px)", "100 x 80"),
        ],
        "diagnosis": sweep_diagnosis(partial(attack, attack=ALL, steps=10, limit=4), (4, 16), ("ANB", "MW")),
        "defence": sweep_defence(
            partial(test, "100x80", steps=10, limit=4),
            {"size": (100, 80), "init": Checkpoint("100x80", 15), **SMALL, "lr": 3e-4, "epochs": 3},
            splits,
            (8, 32),
            {"steps": 30},
            "MW",
        ),
    }
    return Scale("100x80", experiments)


def demo():
    """Phantoms, a detector trained on them, tested and attacked: two cores, ten minutes."""
    attack = {"attack": PAPER, **TARGETS["8 mm"], "shift_count": 5, "epsilon": 16, "steps": 40, "limit": 6}
    experiments = {
        "detection": [
            draw(train=80, test1=20, test2=0),
            train("100x80", size=(100, 80), **SMALL, epochs=16, checkpoint_every=16),
            refine("200x160", (200, 160), Checkpoint("100x80", 15), lr=5e-4, epochs=8),
            *detection("200x160", ["test1"]),
        ],
        "attack": [
            test("200x160", "attack/shift", {"description": "Displacements of 8 mm, epsilon 16"}, **attack, pictures=4)
        ],
    }
    return Scale("200x160", experiments)


SCALES = {"paper": paper, "cpu": cpu, "cpu-full": cpu_full, "quick": quick, "demo": demo}
