"""What several commands have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..generation.settings import GenerationSettings
from ..options import said_options

NEEDS: dict[str, Any] = {"needs": ("onnxruntime",), "extra": "cpu"}
"""Of commands that open a graph: what they import, and the extra of the package that brings it."""


def add_artifact(parser: argparse.ArgumentParser) -> None:
    """Add the first argument of every command that reads an artifact."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder, as `export` writes it")


def said_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of GenerationSettings, for `GenerationSettings.of_model`. Raises SettingsError for what is
    wrong in them, before a model is loaded."""
    said = said_options(GenerationSettings, args)
    GenerationSettings(**said)
    return said
