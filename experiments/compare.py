"""Tables of finished attacks: measures with 95 % intervals, and differences paired by image.

    python -m experiments.compare temp                  # the methods of one run of test.py --attack
    python -m experiments.compare random_i random_ati   # of several runs; the first is what the others differ from

Prints Markdown. Runs should have the same images and targets.
"""

from pathlib import Path

import pandas as pd

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
    print(render_measures(compute(attacks)))
    if len(attacks) > 1:
        print(render_differences(compute_differences(attacks)))


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
