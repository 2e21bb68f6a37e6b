"""`score`: how likely given continuations of prompts are."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..engine.execution import Execution
from ..errors import PromptError, setting
from ..generation.score_settings import ScoreSettings
from ..interrupts import loading
from ..options import read_options
from .common import NEEDS, add_artifact
from .rows import Progress, RowWriter, add_files, check_apart, prepare_rows, read_rows

if TYPE_CHECKING:
    from ..console import Commands


def register(commands: Commands) -> None:
    """Add `score`."""
    parser = commands.add("score", _score, "tell how likely given continuations of prompts are", **NEEDS)
    add_artifact(parser)
    reads = "rows of JSON with the keys prompt and continuation (text, or a list of choices)"
    add_files(parser, reads, "a row of JSON for each of them")
    commands.add_options(parser, ScoreSettings)
    commands.add_options(parser, Execution)


def _score(args: argparse.Namespace) -> int:
    settings, execution = read_options(ScoreSettings, args), read_options(Execution, args)
    with loading():
        from ..generation.generation import load
        from ..generation.scoring import facts_of_scores, perplexity, prepare, score_prepared

    rows = read_rows(args.input, _check)
    check_apart(args.input, args.output)
    model = load(args.artifact, execution)
    prepared = prepare_rows(rows, lambda value: prepare(model, value, settings))
    total, tokens = 0.0, 0
    with RowWriter(args.output) as writer, Progress(len(rows), sum(row.tokens for row in prepared)) as progress:
        for row, ready, scores in zip(rows, prepared, score_prepared(model, prepared, settings), strict=True):
            writer.write(facts_of_scores(row.value, scores))
            progress.advance(ready.tokens)
            total += sum(score.logprob for score in scores)
            tokens += sum(len(score.logprobs) for score in scores)
    mean = total / tokens
    line = f"{len(rows)} rows, {tokens} tokens, {mean:.4f} nats a token, perplexity {perplexity(mean):.4g}"
    print(line, file=sys.stderr)
    return 0


def _check(row: Any) -> None:
    from ..generation.scoring import check_row

    check_row(row)
    if said := [each.name for each in fields(ScoreSettings) if each.name in row]:
        raise PromptError(f"it has {said[0]}, and all rows are judged alike: say {setting(said[0])} for all")
