"""One small PEFT config per method for a tiny model of any architecture, and siamese models with random values."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from imsm_core.adapters.attach import attach_adapter
from imsm_core.adapters.methods import linear_layers
from imsm_core.backbone import hidden_size, load_base_model
from imsm_core.gates import make_gate
from imsm_core.siamese import SiameseModel

VIRTUAL_TOKENS = 3
TOKENS = [3, 70, 80, 90]
"""Those whose embeddings are trained by the configs that train some."""


def common_divisor(model: PreTrainedModel, inputs_only: bool = False) -> int:
    """The greatest number that divides the sizes of all linear layers."""
    return math.gcd(*(size for shape in linear_layers(model).values() for size in shape[: 1 if inputs_only else 2]))


def norms(model: PreTrainedModel) -> list[str]:
    """The last part of every norm's name."""
    found = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    return sorted({name.rsplit(".", 1)[-1] for name in found})


def embeddings(model: PreTrainedModel) -> str:
    """The name of the input embeddings' module."""
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    return names[model.get_input_embeddings()]


def last_parts(model: PreTrainedModel) -> list[str]:
    """The last parts of the linear layers' names."""
    return sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})


def first_layer(model: PreTrainedModel) -> list[str]:
    """The linear layers of the first block."""
    names = list(linear_layers(model))
    return [name for name in names if name.startswith(names[0].partition(".0.")[0] + ".0.")]


def mlp_outputs(model: PreTrainedModel) -> list[str]:
    """The names' last parts of the layers that lead from the MLP's width back to d."""
    shapes, width = linear_layers(model), hidden_size(model)
    return sorted({name.rsplit(".", 1)[-1] for name, (i, o) in shapes.items() if o == width and i > width})


def _on_linear(kind: str, **options: Any) -> Callable[[PreTrainedModel], PeftConfig]:
    """A config on every linear layer; an option that is a function is called with the model."""

    def make(model: PreTrainedModel) -> PeftConfig:
        values = {name: value(model) if callable(value) else value for name, value in options.items()}
        targets = values.pop("target_modules", "all-linear")
        config: PeftConfig = getattr(peft, kind)(target_modules=targets, task_type="CAUSAL_LM", **values)
        return config

    return make


def _virtual(kind: str, count: int | None = None, **options: Any) -> Callable[[PreTrainedModel], PeftConfig]:
    def make(model: PreTrainedModel) -> PeftConfig:
        tokens = VIRTUAL_TOKENS if count is None else count
        config: PeftConfig = getattr(peft, kind)(num_virtual_tokens=tokens, task_type="CAUSAL_LM", **options)
        return config

    return make


ADAPTERS: dict[str, Callable[[PreTrainedModel], PeftConfig]] = {
    "lora": _on_linear("LoraConfig", r=4, lora_alpha=8),
    "rslora": _on_linear("LoraConfig", r=4, lora_alpha=8, use_rslora=True),
    "lora_bias": _on_linear("LoraConfig", r=4, lora_alpha=8, lora_bias=True),
    "lora_patterns": _on_linear(
        "LoraConfig",
        r=4,
        lora_alpha=8,
        target_modules=last_parts,
        exclude_modules=first_layer,
        rank_pattern=lambda model: dict.fromkeys(mlp_outputs(model), 2),
        alpha_pattern=lambda model: dict.fromkeys(mlp_outputs(model), 3),
    ),
    "lora_layers": _on_linear("LoraConfig", r=4, lora_alpha=8, target_modules=last_parts, layers_to_transform=[1]),
    "lora_embeddings": _on_linear(
        "LoraConfig", r=4, lora_alpha=8, target_modules=lambda model: [*linear_layers(model), embeddings(model)]
    ),
    "lora_tokens": _on_linear(
        "LoraConfig", r=4, lora_alpha=8, trainable_token_indices=lambda model: {embeddings(model): TOKENS}
    ),
    "lora_norms": _on_linear("LoraConfig", r=4, lora_alpha=8, modules_to_save=norms),
    "lora_saved_embeddings": _on_linear(
        "LoraConfig", r=4, lora_alpha=8, modules_to_save=lambda model: [embeddings(model)]
    ),
    "lora_all_biases": _on_linear("LoraConfig", r=4, lora_alpha=8, bias="all"),
    "lora_only_biases": _on_linear("LoraConfig", r=4, lora_alpha=8, bias="lora_only"),
    "dora": _on_linear("LoraConfig", r=4, lora_alpha=8, use_dora=True),
    "adalora": _on_linear("AdaLoraConfig", init_r=6, target_r=4, lora_alpha=8, total_step=10),
    "ia3": _on_linear("IA3Config", target_modules=last_parts, feedforward_modules=mlp_outputs),
    "vera": _on_linear("VeraConfig", r=4),
    "loha": _on_linear("LoHaConfig", r=4, alpha=8),
    "lokr": _on_linear("LoKrConfig", r=4, alpha=8),
    "lokr_full": _on_linear("LoKrConfig", r=10**4, alpha=10**4),
    "lokr_factored": _on_linear("LoKrConfig", r=1, alpha=2, decompose_both=True, decompose_factor=4),
    "oft": _on_linear("OFTConfig", r=0, oft_block_size=common_divisor),
    "oft_cayley": _on_linear("OFTConfig", r=0, oft_block_size=common_divisor, use_cayley_neumann=False),
    "oft_shared": _on_linear("OFTConfig", r=0, oft_block_size=common_divisor, block_share=True),
    "boft": _on_linear("BOFTConfig", boft_block_size=lambda model: common_divisor(model, inputs_only=True)),
    "ln_tuning": _on_linear("LNTuningConfig", target_modules=norms),
    "fourierft": _on_linear("FourierFTConfig", n_frequency=40, scaling=20.0),
    "vblora": _on_linear("VBLoRAConfig", r=4, num_vectors=8, vector_length=common_divisor, topk=2),
    "prefix_tuning": _virtual("PrefixTuningConfig"),
    "prefix_long": _virtual("PrefixTuningConfig", 11),  # longer than the windows of tests/zoo.py
    "prefix_projection": _virtual("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=12),
    "prompt_tuning": _virtual("PromptTuningConfig"),
    "p_tuning": _virtual("PromptEncoderConfig", encoder_hidden_size=12),
    "p_tuning_lstm": _virtual(
        "PromptEncoderConfig",
        encoder_hidden_size=12,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=1,
    ),
    "cartridge": _virtual("CartridgeConfig", num_frozen_tokens=1),
    "trainable_tokens": _on_linear("TrainableTokensConfig", target_modules=embeddings, token_indices=TOKENS),
    "hra": _on_linear("HRAConfig", r=4),
    "c3a": _on_linear("C3AConfig", block_size=common_divisor),
    "road": _on_linear("RoadConfig", group_size=2),
    "miss": _on_linear("MissConfig", r=4),
    "randlora": _on_linear("RandLoraConfig", r=4),
    "shira": _on_linear("ShiraConfig", r=2),
    "waveft": _on_linear("WaveFTConfig", n_frequency=40),
    "delora": _on_linear("DeloraConfig", r=4),
    "hira": _on_linear("HiraConfig", r=4),
    "gralora": _on_linear("GraloraConfig", r=4, alpha=8, gralora_k=2),
    "pvera": _on_linear("PveraConfig", r=4),
    "frod": _on_linear("FrodConfig"),
    "tinylora": _on_linear("TinyLoraConfig", u=4),
    "unilora": _on_linear("UniLoraConfig", r=4, theta_d_length=64),
    "psoft": _on_linear("PsoftConfig", r=4),
    "deft": _on_linear("DeftConfig", r=4),
    "peanut": _on_linear("PeanutConfig", r=4, depth=1),
    "beft": _on_linear("BeftConfig"),
    "glora": _on_linear("GloraConfig", r=4),
    "supertuning": _on_linear("SupertuningConfig", sparsity=0.9),
}


SCALES = {"unilora": 4.0, "c3a": 2.0, "vera": 0.8, "pvera": 0.8, "tinylora": 0.5, "hira": 0.5, "lokr_full": 0.1}
"""Of the noise that changes hidden states about as much as the others' 0.25 does."""


def make_siamese_with(
    base_folder: Path, adapter_name: str, gate_kind: str = "query_aware", seed: int = 1, gate_rank: int = 3
) -> SiameseModel:
    """A siamese model with a random non-zero adapter of ADAPTERS and a random gate, in eval mode."""
    base = load_base_model(str(base_folder))
    torch.manual_seed(seed)
    gate = make_gate(gate_kind, hidden_size(base), gate_rank)
    config = ADAPTERS[adapter_name](base)
    torch.manual_seed(seed)  # the adapter's values do not depend on the kind of gate
    model = SiameseModel(attach_adapter(base, config), gate)
    randomize_adapter(model, seed, SCALES.get(adapter_name, 0.25))
    return model.eval()


def randomize_adapter(model: SiameseModel, seed: int, scale: float = 0.25) -> None:
    """Add noise to every trained value."""
    with torch.no_grad():
        for name, parameter in sorted(model.trainable_parameters().items()):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
