"""The files of a run, runs/<tag>/: configuration and checkpoints, each written whole or not at all."""

import contextlib
import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision

from command import InputError

RUNS = Path("runs")


def write(path, save):
    """Write a file by ``save(temporary path)``, then give it its name: no reader, and no crash, ever sees half of it.

    Its folder is made. A kill may leave the temporary file, which the next attempt overwrites.

    Raises:
        InputError: it can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")  # the suffix tells some writers the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # on the disk, before its name is
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: can't be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_tensors(path, content):
    """``torch.save``, see ``write``."""

    def save(temporary):
        with open(temporary, "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # it hides its cause, that the disk is full, say
                raise error.__context__ or error from None

    write(path, save)


def write_text(path, text):
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_table(path, table):
    """A DataFrame as CSV, without its index."""
    write(path, lambda temporary: table.to_csv(temporary, index=False, float_format="%.4f"))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def make_folder(path):
    """Make a folder, parents included, and try that it can be written.

    Raises:
        InputError: it can't.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"{path}: can't be used as output folder ({error})") from None


def save_config(path, config, device):
    """Write a configuration as JSON with the versions of what it runs on; one that is there stays as it is."""
    if path.exists():
        return
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    write_json(path, {**config, "versions": versions})


def read_config(path):
    """Read a configuration back.

    Raises:
        InputError: missing or damaged.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable configuration ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a configuration, which maps names to values")
    return config


def check_same_config(path, config, ignore, remedy):
    """Raise InputError unless the configuration in ``path`` equals ``config`` but for the names in ``ignore``.

    A name that ``path`` does not have is that of a later argument; not to use it (False) is what was done then.
    ``remedy`` names the argument that would choose another folder.
    """
    config = json.loads(json.dumps(config))  # tuples become lists, as they did on disk
    kept = read_config(path)
    differences = [
        f"the content of the {name.removesuffix('_sha256')} has changed"
        if name.endswith("_sha256")
        else f"{name} was {kept.get(name)!r}, now it is {config.get(name)!r}"
        for name in sorted((config.keys() | kept.keys()) - {*ignore, "versions"}, key=lambda n: n.endswith("_sha256"))
        if config.get(name) != kept.get(name) and not (name not in kept and config[name] is False)
    ]
    if differences:
        raise InputError(
            f"{path.parent}: holds results of another configuration: {'; '.join(differences)}; repeat the old one, or "
            f"choose another {remedy}"
        )


def run_folder(tag):
    """The folder of a trained run.

    Raises:
        InputError: there is none; the message names those that are there.
    """
    folder = RUNS / tag
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(config.parent.name for config in RUNS.glob("*/config.json"))) or "no other either"
        raise InputError(f"{folder}: no run of this --tag (there is: {known}); train it first by train.py --tag {tag}")
    return folder


def checkpoint_path(folder, epoch):
    return folder / f"model_epoch_{epoch}.pth"


def checkpoint_epochs(folder):
    """The epochs of the checkpoints of a run, in order."""
    names = [path.stem.removeprefix("model_epoch_") for path in folder.glob("model_epoch_*.pth")]
    return sorted(int(name) for name in names if name.isdecimal())
