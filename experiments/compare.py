"""Tables of finished attacks: measures with 95 % intervals, and differences paired by image.

    python -m experiments.compare temp                  # the methods of one run of test.py --attack
    python -m experiments.compare random_i random_ati   # of several runs; the first is what the others differ from

Prints Markdown. Differences are paired by image, so runs need the same targets.
"""

from pathlib import Path

import pandas as pd

from attack import UNTARGETED
from experiments.measures import Result, last, measure, of_role, render_differences, render_measures
from experiments.statistics import differences
from support import command
from support.errors import InputError


def main(argv=None):
    parser = command.Parser("Print measures of finished attacks with intervals, and their paired differences.")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folders of test.py --attack")
    folders = [Path(folder) for folder in parser.parse_args(argv).folders]
    short = len({folder.name for folder in folders}) == len(folders)
    names = {folder: folder.name if short else str(folder) for folder in folders}
    attacks = {}  # (name of the folder, method) -> records
    for folder in folders:
        if "method" not in Result({}, folder).predictions():
            raise InputError(f"{folder}: not the results of an attack; give output folders of test.py --attack")
        for method, records in Result({}, folder).attacked().groupby("method", sort=False):
            attacks[names[folder], method] = records
    check_targets(attacks)
    print(render_measures(compute(attacks)))
    if len(attacks) > 1:
        print(render_differences(compute_differences(attacks)))


def check_targets(attacks):
    """Refuse targeted attacks with other targets than the first has for the same images."""
    targets = {
        name: last(records).set_index(["image", "landmark"])[["target_x_px0", "target_y_px0"]]
        for name, records in attacks.items()
        if name[1] != UNTARGETED
    }
    first = next(iter(targets), None)
    for name, found in targets.items():
        common = found.index.intersection(targets[first].index)
        if not found.loc[common].equals(targets[first].loc[common]):
            raise InputError(f"{name[0]}: other targets than in {first[0]}; give runs with the same --targets, --seed")


def compute(attacks):
    """``measure`` of each attack."""
    return pd.concat([measure(records, {"run": folder}) for (folder, _), records in attacks.items()])


def compute_differences(attacks):
    """The last iteration of each further attack minus that of the first."""
    (first, *others), pairs = attacks, []
    for other in others:
        for role in ("targeted", "stationary"):
            labels = {"attacks": f"{' '.join(other)} minus {' '.join(first)}", "landmarks": role}
            pairs.append((labels, *(of_role(last(attacks[name]), role) for name in (other, first))))
    return differences(pairs)


if __name__ == "__main__":
    command.run(main)
