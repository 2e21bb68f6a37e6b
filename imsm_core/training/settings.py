"""What can be set in a training run. The command line derives its options from these two dataclasses.

Imports neither PyTorch nor PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.options import PEFT_METHODS, SETTINGS, check_options
from ..choices import BITS, BLOCK_SIZE, GATE_KINDS, check_gate_kind, check_rounding
from ..errors import SettingsError

DEFAULT_METHOD = "lora"
MOST = 65_536
"""Of what has to be in memory at once."""
LONGEST = 1024


@dataclass(frozen=True)
class TuneSettings:
    """What is tuned, and on which text. None stands for the default that the field's help gives.

    Raises SettingsError for a value outside its range, or two that contradict each other.
    """

    prompt_field: str = field(default="prompt", metadata={"help": "the field with the prompt", "metavar": "NAME"})
    answer_field: str = field(default="answer", metadata={"help": "the field with the answer", "metavar": "NAME"})
    raw: bool = field(default=False, metadata={"help": "do not use the tokenizer's chat template"})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "skip rows that have more tokens, prompt and answer together; without it the model's context, at "
            f"most {LONGEST}",
            "metavar": "N",
        },
    )
    peft: str | None = field(
        default=None,
        metadata={
            "help": f"the PEFT method, without it {DEFAULT_METHOD}: {', '.join(PEFT_METHODS)}",
            "metavar": "NAME",
        },
    )
    peft_config: Path | None = field(
        default=None,
        metadata={
            "help": "a file with any PEFT config, as PEFT writes it to adapter_config.json; replaces the PEFT method "
            "and the options of the adapter",
            "metavar": "FILE",
        },
    )
    adapter_rank: int | None = field(
        default=None,
        metadata={"help": "rank of the adapter; without it the method's own, 16 for lora", "metavar": "R"},
    )
    adapter_alpha: int | None = field(
        default=None,
        metadata={
            "help": "alpha of the adapter (scale = alpha / rank); without it the method's own, 16 for lora",
            "metavar": "A",
        },
    )
    adapter_dropout: float | None = field(
        default=None,
        metadata={
            "help": "dropout of the adapter's input; without it the method's own, 0.1 for lora",
            "metavar": "P",
        },
    )
    target_modules: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "the layers to adapt, by the end of their names; without it the method's own, for most methods "
            "all linear layers but the lm_head",
            "metavar": "NAME",
        },
    )
    virtual_tokens: int | None = field(
        default=None,
        metadata={"help": "how many virtual tokens the methods with virtual tokens add; without it 20", "metavar": "N"},
    )
    token_indices: Sequence[int] | None = field(
        default=None,
        metadata={"help": "the tokens whose embeddings trainable_tokens trains", "metavar": "ID"},
    )
    gate: str = field(
        default="query_aware",
        metadata={"help": f"the kind of gate: {', '.join(GATE_KINDS)}", "metavar": "KIND"},
    )
    gate_rank: int = field(default=8, metadata={"help": "rank of the gate", "metavar": "R"})
    quantized_backbone: str | None = field(
        default=None,
        metadata={
            "help": f"{' or '.join(BITS)}: train against the frozen weights as an export in this precision rounds "
            "them, so that the adapter learns to correct the error",
            "metavar": "NAME",
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": f"how many weights of a quantized backbone share a scale; without it {BLOCK_SIZE}",
            "metavar": "N",
        },
    )

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            rule = "it must be at least 2: one token of a prompt and one of an answer"
            raise SettingsError("max_length", self.max_length, rule)
        check_gate_kind(self.gate)
        if self.gate_rank < 1:
            raise SettingsError("gate_rank", self.gate_rank, "it must be at least 1")
        if self.gate_rank > MOST:
            raise SettingsError("gate_rank", self.gate_rank, f"it must be at most {MOST}")
        if self.quantized_backbone is not None:
            check_rounding(**self.rounding())
        elif self.block_size is not None:
            raise SettingsError("block_size", self.block_size, "it needs {quantized_backbone}")
        if self.peft_config is None:
            check_options(self.peft or DEFAULT_METHOD, **self.adapter_options())
            return
        for name, value in ({"peft": self.peft, **self.adapter_options()}).items():
            if value is not None:
                rule = "it cannot be combined with {peft_config}, whose file describes the whole adapter"
                raise SettingsError(SETTINGS.get(name, name), value, rule)

    def adapter_options(self) -> dict[str, Any]:
        """The options of the adapter, by the names that `peft_config` has for them; None where nothing is given."""
        return {
            "rank": self.adapter_rank,
            "alpha": self.adapter_alpha,
            "dropout": self.adapter_dropout,
            "target_modules": self.target_modules,
            "virtual_tokens": self.virtual_tokens,
            "token_indices": self.token_indices,
        }

    def rounding(self) -> dict[str, Any]:
        """The arguments of `round_backbone`, as a checkpoint keeps them; empty if the backbone is not rounded."""
        if self.quantized_backbone is None:
            return {}
        block_size = BLOCK_SIZE if self.block_size is None else self.block_size
        return {"precision": self.quantized_backbone, "block_size": block_size}


@dataclass(frozen=True)
class TrainSettings:
    """How the training runs. One optimizer step sees batch_size * gradient_accumulation examples; the learning rates
    follow a cosine after the warm-up. None stands for the default that the field's help gives.

    Raises SettingsError for a value outside its range.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "learning rate of the adapter; without it the PEFT method's own, 3e-4 for lora",
            "metavar": "LR",
        },
    )
    gate_learning_rate: float = field(default=1e-3, metadata={"help": "learning rate of the gate", "metavar": "LR"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay of AdamW", "metavar": "W"})
    warmup_ratio: float = field(
        default=0.1, metadata={"help": "share of the steps in which the learning rates rise", "metavar": "F"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm", "metavar": "N"})
    epochs: float = field(
        default=3, metadata={"help": "passes over the data, if the steps are not given", "metavar": "N"}
    )
    steps: int | None = field(default=None, metadata={"help": "optimizer steps", "metavar": "N"})
    batch_size: int = field(default=16, metadata={"help": "examples in a forward pass", "metavar": "N"})
    gradient_accumulation: int = field(
        default=1, metadata={"help": "forward passes in an optimizer step", "metavar": "N"}
    )
    gate_dropout: float = field(
        default=0.1, metadata={"help": "dropout after each linear layer of the gate", "metavar": "P"}
    )
    seed: int = field(
        default=2024, metadata={"help": "seed of the initial weights, the order and the dropout", "metavar": "N"}
    )
    save_every: int = field(
        default=200, metadata={"help": "steps between two snapshots, from which a run can resume", "metavar": "N"}
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "save_every", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(name, value, "it must be at least 1")
        for name in ("batch_size", "gradient_accumulation"):
            if getattr(self, name) > MOST:
                raise SettingsError(name, getattr(self, name), f"it must be at most {MOST}")
        for name in ("learning_rate", "gate_learning_rate", "max_grad_norm", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(name, value, "it must be above 0 and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise SettingsError("weight_decay", self.weight_decay, "it must be at least 0 and finite")
        for name in ("gate_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(name, getattr(self, name), "it must be in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise SettingsError("seed", self.seed, "it must be in [0, 2**32)")

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run over `examples` rows."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * examples / (self.batch_size * self.gradient_accumulation)))
