"""One command line for the repository: each package registers its own commands; this only wires them together.

    python cli.py train | export | verify | inspect | generate | bench | doctor

`imsm`, from the wheel, is the same. Heavy imports stay inside the commands.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # while what follows is imported

import export.commands
import imsm_core.commands
import runtime.cli.register
from runtime.console import run_commands

REGISTERS = (imsm_core.commands.register, export.commands.register, runtime.cli.register.register)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    return run_commands("cli.py", REGISTERS, argv)


if __name__ == "__main__":
    sys.exit(main())
