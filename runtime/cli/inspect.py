"""`inspect`: what an artifact is, without loading its graph."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .common import add_artifact

if TYPE_CHECKING:
    from ..console import Commands


def register(commands: Commands) -> None:
    """Add `inspect`."""
    parser = commands.add("inspect", _inspect, "describe an artifact")
    add_artifact(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(args: argparse.Namespace) -> int:
    from ..inspect import format_summary, summarize

    facts = summarize(args.artifact)
    print(json.dumps(facts) if args.json else format_summary(facts))
    return 0
