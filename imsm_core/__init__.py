"""Train a siamese language model: one frozen backbone, one PEFT adapter, one gate.

    from imsm_core import TrainSettings, TuneSettings, tune

Names are imported when they are first used, so that importing an error class does not import PyTorch.
"""

import importlib
import importlib.metadata
import typing

_HOMES = {
    "adapters.attach": ("attach_adapter", "load_adapter"),
    "adapters.methods": ("peft_config",),
    "backbone": ("fingerprint", "hidden_size", "load_base_model", "load_tokenizer"),
    "checkpoint": ("CheckpointInfo", "load_checkpoint", "save_checkpoint"),
    "data.dataset": ("Dataset", "Example", "load_jsonl"),
    "errors": (
        "AdapterError",
        "BaseModelError",
        "CheckpointError",
        "DataError",
        "Diverged",
        "IMSMError",
        "Interrupted",
        "OutputError",
        "OutputExistsError",
        "SettingsError",
    ),
    "foreign": ("assemble",),
    "gates": ("GATES", "Gate", "Memories", "make_gate"),
    "reference": ("reference_generate", "reference_step"),
    "siamese": ("SiameseModel",),
    "training.loop": ("train",),
    "training.settings": ("TrainSettings", "TuneSettings"),
    "training.tuning": ("tune",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> typing.Any:
    if name == "__version__":
        return importlib.metadata.version("imsm-runtime")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
