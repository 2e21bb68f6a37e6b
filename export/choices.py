"""What settings can choose from, apart from the code that needs PyTorch, so that settings are checked without it."""

from __future__ import annotations

from imsm_core.errors import SettingsError

FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What a model can compute in, and the type's name in PyTorch and NumPy."""

WEIGHT_BITS = {"int8": 8, "int4": 4}
"""The precisions with quantized weights, and the bits of a weight."""

PRECISIONS = (*FLOATS, *WEIGHT_BITS)
KV_CACHES = ("float", "int8")
SMALLEST_BLOCK = 16
LARGEST_PERPLEXITY_CHANGE = 0.02
"""A rise of the perplexity, as a share, beyond which an export warns by default."""


def check_block_size(block_size: int) -> None:
    """Raise SettingsError for a block size that MatMulNBits does not take."""
    if block_size < SMALLEST_BLOCK or block_size & (block_size - 1):
        raise SettingsError("block_size", block_size, f"it must be a power of two, at least {SMALLEST_BLOCK}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise SettingsError for a value that is not one of the choices."""
    if value not in choices:
        raise SettingsError(name, value, f"choose one of {', '.join(choices)}")
