"""The backbone's own biases where an adapter trained them (PEFT's bias="all" and bias="..._only").

A bias is added last, in both linear layers and norms, so that its change is one more sum on the adapter's rows. Any
other module that has one, such as a router, gets a copy with the trained bias for the adapter's rows.
"""

from __future__ import annotations

import copy

from peft import PeftModel
from torch import nn

from imsm_core.adapters.biases import backbone_biases

from .fallback import SplitRows
from .rows import TwoStreamBias, linear_weight


def add_bias_changes(peft_model: PeftModel, forms: dict[str, nn.Module]) -> None:
    """Put the change of every trained bias on top of `forms`, by layer name; layers without a form get one.

    Runs where the backbone has its original biases (`imsm_core.adapters.biases.original_biases`).
    """
    model = peft_model.get_base_model()
    for name, (trained, original) in backbone_biases(peft_model).items():
        layer = name.removesuffix(".bias")
        frozen = model.get_submodule(layer)
        if layer in forms or linear_weight(frozen) is not None or isinstance(frozen, nn.LayerNorm):
            forms[layer] = TwoStreamBias(forms.get(layer) or frozen, (trained - original).detach())
        else:
            copied = copy.deepcopy(frozen)
            copied.get_parameter("bias").data = trained.detach().clone()
            forms[layer] = SplitRows(frozen, copied)
