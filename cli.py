"""One command line for the repository: each package registers its own commands; this only wires them together.

    python cli.py train | export | verify | inspect | generate | bench | doctor

Heavy imports stay inside the commands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import export.commands
import imsm_core.commands
import runtime.commands
from imsm_core.console import IntermixedParser
from imsm_core.errors import IMSMError
from runtime.errors import IMSMRuntimeError


def check_parity(artifact: Path, checkpoint: Path, base_model: str | None) -> dict[str, Any]:
    """The part of `verify` that needs PyTorch."""
    return export.commands.verify_against_checkpoint(artifact, checkpoint, base_model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="cli.py", description="Tune, export and run siamese language models (IMSM).")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=IntermixedParser)
    imsm_core.commands.register(subparsers)
    export.commands.register(subparsers)
    runtime.commands.register(subparsers, check_parity)
    return runtime.commands.run(parser, argv, (IMSMError, IMSMRuntimeError))


if __name__ == "__main__":
    sys.exit(main())
