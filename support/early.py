"""Ctrl-C in the seconds in which a program's imports are loaded; it imports this first, and nothing heavy is here."""

import os
import signal
import sys
from pathlib import Path


def interrupt(*_):
    os.write(2, f"{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(130)


program = Path(__file__).resolve().parents[1] in Path(sys.argv[0]).resolve().parents[:2]  # else it is imported
if program and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, interrupt)  # until command.run
