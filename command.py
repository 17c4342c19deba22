"""How the commands talk to their user: arguments, progress, and wrong input as one line with exit status 2."""

import argparse
import gc
import math
import os
import re
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

STOPPED = 128 + signal.SIGTERM  # exit status
TRY_AGAIN = 75  # exit status EX_TEMPFAIL of sysexits.h


class InputError(Exception):
    """Wrong input. The message is one line: what is wrong, where, and what to do."""


class Stopped(BaseException):
    """SIGTERM. No Exception, so that nothing takes it for an error of its own."""


def rank():
    """The number of this process among those that torchrun has started; 0 of a process alone."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size():
    """How many processes torchrun has started."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def cores():
    """How many of this machine's cores are this process's own."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    return max(1, os.cpu_count() // here)


def is_main():
    """Whether this process is the first, which alone shows progress and writes what all have found."""
    return rank() == 0


def progress(*args, **options):
    """A tqdm bar, shown by the first process."""
    if not is_main():
        options["disable"] = True
    return tqdm(*args, **options)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and reports a wrong argument in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def add_argument(self, *names, **options):
        if options.get("default", argparse.SUPPRESS) is not argparse.SUPPRESS:
            options["help"] = f"{options['help']} (default: %(default)s)"
        return super().add_argument(*names, **options)

    def error(self, message):
        line = f"{self.prog}: error: {message} (--help lists all arguments)\n"
        self.exit(2, line if is_main() else None)


def run(main):
    """Run a command's ``main()``; what goes wrong becomes one line on standard error and an exit status.

    2: wrong input, or something else that a person must see to, a full disk say; 75: another process was lost;
    130: Ctrl-C; 143: SIGTERM. Of what all processes know, the first tells.
    """
    name = Path(sys.argv[0]).name
    warnings.filterwarnings("ignore", module="PIL")  # of damaged images, which are refused by name
    warnings.showwarning = lambda message, *_: is_main() and print(f"{name}: warning: {message}", file=sys.stderr)
    # PyTorch then asks Linux for huge pages: on CPUs, the first touch of big tensors costs a tenth of all time without
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    def stop(*_):
        raise Stopped("stopped by SIGTERM; what was finished is kept")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        try:
            main()
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, if others have ended for the same reason
            status, message = explain(error)
        gc.collect()  # with the error its progress bars go, each of which ends its line
        if message:
            print(f"{name}: {message}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(status)  # the threads that talked to the others may hang or abort at a usual exit
        sys.exit(status)
    finally:
        signal.signal(signal.SIGTERM, before)


def explain(error):
    """Exit status and line for an error that is not a fault of the program; raises any other again."""
    if isinstance(error, (InputError, OSError)):  # an OSError names its file: a full disk, a folder that can't be read
        return 2, f"error: {' '.join(str(error).split())}"
    if isinstance(error, SystemExit):  # it has said what there is to say
        return error.code or 0, None
    if isinstance(error, Stopped):
        return STOPPED, str(error) if is_main() else None
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted" if is_main() else None
    reason = str(error).partition("\n")[0]
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in reason):
        return TRY_AGAIN, f"process {rank()}: lost another process of this run, run it again ({reason})"
    told = "out of memory", "can't allocate memory", "ALLOC_FAILED"  # by CUDA, PyTorch, cuBLAS and cuDNN
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in told)):
        return 2, f"error: out of memory; use a smaller --batch-size ({reason})"
    raise error


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


def fast_precision():
    """The faster --precision here: float32 where a processor would only imitate bfloat16."""
    processor = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if torch.cuda.is_available() or processor.get("avx512_bf16", False) else "fp32"


def find_device(name):
    """The torch.device of a ``--device`` argument; a GPU becomes the current one, and cuDNN tries its algorithms.

    Of several processes on a machine, each takes the GPU of its own number.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if kind is None:
        raise InputError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device(name)
    index = int(kind[1] or 0)
    if world_size() > 1:
        if kind[1]:
            raise InputError(f"--device {name}: several processes can't share a GPU; use --device cuda")
        index = int(os.environ["LOCAL_RANK"])
        name = f"cuda:{index}"
    if index >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: CUDA finds {torch.cuda.device_count()} devices here; use --device cpu or fewer processes"
        )
    torch.cuda.set_device(index)
    torch.backends.cudnn.benchmark = True
    return torch.device(name)
