"""The report of all experiments: a section for each, put together in results/<name>/report.md."""

import os

from experiments import attack, causes, count, defence, detection, diagnosis, epsilon, fancy, robustness
from experiments.statistics import ENOUGH
from support.files import read_config, write_text

EXPERIMENTS = {  # in order; each has publish(results, data, out) -> Markdown
    "detection": detection,
    "attack": attack,
    "robustness": robustness,
    "epsilon": epsilon,
    "count": count,
    "fancy": fancy,
    "causes": causes,
    "diagnosis": diagnosis,
    "defence": defence,
}
NOTE = (
    "Brackets contain 95 % confidence intervals by a bootstrap over images; where all landmarks or none succeeded, the "
    f"exact bound of as many images. Fewer than {ENOUGH} images are a pilot: their intervals are too narrow. All "
    "numbers are in the CSV files beside this report."
)


def describe(name):
    """The title of an experiment's section and its introduction: its module's docstring."""
    title, _, text = EXPERIMENTS[name].__doc__.partition(".\n\n")
    return title, text.strip()


def publish(name, results, data, commands, out):
    """Write an experiment's tables and charts, and its section, <out>/<name>.md.

    Args:
        results: list of results.Result.
        data: folder of the images.
        commands: list of command lines that made the results, for the reader.
    """
    text = EXPERIMENTS[name].publish(results, data, out)
    text += "\nCommands:\n\n```\n" + "\n".join(commands) + "\n```\n"
    write_text(out / f"{name}.md", text)


def assemble(scale, names, run, out):
    """Write <out>/report.md from the sections that exist.

    Args:
        scale: its name.
        names: its experiments.
        run: folder of the attacked detector.
    """
    config = read_config(run / "config.json")
    machine = config["versions"]["gpu"] or f"{os.cpu_count()} CPU cores"
    text = f"# Reproduction at the scale `{scale}`\n\n{machine}, PyTorch {config['versions']['torch']}, "
    text += f"{config['precision']}. {NOTE}\n"
    for number, name in enumerate(names, 1):
        (title, introduction), file = describe(name), out / f"{name}.md"
        section = file.read_text(encoding="utf-8") if file.exists() else f"Not yet run: `--only {name}`.\n"
        text += f"\n## {number}. {title}\n\n{introduction}\n\n{section.lstrip()}"
    write_text(out / "report.md", text)
