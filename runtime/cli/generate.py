"""`generate`: text from an artifact."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..engine.execution import Execution
from ..generation.settings import GenerationSettings
from ..interrupts import loading
from ..options import read_options
from ..streams import read_prompt
from .common import NEEDS, add_artifact, said_settings
from .token_lines import heading, token_line

if TYPE_CHECKING:
    from ..console import Commands
    from ..generation.generation import Model
    from ..generation.results import Chunk, Generation


def register(commands: Commands) -> None:
    """Add `generate`."""
    parser = commands.add("generate", _generate, "generate text from an artifact", **NEEDS)
    add_artifact(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt, or - to read it from stdin")
    commands.add_options(parser, GenerationSettings)
    commands.add_options(parser, Execution)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def _generate(args: argparse.Namespace) -> int:
    said, execution = said_settings(args), read_options(Execution, args)
    prompt = read_prompt(args.prompt)
    with loading():
        from ..generation.generation import generate, load, stream_generate

    model = load(args.artifact, execution)
    settings = GenerationSettings.of_model(model.session.manifest.generation, **said)
    if args.json:
        print(json.dumps(_document(model, generate(model, prompt, settings))))
        return 0
    if settings.logprobs is not None or settings.trace is not None:
        _print_tokens(model, stream_generate(model, prompt, settings))
        return 0
    for chunk in stream_generate(model, prompt, settings):
        print(chunk.text, end="", flush=True)
    print()
    return 0


def _print_tokens(model: Model, chunks: Iterator[Chunk]) -> None:
    headed = False
    for chunk in chunks:
        if chunk.token is not None:
            if not headed:
                print(heading(chunk.token))
                headed = True
                for token in chunk.prompt or ():
                    print(token_line(token, model.codec.token_text))
            print(token_line(chunk.token, model.codec.token_text), flush=True)


def _document(model: Model, result: Generation) -> dict[str, Any]:
    from ..generation.results import facts_of_tokens

    document: dict[str, Any] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "stopped_by": result.stopped_by,
        "gate_mean": result.gate_means,
        "timings": vars(result.timings),
        "providers": model.session.providers,
    }
    return document | facts_of_tokens(result, model.codec.token_text)
