"""What settings can choose from, apart from the code that needs PyTorch, so that settings are checked without it."""

from __future__ import annotations

from .errors import SettingsError

GATE_KINDS = ("query_aware", "token", "residual", "query_mixed", "mean_logits")
"""The keys of `gates.GATES`."""

BITS = {"int4": 4, "int8": 8}
"""The precisions that a backbone can be rounded to, and the bits of a weight."""

SMALLEST_BLOCK = 16
BLOCK_SIZE = 32
"""How many weights share a scale when nothing else is asked for."""


def check_gate_kind(kind: str) -> None:
    """Raise SettingsError for an unknown kind."""
    one_of("gate", kind, GATE_KINDS)


def check_rounding(precision: str, block_size: int) -> None:
    """Raise SettingsError for a precision or a block size that the export does not offer."""
    one_of("quantized_backbone", precision, tuple(BITS))
    check_block_size(block_size)


def check_block_size(block_size: int) -> None:
    """Raise SettingsError for a block size that MatMulNBits does not take."""
    if block_size < SMALLEST_BLOCK or block_size & (block_size - 1):
        raise SettingsError("block_size", block_size, f"it must be a power of two, at least {SMALLEST_BLOCK}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise SettingsError for a value that is not one of the choices."""
    if value not in choices:
        raise SettingsError(name, value, f"choose one of {', '.join(choices)}")
