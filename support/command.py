"""The command line: arguments, progress bars, and errors as one line with exit status 2."""

import argparse
import contextlib
import gc
import math
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.distributed import is_main, launched, rank, world_size
from support.errors import CONTROL, UNFIT, InputError, Stopped

STOPPED = 128 + signal.SIGTERM  # exit status; SIGHUP counts as SIGTERM
TRY_AGAIN = 75  # exit status EX_TEMPFAIL of sysexits.h


class Lines:
    """A file for tqdm where the output is no terminal: each state of a bar becomes a line."""

    def write(self, text):
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress(*args, **options):
    """A tqdm bar, shown by the main process only; where the output is no terminal, a line a minute."""
    if not is_main():
        options["disable"] = True
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": 60, "maxinterval": 60, "position": 0, "ascii": True}
        options["delay"] = 0 if options.get("leave", True) else 60
    return tqdm(*args, **options)


def loading_bar(iterable, **options):
    """A bar that disappears when its work is done."""
    return progress(iterable, unit="image", leave=False, **options)


@contextlib.contextmanager
def late_stop():
    """An event that SIGTERM sets, instead of ending the command at once: a step can be finished first.

    Raises:
        Stopped: at the end of the block, if it has come.
    """
    event = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
    if event.is_set():
        stop()


def stop(*_):
    raise Stopped("stopped by SIGTERM; finished work is kept")


def one_line(text):
    """A text without line ends, and without what a terminal would obey: names in files may hold anything."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], " ".join(text.split()))


def say(message):
    """A line on standard error."""
    with contextlib.suppress(OSError):  # a terminal that is closed
        print(f"{Path(sys.argv[0]).name}: {one_line(message)}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts no abbreviations and reports a wrong argument in one line.

    Attributes:
        may_change: names of arguments that may change when a command is repeated on its earlier results.
    """

    def __init__(self, description):
        self.may_change = set()
        super().__init__(description=description, allow_abbrev=False)

    def add_argument(self, *names, may_change=False, **options):
        if options.get("default") is not None and options["default"] is not argparse.SUPPRESS:
            options["help"] = f"{options['help']} (default: %(default)s)"
        action = super().add_argument(*names, **options)
        if may_change:
            self.may_change.add(action.dest)
        return action

    def error(self, message):
        line = f"{self.prog}: error: {one_line(message)} (--help lists all arguments)\n"
        self.exit(2, line if is_main() else None)

    def refuse(self, args, names, reason):
        """End with the reason if one of these arguments is not its default."""
        for name in names:
            if getattr(args, name) != self.get_default(name):
                self.error(f"--{name.replace('_', '-')}: {reason}")

    def defaults(self):
        """{name: default} of all arguments."""
        return {action.dest: action.default for action in self._actions if action.dest != "help"}


def run(main):
    """Call a command's ``main()``; errors become one line on standard error and an exit status.

    2: wrong input, or another condition that the user must resolve (a full disk); 75: another process was lost; 130:
    Ctrl-C; 143: SIGTERM or SIGHUP. An error that all processes have is reported by the main process only.
    """
    # names that it cannot show, standard error escapes them itself; a line is seen when it is printed
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    warnings.filterwarnings("ignore", module="PIL")  # about damaged images, which are refused by name
    warnings.showwarning = lambda message, *_: is_main() and say(f"warning: {message}")
    # PyTorch then requests huge pages from Linux: a tenth of all time on CPUs is the first touch of large tensors
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGTERM, stop)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not after nohup
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))  # a terminal is closed
    status, message = 0, None
    try:
        main()
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun, if other processes ended for the same reason
        status, message = explain(error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is written
    gc.collect()  # closes the progress bars that the error holds, each of which ends its line
    if message:
        say(message)
    if dist.is_initialized():
        if status == 0:
            with contextlib.suppress(RuntimeError):  # another process may be gone
                dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)  # the communication threads may hang or abort in a normal exit
    if status:
        sys.exit(status)


def explain(error):
    """(exit status, line) of an error that is not a bug; any other is raised again."""
    if isinstance(error, (InputError, OSError)):  # an OSError names its file
        return 2, f"error: {error}"
    if isinstance(error, SystemExit):  # already reported
        return error.code or 0, None
    if isinstance(error, Stopped):
        return STOPPED, str(error) if is_main() else None
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted" if is_main() else None
    lines = str(error).splitlines() or [""]
    out_of_memory = "out of memory", "can't allocate memory", "ALLOC_FAILED"  # CUDA, PyTorch, cuBLAS and cuDNN
    if isinstance(error, MemoryError) or any(phrase in str(error) for phrase in out_of_memory):
        return 2, f"error: out of memory; use a smaller --batch-size ({lines[0]})"
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and re.search("gloo|abruptly", lines[0])):
        # NCCL says the cause in its last line
        return TRY_AGAIN, f"process {rank()}: lost another process of this run, run it again ({' '.join(lines)})"
    raise error


# --- types of arguments ----------------------------------------------------------------------------------------------


def bounded(kind, is_valid, words):
    """A type of arguments: numbers of a kind, int or float, for which ``is_valid`` holds."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if is_valid(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {words}")

    return parse


positive_int = bounded(int, lambda value: value > 0, "a whole number above 0")
natural_int = bounded(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
positive_float = bounded(float, lambda value: 0 < value < math.inf, "a number above 0")


def half_grey_levels(text):
    """A value of --epsilon, such as 8."""
    words = "a number of half grey levels; 4/255 of an image in [0, 1] is --epsilon 8"
    value = bounded(float, lambda value: 0 <= value < math.inf, words)(text)
    if 0 < value * 127.5 / 256 < 0.5:
        lost = "less than half a grey level, of which 8-bit images keep nothing"
        warnings.warn(f"--epsilon {value:g} is {lost}; 8/255 of an image in [0, 1] is --epsilon 16", stacklevel=2)
    return value


def tag(text):
    """A run's name: one folder below runs/."""
    if text in ("", ".", "..") or {*"/\\"} & {*text} or UNFIT.match(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name")
    return text


# --- arguments that commands share -----------------------------------------------------------------------------------


def add_data_arguments(parser):
    """--data, --mm-per-px and --unusual."""
    add = parser.add_argument
    add("--data", default="dataset", may_change=True, help="folder of the ISBI 2015 data, see docs/data.md")
    spacing = "pixel spacing of the original images (default: the data's spacing file, else 0.1)"
    add("--mm-per-px", type=positive_float, metavar="MM", help=spacing)
    add("--unusual", action="store_true", may_change=True, help="skip the checks for implausible annotations")


def add_device_arguments(parser):
    """--device and --compile."""
    devices = "auto (cuda if available), cpu, cuda, cuda:1, ..."
    parser.add_argument("--device", default="auto", may_change=True, help=devices)
    parser.add_argument("--compile", action="store_true", may_change=True, help="torch.compile the network")


def add_compute_arguments(parser):
    """--device, --compile, --precision and --seed."""
    add_device_arguments(parser)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast of the network")
    parser.add_argument("--seed", type=natural_int, default=0, help="seed of everything random")


def fast_precision(device):
    """The faster --precision on a ``--device``: bf16 unless it would be emulated."""
    native = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    if device != "cpu" and torch.cuda.is_available():
        native = torch.cuda.get_device_capability(None if device in ("auto", "cuda") else device) >= (8, 0)
    return "bf16" if native else "fp32"


def find_device(name):
    """The torch.device of a ``--device`` argument; a GPU becomes the current one, with cuDNN's autotuner on.

    Under torchrun, each process takes the GPU of its local rank.

    Raises:
        InputError: no such device.
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
            raise InputError(f"--device {name}: several processes cannot use one GPU; use --device cuda")
        index = launched("LOCAL_RANK", 0)
        name = f"cuda:{index}"
    if index >= (count := torch.cuda.device_count()):
        raise InputError(f"--device {name}: CUDA finds {count} devices; use --device cpu or fewer processes")
    torch.cuda.set_device(index)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, as in convolutions
    return torch.device(name)
