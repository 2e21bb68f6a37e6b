"""`generate`: text from an artifact."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..engine.execution import Execution
from ..generation.settings import GenerationSettings
from ..interrupts import loading
from ..options import read_options
from ..streams import read_prompt
from .common import NEEDS, add_artifact

if TYPE_CHECKING:
    from ..console import Commands


def register(commands: Commands) -> None:
    """Add `generate`."""
    parser = commands.add("generate", _generate, "generate text from an artifact", **NEEDS)
    add_artifact(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt, or - to read it from stdin")
    commands.add_options(parser, GenerationSettings)
    commands.add_options(parser, Execution)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def _generate(args: argparse.Namespace) -> int:
    settings, execution = read_options(GenerationSettings, args), read_options(Execution, args)
    prompt = read_prompt(args.prompt)
    with loading():
        from ..generation.generation import generate, load, stream_generate

    model = load(args.artifact, execution)
    if args.json:
        result = generate(model, prompt, settings)
        document = {
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "gate_mean": result.gate_means,
            "timings": vars(result.timings),
            "providers": model.session.providers,
        }
        print(json.dumps(document))
        return 0
    for chunk in stream_generate(model, prompt, settings):
        print(chunk.text, end="", flush=True)
    print()
    return 0
