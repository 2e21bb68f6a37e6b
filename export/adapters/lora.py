"""LoRA (arXiv 2106.09685): y = W x + scaling * B A x, and DoRA (arXiv 2402.09353), which also rescales each output:
y = m * (W x + scaling * B A x) with m = magnitude / |W + scaling * B A|, row by row.

W stays shared and unmerged; rsLoRA and alpha patterns only change `scaling`.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional

from .parameters import two_stream_parameters
from .rows import LowRank, PeftLayer, TwoStreamEmbedding, constant, linear_weight, on_adapter_rows


class TwoStreamDora(LowRank):
    """magnitude: (out,), m above; base_bias: the frozen layer's own bias, which DoRA does not scale, or None."""

    def __init__(
        self, base_layer: nn.Module, a: Tensor, b: Tensor, magnitude: Tensor, base_bias: Tensor | None
    ) -> None:
        unscaled = None if base_bias is None else (1 - magnitude) * base_bias
        super().__init__(base_layer, a, b * magnitude[:, None], unscaled)
        self.adapter_magnitude = constant(magnitude)

    def frozen_product(self, x: Tensor) -> Tensor:
        """Scaled on the adapter's rows."""
        return super().frozen_product(x) * on_adapter_rows(self.adapter_magnitude, x)


class TwoStreamLoraEmbedding(TwoStreamEmbedding):
    """m * (E[ids] + (A^T)[ids] B^T). a: (vocab, r), b: (d, r) with the scale folded in, magnitude: (d,), DoRA's m, or
    None."""

    def __init__(self, base_layer: nn.Module, a: Tensor, b: Tensor, magnitude: Tensor | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_a = constant(a)
        self.adapter_b = constant(b if magnitude is None else b * magnitude[:, None])
        self.adapter_magnitude = None if magnitude is None else constant(magnitude)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, S) -> (2 * B, S, d)."""
        frozen: Tensor = self.base_layer(input_ids)
        change = functional.linear(functional.embedding(input_ids, self.adapter_a), self.adapter_b)
        scaled = frozen if self.adapter_magnitude is None else frozen * self.adapter_magnitude
        return torch.cat([frozen, scaled + change])


def two_stream_lora(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT LoRA layer on a linear layer (nn.Linear or Conv1D) or on the embeddings."""
    if isinstance(layer, ParamWrapper):
        if linear_weight(frozen) is not None:
            return None
        return two_stream_parameters(name, layer, frozen, adapter)
    variant = layer.lora_variant.get(adapter)
    kind = type(variant).__name__
    if adapter in layer.lora_embedding_A:
        return _embedding(layer, frozen, adapter, kind) if variant is None or kind == "DoraEmbeddingVariant" else None
    if adapter not in layer.lora_A:
        return None
    down, up, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
    weight = linear_weight(frozen)
    if weight is None or not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear):
        return None
    a, b = down.weight.detach(), up.weight.detach() * scaling
    if variant is None:
        return LowRank(frozen, a, b, None if up.bias is None else up.bias.detach() * scaling)
    if kind == "DoraLinearVariant" and up.bias is None:
        magnitude = layer.lora_magnitude_vector[adapter].weight.detach()
        norm = torch.linalg.norm(weight + b @ a, dim=1)
        bias = getattr(frozen, "bias", None)
        return TwoStreamDora(frozen, a, b, magnitude / norm, None if bias is None else bias.detach())
    return None


def _embedding(layer: PeftLayer, frozen: nn.Module, adapter: str, kind: str) -> nn.Module:
    a, b = layer.lora_embedding_A[adapter].detach().T, layer.lora_embedding_B[adapter].detach() * layer.scaling[adapter]
    magnitude = None
    if kind == "DoraEmbeddingVariant":
        weight = frozen.weight
        assert isinstance(weight, Tensor)
        norm = torch.linalg.norm(weight.detach() + a @ b.T, dim=0)
        magnitude = layer.lora_magnitude_vector[adapter].weight.detach() / norm
    return TwoStreamLoraEmbedding(frozen, a, b * embedding_scale(frozen), magnitude)


def embedding_scale(embedding: nn.Module) -> float:
    """The factor that some embeddings (Gemma's) put on what they look up."""
    scale = getattr(embedding, "embed_scale", None)
    return 1.0 if scale is None else float(scale)
