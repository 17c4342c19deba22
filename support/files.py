"""Output files: written whole or not at all, and the configuration that says what made them."""

import contextlib
import json
import os
import platform
import re
import secrets
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from support.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUNS = Path("runs")
LOCK = ".lock"  # in a folder that a command uses
PART = re.compile(r"\..+\.part(\.[^.]*)?")  # names of temporary files


@contextlib.contextmanager
def atomic(path):
    """A temporary path to write to, renamed to ``path`` at the end: no reader and no crash leaves half a file.

        with atomic("runs/a/chart.png") as temporary:
            figure.savefig(temporary)

    The folder is created. A killed process may leave the temporary file, which the next ``own_folder`` removes.

    Raises:
        InputError: an OSError in the block, or in renaming.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(6)}.part{path.suffix}")  # its suffix tells writers the format
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


def load_table(path, columns):
    """A table of an earlier call as a DataFrame.

    Raises:
        InputError: missing, or not a table with these columns and a row.
    """
    with contextlib.suppress(OSError, ValueError):
        table = pd.read_csv(path)
        if len(table) and set(columns) <= set(table):
            return table
    raise InputError(f"{path}: not a readable table; remove it and repeat the command that writes it")


# --- folders ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_folder(folder, program, remedy, mark, sign=None):
    """A folder of results for one command alone, as long as the block lasts; if nothing is written, it is as before.

    What killed commands left half written is removed. The lock ends with the process, however that ends; on Windows and
    on file systems without locks there is none.

    Args:
        folder: Path; created, parents included.
        program: name of the command.
        remedy: the argument that chooses another folder, for the message.
        mark: a file that the command writes into each of its folders.
        sign: an argument that no other command has, if the mark is a configuration, which names it.

    Raises:
        InputError: another process uses it, another command began it, it holds other files, or is not writable.
    """
    names, path = results(folder), folder / LOCK
    if names and (mark not in names or (sign and sign not in read_config(folder / mark))):
        raise InputError(f"{folder}: holds files, but no {mark} of {program}; choose another {remedy}")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as output folder ({error})") from None
    with open(lock, "r+b", buffering=0) as file:
        if fcntl and is_locked(file, path):
            raise InputError(f"{folder}: in use by {file.read(200).decode()}; wait for it, or choose another {remedy}")
        try:
            file.truncate()
            file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}".encode())
            remove_parts(folder)
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                for parent in made:  # that is empty
                    parent.rmdir()


def is_locked(file, path):
    """Lock an open file, or return that another process has. (Not ``flock``: forked children would keep that.)"""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # removed just now
    except OSError as error:  # others: a file system without locks
        return isinstance(error, (BlockingIOError, PermissionError, FileNotFoundError))


def results(folder):
    """Names of what a folder holds, but for locks and temporary files; [] without a folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [name for name in names if name != LOCK and not PART.fullmatch(name)]


def remove_parts(folder):
    """Remove temporary files, but in subfolders that a command uses."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, LOCK).exists()]
        for name in filter(PART.fullmatch, names):
            Path(place, name).unlink(missing_ok=True)


# --- configurations --------------------------------------------------------------------------------------------------


def save_config(path, config, device, update=()):
    """Write a configuration as JSON with the versions of what it runs on; in an existing one change ``update`` only."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
    versions |= {name: version(name) for name in ("torchvision", "numpy")}
    versions["gpu"] = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    config = {**config, "versions": versions}
    kept = read_config(path) if path.exists() else config
    write_json(path, kept | {name: config[name] for name in update})


def read_config(path):
    """Read a configuration.

    Raises:
        InputError: missing or not JSON of an object, or its epochs are no number.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable configuration ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("epochs", 0), int):
        raise InputError(f"{path}: not a configuration: a JSON object is needed, its epochs a number")
    return config


def check_same_config(path, config, defaults, ignore, remedy, kept=None):
    """Raise InputError where the configuration in ``path``, if any, differs from ``config``, except in ``ignore``.

    Args:
        kept: the configuration, if ``path`` is another kind of file.
        defaults: {name: value} of the command's arguments; an argument that the file does not have, since it was
            written before the argument existed, counts as having its default.
        remedy: name of the argument that chooses another folder, for the message.
    """
    kept = kept or (read_config(path) if path.exists() else config)
    # tuples become lists, as on disk
    kept, config = (json.loads(json.dumps(defaults | content)) for content in (kept, config))
    names = sorted((config.keys() | kept.keys()) - {*ignore, "versions"}, key=lambda name: name.endswith("_sha256"))
    differences = [
        f"the content of the {name.removesuffix('_sha256')} has changed"
        if name.endswith("_sha256")
        else f"{name} was {kept.get(name)!r}, now it is {config.get(name)!r}"
        for name in names
        if config.get(name) != kept.get(name)
    ]
    if differences:
        other = f"holds results of another configuration: {'; '.join(differences)}"
        raise InputError(f"{path.parent}: {other}; repeat the old one, or choose another {remedy}")


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
