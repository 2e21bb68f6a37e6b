"""What settings can choose from, apart from the code that needs PyTorch, so that settings are checked without it."""

from __future__ import annotations

FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What a model can compute in, and the type's name in PyTorch and NumPy."""

AUTO = "auto"
"""The precision that is found by its KL."""

WEIGHT_BITS = {"int8": 8, "int4": 4, AUTO: 4}
"""The precisions with quantized weights, and the fewest bits of a weight."""

PRECISIONS = (*FLOATS, *WEIGHT_BITS)
ROUNDINGS = ("best", "nearest")
MEAN_BITS = 5.0
"""Bits of a weight of int4, on average over the layers."""
MAX_KL = 0.05
"""What "auto" keeps, in nats a token."""
KV_CACHES = ("float", "int8")
LARGEST_PERPLEXITY_CHANGE = 0.02
"""A rise of the perplexity, as a share, beyond which an export warns by default."""
