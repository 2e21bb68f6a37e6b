"""The two-stream forms of PEFT's tuner layers: one file per adapter family, one registration line each.

A two-stream form is a module that replaces a tuner layer before the trace. Its input holds the rows of both streams,
(2 * B, S, in_features), base rows first; it applies the frozen layer to all of them, so that its weight is read once,
and the adapter's change to the adapter's rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import Tensor, nn

from imsm_core.adapters import adapted_layers, peft_type

from ..errors import UnsupportedError

TwoStreamForm = Callable[[str, nn.Module, str], nn.Module]
"""(name of the layer, PEFT tuner layer, name of the active adapter) -> its two-stream form; raises UnsupportedError."""

TWO_STREAM_FORMS: dict[str, TwoStreamForm] = {}


def register(peft_type: str) -> Callable[[TwoStreamForm], TwoStreamForm]:
    """Register the two-stream form of a PEFT type, as `peft.PeftType` spells it."""

    def add(form: TwoStreamForm) -> TwoStreamForm:
        TWO_STREAM_FORMS[peft_type] = form
        return form

    return add


class AdapterRows:
    """Which rows of a stacked input belong to the adapter stream; set anew for every traced step.

    mask: (2 * B, 1, 1), 0 for the base stream's rows and 1 for the adapter stream's.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Raises RuntimeError outside `of`."""
        if self._mask is None:
            raise RuntimeError("a two-stream layer ran outside a traced step")
        return self._mask

    @contextmanager
    def of(self, mask: Tensor) -> Iterator[None]:
        """Use `mask` inside the block."""
        self._mask = mask
        try:
            yield
        finally:
            self._mask = None


ADAPTER_ROWS = AdapterRows()


def two_stream_layers(peft_model: PeftModel) -> dict[str, nn.Module]:
    """The two-stream form of every layer that the adapter touches, by its name inside the causal LM.

    Raises UnsupportedError naming the layer and the PEFT type for what has none.
    """
    from . import lora  # noqa: F401  registers itself

    adapter = peft_model.active_adapter
    kind = peft_type(peft_model.peft_config[adapter])
    if kind not in TWO_STREAM_FORMS:
        raise UnsupportedError(f"PEFT type {kind} has no two-stream form; exportable: {', '.join(TWO_STREAM_FORMS)}")
    return {
        layer.name: TWO_STREAM_FORMS[kind](layer.name, layer.tuner, adapter) for layer in adapted_layers(peft_model)
    }


def base_layers(peft_model: PeftModel) -> dict[str, nn.Module]:
    """The frozen layer under every tuner layer: what a base-only graph is traced with."""
    return {layer.name: layer.frozen for layer in adapted_layers(peft_model)}


@contextmanager
def replaced_layers(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Put `layers` into `model` by name for the time of the block."""
    originals = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in originals.items():
            model.set_submodule(name, layer)
