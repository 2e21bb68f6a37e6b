"""`bench`: how fast an artifact runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.settings import BenchSettings
from ..engine.execution import Execution
from ..errors import SettingsError
from ..interrupts import loading
from ..options import read_options
from .common import NEEDS, add_artifact

if TYPE_CHECKING:
    from ..console import Commands


def register(commands: Commands) -> None:
    """Add `bench`."""
    parser = commands.add("bench", _bench, "measure an artifact; the last line of stdout is JSON", **NEEDS)
    add_artifact(parser)
    text = "execution providers to compare, or all that start; if one cannot run, the others still do; exit code 1"
    parser.add_argument("--providers", default="cpu", metavar="A,B", help=text)
    parser.add_argument("--prompt-lengths", default="32,128", metavar="N,N", help="prompt lengths in tokens")
    commands.add_options(parser, BenchSettings)
    commands.add_options(parser, Execution, leave_out=("provider",))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON document to FILE")


def _bench(args: argparse.Namespace) -> int:
    with loading():
        from ..bench.compare import bench, format_table, named_providers

    if args.json is not None:
        _check_file(args.json)
    try:
        lengths = tuple(int(length) for length in args.prompt_lengths.split(","))
    except ValueError as error:
        raise SettingsError("prompt_lengths", args.prompt_lengths, "they must be numbers like 32,128") from error
    providers = named_providers(args.providers)
    if args.cuda_graph and "cuda" not in providers:
        raise SettingsError("providers", args.providers, "{cuda_graph} needs cuda")
    execution = read_options(Execution, args, provider="cuda" if args.cuda_graph else "cpu")
    settings = read_options(BenchSettings, args, prompt_lengths=lengths, execution=execution)
    document = bench(args.artifact, providers, settings)
    print(format_table(document))
    text = json.dumps(document)
    print(text)
    if args.json is not None:
        try:
            args.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:  # one of writing has no name of a file
            raise OSError(error.errno, error.strerror, str(args.json)) from error
    failures = [facts for facts in document["providers"] if "error" in facts]
    for facts in failures:
        print(f"error: {facts['provider']} did not run: {facts['error']}", file=sys.stderr)
    return 1 if failures else 0


def _check_file(path: Path) -> None:
    """Raise SettingsError if --json cannot be written: before the measurement, not after it."""
    if not path.absolute().parent.is_dir():
        raise SettingsError("json", path, "its folder does not exist")
    if path.is_dir():
        raise SettingsError("json", path, "it is a folder")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise SettingsError("json", path, "there is no permission to write it")
