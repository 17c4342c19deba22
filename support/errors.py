"""The exceptions that a command reports in one line, see ``command.run``; and what functions refuse in Python."""

import argparse
import re

import torch

KINDS = {"float": torch.is_floating_point, "bool": lambda value: value.dtype == torch.bool, "number": torch.is_tensor}
# characters that change what a terminal shows, and surrogates, which stand for bytes that are no UTF-8
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
UNFIT = re.compile(f"[=+@-]|.*{CONTROL.pattern}", re.DOTALL)  # as names in tables: spreadsheets run =1+1


class InputError(argparse.ArgumentTypeError):  # so that functions that raise it can be types of arguments
    """Wrong input. The message is one line: what is wrong, where, and what to do."""


class Stopped(BaseException):
    """SIGTERM or SIGHUP arrived. Not an Exception, so that no ``except Exception`` swallows it."""


def check_tensors(**tensors):
    """Refuse arguments that are no tensors, or do not fit together.

    Args:
        tensors: name=(value, axes, kind). Axes are a letter each, of one size wherever it stands, or a digit, the size
            itself. Kinds are those of KINDS.

    Raises:
        ValueError: it names the first that does not fit, and says what all are.
    """
    sizes = {"2": 2, "3": 3}
    for name, (value, axes, kind) in tensors.items():
        fits = torch.is_tensor(value) and KINDS[kind](value) and len(axes) == value.dim()
        if not fits or any(sizes.setdefault(axis, n) != n for axis, n in zip(axes, value.shape, strict=False)):
            all_are = "; ".join(f"{other} is {describe(value)}" for other, (value, *_) in tensors.items())
            raise ValueError(f"{name} must be ({', '.join(axes)}), a tensor of kind {kind}: {all_are}")


def describe(value):
    """What an argument is, in a message."""
    return f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else f"a {type(value).__name__}"
