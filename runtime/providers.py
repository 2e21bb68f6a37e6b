"""Execution providers: short names, and sessions that really use what was asked for."""

from __future__ import annotations

import base64
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime

from .errors import ArtifactError, ProviderError
from .machine import usable_cores

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
ON_DEVICE = {"cuda": "cuda"}
"""Providers whose caches live on a device of their own, and what onnxruntime calls that device."""

# y = x + x over one float, serialised by onnx: the smallest session that shows whether a provider starts.
_PROBE = base64.b64decode("CAo6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAV")


def open_session(
    model: Path | bytes,
    provider: str = "cpu",
    threads: int | None = None,
    spin: bool = True,
    allow_fallback: bool = False,
) -> onnxruntime.InferenceSession:
    """An onnxruntime session on `provider`, a key of PROVIDERS.

    threads: None is the number of usable physical cores. spin: whether idle threads busy-wait, which is faster and
    uses the processor. Raises ProviderError if the provider is unknown, not built in, or did not start (unless
    `allow_fallback`), and ArtifactError if onnxruntime refuses the graph.
    """
    if threads is not None and threads < 1:
        raise ProviderError(f"threads is {threads}; it must be at least 1")
    wanted = _full_name(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = 4  # errors are raised; onnxruntime would also print them
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider in ("cuda", "tensorrt"):
        onnxruntime.preload_dlls()
    names = [wanted] if wanted in onnxruntime.get_available_providers() else []
    if "CPUExecutionProvider" not in names:
        names.append("CPUExecutionProvider")
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(source, options, providers=names)
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ArtifactError(f"onnxruntime cannot load {_name(model)}: {_one_line(error)}") from error
    if wanted not in session.get_providers() and not allow_fallback:
        raise ProviderError(
            f"execution provider {provider!r} is not in use (in use: {', '.join(session.get_providers())}); "
            "run `doctor`, or allow it with --allow-fallback"
        )
    return session


def usable_providers() -> dict[str, str]:
    """Every provider that this onnxruntime was built with, and "usable" or why it is not, by starting each."""
    names = {full: short for short, full in PROVIDERS.items()}
    found = {}
    for full in onnxruntime.get_available_providers():
        short = names.get(full)
        if short is None:
            continue
        try:
            open_session(_PROBE, short)
            found[short] = "usable"
        except (ProviderError, ArtifactError) as error:
            found[short] = f"not usable: {error}"
    return found


def installed_builds() -> dict[str, str]:
    """The onnxruntime distributions that are installed, with versions. Two at once overwrite each other's files."""
    names = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _full_name(provider: str) -> str:
    if provider not in PROVIDERS:
        raise ProviderError(f"unknown execution provider {provider!r}; choose one of {', '.join(PROVIDERS)}")
    return PROVIDERS[provider]


def _name(model: Path | bytes) -> str:
    return "a probe graph" if isinstance(model, bytes) else str(model)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
