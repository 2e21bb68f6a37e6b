"""`batch`: completions, chats and scores for a whole file of rows."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import check_fields
from ..engine.execution import Execution
from ..errors import IMSMRuntimeError, PromptError, SettingsError, shown
from ..generation.settings import GenerationSettings
from ..interrupts import loading
from ..options import read_options
from .batch_output import Output
from .common import NEEDS, add_artifact, said_settings
from .rows import Progress, Row, at_line, check_apart, parse_rows, read_content

if TYPE_CHECKING:
    from ..console import Commands
    from ..generation.batch_rows import Job, Key
    from ..generation.generation import Model


@dataclass(frozen=True)
class BatchOptions:
    """How a file of rows is worked through. rows: texts that are generated together, at most."""

    rows: int = field(default=8, metadata={"help": "generate so many texts at once, at most", "metavar": "N"})
    skip_bad_rows: bool = field(default=False, metadata={"help": "write an error for a row that cannot be used"})
    overwrite: bool = field(default=False, metadata={"help": "begin anew where the output exists"})

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows < 1:
            raise SettingsError("rows", self.rows, "it must be at least 1")


def register(commands: Commands) -> None:
    """Add `batch`."""
    parser = commands.add("batch", _batch, "answer a file of prompts, chats or OpenAI's batch lines", **NEEDS)
    add_artifact(parser)
    text = "rows of JSON: prompts, messages, or lines of OpenAI's batches; - is stdin"
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help=text)
    text = "a row of JSON for each of them, as soon as it is there; a run that was ended goes on"
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=text)
    commands.add_options(parser, BatchOptions)
    commands.add_options(parser, GenerationSettings)
    commands.add_options(parser, Execution)


def _batch(args: argparse.Namespace) -> int:
    options, execution = read_options(BatchOptions, args), read_options(Execution, args)
    said = said_settings(args)
    with loading():
        from ..generation.batch_rows import error_document, is_error, key_of_result
        from ..generation.batch_run import answers
        from ..generation.generation import load

    content = read_content(args.input)
    rows, bad = _keyed(parse_rows(args.input, content), options.skip_bad_rows)
    check_apart(args.input, args.output)
    model = load(args.artifact, execution)
    defaults = GenerationSettings.of_model(model.session.manifest.generation, **said)
    identity = {
        "input": _hash(content),
        "artifact": _hash(model.session.artifact.encode()),
        "set of options": _hash(json.dumps(vars(defaults), sort_keys=True).encode()),
    }
    with Output(args.output, identity, key_of_result, is_error, options.overwrite) as output:
        left = {key: row for key, row in rows.items() if key not in output.done}
        bad = {key: error for key, error in bad.items() if key not in output.done}
        jobs = _jobs(model, left, bad, defaults, options.skip_bad_rows)
        begin, tokens, wrong = time.perf_counter(), 0, output.failed + len(bad)
        with output.begin() as writer, Progress(len(jobs), len(jobs)) as progress:
            for key, error in bad.items():
                writer.write(error_document(key, error))
            for answer in answers(model, jobs, options.rows):
                writer.write(answer.document)
                progress.advance(1)
                tokens, wrong = tokens + answer.tokens, wrong + answer.failed
        seconds = time.perf_counter() - begin
        done = f"{len(jobs) + len(bad)} rows written, {len(output.done)} were there"
    told = [done, f"{tokens} tokens, {tokens / seconds:.1f} tokens/s", *([f"{wrong} have an error"] if wrong else [])]
    print("; ".join(told), file=sys.stderr)
    return 1 if wrong else 0


def _keyed(rows: list[Row], skip: bool) -> tuple[dict[Key, Row], dict[Key, IMSMRuntimeError]]:
    """The rows by their keys, and what is no row. Raises PromptError for a key that comes twice, and, unless they are
    skipped, for what is no row."""
    from ..generation.batch_rows import key_of

    found: dict[Key, Row] = {}
    bad: dict[Key, IMSMRuntimeError] = {}
    for row in rows:
        with at_line(row.line):
            try:
                if row.error is not None:
                    raise row.error
                key = key_of(row.value, row.line)
            except PromptError as error:
                if not skip:
                    raise
                bad["row", row.line] = error
                continue
            if key in found:
                raise PromptError(f"its {key[0]} {shown(key[1])} is that of line {found[key].line}, too")
            found[key] = row
    return found, bad


def _jobs(
    model: Model,
    rows: dict[Key, Row],
    bad: dict[Key, IMSMRuntimeError],
    defaults: GenerationSettings,
    skip: bool,
) -> list[Job]:
    """What the rows ask for; errors of bodies, and of rows that are skipped, go to `bad`."""
    from ..generation.batch_rows import read_job
    from ..generation.openai_rows import BodyError

    jobs = []
    for key, row in rows.items():
        try:
            jobs.append(read_job(model, key, row.value, defaults))
        except BodyError as error:
            bad[key] = error
        except IMSMRuntimeError as error:
            if not skip:
                raise PromptError(f"line {row.line}: {error}") from error
            bad[key] = error
    return jobs


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
