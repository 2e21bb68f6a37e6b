"""The backbone's own biases where an adapter trained them (PEFT's bias="all" and bias="..._only").

A bias is added last, in linear layers and in norms alike, so that its change is one more sum on the adapter's rows.
"""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from imsm_core.biases import backbone_biases

from .rows import TwoStreamBias


def add_bias_changes(peft_model: PeftModel, forms: dict[str, nn.Module]) -> None:
    """Put the change of every trained bias on top of `forms`, by layer name; layers without a form get one.

    Runs where the backbone has its original biases (`imsm_core.biases.original_biases`).
    """
    model = peft_model.get_base_model()
    for name, (trained, original) in backbone_biases(peft_model).items():
        layer = name.removesuffix(".bias")
        forms[layer] = TwoStreamBias(forms.get(layer) or model.get_submodule(layer), (trained - original).detach())
