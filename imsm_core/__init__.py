"""Train a siamese language model: one frozen backbone, one PEFT adapter, one gate.

    from imsm_core import TrainSettings, TuneSettings, tune

Names are imported when they are first used, so that importing an error class does not import PyTorch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "adapters.attach": ("attach_adapter", "load_adapter"),
    "backbone": ("fingerprint", "hidden_size", "load_base_model", "load_tokenizer"),
    "checkpoint": ("CheckpointInfo", "load_checkpoint", "save_checkpoint"),
    "data.dataset": ("Dataset", "Example", "load_jsonl"),
    "errors": ("IMSMError",),
    "gates": ("GATES", "Gate", "Memories", "make_gate"),
    "foreign": ("assemble",),
    "adapters.methods": ("peft_config",),
    "reference": ("reference_generate", "reference_step"),
    "siamese": ("SiameseModel",),
    "training.loop": ("TrainSettings", "train"),
    "training.tuning": ("TuneSettings", "tune"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
