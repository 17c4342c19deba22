"""Output files: written whole or not at all, and the configuration that says what made them."""

import contextlib
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from support.errors import InputError

RUNS = Path("runs")


@contextlib.contextmanager
def atomic(path):
    """A temporary path to write to, renamed to ``path`` at the end: no reader and no crash leaves half a file.

        with atomic("runs/a/chart.png") as temporary:
            figure.savefig(temporary)

    The folder is created. A killed process may leave the temporary file, which the next attempt overwrites.

    Raises:
        InputError: an OSError in the block, or in renaming.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")  # the suffix tells some writers the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:  # for update: Windows flushes no handle that was opened for reading
            os.fsync(file.fileno())  # the content is on the disk before the name is
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # a path may be no text


def write_table(path, table):
    """A DataFrame as CSV, without its index: four decimals, but all of the pixel spacing, a factor of others."""
    if "mm_per_px0" in table:
        table = table.assign(mm_per_px0=table["mm_per_px0"].map(str))
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4f")


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def make_folder(path):
    """Create a folder, parents included, and check that it is writable.

    Raises:
        InputError: it is not.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be used as output folder ({error})") from None


def save_config(path, config, device, update=()):
    """Write a configuration as JSON with the versions of what it runs on; in an existing one change ``update`` only."""
    if path.exists():
        kept = read_config(path)
        changed = {name: config[name] for name in update if kept.get(name) != config[name]}
        if changed:
            write_json(path, kept | changed)
        return
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    write_json(path, {**config, "versions": versions})


def read_config(path):
    """Read a configuration.

    Raises:
        InputError: missing or not JSON of an object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable configuration ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a configuration: a JSON object is needed")
    return config


def check_same_config(path, config, defaults, ignore, remedy):
    """Raise InputError unless the configuration in ``path`` equals ``config``, except for the names in ``ignore``.

    Args:
        defaults: {name: value} of the command's arguments; an argument that the file does not have, since it was
            written before the argument existed, counts as having its default.
        remedy: name of the argument that chooses another folder, for the message.
    """
    kept, config = defaults | read_config(path), defaults | config
    kept, config = (json.loads(json.dumps(content)) for content in (kept, config))  # tuples become lists, as on disk
    names = sorted((config.keys() | kept.keys()) - {*ignore, "versions"}, key=lambda name: name.endswith("_sha256"))
    differences = [
        f"the content of the {name.removesuffix('_sha256')} has changed"
        if name.endswith("_sha256")
        else f"{name} was {kept.get(name)!r}, now it is {config.get(name)!r}"
        for name in names
        if config.get(name) != kept.get(name)
    ]
    if differences:
        raise InputError(
            f"{path.parent}: holds results of another configuration: {'; '.join(differences)}; repeat the old one, or "
            f"choose another {remedy}"
        )


def run_folder(tag):
    """The folder of a run, of train.py or of the 2020 code.

    Raises:
        InputError: there is none; the message names those that exist.
    """
    folder = RUNS / tag
    known = {config.parent.name for name in ("config.json", "config.yaml") for config in RUNS.glob(f"*/{name}")}
    if tag not in known:
        known = ", ".join(sorted(known)) or "none"
        raise InputError(f"{folder}: no such run (existing runs: {known}); train it by train.py --tag {tag}")
    return folder
