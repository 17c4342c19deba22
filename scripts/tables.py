"""Tables and charts of finished runs of test.py, as reproduce.py makes them of its own.

    python scripts/tables.py attack temp                      # the methods of one attack, with intervals; Markdown
    python scripts/tables.py attack random_i random_ati       # of several, and their differences from the first
    python scripts/tables.py diagnosis --data dataset --out tables anb_2 anb_4 fma_4
    python scripts/tables.py defence --out tables accuracy attack adversarial
    python scripts/tables.py robustness --out tables shift random   # attacks, and the worst case

All but attack write tables, charts and their text, <experiment>.md, into --out. Differences are paired by image, so
runs need the same targets.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, when this file is run by its path

import support.early  # noqa: F401  for Ctrl-C while the rest is imported

from experiments import attack, defence, diagnosis, robustness
from experiments.results import Result
from support import command
from support.files import own_folder, write_json, write_text

EXPERIMENTS = {"attack": attack, "diagnosis": diagnosis, "defence": defence, "robustness": robustness}


def main(argv=None):
    parser = command.Parser("Tables and charts of finished runs of test.py.")
    parser.add_argument("experiment", choices=EXPERIMENTS, help="whose tables are made")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folders of test.py")
    parser.add_argument("--data", default="dataset", help="diagnosis: folder of the images, for the doctors' marks")
    parser.add_argument("--out", metavar="DIR", help="folder to write to, of all but attack")
    args = parser.parse_args(argv)
    if (args.out is None) != (args.experiment == "attack"):
        parser.error("--out: needed, but for attack, which prints its tables")
    folders = [Path(folder) for folder in args.folders]
    short = len({folder.name for folder in folders}) == len(folders)
    results = [Result({"run": folder.name if short else str(folder)}, folder) for folder in folders]
    if args.experiment == "attack":
        attack.print_tables(results)
        return
    experiment, out = EXPERIMENTS[args.experiment], Path(args.out)
    results = experiment.check(results)
    with own_folder(out, "scripts/tables.py", "--out", "config.json", "folders"):
        write_json(out / "config.json", vars(args))
        write_text(out / f"{args.experiment}.md", experiment.publish(results, args.data, out))
    print(f"written to {out}/")


if __name__ == "__main__":
    command.run(main)
