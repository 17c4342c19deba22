"""Tables and charts of finished runs of test.py, as reproduce.py makes them of its own.

    python scripts/tables.py attack --out tables random_i random_ati     # attacks with the same targets, compared
    python scripts/tables.py robustness --out tables shift random        # attacks of a run each, and the worst case
    python scripts/tables.py diagnosis --data dataset --out tables anb_2 anb_4 fma_4
    python scripts/tables.py defence --out tables accuracy attack adversarial

Writes tables, charts and their text, <experiment>.md, into --out. Differences are paired by image.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, when this file is run by its path

from experiments import attack, defence, diagnosis, robustness
from experiments.results import Result
from support import command
from support.files import check_same_config, own_folder, write_json, write_text

EXPERIMENTS = {"attack": attack, "diagnosis": diagnosis, "defence": defence, "robustness": robustness}


def main(argv=None):
    parser = command.Parser("Tables and charts of finished runs of test.py.")
    parser.add_argument("experiment", choices=EXPERIMENTS, help="whose tables are made")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folders of test.py")
    parser.add_argument("--data", default="dataset", help="diagnosis: folder of the images, for the doctors' marks")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write to")
    args = parser.parse_args(argv)
    folders = [Path(folder) for folder in args.folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        parser.error("DIR: name each folder once")
    short = len({folder.name for folder in folders}) == len(folders)
    results = [Result({"run": folder.name if short else str(folder)}, folder) for folder in folders]
    experiment, out = EXPERIMENTS[args.experiment], Path(args.out)
    results = experiment.check(results)
    with own_folder(out, "scripts/tables.py", "--out", "config.json", "folders"):
        check_same_config(out / "config.json", vars(args), {}, ("data", "out"), "--out")
        write_text(out / f"{args.experiment}.md", experiment.publish(results, args.data, out))
        write_json(out / "config.json", vars(args))
    print(f"written to {out}/")


if __name__ == "__main__":
    command.run(main)
