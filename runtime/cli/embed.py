"""`embed`: texts as vectors."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..engine.execution import Execution
from ..errors import PromptError, shown
from ..generation.embed_settings import EmbedSettings
from ..interrupts import loading
from ..options import read_options
from .common import NEEDS, add_artifact
from .rows import Progress, RowWriter, add_files, check_apart, prepare_rows, read_rows

if TYPE_CHECKING:
    from ..console import Commands

KEYS = ("text", "input")


def register(commands: Commands) -> None:
    """Add `embed`."""
    parser = commands.add("embed", _embed, "turn texts into vectors, to compare or to search them", **NEEDS)
    add_artifact(parser)
    reads = "rows of JSON with the key text (or input), and an id if you like"
    add_files(parser, reads, "a row of JSON for each of them, with its embedding")
    commands.add_options(parser, EmbedSettings)
    commands.add_options(parser, Execution)


def _embed(args: argparse.Namespace) -> int:
    settings, execution = read_options(EmbedSettings, args), read_options(Execution, args)
    with loading():
        from ..generation.embedding import embed_prepared, prepare
        from ..generation.generation import load

    rows = read_rows(args.input, _check)
    check_apart(args.input, args.output)
    model = load(args.artifact, execution)
    prepared = prepare_rows(rows, lambda value: prepare(model, _text(value), settings))
    embeddings = embed_prepared(model.session, prepared, settings)
    with RowWriter(args.output) as writer, Progress(len(rows), sum(map(len, prepared))) as progress:
        for index, (row, ids, embedding) in enumerate(zip(rows, prepared, embeddings, strict=True)):
            name = {"id": row.value["id"]} if "id" in row.value else {"index": index}
            writer.write({**name, "embedding": embedding.tolist(), "tokens": len(ids)})
            progress.advance(len(ids))
    return 0


def _check(row: Any) -> None:
    if not isinstance(row, dict):
        raise PromptError(f"it is {shown(row)}, not an object with the key text")
    found = [key for key in KEYS if key in row]
    if len(found) != 1:
        raise PromptError("it has both text and input" if found else "it has no text; a row has the key text, or input")
    if not isinstance(_text(row), str):
        raise PromptError(f"the {found[0]} is {shown(_text(row))}; it must be text")


def _text(row: dict[str, Any]) -> Any:
    return next(row[key] for key in KEYS if key in row)
