"""Files of weights: where a run keeps them, and how they are read without running code that they may hold."""

import hashlib
import io
import os
import re
import warnings

import torch

from support.errors import InputError, describe
from support.files import atomic


def checkpoint_path(folder, epoch):
    """The file of the weights after an epoch, counted from 0."""
    return folder / f"model_epoch_{epoch}.pth"


def checkpoint_epochs(folder):
    """The epochs of a run's checkpoints, in order."""
    names = [path.stem.removeprefix("model_epoch_") for path in folder.glob("model_epoch_*.pth")]
    return sorted(int(name) for name in names if name.isdecimal())


def find_checkpoint(folder, epoch=None):
    """(epoch, path) of a checkpoint, the newest for ``epoch`` None.

    Raises:
        InputError: there is none; the message names those that exist.
    """
    epochs = checkpoint_epochs(folder)
    if not epochs:
        raise InputError(f"{folder}: no checkpoint model_epoch_<e>.pth yet; continue training by train.py --resume")
    epoch = epochs[-1] if epoch is None else epoch
    path = checkpoint_path(folder, epoch)
    if epoch not in epochs:
        raise InputError(f"{path}: no such checkpoint; --iteration takes one of: {', '.join(map(str, epochs))}")
    return epoch, path


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path, content):
    """``torch.save`` by ``files.atomic``."""
    buffer = io.BytesIO()  # torch.save itself hides an OSError, of a full disk say
    torch.save(content, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_file(path):
    """``torch.load`` on the CPU with ``weights_only``.

    Raises:
        InputError: no file, damaged, or with more than tensors and numbers.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, or no regular one")  # a pipe would wait
    try:
        with warnings.catch_warnings(action="ignore"):  # about old pickle protocols, which are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen types
        raise InputError(f"{path}: not a readable file of weights, or of more ({type(error).__name__})") from None


def load_tensors(path):
    """Read a state dict (name to tensor), bare or within {"state_dict": ...} or a run's resume.pth.

    Prefixes of its names that ``DataParallel`` ("module.") and ``torch.compile`` ("_orig_mod.") leave are removed.

    Raises:
        InputError: see ``load_file``; or it holds something else.
    """
    state = load_file(path)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(key, str) and torch.is_tensor(state[key]) for key in state):
        raise InputError(f"{path}: not a state dict, which maps names to tensors")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}


def checked(path, state, expected):
    """Weights, as floating-point numbers of the types of a network's own.

    Args:
        path: where they come from, for the message.
        state: {name: tensor}.
        expected: {name: tensor}, the network's.

    Raises:
        InputError: other names, shapes or kinds of numbers; nan, inf, a number too large for the type, or a variance
            below 0.
    """
    if names := expected.keys() ^ state.keys():
        raise InputError(f"{path}: weights of another network: {len(names)} names differ, {min(names)} is one")
    found = {}
    for name, wanted in expected.items():
        value = state[name]
        if value.shape != wanted.shape or value.is_floating_point() != wanted.is_floating_point():
            raise InputError(f"{path}: weights of another network: {name} is {describe(value)}, not {describe(wanted)}")
        found[name] = value.to(wanted.dtype)
        if not found[name].isfinite().all() or (name.endswith("running_var") and (found[name] < 0).any()):
            raise InputError(f"{path}: weights that are nan or inf, or variances below 0: {name}")
    return found
