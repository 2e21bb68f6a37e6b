"""`doctor`: what this machine can run."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..interrupts import loading
from .common import NEEDS

if TYPE_CHECKING:
    from ..console import Commands


def register(commands: Commands) -> None:
    """Add `doctor`."""
    parser = commands.add("doctor", _doctor, "show what this machine can run", **NEEDS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _doctor(args: argparse.Namespace) -> int:
    with loading():
        from ..doctor import examine, format_report

    facts = examine()
    print(json.dumps(facts) if args.json else format_report(facts))
    return 1 if facts["problems"] else 0
