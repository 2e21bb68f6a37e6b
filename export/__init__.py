"""Export a trained siamese model as one ONNX graph.

    from export import export_checkpoint          # `imsm_export` when installed from the wheel

Names are imported when they are first used, so that importing an error class does not import PyTorch.
"""

import os
from importlib import import_module
from importlib.metadata import version
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime is imported, which writes a device's id

_MODULES = {
    "ExportError": "errors",
    "ExportSettings": "settings",
    "TraceError": "errors",
    "UnsupportedError": "errors",
    "VerificationError": "errors",
    "export_adapter": "pipeline",
    "export_checkpoint": "pipeline",
    "export_model": "pipeline",
    "verify_against_checkpoint": "verification.against_checkpoint",
    "verify_graph": "verification.parity",
}

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("imsm-runtime")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
