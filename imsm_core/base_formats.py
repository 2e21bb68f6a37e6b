"""Base models whose weights are stored in few bits: which are read, as floats, and which are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.utils.quantization_config import FineGrainedFP8Config, GgufConfig, Mxfp4Config

from .base_source import BaseSource
from .errors import BaseModelError


def quantization_config(source: BaseSource, fields: dict[str, Any]) -> Any:
    """How transformers is told to read a base model whose weights are stored in few bits: as floats. Else None.

    Raises BaseModelError for formats that it does not turn into floats without further packages.
    """
    if source.gguf_file:
        return GgufConfig(dequantize=True)
    text = fields.get("text_config")
    found = fields.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not found:
        return None
    found = found if isinstance(found, dict) else {}
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "fp8":
        return FineGrainedFP8Config(dequantize=True, modules_to_not_convert=_skipped(found))
    if method == "mxfp4":
        return Mxfp4Config(dequantize=True)
    raise BaseModelError(
        f"the base model {source.name!r} is quantized ({method or 'by an unnamed method'}), and only fp8 and mxfp4 are "
        "read; give the model that it was made from, in floating point, or its GGUF file"
    )


def _skipped(found: dict[str, Any]) -> Any:
    return found.get("modules_to_not_convert", found.get("ignored_layers"))


@contextmanager
def fp8_in_whole_blocks() -> Iterator[None]:
    """transformers divides a weight by its grid of scales evenly: 200 rows in blocks of 128 would be two of 100. Inside
    the block of code the last blocks are filled up first, and cut off after."""
    original, owner = Fp8Dequantize._dequantize_one, cast(Any, Fp8Dequantize)

    def dequantize(self: Any, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        (rows, columns), grid = quantized.shape[-2:], tuple(scales.shape[-2:])
        if block is None or grid != (-(-rows // block[0]), -(-columns // block[1])):
            return original(self, quantized, scales, output_dtype)
        filled = functional.pad(quantized.float(), (0, -columns % block[1], 0, -rows % block[0]))
        return original(self, filled, scales, output_dtype)[..., :rows, :columns].contiguous()

    owner._dequantize_one = dequantize
    try:
        yield
    finally:
        owner._dequantize_one = original
