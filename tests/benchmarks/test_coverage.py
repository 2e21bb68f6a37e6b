"""A diagonal of the coverage matrix: every architecture that the matrix has as a row and that no other test exports,
every method that it has as a column, and each kind of graph that only one family needs. scripts/coverage runs the
whole."""

from __future__ import annotations

import pytest

from benchmarks.coverage import COLUMNS, ROWS, Cell, Document, run_cells

DIAGONAL = {
    "llama, llama3 scaling": "boft",
    "mistral": "prompt_tuning",  # a window beside virtual tokens
    "qwen1.5": "adalora",
    "qwen2_moe": "dora",
    "mixtral": "lora",  # on experts and routers
    "gemma2": "prefix_long",  # more virtual tokens than the window
    "gemma3": "trainable_tokens",  # tied
    "phi3": "vera",
    "glm4": "prefix_tuning",
    "gpt_neox": "fourierft",
    "opt": "ln_tuning",
    "falcon": "ia3",
    "stablelm": "vblora",
    "olmo2": "oft",
    "granite": "p_tuning",
    "smollm3": "lokr",
    "cohere": "lora",
    "starcoder2": "lora_all_biases",
    "bloom": "prompt_tuning",  # a bias on the scores that counts virtual tokens
    "mpt": "loha",
    "gpt_oss": "lora",  # attention sinks, experts laid out otherwise
    "deepseek_v3": "lora",  # values narrower than keys
    "llama, dynamic scaling": "hira",
}
ELSEWHERE = {"llama", "qwen2", "qwen3", "gpt2", "glm"}
"""Rows whose exports tests/parity/test_architectures.py and test_chunks_of_batches.py compare with the same oracle."""


@pytest.fixture(scope="module")
def cells() -> dict[str, Cell]:
    found = run_cells([*DIAGONAL.items()], jobs=2, note=lambda cell: None)
    return {row: cell for (row, _), cell in found.items()}


@pytest.mark.parametrize("row", DIAGONAL)
def test_a_pair_agrees_with_pytorch(cells: dict[str, Cell], row: str) -> None:
    cell = cells[row]
    assert not cell.failed
    assert not cell.refused
    assert 0 < cell.difference < 1e-3


def test_every_row_and_column_is_met() -> None:
    assert set(ROWS) == set(DIAGONAL) & set(ROWS) | ELSEWHERE
    assert not ELSEWHERE & set(DIAGONAL)
    assert set(COLUMNS) <= set(DIAGONAL.values())


def test_the_document_numbers_reasons_and_marks_failures() -> None:
    cells = [
        Cell("llama", "lora", 2.3e-6),
        Cell("llama", "dora", refused="the adapter does not fit the model: no such layer"),
        Cell("gpt2", "lora", failed="AssertionError: logits are off"),
        Cell("gpt2", "dora", refused="the adapter does not fit the model: no such layer"),
    ]
    document = Document({(cell.row, cell.column): cell for cell in cells})
    assert document.table(["gpt2", "llama"], COLUMNS) == [
        "| | lora | dora |",
        "|---|---|---|",
        "| gpt2 | **FAILED** | refused (1) |",
        "| llama | 2e-06 | refused (1) |",
    ]
    assert document.reasons == ["PEFT: no such layer"]
