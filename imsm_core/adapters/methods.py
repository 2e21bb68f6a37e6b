"""New PEFT configs for the methods of `options.PEFT_METHODS`.

They fit any architecture: the layers and block sizes come from the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
from peft import PeftConfig
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..backbone import hidden_size
from ..errors import AdapterError, SettingsError
from .options import PEFT_METHODS, check_options
from .refusals import check_tokens

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the lm_head


def peft_config(
    method: str,
    rank: int | None = None,
    alpha: int | None = None,
    dropout: float | None = None,
    target_modules: Sequence[str] | None = None,
    *,
    virtual_tokens: int | None = None,
    token_indices: Sequence[int] | None = None,
    model: PreTrainedModel | None = None,
) -> PeftConfig:
    """The PEFT config of `method` for `model`, on `target_modules` (None: the method's own choice, for most every
    linear layer but the lm_head).

    None is the method's default. model: needed by the methods that take their layers or sizes from it. Raises
    SettingsError for a method that is not offered, an option that the method does not take, or a value out of range;
    AdapterError if the model is needed and not given, or has no layer or token for the method.
    """
    chosen = check_options(
        method,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        virtual_tokens=virtual_tokens,
        token_indices=token_indices,
    )
    new = NewConfig(
        rank=chosen.get("rank", 0),
        alpha=chosen.get("alpha", 0),
        dropout=chosen.get("dropout", 0.0),
        target_modules=list(target_modules) if target_modules else None,
        virtual_tokens=chosen.get("virtual_tokens", 0),
        token_indices=list(token_indices or []),
        given_model=model,
    )
    return PEFT_METHODS[method].make(new)


@dataclass(frozen=True)
class NewConfig:
    """The options of a new config, the method's defaults among them, and the ways to build it. Sizes come from
    `model`."""

    rank: int
    alpha: int
    dropout: float
    target_modules: list[str] | None
    virtual_tokens: int
    token_indices: list[int]
    given_model: PreTrainedModel | None

    @property
    def model(self) -> PreTrainedModel:
        """The base model. Raises AdapterError if it was not given."""
        if self.given_model is None:
            raise AdapterError("this PEFT method takes its sizes from the base model, which is not given")
        return self.given_model

    def shapes(self) -> list[tuple[int, int]]:
        """(in, out) of the layers that are adapted, at least one. Raises SettingsError if `target_modules` names none,
        AdapterError if the model has none."""
        found = [
            shape
            for name, shape in linear_layers(self.model).items()
            if self.target_modules is None or any(f".{name}".endswith(f".{t}") for t in self.target_modules)
        ]
        if not found and self.target_modules is None:
            raise AdapterError("the model has no linear layer to adapt, except perhaps the lm_head")
        if not found:
            raise SettingsError("target_modules", self.target_modules, "it must name a linear layer, not the lm_head")
        return found

    def block(self, at_most: int, outputs: bool = False) -> int:
        """The largest block that divides the input sizes of all adapted layers, and the output sizes if `outputs`.
        Raises SettingsError if there is none above 1."""
        sizes = [size for shape in self.shapes() for size in (shape if outputs else shape[:1])]
        common = math.gcd(*sizes)
        size = max((n for n in range(2, at_most + 1) if common % n == 0), default=1)
        if size == 1:
            rule = "the sizes of the adapted layers have no common block; choose other layers"
            raise SettingsError("target_modules", self.target_modules, rule)
        return size

    def layers(self, kind: str, **options: Any) -> PeftConfig:
        """A config of the PEFT class `kind`, which changes layers."""
        targets = self.target_modules or ALL_LINEAR
        config: PeftConfig = getattr(peft, kind)(target_modules=targets, task_type="CAUSAL_LM", **options)
        return config

    def virtual(self, kind: str, **options: Any) -> PeftConfig:
        """A config of the PEFT class `kind`, which adds virtual tokens."""
        config: PeftConfig = getattr(peft, kind)(
            num_virtual_tokens=self.virtual_tokens, task_type="CAUSAL_LM", **options
        )
        return config

    def lora(self, **options: Any) -> PeftConfig:
        """LoRA, or one of its variants."""
        return self.layers("LoraConfig", r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, **options)

    def adalora(self) -> PeftConfig:
        """Starts with 1.5 times the final mean rank, as in the paper. Training sets the steps of the schedule."""
        return self.layers(
            "AdaLoraConfig",
            init_r=math.ceil(1.5 * self.rank),
            target_r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            total_step=1,
        )

    def ia3(self) -> PeftConfig:
        """On the paper's layers (keys, values, the MLP's output) where PEFT knows them, else on every linear layer. It
        scales a layer's output, or its input in the case of the MLP's output layer."""
        model, targets, feedforward = self.model, self.target_modules, None
        if targets is not None or model.config.model_type not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
            shapes, width = linear_layers(model), hidden_size(model)
            targets = targets or sorted({name.rsplit(".", 1)[-1] for name in shapes})
            mlp = max(outputs for _, outputs in shapes.values())
            by_target = {t: [shape for name, shape in shapes.items() if f".{name}".endswith(f".{t}")] for t in targets}
            feedforward = [t for t, found in by_target.items() if found and all(s == (mlp, width) for s in found)]
        config: PeftConfig = peft.IA3Config(
            target_modules=targets, feedforward_modules=feedforward, task_type="CAUSAL_LM"
        )
        return config

    def ln_tuning(self) -> PeftConfig:
        """Every norm of the model, by its class's name. Raises SettingsError for a target that is not a norm."""
        modules = dict(self.model.named_modules())
        norms = {
            name
            for name, module in modules.items()
            if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
        }
        for target in self.target_modules or []:
            found = [name for name in modules if f".{name}".endswith(f".{target}")]
            if other := [name for name in found if name not in norms]:
                raise SettingsError("target_modules", target, f"ln_tuning trains norms, and {other[0]} is not one")
        targets = self.target_modules or sorted({name.rsplit(".", 1)[-1] for name in norms})
        config: PeftConfig = peft.LNTuningConfig(target_modules=targets, task_type="CAUSAL_LM")
        return config

    def fourierft(self) -> PeftConfig:
        """Starts from a spectrum of zeros, at the base model; PEFT's own default is a random one."""
        frequencies = min(1000, *(inputs * outputs for inputs, outputs in self.shapes()))
        return self.layers("FourierFTConfig", n_frequency=frequencies, init_weights=True)

    def trainable_tokens(self) -> PeftConfig:
        """The embeddings of `token_indices`. Raises AdapterError for a token that the model does not have."""
        embeddings: Any = self.model.get_input_embeddings()
        check_tokens(self.token_indices, int(embeddings.weight.shape[0]))
        config: PeftConfig = peft.TrainableTokensConfig(token_indices=self.token_indices, task_type="CAUSAL_LM")
        return config


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer but the lm_head, by name."""
    head = model.get_output_embeddings()
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            shapes[name] = (inputs, outputs)
    return shapes
