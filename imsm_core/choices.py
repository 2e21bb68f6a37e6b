"""What settings can choose from, apart from the code that needs PyTorch, so that settings are checked without it."""

from __future__ import annotations

from .errors import SettingsError

GATE_KINDS = ("query_aware", "token", "residual", "query_mixed", "mean_logits")
"""The keys of `gates.GATES`."""

BITS = {"int4": 4, "int8": 8}
"""The precisions that a backbone can be rounded to, and the bits of a weight."""

BLOCK_SIZE = 32
"""How many weights share a scale when nothing else is asked for."""


def check_gate_kind(kind: str) -> None:
    """Raise SettingsError for an unknown kind."""
    if kind not in GATE_KINDS:
        raise SettingsError("gate", kind, f"choose one of {', '.join(GATE_KINDS)}")


def check_rounding(precision: str, block_size: int) -> None:
    """Raise SettingsError for a precision or a block size that the export does not offer."""
    if precision not in BITS:
        raise SettingsError("quantized_backbone", precision, f"choose one of {', '.join(BITS)}")
    if block_size < 16 or block_size & (block_size - 1):
        raise SettingsError("block_size", block_size, "it must be a power of two, at least 16")
