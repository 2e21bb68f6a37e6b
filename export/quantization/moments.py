"""What the backbone's layers read, and how much it matters to the predictions: what rounding is weighted by.

The loss is the models' own, next-token cross-entropy on calibration texts, once of each stream with its own head. Its
gradient g_t at a layer's output tells what an error e_t of that output costs: to second order, and on text that the
model could have written itself, KL = 1/2 E[(g_t e_t)^2] (Fisher information, as in "Optimal Brain Damage", LeCun et al.
1989). The first tokens of a text are often read with huge values and matter little, so that inputs count by their own
size and, in the same amount, by the size of the gradient at their token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imsm_core.adapters.virtual_tokens import adapter_hidden_state
from imsm_core.backbone import last_hidden_state
from imsm_core.head_loss import summed_loss
from imsm_core.quantized_backbone import nearest_in_blocks
from imsm_core.siamese import SiameseModel

from .layers import weight_of
from .weight_format import Array

FEWEST = 4
"""Bits of the rounding whose cost is found."""


@dataclass(frozen=True)
class Moments:
    """Of one layer. inputs: (K, K) float32, the weighted sum of x x^T over all rows of both streams. cost: what its
    weight's rounding to the nearest of 4 bits costs, nats a token; None where no gradient could be had
    or it was not asked for."""

    inputs: Array
    cost: float | None


class _Sums:
    """Of one layer with K inputs while texts are read. error: (N, K) float32, what rounding changes; None if its cost
    is not asked for."""

    def __init__(self, inputs: int, error: Tensor | None) -> None:
        self.error = error
        self.inputs = torch.zeros(inputs, inputs)
        self.cost = 0.0
        self.unit = 0.0  # the mean square of the first text's gradients: a token of that size counts twice
        self.rows = 0

    def add(self, rows: Tensor, gradients: Tensor | None) -> None:
        """rows: (S, K); gradients: (S, N), or None where none can be had."""
        weighted = rows
        if gradients is not None:
            sizes = gradients.square().mean(1)
            self.unit = self.unit or float(sizes.mean())
            if self.unit:
                weighted = rows * (1 + sizes / self.unit)[:, None]
            if self.error is not None:
                self.cost += 0.5 * float(((rows @ self.error.T) * gradients).square_().sum())
        self.inputs.addmm_(weighted.T, rows)
        self.rows += len(rows)

    def moments(self, tokens: int) -> Moments | None:
        if not self.rows or not self.inputs.isfinite().all():
            return None
        inputs: Array = self.inputs.numpy()
        known = self.unit and self.error is not None and math.isfinite(self.cost)
        return Moments(inputs, self.cost / tokens if known else None)


def read_together(model: SiameseModel, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each layer the first one that reads the same values, which one node can multiply with all their weights.
    A layer that the token 0 does not reach is left out."""
    together: dict[str, str] = {}
    last: list[Any] = [None, ""]  # the last input, and the layer that read it first

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if last[0] is not args[0]:
                last[:] = args[0], name
            together.setdefault(name, last[1])

        return read

    with ExitStack() as stack, torch.no_grad(), model.adapter_disabled():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        last_hidden_state(model.causal_lm, input_ids=torch.tensor([[0]]))
    return together


def collect(
    model: SiameseModel,
    layers: Mapping[str, nn.Module],
    texts: Sequence[Sequence[int]],
    block_size: int,
    unpriced: Collection[str] = (),
) -> dict[str, Moments | None]:
    """Read the texts in both streams; gives the moments by layer, None for one that no text reaches or with values that
    are not finite. model: on the CPU, float32, eval mode, and stays as it is. block_size: of the rounding whose cost is
    found, but for the layers that are `unpriced`.

    With an adapter that multiplies by a changed weight without the layer, as HRA does, only the base stream's rows
    count.
    """
    sums = {}
    for name, layer in layers.items():
        weight = torch.from_numpy(weight_of(layer))
        error = None if name in unpriced else weight - nearest_in_blocks(weight, FEWEST, block_size)
        sums[name] = _Sums(weight.shape[1], error)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def read(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: _add(rows, gradient))
            else:
                sums[name].add(rows, None)

        def _add(rows: Tensor, gradient: Tensor) -> None:
            sums[name].add(rows, gradient.reshape(len(rows), -1).float())

        return read

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(name)).remove)
        tokens = sum(_losses(model, texts))
    return {name: each.moments(tokens) for name, each in sums.items()}


def _losses(model: SiameseModel, texts: Sequence[Sequence[int]]) -> Iterator[int]:
    """Run the loss of each stream on each text, back to the embeddings; gives how many tokens were predicted."""
    with _differentiable(model):
        for text in texts:
            if len(text) < 2:
                continue
            token_ids = torch.tensor([list(text)])
            for adapted in (False, True):
                with nullcontext() if adapted else model.adapter_disabled():
                    _freeze(model)  # which that context would undo
                    states = (
                        adapter_hidden_state(model.peft_model, token_ids)
                        if adapted
                        else last_hidden_state(model.causal_lm, input_ids=token_ids)
                    )
                    loss = summed_loss(model.causal_lm, states[0, :-1], token_ids[0, 1:])
                    if loss.requires_grad:
                        loss.backward()
                yield len(text) - 1


@contextmanager
def _differentiable(model: SiameseModel) -> Iterator[None]:
    """Inside the block gradients reach what layers give, and no parameter."""

    def begin(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_().clone()  # some models scale it in place

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handle = model.causal_lm.get_input_embeddings().register_forward_hook(begin)
    try:
        _freeze(model)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _freeze(model: SiameseModel) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
