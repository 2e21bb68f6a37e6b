"""The backbone's own biases, where an adapter trains them in place (PEFT's bias="all" and bias="..._only").

Disabling such an adapter does not give the base model back: PEFT keeps only the trained values. This module keeps
the originals too, and the base stream runs with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import AdapterError

_HOME = "original_biases"


class _OriginalBiases(nn.Module):
    """Buffers, so that they move to a device with the model; not saved, since the base model has them."""

    def __init__(self, originals: dict[str, Tensor], places: dict[str, str]) -> None:
        super().__init__()
        self.places = places  # the bias's name in the plain causal LM -> its name with the adapter in place
        self.buffer_names = {name: f"original_{index}" for index, name in enumerate(originals)}
        for name, original in originals.items():
            self.register_buffer(self.buffer_names[name], original, persistent=False)


def keep_original_biases(peft_model: PeftModel, trained: dict[str, tuple[nn.Parameter, Tensor]]) -> None:
    """Keep the original values of `trained`: name in the plain causal LM -> (parameter trained in place, original).
    An empty dict records that no bias of the backbone is trained."""
    names = {id(parameter): name for name, parameter in peft_model.get_base_model().named_parameters()}
    places = {name: names[id(parameter)] for name, (parameter, _) in trained.items()}
    peft_model.add_module(_HOME, _OriginalBiases({name: value for name, (_, value) in trained.items()}, places))


def backbone_biases(peft_model: PeftModel) -> dict[str, tuple[Tensor, nn.Parameter]]:
    """The biases that differ between the streams: name in the plain causal LM -> (base stream's, adapter stream's).

    Raises AdapterError for a PEFT model that trains biases and does not come from `attach_adapter` or `load_adapter`:
    its original biases are lost.
    """
    home = dict(peft_model.named_children()).get(_HOME)
    if not isinstance(home, _OriginalBiases):
        bias = getattr(peft_model.peft_config[peft_model.active_adapter], "bias", "none")
        own = _adapter_parameters(peft_model)
        named = peft_model.get_base_model().named_parameters()
        if bias != "none" and any(name.endswith(".bias") and id(parameter) not in own for name, parameter in named):
            raise AdapterError(f"bias={bias!r} trains the backbone's biases, and their original values are lost")
        return {}
    model = peft_model.get_base_model()
    return {
        name: (home.get_buffer(home.buffer_names[name]), model.get_parameter(place))
        for name, place in home.places.items()
    }


def _adapter_parameters(peft_model: PeftModel) -> set[int]:
    """The ids of the parameters that the method itself added to the layers: LoRA's B may have a bias too."""
    layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
    parts = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    return {id(parameter) for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()}


@contextmanager
def original_biases(peft_model: PeftModel) -> Iterator[None]:
    """Within it the backbone has its original biases. Not for passes that need gradients."""
    pairs = list(backbone_biases(peft_model).values())
    _swap(pairs)
    try:
        yield
    finally:
        _swap(pairs)


def _swap(pairs: list[tuple[Tensor, nn.Parameter]]) -> None:
    for original, trained in pairs:
        original.data, trained.data = trained.data, original.data
