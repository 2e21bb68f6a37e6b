"""What settings can choose from, apart from the code that needs PyTorch, so that settings are checked without it."""

from __future__ import annotations

FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What a model can compute in, and the type's name in PyTorch and NumPy."""

WEIGHT_BITS = {"int8": 8, "int4": 4}
"""The precisions with quantized weights, and the bits of a weight."""

PRECISIONS = (*FLOATS, *WEIGHT_BITS)
KV_CACHES = ("float", "int8")
LARGEST_PERPLEXITY_CHANGE = 0.02
"""A rise of the perplexity, as a share, beyond which an export warns by default."""
