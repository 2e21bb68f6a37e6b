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

from .gptq import gptq, searched
from .layers import backbone_layers, embedding_layer, head_layer, weight_of
from .moments import Moments, collect
from .weight_format import Array, QuantizedWeight, dequantize
from .widths import Weights, choose_widths, left_of_cost, neighbours

MOMENT_BYTES = 2**32  # of what is collected in one pass over the texts
_LEFT_BY_GPTQ = 0.3
"""Of the cost of rounding to nearest: KL 0.40 and 0.12 nats on SmolLM2 in 4 bits."""


@dataclass(frozen=True)
class Candidate:
    """A weight in several widths. size: how many numbers. cost: an estimate for 4 bits, in nats a token; 0 where
    nothing is known. group: weights of one group get one width, because one node multiplies with them. counted: whether
    the mean of the widths is of this one too."""

    forms: dict[int, QuantizedWeight]
    size: int
    cost: float
    group: str
    counted: bool = True


@dataclass(frozen=True)
class Candidates:
    """found: by the layer's name inside the causal LM, as `layer_name` makes it. widths: what there is to choose."""

    found: dict[str, Candidate]
    widths: tuple[int, ...]

    def choose(self, mean_bits: float) -> dict[str, QuantizedWeight]:
        """Every weight in one width; the mean is over all but the embeddings and the lm_head."""
        members: dict[str, list[Candidate]] = defaultdict(list)
        for candidate in self.found.values():
            members[candidate.group].append(candidate)
        groups = {
            name: Weights(sum(each.size for each in group), sum(each.cost for each in group), group[0].counted)
            for name, group in members.items()
        }
        bits = choose_widths(groups, mean_bits, self.widths)
        return {name: candidate.forms[bits[candidate.group]] for name, candidate in self.found.items()}


def round_backbone(
    model: SiameseModel,
    texts: Sequence[Sequence[int]],
    widths: Sequence[int],
    mean_bits: float | None,
    block_size: int,
    symmetric: bool,
    report: Callable[[str], None] = print,
) -> Candidates:
    """Every frozen linear layer of the backbone, the lm_head and the embeddings in `widths`, layers in those alone that
    this mean is made of; None is any.

    model: on the CPU, float32, eval mode; its weights are the same before and after. texts: token ids; some thousands
    of tokens in all. Layers are taken as many at a time as MOMENT_BYTES allows. A layer that no text reaches is rounded
    as if all its inputs were alike. Raises as `check_format`.
    """
    layers, (head_name, head) = backbone_layers(model), head_layer(model)
    form = (block_size, symmetric)
    of_layers = tuple(widths) if mean_bits is None else neighbours(mean_bits, widths)
    found: dict[str, Candidate] = {}
    for group in _groups({**layers, head_name: head}):
        collected = collect(model, group, texts, block_size)
        for name, layer in group.items():
            moments = collected.moments.pop(name)
            if name != head_name:
                found[name] = _layer(weight_of(layer), moments, collected.together.get(name, name), of_layers, *form)
                if len(found) % 8 == 0 or len(found) == len(layers):
                    report(f"round     {len(found)} of {len(layers)} layers")
            else:
                found |= _ends(model, moments, collected.embeddings, tuple(widths), *form)
    return Candidates(found, tuple(widths))


def _groups(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    group: dict[str, nn.Module] = {}
    total = 0
    for name, layer in layers.items():
        outputs, inputs = weight_of(layer).shape
        size = 4 * inputs * (inputs + outputs)
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
    return Candidate(forms, weight.size, _LEFT_BY_GPTQ * (moments.cost or 0.0), group)


def _nearest(
    weight: Array, importance: Array | None, group: str, widths: Sequence[int], block_size: int, symmetric: bool
) -> Candidate:
    """Without a cost. importance: (K,) of the inputs; None where they are alike."""
    importance = np.ones(weight.shape[1], np.float32) if importance is None else importance
    forms = {bits: searched(weight, importance, bits, block_size, symmetric) for bits in widths}
    return Candidate(forms, weight.size, 0.0, group)


def _ends(
    model: SiameseModel,
    moments: Moments | None,
    gradients: Array | None,
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
        ends[name] = _embedded(weight_of(embedding), None, gradients, name, *form)
    else:
        both = _embedded(weight_of(head), moments, gradients, head_name, *form)
        ends = {head_name: both, name: replace(both, size=0, cost=0.0)}  # counted once
    return {name: replace(candidate, counted=False) for name, candidate in ends.items()}


def _embedded(
    weight: Array,
    moments: Moments | None,
    gradients: Array | None,
    group: str,
    widths: Sequence[int],
    block_size: int,
    symmetric: bool,
) -> Candidate:
    """The embeddings; with moments of the lm_head, if that is the same weight. gradients: as `Collected.embeddings`."""
    importance = None
    if moments is not None and moments.inputs.any():
        diagonal = moments.inputs.diagonal()
        importance = np.ascontiguousarray(1 + diagonal / diagonal.mean())
    found = _nearest(weight, importance, group, widths, block_size, symmetric)
    cost = 0.0 if moments is None or moments.cost is None else moments.cost
    if gradients is not None:
        # Of a row that is as wrong as all of them are on average.
        error = np.square(weight - dequantize(found.forms[widths[0]], weight.shape[1])).mean(0)
        cost += float(error @ gradients) / left_of_cost(widths[0])
    return replace(found, cost=cost)
