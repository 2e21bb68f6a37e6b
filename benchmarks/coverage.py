"""The coverage matrix: architecture x PEFT method, each cell an export that is run and compared with PyTorch.

    scripts/coverage [--rows NAME ...] [--columns NAME ...] [--jobs N] [--out FILE]

A cell makes a tiny model with random weights, puts a random non-zero adapter and gate on it, and exports it, which
compares hidden states, gate and logits of a ragged prefill, 32 cached steps and a chunked prefill with PyTorch. Then
the runtime generates from the artifact: a ragged batch against the uncached oracle, and with the gate forced to either
side against the plain base model and against PEFT's own model. The largest difference of logits is the cell's number.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import onnx_ir as ir
import torch

from export.errors import UnsupportedError
from export.pipeline import export_model
from export.settings import ExportSettings
from imsm_core.backbone import load_base_model, load_tokenizer
from imsm_core.errors import AdapterError, BaseModelError
from imsm_core.reference import reference_generate
from imsm_core.siamese import SiameseModel
from imsm_core.text_part import TAKEN_OUT
from runtime import Session
from tests.adapters import ADAPTERS, TOKENS, make_siamese_with
from tests.builders import save_tiny_checkpoint
from tests.zoo import ARCHITECTURES, REFUSED, make_zoo_base

# The rows and columns of the matrix; the rest of the zoo meets LoRA, and the rest of the methods meet Llama.
ROWS = (
    "llama", "mistral", "qwen1.5", "qwen2", "qwen3", "mixtral", "gemma2", "gemma3", "phi3", "glm", "glm4", "gpt2",
    "gpt_neox", "opt", "falcon", "stablelm", "olmo2", "granite", "smollm3", "cohere", "starcoder2", "bloom",
)  # fmt: skip
COLUMNS = (
    "lora", "dora", "adalora", "ia3", "vera", "loha", "lokr", "oft", "boft", "ln_tuning", "fourierft", "prefix_tuning",
    "prompt_tuning", "p_tuning", "trainable_tokens",
)  # fmt: skip

PROMPTS = ([0, 80, 104, 77, TOKENS[0], 102, 114, TOKENS[1], 118, 90, 61], [77, TOKENS[2], 102, 114], [TOKENS[1]])
STEPS = 24
TOLERANCE = 1e-4  # absolute, and relative to the largest logit
BATCH = 60  # cells before the processes are restarted
NOTICEABLE = 512  # bytes of a weight
FORCED = 1e4  # a memory bias that closes the gate on one side


@dataclass(frozen=True)
class Cell:
    """difference: the largest absolute one of logits; refused, failed: the reason."""

    row: str
    column: str
    difference: float = 0.0
    refused: str = ""
    failed: str = ""
    seconds: float = 0.0


def run_cell(row: str, column: str) -> Cell:
    """Make, export, run and compare one model."""
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="coverage-"))
    try:
        return Cell(row, column, _difference(row, column, folder), seconds=time.perf_counter() - start)
    except (AdapterError, BaseModelError, UnsupportedError) as error:
        return Cell(row, column, refused=str(error), seconds=time.perf_counter() - start)
    except Exception as error:  # a cell that fails must not end the run
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Cell(row, column, failed=reason, seconds=time.perf_counter() - start)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _difference(row: str, column: str, folder: Path) -> float:
    base = make_zoo_base(folder / "base", row)
    model = make_siamese_with(base, column)
    info = save_tiny_checkpoint(model, base, folder / "checkpoint")
    artifact = folder / "artifact"
    manifest = export_model(
        model, load_tokenizer(str(base)), info, artifact, ExportSettings(), report=lambda line: None
    )
    _check_stored_once(artifact)
    compared = manifest["parity"]["max_abs_difference"].values()
    found: list[float] = [value for way in compared for name, value in way.items() if name.startswith("logits")]
    session = Session(artifact, threads=1)
    found += _against_oracle(model, session)
    found.append(_forced(session, FORCED, load_base_model(str(base))))
    found.append(_forced(session, -FORCED, model.peft_model))
    return float(max(found))


def _check_stored_once(artifact: Path) -> None:
    """Raise AssertionError if two weights of the graph are the same."""
    seen: dict[bytes, str] = {}
    for name, value in ir.load(artifact / "model.onnx").graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < NOTICEABLE:
            continue
        content = hashlib.sha256(tensor.tobytes()).digest()
        if content in seen:
            raise AssertionError(f"the graph holds {name} twice, also as {seen[content]}")
        seen[content] = name


def _against_oracle(model: SiameseModel, session: Session) -> list[float]:
    expected = [reference_generate(model, prompt, STEPS) for prompt in PROMPTS]
    state = session.new_state(len(PROMPTS))
    output = session.prefill(state, PROMPTS)
    found = []
    for steps in zip(*expected, strict=True):
        found += [_compare(output.logits[index], step.logits.numpy()) for index, step in enumerate(steps)]
        output = session.decode_step(state, [step.token for step in steps])
    return found


@torch.no_grad()
def _forced(session: Session, bias: float, plain: Any) -> float:
    """The runtime with the gate on one side against a plain model's own forward pass."""
    output = session.prefill(session.new_state(1, bias), PROMPTS[:1])
    return _compare(output.logits[0], plain(torch.tensor(PROMPTS[:1])).logits[0, -1].numpy())


def _compare(found: np.ndarray, expected: np.ndarray) -> float:
    difference = float(np.abs(found - expected).max())
    limit = TOLERANCE * (1 + float(np.abs(expected).max()))
    if not difference <= limit:
        raise AssertionError(f"logits are off by {difference:.2e}, more than {limit:.2e}")
    return difference


def run_cells(cells: Sequence[tuple[str, str]], jobs: int, note: Callable[[Cell], None]) -> dict[tuple[str, str], Cell]:
    """Run cells in `jobs` processes, which are restarted now and then to free their memory. Raises
    BrokenProcessPool if one of them dies."""
    done: dict[tuple[str, str], Cell] = {}
    spawn = multiprocessing.get_context("spawn")
    for first in range(0, len(cells), BATCH):
        with ProcessPoolExecutor(jobs, spawn, _quiet) as pool:
            for future in as_completed([pool.submit(run_cell, *names) for names in cells[first : first + BATCH]]):
                cell = future.result()
                done[cell.row, cell.column] = cell
                note(cell)
    return done


def read_results(path: Path | None) -> dict[tuple[str, str], Cell]:
    """The cells of an interrupted run, one JSON object a line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
    cells = [Cell(**json.loads(line)) for line in lines]
    return {(cell.row, cell.column): cell for cell in cells}


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  progress bars of saving tiny models


class Document:
    """docs/COVERAGE.md, with each reason for a refusal as a numbered note."""

    def __init__(self, cells: dict[tuple[str, str], Cell]) -> None:
        self.cells = cells
        self.reasons: list[str] = []

    def entry(self, row: str, column: str) -> str:
        """A difference, `refused` with the number of its reason, or FAILED."""
        cell = self.cells.get((row, column))
        if cell is None:
            return ""
        if cell.failed:
            return "**FAILED**"
        if not cell.refused:
            return f"{cell.difference:.0e}"
        reason = _general(cell.refused)
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"refused ({self.reasons.index(reason) + 1})"

    def table(self, rows: Iterable[str], columns: Sequence[str]) -> list[str]:
        """Markdown lines; rows and columns without a cell are left out."""
        columns = [column for column in columns if any((row, column) in self.cells for row in ARCHITECTURES)]
        lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        for row in rows:
            if any((row, column) in self.cells for column in columns):
                lines.append(f"| {row} | " + " | ".join(self.entry(row, column) for column in columns) + " |")
        return lines


def _general(reason: str) -> str:
    """A reason without what differs from layer to layer."""
    return reason.replace("the adapter does not fit the model: ", "PEFT: ")


def write_document(cells: dict[tuple[str, str], Cell], path: Path) -> None:
    """Write the matrix, the two lists beside it, and the architectures that are refused."""
    document = Document(cells)
    passed = [cell.difference for cell in cells.values() if not cell.refused and not cell.failed]
    failed = [cell for cell in cells.values() if cell.failed]
    refused = [cell for cell in cells.values() if cell.refused]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "onnxruntime"))
    minutes = sum(cell.seconds for cell in cells.values()) / 60
    matrix = document.table(ROWS, COLUMNS)
    left = sum((row, column) not in cells for row in ROWS for column in COLUMNS)
    left_out = [f"{left} pairs of the matrix were left out of this run; their cells are empty.", ""] if left else []
    others = document.table([name for name in ARCHITECTURES if name not in ROWS], ["lora"])
    methods = [name for name in ADAPTERS if name not in COLUMNS]
    lines = [
        "# Coverage: architecture x PEFT method",
        "",
        f"Written by `scripts/coverage` on {datetime.date.today()} ({platform.machine()}; {versions}; {minutes:.0f} "
        f"minutes of one core): {len(passed)} pairs agree with PyTorch, {len(refused)} are refused with a reason, "
        f"{len(failed)} fail. The largest difference of all is {max(passed, default=0):.0e}.",
        "",
        "A number is the largest absolute difference of logits between the artifact and PyTorch in float32, on a tiny "
        "model with random weights, a random non-zero adapter and a random gate: a ragged prefill, cached decode steps "
        "that take the graph's own tokens, a chunked prefill, the runtime's decoding of a ragged batch against the "
        "uncached oracle, and the gate forced to either side against the plain base model and PEFT's own model. The "
        "export compares hidden states and the gate as well. A pair fails above 1e-4 plus 1e-4 of the largest logit.",
        "",
        "The paper's three models: ChatGLM3-6B is `glm` (its in-library successor, partial interleaved rotation), "
        "Qwen1.5-4B is `qwen1.5` (transformers' qwen2 with as many key as query heads and biases on q, k and v), "
        "Llama3-8B is `llama`. Names are those of tests/zoo.py and tests/adapters.py, which hold the configurations.",
        "",
        "Between them the rows have tied and untied embeddings (qwen2, llama), grouped, single and multi-query heads "
        "(llama, gpt2, falcon), biases and none (qwen1.5, llama), windows, experts, ALiBi, learned positions, and "
        "rotations of whole, partial, interleaved and no width.",
        "",
        *left_out,
        *matrix,
        "",
        "## Every other architecture, with LoRA on all linear layers",
        "",
        *others,
        "",
    ]
    if run := [name for name in methods if ("llama", name) in cells]:
        lines += ["## Every other PEFT method and setting, on Llama", "", "| | llama |", "|---|---|"]
        lines += [*[f"| {name} | {document.entry('llama', name)} |" for name in run], ""]
    if document.reasons:
        lines += ["## Why a pair is refused", ""]
        lines += [f"{number}. {reason}" for number, reason in enumerate(document.reasons, 1)]
        lines.append("")
    lines += ["## Architectures that are refused", "", "Before any long work, by name:", ""]
    lines += [f"- {line}" for line in refusals()]
    lines += ["", *multimodal()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def multimodal() -> list[str]:
    """Which multimodal models the text part is taken out of."""
    kinds = ", ".join(f"`{kind}`" for kind in sorted(TAKEN_OUT))
    return [
        "## Multimodal models",
        "",
        f"The text part is taken out of {kinds}: on text it gives the logits of the whole model, which "
        "tests/imsm_core/test_text_part.py shows on tiny ones of each. What it exports to is what the text model alone "
        "does. Others are refused by name, among them PaliGemma, whose prompt attends to all of itself, Aya Vision, "
        "whose text model alone scales its logits, Gemma 3n and GLM-4V.",
    ]


def refusals() -> list[str]:
    """The exporter's message for every architecture of the zoo that it refuses."""
    cells = run_cells([(name, "lora") for name in REFUSED], 1, lambda cell: None)
    for cell in cells.values():
        if not cell.refused:
            raise AssertionError(f"{cell.row} was not refused: {cell}")
    return [f"{row}: {cell.refused}" for (row, _), cell in sorted(cells.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix, or a part of it; 1 if a pair fails."""
    parser = argparse.ArgumentParser(prog="scripts/coverage", description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="architectures (tests/zoo.py); without it all")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="methods (tests/adapters.py); without it all")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write; without it only print")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keep every pair's result here, and skip those that it already has"
    )
    args = parser.parse_args(argv)
    for given, names in ((args.rows, list(ARCHITECTURES)), (args.columns, list(ADAPTERS))):
        if unknown := [name for name in given or [] if name not in names]:
            parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(names)}")
    if args.rows or args.columns:
        chosen = [(row, column) for row in args.rows or ROWS for column in args.columns or COLUMNS]
    else:
        chosen = [(row, column) for row in ROWS for column in COLUMNS]
        chosen += [(row, "lora") for row in ARCHITECTURES if row not in ROWS]
        chosen += [("llama", column) for column in ADAPTERS if column not in COLUMNS]
    start = time.perf_counter()
    known = read_results(args.results)

    def note(cell: Cell) -> None:
        result = f"refused: {cell.refused}" if cell.refused else f"FAILED: {cell.failed}" if cell.failed else ""
        print(f"{cell.row} x {cell.column}: {result or f'{cell.difference:.1e}'} ({cell.seconds:.0f} s)", flush=True)
        if args.results is not None:
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(cell)) + "\n")

    cells = known | run_cells([pair for pair in chosen if pair not in known], args.jobs, note)
    if args.out is not None:
        write_document(cells, args.out)
    seconds = time.perf_counter() - start
    failed = sum(bool(cell.failed) for cell in cells.values())
    print(f"{len(cells)} pairs, {failed} failed, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
