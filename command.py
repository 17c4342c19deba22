"""How the commands talk to their user: arguments, and wrong input as one line with exit status 2."""

import argparse
import math
import os
import re
import sys
import warnings
from pathlib import Path

import torch


class InputError(Exception):
    """Wrong input. The message is one line: what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and reports a wrong argument in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def add_argument(self, *names, **options):
        if options.get("default", argparse.SUPPRESS) is not argparse.SUPPRESS:
            options["help"] = f"{options['help']} (default: %(default)s)"
        return super().add_argument(*names, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all arguments)\n")


def run(main):
    """Run a command's ``main()``; wrong input becomes one line on standard error and exit status 2."""
    name = Path(sys.argv[0]).name
    warnings.filterwarnings("ignore", module="PIL")  # of damaged images, which are refused by name
    warnings.showwarning = lambda message, *_: print(f"{name}: warning: {message}", file=sys.stderr)
    # PyTorch then asks Linux for huge pages: on CPUs, the first touch of big tensors costs a tenth of all time without
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        main()
        return
    except (InputError, OSError) as error:  # an OSError names its file: a full disk, a folder that can't be read
        status, message = 2, f"error: {' '.join(str(error).split())}"
    except (RuntimeError, MemoryError) as error:
        told = "out of memory", "can't allocate memory", "ALLOC_FAILED"  # by CUDA, PyTorch, cuBLAS and cuDNN
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in told):
            raise
        reason = str(error).partition("\n")[0]
        status, message = 2, f"error: out of memory; use a smaller --batch-size ({reason})"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    print(f"{name}: {message}", file=sys.stderr)  # only here, where the error's progress bars are gone
    sys.exit(status)


def positive_int(text):
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def natural_int(text):
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63 - 1")
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def tag(text):
    """A run's name: one folder below runs/."""
    if not text or text in (".", "..") or "/" in text or "\\" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name")
    return text


def subfolder(text):
    """A path below a run's folder."""
    path = Path(text)
    if not text or path.is_absolute() or ".." in path.parts or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path below the run's folder")
    return text


def add_device_arguments(parser):
    """--device and --compile, alike in every command that runs the network."""
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, with CUDA graphs on a GPU")


def add_compute_arguments(parser):
    """Those of ``add_device_arguments``, --precision and --seed, alike in training and testing."""
    add_device_arguments(parser)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast of the network")
    parser.add_argument("--seed", type=natural_int, default=0, help="seed of everything random")


def find_device(name):
    """The torch.device of a ``--device`` argument; a GPU becomes the current one, and cuDNN tries its algorithms.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if kind is None:
        raise InputError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(kind[1] or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: CUDA finds {torch.cuda.device_count()} devices here; use --device cpu")
    if name.startswith("cuda"):
        torch.cuda.set_device(int(kind[1] or 0))
        torch.backends.cudnn.benchmark = True
    return torch.device(name)
