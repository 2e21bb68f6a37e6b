"""The PEFT methods that `--peft NAME` offers: one small factory each. One entry of PEFT_METHODS adds one.

Defaults are IMSM's released ones where its authors released any (lora, dora, ia3, adalora); otherwise those of the
method's paper or of PEFT's documentation. They fit any architecture: the layers and block sizes come from the model.
Any other PEFT config comes from a file (`read_peft_config`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..backbone import first_line, hidden_size
from ..console import option
from ..errors import AdapterError
from .configs import CONFIG_TYPES, read_fields, warnings_unless_refused
from .refusals import check_new_config, check_tokens

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the lm_head
LARGEST_RANK = 4096
OPTIONS = {"rank": "adapter_rank", "alpha": "adapter_alpha", "dropout": "adapter_dropout"}
"""Those that the command line calls by another name."""


@dataclass(frozen=True)
class _Wanted:
    """What a factory gets: the method's own default where the user gave nothing. Sizes come from `model`."""

    rank: int
    alpha: int
    dropout: float
    target_modules: list[str] | None
    virtual_tokens: int
    token_indices: list[int]
    given_model: PreTrainedModel | None

    @property
    def model(self) -> PreTrainedModel:
        if self.given_model is None:
            raise AdapterError("this PEFT method takes its sizes from the base model, which is not given")
        return self.given_model

    @property
    def targets(self) -> str | list[str]:
        return self.target_modules or ALL_LINEAR

    def shapes(self) -> list[tuple[int, int]]:
        """(in, out) of the layers that are adapted, at least one. Raises AdapterError if there is none."""
        found = [
            shape
            for name, shape in linear_layers(self.model).items()
            if self.target_modules is None or any(f".{name}".endswith(f".{t}") for t in self.target_modules)
        ]
        if not found:
            names = ", ".join(self.target_modules or [ALL_LINEAR])
            raise AdapterError(f"{option('target_modules')} {names} names no linear layer but, at most, the lm_head")
        return found

    def block(self, at_most: int, outputs: bool = False) -> int:
        """The largest block that divides the input sizes of all adapted layers, and the output sizes if `outputs`."""
        sizes = [size for shape in self.shapes() for size in (shape if outputs else shape[:1])]
        common = math.gcd(*sizes)
        size = max((n for n in range(2, at_most + 1) if common % n == 0), default=1)
        if size == 1:
            raise AdapterError(
                f"the adapted layers' sizes have no common block; choose others with {option('target_modules')}"
            )
        return size


@dataclass(frozen=True)
class _Method:
    """options: which of the user's options it takes, with the method's defaults. learning_rate: of the adapter."""

    make: Callable[[_Wanted], PeftConfig]
    learning_rate: float
    options: dict[str, Any]


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
    AdapterError for a method that is not offered, an option that the method does not have, or a value out of range.
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
    wanted = _Wanted(
        rank=chosen.get("rank", 0),
        alpha=chosen.get("alpha", 0),
        dropout=chosen.get("dropout", 0.0),
        target_modules=list(target_modules) if target_modules else None,
        virtual_tokens=chosen.get("virtual_tokens", 0),
        token_indices=list(token_indices or []),
        given_model=model,
    )
    return PEFT_METHODS[method].make(wanted)


def check_options(method: str, **options: Any) -> dict[str, Any]:
    """The method's defaults with the given options (None: not given) over them. Raises AdapterError."""
    if method not in PEFT_METHODS:
        raise AdapterError(f"unsupported PEFT method {method!r}; choose one of {', '.join(PEFT_METHODS)}")
    known = PEFT_METHODS[method].options
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            has = ", ".join(map(_option, known)) or "none"
            raise AdapterError(f"{method} has no {_option(name)}; its options: {has}")
    chosen = {**known, **given}
    if chosen.get("rank", 1) < 1:
        raise AdapterError(f"{_option('rank')} is {chosen['rank']}; it must be at least 1")
    if chosen.get("rank", 1) > LARGEST_RANK:
        raise AdapterError(
            f"{_option('rank')}: {chosen['rank']} is larger than any layer; it must be at most {LARGEST_RANK}"
        )
    if not chosen.get("alpha", 1) > 0:
        raise AdapterError(f"{_option('alpha')} is {chosen['alpha']}; it must be above 0")
    if not 0 <= chosen.get("dropout", 0) < 1:
        raise AdapterError(f"{_option('dropout')} is {chosen['dropout']}; it must be in [0, 1)")
    if chosen.get("virtual_tokens", 1) < 1:
        raise AdapterError(f"{_option('virtual_tokens')} is {chosen['virtual_tokens']}; it must be at least 1")
    if "token_indices" in known and not chosen["token_indices"]:
        raise AdapterError(f"{method} trains the embeddings of chosen tokens; name them with {option('token_indices')}")
    return chosen


def _option(name: str) -> str:
    return option(OPTIONS.get(name, name))


@warnings_unless_refused()
def read_peft_config(path: Path) -> PeftConfig:
    """Any PEFT config, as PEFT writes it to adapter_config.json, for a new adapter. Raises AdapterError."""
    fields = read_fields(path)
    kind = CONFIG_TYPES[fields["peft_type"]]
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(fields.keys() - known - {"peft_version"}):
        raise AdapterError(f"{path} has fields that {kind.__name__} does not know, such as {unknown[0]}")
    about_saved = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "peft_type")
    values = {name: value for name, value in fields.items() if name not in about_saved}
    try:
        config: PeftConfig = kind(**values | {"inference_mode": False})
    except Exception as error:  # PEFT's configs raise several types
        raise AdapterError(f"{path} is no usable {kind.__name__}: {first_line(error)}") from error
    check_new_config(config)
    if config.task_type is None:
        config.task_type = "CAUSAL_LM"
    return config


def default_learning_rate(config: PeftConfig) -> float:
    """The adapter's learning rate when none is given: that of the method, or the released LoRA's."""
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    name = "dora" if kind == "lora" and getattr(config, "use_dora", False) else kind
    return PEFT_METHODS[name if name in PEFT_METHODS else "lora"].learning_rate


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


def _lora(wanted: _Wanted, **options: Any) -> PeftConfig:
    config: PeftConfig = peft.LoraConfig(
        r=wanted.rank,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        target_modules=wanted.targets,
        task_type="CAUSAL_LM",
        **options,
    )
    return config


def _adalora(wanted: _Wanted) -> PeftConfig:
    """Starts with 1.5 times the final mean rank, as in the paper. Training sets the steps of the schedule."""
    config: PeftConfig = peft.AdaLoraConfig(
        init_r=math.ceil(1.5 * wanted.rank),
        target_r=wanted.rank,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        target_modules=wanted.targets,
        total_step=1,
        task_type="CAUSAL_LM",
    )
    return config


def _ia3(wanted: _Wanted) -> PeftConfig:
    """On the paper's layers (keys, values, the MLP's output) where PEFT knows them, else on every linear layer; what
    is scaled is a layer's output, but the input of the MLP's output layer."""
    model, targets, feedforward = wanted.model, wanted.target_modules, None
    if targets is not None or model.config.model_type not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        shapes, width = linear_layers(model), hidden_size(model)
        targets = targets or sorted({name.rsplit(".", 1)[-1] for name in shapes})
        mlp = max(outputs for _, outputs in shapes.values())
        by_target = {t: [shape for name, shape in shapes.items() if f".{name}".endswith(f".{t}")] for t in targets}
        feedforward = [t for t, found in by_target.items() if found and all(s == (mlp, width) for s in found)]
    config: PeftConfig = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type="CAUSAL_LM")
    return config


def _ln_tuning(wanted: _Wanted) -> PeftConfig:
    """Every norm of the model, by its class's name."""
    modules = dict(wanted.model.named_modules())
    norms = {
        name
        for name, module in modules.items()
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    }
    for target in wanted.target_modules or []:
        found = [name for name in modules if f".{name}".endswith(f".{target}")]
        if other := [name for name in found if name not in norms]:
            raise AdapterError(f"ln_tuning trains norms, and {option('target_modules')} {target} names {other[0]}")
    targets = wanted.target_modules or sorted({name.rsplit(".", 1)[-1] for name in norms})
    config: PeftConfig = peft.LNTuningConfig(target_modules=targets, task_type="CAUSAL_LM")
    return config


def _fourierft(wanted: _Wanted) -> PeftConfig:
    """Starts from a spectrum of zeros, at the base model; PEFT's own default is a random one."""
    frequencies = min(1000, *(inputs * outputs for inputs, outputs in wanted.shapes()))
    return _simple("FourierFTConfig", wanted, n_frequency=frequencies, init_weights=True)


def _virtual(kind: str, wanted: _Wanted, **options: Any) -> PeftConfig:
    config: PeftConfig = getattr(peft, kind)(num_virtual_tokens=wanted.virtual_tokens, task_type="CAUSAL_LM", **options)
    return config


def _trainable_tokens(wanted: _Wanted) -> PeftConfig:
    embeddings: Any = wanted.model.get_input_embeddings()
    check_tokens(wanted.token_indices, int(embeddings.weight.shape[0]))
    config: PeftConfig = peft.TrainableTokensConfig(token_indices=wanted.token_indices, task_type="CAUSAL_LM")
    return config


def _simple(kind: str, wanted: _Wanted, **options: Any) -> PeftConfig:
    config: PeftConfig = getattr(peft, kind)(target_modules=wanted.targets, task_type="CAUSAL_LM", **options)
    return config


_LAYERS: dict[str, Any] = {"target_modules": None}
_LORA = {"rank": 16, "alpha": 16, "dropout": 0.1, **_LAYERS}
_VIRTUAL = {"virtual_tokens": 20}

PEFT_METHODS: dict[str, _Method] = {
    # Released with IMSM.
    "lora": _Method(_lora, 3e-4, _LORA),
    "dora": _Method(lambda w: _lora(w, use_dora=True), 1e-4, _LORA | {"alpha": 32}),
    "adalora": _Method(_adalora, 2e-3, {"rank": 8, "alpha": 32, "dropout": 0.1, **_LAYERS}),
    "ia3": _Method(_ia3, 3e-3, _LAYERS),
    # The papers' values or PEFT's; where neither has a rate for language models, the released LoRA's.
    "rslora": _Method(lambda w: _lora(w, use_rslora=True), 3e-4, _LORA),
    "vera": _Method(
        lambda w: _simple("VeraConfig", w, r=w.rank, vera_dropout=w.dropout),
        4e-3,
        {"rank": 256, "dropout": 0.0, **_LAYERS},
    ),
    "loha": _Method(
        lambda w: _simple("LoHaConfig", w, r=w.rank, alpha=w.alpha), 3e-4, {"rank": 8, "alpha": 8, **_LAYERS}
    ),
    "lokr": _Method(
        lambda w: _simple("LoKrConfig", w, r=w.rank, alpha=w.alpha), 3e-4, {"rank": 8, "alpha": 8, **_LAYERS}
    ),
    "oft": _Method(lambda w: _simple("OFTConfig", w, r=0, oft_block_size=w.block(32)), 3e-4, _LAYERS),
    "boft": _Method(lambda w: _simple("BOFTConfig", w, boft_block_size=w.block(4)), 3e-4, _LAYERS),
    "hra": _Method(lambda w: _simple("HRAConfig", w, r=w.rank), 3e-4, {"rank": 8, **_LAYERS}),
    "hira": _Method(lambda w: _simple("HiraConfig", w, r=w.rank), 3e-4, {"rank": 32, **_LAYERS}),
    "delora": _Method(lambda w: _simple("DeloraConfig", w, r=w.rank), 3e-3, {"rank": 8, **_LAYERS}),
    "c3a": _Method(lambda w: _simple("C3AConfig", w, block_size=w.block(256, outputs=True)), 3e-3, _LAYERS),
    "ln_tuning": _Method(_ln_tuning, 3e-3, _LAYERS),
    "fourierft": _Method(_fourierft, 3e-3, _LAYERS),
    "vblora": _Method(
        lambda w: _simple("VBLoRAConfig", w, r=w.rank, vector_length=w.block(256, outputs=True)),
        1e-3,
        {"rank": 4, **_LAYERS},
    ),
    "prefix_tuning": _Method(lambda w: _virtual("PrefixTuningConfig", w), 1e-2, _VIRTUAL),
    "prompt_tuning": _Method(lambda w: _virtual("PromptTuningConfig", w), 3e-2, _VIRTUAL),
    "p_tuning": _Method(lambda w: _virtual("PromptEncoderConfig", w, encoder_hidden_size=128), 1e-3, _VIRTUAL),
    "trainable_tokens": _Method(_trainable_tokens, 1e-3, {"token_indices": None}),
}
