"""Ablation of Vote-PGD: the same attack by variants that differ in one ingredient each.

    python -m experiments.ablation --out ablation -- --tag baseline --limit 20 --steps 100

What follows -- are arguments of test.py, which runs each variant into OUT/<variant>/ and resumes after a stop. Prints
the tables of experiments.compare, with the differences from the first variant: Vote-PGD, unless --only omits it.
"""

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import attack
import test
from experiments import compare
from support import command, distributed


def paper_loss(model, image, goal, epsilon=8, steps=300, restarts=1, seed=0):
    """The loss of ATI-FGSM with momentum and schedule of Vote-PGD, last iterate; one run, as long as all restarts."""
    loss = partial(attack.adaptive_loss, goal=goal)
    return attack.pgd(model, image, loss, epsilon, steps * restarts, attack.falling, attack.MOMENTUM)


def last_iterate(iterates, score):
    """Instead of ``attack.keep_best``."""
    return iterates


VARIANTS = {  # name -> what replaces names of attack.py
    "Vote-PGD": {},
    "last_iterate": {"keep_best": last_iterate},
    "constant_weights": {"TARGETED_WEIGHT": (1.0, 1.0, 0.0), "STATIONARY_WEIGHT": (0.3, 0.3, 0.0)},
    "width_0.1": {"VOTE_WIDTH": (0.1, 0.1)},
    "width_0.33": {"VOTE_WIDTH": (0.33, 0.33)},
    "no_momentum": {"MOMENTUM": 0.0},
    "constant_step": {"falling": attack.STEP_SIZE},
    "paper_loss": {"vote_goal": attack.goal_maps},
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    own, rest = argv, []
    if "--" in argv:
        own, rest = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = command.Parser("Attack by variants of Vote-PGD. Arguments after -- are passed to test.py.")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the variants' results")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT", help="only these variants"
    )
    args = parser.parse_args(own)
    folders = []
    for name in (name for name in VARIANTS if name in args.only):
        folders.append(str(Path(args.out) / name))
        with ExitStack() as stack:
            for what, replacement in VARIANTS[name].items():
                stack.enter_context(mock.patch.object(attack, what, replacement))
            if name == "paper_loss":
                stack.enter_context(mock.patch.dict(attack.ATTACKS, {"Vote-PGD": paper_loss}))
            test.main([*rest, "--attack", "4", "--pictures", "0", "--rand", folders[-1]])
    if distributed.is_main():
        compare.main(folders)


if __name__ == "__main__":
    command.run(main)
