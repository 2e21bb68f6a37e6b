"""What several commands have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

NEEDS: dict[str, Any] = {"needs": ("onnxruntime",), "extra": "cpu"}
"""Of commands that open a graph: what they import, and the extra of the package that brings it."""


def add_artifact(parser: argparse.ArgumentParser) -> None:
    """Add the first argument of every command that reads an artifact."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder, as `export` writes it")
