"""A backbone in 4 to 8 bits a weight: every weight in every width, and the choice among them.

All weights are rounded by GPTQ in all widths at once, so that other choices cost nothing more. The embeddings, and an
lm_head that is tied to them, are rounded to nearest with scales of least error, because their rows are also read as
they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from imsm_core.siamese import SiameseModel

from .gptq import gptq, output_error, searched
from .layers import backbone_layers, embedding_layer, head_layer, weight_of
from .moments import Moments, collect
from .weight_format import Array, QuantizedWeight, dequantize
from .widths import Weights, choose_widths

MOMENT_BYTES = 2**32  # of the layers whose inputs are collected in one pass over the texts


@dataclass(frozen=True)
class Candidate:
    """A weight in several widths. size: how many numbers. costs: by bits, an estimate in nats a token; None where
    nothing is known. group: weights of one group get one width, because one node multiplies with them. counted: whether
    the mean of the widths is of this one too."""

    forms: dict[int, QuantizedWeight]
    size: int
    costs: dict[int, float] | None
    group: str
    counted: bool = True


@dataclass(frozen=True)
class Candidates:
    """By the layer's name inside the causal LM, as `layer_name` makes it."""

    found: dict[str, Candidate]

    def choose(self, mean_bits: float, widths: Sequence[int]) -> dict[str, QuantizedWeight]:
        """Every weight in one of `widths`, the mean of which is over all but the embeddings and the lm_head."""
        members: dict[str, list[Candidate]] = defaultdict(list)
        for candidate in self.found.values():
            members[candidate.group].append(candidate)
        bits = choose_widths({name: _together(group, widths) for name, group in members.items()}, mean_bits, widths)
        return {name: candidate.forms[bits[candidate.group]] for name, candidate in self.found.items()}


def _together(group: list[Candidate], widths: Sequence[int]) -> Weights:
    known = [each.costs for each in group if each.costs is not None]
    cost = {bits: sum(costs[bits] for costs in known) for bits in widths}
    return Weights(sum(each.size for each in group), cost, all(each.counted for each in group))


def round_backbone(
    model: SiameseModel,
    texts: Sequence[Sequence[int]],
    widths: Sequence[int],
    block_size: int,
    symmetric: bool,
    report: Callable[[str], None] = print,
) -> Candidates:
    """Every frozen linear layer of the backbone, the lm_head and the embeddings in all `widths`.

    model: on the CPU, float32, eval mode; its weights are the same before and after. texts: token ids; some thousands
    of tokens in all. Layers are taken as many at a time as MOMENT_BYTES allows. A layer that no text reaches is rounded
    as if all its inputs were alike. Raises as `check_format`.
    """
    layers, (head_name, head) = backbone_layers(model), head_layer(model)
    form = (tuple(widths), block_size, symmetric)
    found: dict[str, Candidate] = {}
    for group in _groups({**layers, head_name: head}):
        collected = collect(model, group, texts)
        for name, layer in group.items():
            moments = collected.moments.pop(name)
            if name != head_name:
                found[name] = _layer(weight_of(layer), moments, collected.together.get(name, name), *form)
                if len(found) % 8 == 0 or len(found) == len(layers):
                    report(f"round     {len(found)} of {len(layers)} layers")
            else:
                found |= _ends(model, moments, collected.embeddings, *form)
    return Candidates(found)


def _groups(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    group: dict[str, nn.Module] = {}
    total = 0
    for name, layer in layers.items():
        size = 4 * weight_of(layer).shape[1] ** 2
        if group and total + size > MOMENT_BYTES:
            yield group
            group, total = {}, 0
        group[name] = layer
        total += size
    yield group


def _layer(
    weight: Array, moments: Moments | None, group: str, widths: Sequence[int], block_size: int, symmetric: bool
) -> Candidate:
    if moments is None or not moments.inputs.any():
        return _nearest(weight, None, group, widths, block_size, symmetric)
    forms = gptq(weight, moments.inputs, widths, block_size, symmetric)
    costs = None if moments.costs is None else {bits: _cost(weight, form, moments) for bits, form in forms.items()}
    return Candidate(forms, weight.size, costs, group)


def _nearest(
    weight: Array, importance: Array | None, group: str, widths: Sequence[int], block_size: int, symmetric: bool
) -> Candidate:
    """Without costs. importance: (K,) of the inputs; None where they are alike."""
    importance = np.ones(weight.shape[1], np.float32) if importance is None else importance
    forms = {bits: searched(weight, importance, bits, block_size, symmetric) for bits in widths}
    return Candidate(forms, weight.size, None, group)


def _ends(
    model: SiameseModel,
    moments: Moments | None,
    embedding_costs: Array | None,
    widths: Sequence[int],
    block_size: int,
    symmetric: bool,
) -> dict[str, Candidate]:
    """The lm_head and the embeddings: one weight where they are tied."""
    (head_name, head), (name, embedding) = head_layer(model), embedding_layer(model)
    form = (widths, block_size, symmetric)
    tied = head.get_parameter("weight") is embedding.get_parameter("weight")
    if not tied:
        ends = {head_name: _layer(weight_of(head), moments, head_name, *form)}
        ends[name] = _embedded(weight_of(embedding), None, embedding_costs, name, *form)
    else:
        both = _embedded(weight_of(head), moments, embedding_costs, head_name, *form)
        ends = {head_name: both, name: replace(both, size=0, costs=None)}  # counted once
    return {name: replace(candidate, counted=False) for name, candidate in ends.items()}


def _embedded(
    weight: Array,
    moments: Moments | None,
    embedding_costs: Array | None,
    group: str,
    widths: Sequence[int],
    block_size: int,
    symmetric: bool,
) -> Candidate:
    """The embeddings; with moments of the lm_head, if that is the same weight."""
    importance = None
    if moments is not None and moments.inputs.any():
        diagonal = moments.inputs.diagonal()
        importance = np.ascontiguousarray(1 + diagonal / diagonal.mean())
    found = _nearest(weight, importance, group, widths, block_size, symmetric)
    costs = None
    if embedding_costs is not None:
        costs = {bits: _lookup_cost(weight, form, embedding_costs) for bits, form in found.forms.items()}
        if moments is not None and moments.costs is not None:
            costs = {bits: cost + _cost(weight, found.forms[bits], moments) for bits, cost in costs.items()}
    return replace(found, costs=costs)


def _cost(weight: Array, form: QuantizedWeight, moments: Moments) -> float:
    assert moments.costs is not None
    return float(moments.costs @ output_error(weight - dequantize(form, weight.shape[1]), moments.inputs))


def _lookup_cost(weight: Array, form: QuantizedWeight, costs: Array) -> float:
    """Of a row that is as wrong as all of them are on average."""
    return float(np.square(weight - dequantize(form, weight.shape[1])).mean(0) @ costs)
