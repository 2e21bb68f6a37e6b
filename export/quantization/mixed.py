"""A backbone in 4 to 8 bits a weight: every weight in several widths, and the choice among them.

Layers are rounded by GPTQ in all widths at once, so that other choices cost nothing more. The embeddings, and an
lm_head that is tied to them, are rounded to nearest with scales of least error, because their rows are also read as
they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from imsm_core.siamese import SiameseModel

from ..adapters.rows import linear_weight
from .gptq import gptq, searched
from .layers import backbone_layers, embedding_layer, head_layer, weight_of
from .moments import Moments, collect, read_together
from .weight_format import Array, QuantizedWeight, round_to_nearest
from .widths import Weights, choose_widths, neighbours, width_of_ends

MOMENT_BYTES = 2**32  # of what is collected in one pass over the texts


@dataclass(frozen=True)
class Form:
    """Of rounded weights. widths: the bits that there are, in ascending order."""

    widths: tuple[int, ...]
    block_size: int
    symmetric: bool


@dataclass(frozen=True)
class Candidate:
    """A layer's weight in several widths. size: how many numbers. cost: an estimate of what rounding to 4 bits costs.
    group: weights of one group get one width, because one node multiplies with them."""

    forms: dict[int, QuantizedWeight]
    size: int
    cost: float
    group: str


@dataclass(frozen=True)
class Candidates:
    """By the layer's name inside the causal LM, as `layer_name` makes it. ends: the embeddings and the lm_head."""

    layers: dict[str, Candidate]
    ends: dict[str, dict[int, QuantizedWeight]]
    widths: tuple[int, ...]

    def choose(self, mean_bits: float) -> dict[str, QuantizedWeight]:
        """Every weight in one width; the mean is over all but the embeddings and the lm_head."""
        members: dict[str, list[Candidate]] = defaultdict(list)
        for candidate in self.layers.values():
            members[candidate.group].append(candidate)
        groups = {
            name: Weights(sum(each.size for each in group), sum(each.cost for each in group))
            for name, group in members.items()
        }
        bits, of_ends = choose_widths(groups, mean_bits, self.widths), width_of_ends(mean_bits, self.widths)
        found = {name: candidate.forms[bits[candidate.group]] for name, candidate in self.layers.items()}
        return found | {name: forms[of_ends] for name, forms in self.ends.items()}


def round_backbone(
    model: SiameseModel,
    texts: Sequence[Sequence[int]],
    form: Form,
    mean_bits: float | None,
    report: Callable[[str], None] = print,
) -> Candidates:
    """Every frozen linear layer of the backbone, the lm_head and the embeddings, in the widths that this mean is made
    of; None is any mean.

    model: on the CPU, float32, eval mode; its weights are the same before and after. texts: token ids; some thousands
    of tokens in all. Layers are taken as many at a time as MOMENT_BYTES allows. A layer that no text reaches is rounded
    as if all its inputs were alike. Raises as `check_format`.
    """
    layers, (head_name, head) = backbone_layers(model), head_layer(model)
    of_layers, of_ends = _widths(form, mean_bits)
    together = read_together(model, layers)
    found: dict[str, Candidate] = {}
    ends: dict[str, dict[int, QuantizedWeight]] = {}
    for group in _groups({**layers, head_name: head}):
        unpriced = group if len(of_layers) == 1 else (head_name,)  # nothing is chosen by it
        collected = collect(model, group, texts, form.block_size, unpriced)
        for name, layer in group.items():
            weight, moments = weight_of(layer), collected.pop(name)
            if name == head_name:
                ends = _ends(model, moments, of_ends, form)
                continue
            cost = 0.0 if moments is None or moments.cost is None else moments.cost
            forms = _layer(weight, moments, of_layers, form)
            found[name] = Candidate(forms, weight.size, cost, together.get(name, name))
            if len(found) % 8 == 0 or len(found) == len(layers):
                report(f"round     {len(found)} of {len(layers)} layers")
    return Candidates(found, ends, form.widths)


def nearest_backbone(model: SiameseModel, form: Form, mean_bits: float) -> Candidates:
    """The same without texts: all weights rounded to nearest, and the first layers have the wider ones."""
    layers, (head_name, head), (name, embedding) = backbone_layers(model), head_layer(model), embedding_layer(model)
    of_layers, of_ends = _widths(form, mean_bits)
    together = read_together(model, layers)

    def nearest(layer: nn.Module, widths: Sequence[int]) -> dict[int, QuantizedWeight]:
        weight = weight_of(layer)
        return {bits: round_to_nearest(weight, bits, form.block_size, form.symmetric) for bits in widths}

    found = {
        name: Candidate(nearest(layer, of_layers), layer.get_parameter("weight").numel(), 0.0, together.get(name, name))
        for name, layer in layers.items()
    }
    return Candidates(found, {head_name: nearest(head, of_ends), name: nearest(embedding, of_ends)}, form.widths)


def _widths(form: Form, mean_bits: float | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of layers, and of the embeddings and the lm_head."""
    if mean_bits is None:
        return form.widths, form.widths
    return neighbours(mean_bits, form.widths), (width_of_ends(mean_bits, form.widths),)


def _groups(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    group: dict[str, nn.Module] = {}
    total = 0
    for name, layer in layers.items():
        weight = linear_weight(layer)
        assert weight is not None
        outputs, inputs = weight.shape
        size = 4 * inputs * (inputs + outputs)
        if group and total + size > MOMENT_BYTES:
            yield group
            group, total = {}, 0
        group[name] = layer
        total += size
    yield group


def _layer(weight: Array, moments: Moments | None, widths: Sequence[int], form: Form) -> dict[int, QuantizedWeight]:
    if moments is None or not moments.inputs.any():
        return _searched(weight, None, widths, form)
    return gptq(weight, moments.inputs, widths, form.block_size, form.symmetric)


def _searched(weight: Array, importance: Array | None, widths: Sequence[int], form: Form) -> dict[int, QuantizedWeight]:
    """importance: (K,) of the inputs; None where they are alike."""
    importance = np.ones(weight.shape[1], np.float32) if importance is None else importance
    return {bits: searched(weight, importance, bits, form.block_size, form.symmetric) for bits in widths}


def _ends(
    model: SiameseModel, moments: Moments | None, widths: Sequence[int], form: Form
) -> dict[str, dict[int, QuantizedWeight]]:
    """The lm_head, with its moments, and the embeddings: one weight where they are tied."""
    (head_name, head), (name, embedding) = head_layer(model), embedding_layer(model)
    if head.get_parameter("weight") is not embedding.get_parameter("weight"):
        embedded = _searched(weight_of(embedding), None, widths, form)
        return {head_name: _layer(weight_of(head), moments, widths, form), name: embedded}
    importance = None
    if moments is not None and moments.inputs.any():
        diagonal = moments.inputs.diagonal()
        importance = np.ascontiguousarray(1 + diagonal / diagonal.mean())
    return dict.fromkeys((head_name, name), _searched(weight_of(head), importance, widths, form))
