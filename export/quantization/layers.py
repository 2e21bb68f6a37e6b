"""The layers of a backbone whose weights are rounded, by the names that weights have in the traced graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from torch import nn

from imsm_core.adapters.attach import adapted_layers
from imsm_core.quantized_backbone import holds_experts
from imsm_core.siamese import SiameseModel

from ..adapters.rows import linear_weight
from ..errors import ExportError
from .precision import layer_weight
from .weight_format import Array, QuantizedWeight


def layer_name(weight: str) -> str:
    """The layer's name inside the causal LM of a weight's name in the traced module, where it stands behind the model's
    own name and inside an adapter's two-stream form: model.model.layers.0.mlp.up_proj.base_layer.weight."""
    return weight.removeprefix("model.").removesuffix(".weight").replace(".base_layer", "")


def backbone_layers(model: SiameseModel) -> dict[str, nn.Module]:
    """Every frozen linear layer of the backbone by its name inside the causal LM, an adapter's wrapping left out; not
    the lm_head."""
    causal_lm = model.causal_lm
    adapted = {layer.name: layer for layer in adapted_layers(model.peft_model)}
    layers: dict[str, nn.Module] = {}
    inside = ""
    for name, module in causal_lm.named_modules():
        if inside and name.startswith(inside):
            continue
        inside = f"{name}." if name in adapted else ""
        layer = adapted[name].frozen if name in adapted else module
        if linear_weight(layer) is not None and module is not causal_lm.get_output_embeddings():
            layers[name] = layer
    return layers


def head_layer(model: SiameseModel) -> tuple[str, nn.Module]:
    """The frozen lm_head and its name."""
    return _named(model, model.causal_lm.get_output_embeddings())


def embedding_layer(model: SiameseModel) -> tuple[str, nn.Module]:
    """The frozen embeddings of the tokens, an adapter's wrapping left out, and their name."""
    return _named(model, model.causal_lm.get_input_embeddings())


def _named(model: SiameseModel, module: nn.Module | None) -> tuple[str, nn.Module]:
    name = next(name for name, each in model.causal_lm.named_modules(remove_duplicate=False) if each is module)
    return name, layer_weight(model.causal_lm, f"model.{name}.weight")[0]


def expert_weights(model: SiameseModel) -> list[str]:
    """The traced names of the weights of all experts, which are one parameter a layer and matrix."""
    return [
        f"model.{name}.{parameter}"
        for name, module in model.causal_lm.named_modules()
        if holds_experts(module)
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    ]


def check_finite(model: SiameseModel) -> None:
    """Raise ExportError with the name of the first of all these layers whose weight has NaN or infinite values."""
    for name, layer in [*backbone_layers(model).items(), head_layer(model), embedding_layer(model)]:
        if not layer.get_parameter("weight").isfinite().all():
            raise ExportError(f"the weight of {name} has values that are not finite and cannot be quantized")


def by_every_name(model: SiameseModel, weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """The weights also by the other names of layers that stand in several places: a graph knows one of them."""
    found = dict(weights)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.causal_lm.named_modules(remove_duplicate=False):
        names[module].append(name)
    for alike in names.values():
        known = next((name for name in alike if name in weights), None)
        if known is not None:
            found |= {name: weights[known] for name in alike if name not in weights}
    return found


def weight_of(layer: nn.Module) -> Array:
    """(N, K) float32, outputs by inputs, or tokens by places; a view where the layer stores it so."""
    weight = linear_weight(layer)
    weight = layer.get_parameter("weight").detach() if weight is None else weight
    values: Array = np.ascontiguousarray(weight.numpy())
    return values
