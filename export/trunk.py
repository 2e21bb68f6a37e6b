"""The shared trunk: layers below the first one that the adapter changes compute the same in both streams, so that they
run once, on one row a text and with one cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .streams import StreamLayout


def trunk_length(model: PreTrainedModel, layer_count: int, adapted: Iterable[str]) -> int:
    """How many of the first layers no layer in `adapted` (dotted names inside the causal LM) belongs to.

    0 where the adapter changes something outside the layers, such as the embeddings, or where the model has no list of
    its layers.
    """
    found = decoder_layers(model, layer_count)
    if found is None:
        return 0
    prefix, _ = found
    first = layer_count
    for name in adapted:
        index, _, _ = name.removeprefix(prefix + ".").partition(".")
        if not name.startswith(prefix + ".") or not index.isdigit():
            return 0
        first = min(first, int(index))
    return first if first < layer_count else 0


def decoder_layers(model: PreTrainedModel, layer_count: int) -> tuple[str, nn.ModuleList] | None:
    """The backbone's list of layers and its dotted name; None if there is not exactly one of that length."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layer_count and not _inside_a_layer(name)
    ]
    return lists[0] if len(lists) == 1 else None


def _inside_a_layer(name: str) -> bool:
    """Whether a number is part of the name: a list within one of the layers, such as experts."""
    return any(part.isdigit() for part in name.split("."))


@contextmanager
def stacking_after_trunk(model: PreTrainedModel, layout: StreamLayout, layer_count: int) -> Iterator[None]:
    """Inside the block the first layer after the trunk gets its rows once for each stream, and so does everything with
    one row a text that the model hands to this layer and to the later ones (rotary tables, positions)."""
    found = decoder_layers(model, layer_count) if layout.trunk else None
    if found is None:
        yield
        return
    handles = [
        layer.register_forward_pre_hook(_stacking(layout, index == layout.trunk), with_kwargs=True)
        for index, layer in enumerate(found[1])
        if index >= layout.trunk
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stacking(layout: StreamLayout, first: bool) -> Callable[[nn.Module, Any, Any], Any]:
    def stack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        rows = hidden.shape[0] * (layout.streams if first else 1)
        return layout.stack_all(args, rows), layout.stack_all(kwargs, rows)

    return stack
