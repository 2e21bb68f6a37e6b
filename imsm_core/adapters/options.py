"""The PEFT methods that the setting `peft` offers, and the options of each. One entry of PEFT_METHODS adds a method.

Defaults are IMSM's released ones where its authors released any (lora, dora, ia3, adalora); otherwise those of the
method's paper or of PEFT's documentation. Any other PEFT config comes from a file (`configs.read_peft_config`).

Imports neither PyTorch nor PEFT, so that settings are checked without them; `methods.py` builds the configs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError

if TYPE_CHECKING:
    from peft import PeftConfig

    from .methods import NewConfig

LARGEST_RANK = 4096
SETTINGS = {"rank": "adapter_rank", "alpha": "adapter_alpha", "dropout": "adapter_dropout"}
"""The options whose setting has another name."""


@dataclass(frozen=True)
class Method:
    """options: which options it takes, with the method's defaults. learning_rate: of the adapter."""

    make: Callable[[NewConfig], PeftConfig]
    learning_rate: float
    options: dict[str, Any]


_LAYERS: dict[str, Any] = {"target_modules": None}
_LORA = {"rank": 16, "alpha": 16, "dropout": 0.1, **_LAYERS}
_VIRTUAL = {"virtual_tokens": 20}

PEFT_METHODS: dict[str, Method] = {
    # Released with IMSM.
    "lora": Method(lambda new: new.lora(), 3e-4, _LORA),
    "dora": Method(lambda new: new.lora(use_dora=True), 1e-4, _LORA | {"alpha": 32}),
    "adalora": Method(lambda new: new.adalora(), 2e-3, {"rank": 8, "alpha": 32, "dropout": 0.1, **_LAYERS}),
    "ia3": Method(lambda new: new.ia3(), 3e-3, _LAYERS),
    # The papers' values or PEFT's; where neither has a rate for language models, the released LoRA's.
    "rslora": Method(lambda new: new.lora(use_rslora=True), 3e-4, _LORA),
    "vera": Method(
        lambda new: new.layers("VeraConfig", r=new.rank, vera_dropout=new.dropout),
        4e-3,
        {"rank": 256, "dropout": 0.0, **_LAYERS},
    ),
    "loha": Method(
        lambda new: new.layers("LoHaConfig", r=new.rank, alpha=new.alpha), 3e-4, {"rank": 8, "alpha": 8, **_LAYERS}
    ),
    "lokr": Method(
        lambda new: new.layers("LoKrConfig", r=new.rank, alpha=new.alpha), 3e-4, {"rank": 8, "alpha": 8, **_LAYERS}
    ),
    "oft": Method(lambda new: new.layers("OFTConfig", r=0, oft_block_size=new.block(32)), 3e-4, _LAYERS),
    "boft": Method(lambda new: new.layers("BOFTConfig", boft_block_size=new.block(4)), 3e-4, _LAYERS),
    "hra": Method(lambda new: new.layers("HRAConfig", r=new.rank), 3e-4, {"rank": 8, **_LAYERS}),
    "hira": Method(lambda new: new.layers("HiraConfig", r=new.rank), 3e-4, {"rank": 32, **_LAYERS}),
    "delora": Method(lambda new: new.layers("DeloraConfig", r=new.rank), 3e-3, {"rank": 8, **_LAYERS}),
    "c3a": Method(lambda new: new.layers("C3AConfig", block_size=new.block(256, outputs=True)), 3e-3, _LAYERS),
    "ln_tuning": Method(lambda new: new.ln_tuning(), 3e-3, _LAYERS),
    "fourierft": Method(lambda new: new.fourierft(), 3e-3, _LAYERS),
    "vblora": Method(
        lambda new: new.layers("VBLoRAConfig", r=new.rank, vector_length=new.block(256, outputs=True)),
        1e-3,
        {"rank": 4, **_LAYERS},
    ),
    "prefix_tuning": Method(lambda new: new.virtual("PrefixTuningConfig"), 1e-2, _VIRTUAL),
    "prompt_tuning": Method(lambda new: new.virtual("PromptTuningConfig"), 3e-2, _VIRTUAL),
    "p_tuning": Method(lambda new: new.virtual("PromptEncoderConfig", encoder_hidden_size=128), 1e-3, _VIRTUAL),
    "trainable_tokens": Method(lambda new: new.trainable_tokens(), 1e-3, {"token_indices": None}),
}


def check_options(method: str, **options: Any) -> dict[str, Any]:
    """The method's defaults with the given options (None: not given) over them. Raises SettingsError, with the name
    that the setting has in `TuneSettings`."""
    if method not in PEFT_METHODS:
        raise SettingsError("peft", method, f"choose one of {', '.join(PEFT_METHODS)}")
    known = PEFT_METHODS[method].options
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            takes = ", ".join(f"{{{SETTINGS.get(option, option)}}}" for option in known)
            raise SettingsError(SETTINGS.get(name, name), value, f"{method} does not take it; it takes {takes}")
    chosen = {**known, **given}
    for name, fits, rule in (
        ("rank", lambda rank: rank >= 1, "it must be at least 1"),
        ("rank", lambda rank: rank <= LARGEST_RANK, f"it must be at most {LARGEST_RANK}: no layer is larger"),
        ("alpha", lambda alpha: alpha > 0, "it must be above 0"),
        ("dropout", lambda dropout: 0 <= dropout < 1, "it must be in [0, 1)"),
        ("virtual_tokens", lambda count: count >= 1, "it must be at least 1"),
        ("token_indices", bool, f"{method} trains the embeddings of chosen tokens, at least one"),
    ):
        if name in known and not fits(chosen[name]):
            raise SettingsError(SETTINGS.get(name, name), chosen[name], rule)
    return chosen


def default_learning_rate(config: PeftConfig) -> float:
    """The adapter's learning rate when none is given: that of the method, or the released LoRA's."""
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    name = "dora" if kind == "lora" and getattr(config, "use_dora", False) else kind
    return PEFT_METHODS[name if name in PEFT_METHODS else "lora"].learning_rate
