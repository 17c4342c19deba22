"""The whole story on synthetic radiographs: draw them, train a detector, test it, attack it.

    make demo               # .venv with all that is needed, then this
    python demo.py

Each stage is a command that could be typed. A stage that is done is skipped; one whose command or code has changed is
done again, with all that follow from it; one that was stopped goes on.
"""

import hashlib
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pandas as pd

import command
from command import InputError, Stopped
from runs import RUNS, read_config, write_json

PHANTOMS, COARSE, FINE = (RUNS / name for name in ("demo-phantoms", "demo-coarse", "demo"))
SIZE, SHIFT_COUNT, SHIFT_MM, EPSILON, STEPS, ATTACKED = "200 160", 5, 8, 16, 40, 6

Stage = namedtuple("Stage", "name output sources command")


def stages():
    """What the demo does; ``sources`` are the files of code that decide a result beside those of the stages before."""
    run = f"--data {PHANTOMS} --precision {command.fast_precision()}"
    train = "train.py model.py container.py dataset.py distributed.py"
    return [
        Stage(
            "draw radiographs",
            PHANTOMS,
            "phantom.py shape_model.json atlas.json",
            f"phantom.py --out {PHANTOMS} --train 80 --test1 20 --test2 0",
        ),
        Stage(
            "train at 100 x 80",
            COARSE,
            train,
            f"train.py --tag {COARSE.name} {run} --size 100 80 --encoder-weights none --epochs 16 --batch-size 4 "
            "--schedule cosine --checkpoint-every 16 --resume",
        ),
        Stage(
            f"train on at {SIZE.replace(' ', ' x ')}",
            FINE,
            train,
            f"train.py --tag {FINE.name} {run} --size {SIZE} --init {COARSE}/model_epoch_15.pth --epochs 8 --lr 5e-4 "
            "--batch-size 4 --schedule cosine --checkpoint-every 8 --resume",
        ),
        Stage("test", FINE / "test", "test.py eval.py", f"test.py --tag {FINE.name} {run} --split test1 --rand test"),
        Stage(
            "attack",
            FINE / "attack",
            "test.py eval.py attack.py adversarial.py",
            f"test.py --tag {FINE.name} {run} --split test1 --rand attack --attack I-FGSM ATI-FGSM --targets shift "
            f"--shift-count {SHIFT_COUNT} --shift-mm {SHIFT_MM} --epsilon {EPSILON} --steps {STEPS} --limit {ATTACKED}",
        ),
    ]


def main():
    command.Parser("Draw synthetic radiographs, train a detector on them, test it, attack it.").parse_args()
    code = Path(__file__).parent
    book = RUNS / "demo.json"  # of each stage's output: the hash of what it was made from, and whether it is done
    RUNS.mkdir(exist_ok=True)
    kept = read_config(book) if book.exists() else {}
    made_from = ""
    start = time.perf_counter()
    todo = stages()
    for number, stage in enumerate(todo, 1):
        print(f"\n[{number} of {len(todo)}] {stage.name}", flush=True)
        made_from += stage.command + "".join((code / source).read_text() for source in stage.sources.split())
        key = hashlib.sha256(made_from.encode()).hexdigest()
        output = str(stage.output)
        if stage.output.exists():
            if output not in kept:
                raise InputError(f"{output}: exists already and is not of the demo; move it away")
            if kept[output] == [key, "done"]:
                print("done before")
                continue
            if kept[output] != [key, "begun"]:
                kept[output] = None  # until the deletion is complete, this output is of no use
                write_json(book, kept)
                shutil.rmtree(stage.output)
        kept[output] = [key, "begun"]
        write_json(book, kept)
        print(f"python {stage.command}", flush=True)
        run_command(code, stage.command)
        kept[output] = [key, "done"]
        write_json(book, kept)
    report()
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")


def run_command(code, line):
    """Run one of the commands; end with its status if it fails, which it has explained."""
    program, *arguments = line.split()
    process = subprocess.Popen([sys.executable, code / program, *arguments])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has been interrupted too, and cleans up
        raise
    except Stopped:
        process.terminate()
        process.wait()
        raise
    if status < 0:
        raise InputError(f"{program}: killed by signal {-status}; was there enough memory?")
    if status:
        sys.exit(status)


def report():
    """Print the two tables, what was different in the paper, and where the pictures are."""
    test = pd.read_csv(FINE / "test" / "summary.csv").iloc[-1:, 1:]
    attack = pd.read_csv(FINE / "attack" / "summary.csv")
    clean = (attack["iteration"] == 0) & (attack["method"] == "I-FGSM")
    attack = attack[clean | (attack["iteration"] == STEPS)].copy()
    attack.loc[attack["iteration"] == 0, "method"] = "no attack"
    paper = [
        ("images", "80 + 20 synthetic", "150 + 250 real"),
        ("input (px)", SIZE.replace(" ", " x "), "800 x 640"),
        ("encoder at first", "random", "ImageNet"),
        ("epochs", "16 at 100 x 80, then 8", "230"),
        ("batch, schedule", "4, cosine", "8, step"),
        ("images attacked", f"{ATTACKED}", "250"),
        ("targeted landmarks", f"{SHIFT_COUNT}", "1 to 17"),
        ("their displacement", f"{SHIFT_MM} mm", "random, about 70 mm"),
        ("epsilon", f"{EPSILON} ({EPSILON / 2:g} of 255 grey levels)", "8 (4 of 255 grey levels)"),
        ("iterations", f"{STEPS}", "300"),
    ]
    print("\nDetection on 20 radiographs that were not trained on\n")
    print(test.to_string(index=False, float_format="%.2f"))
    print(f"\nTargeted attack on the first {ATTACKED} of them, errors from target or truth\n")
    print(attack.to_string(index=False, float_format="%.2f"))
    print("\nWhat is different from the paper\n")
    print(pd.DataFrame(paper, columns=["", "here", "the paper"]).to_string(index=False))
    print("\nPictures: clean prediction, attacked prediction with targets, perturbation\n")
    print(*sorted((FINE / "attack" / "pictures").glob("*.png")), sep="\n")


if __name__ == "__main__":
    command.run(main)
