"""Execution providers: short names, and sessions that really use the requested one."""

from __future__ import annotations

import base64
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime

from ..errors import ArtifactError, ProviderError, setting
from ..files import shown
from ..machine import usable_cores
from ..printable import printable
from . import own_kernels
from .execution import Execution

if os.environ.get("ORT_DISABLE_TELEMETRY") == "1" and hasattr(onnxruntime, "disable_telemetry_events"):
    onnxruntime.disable_telemetry_events()  # where something else has imported onnxruntime before this package

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
"""Providers whose caches live on their own device, and what onnxruntime calls that device."""
THREAD_OPTIONS = {"openvino": "num_of_threads"}
"""Providers with their own threads, and the option that sets their number."""
OLDEST_VERSION = (1, 20)
"""Below this version, attention on the CPU continues a cache by several tokens wrongly and without an error (seen in
1.19.2)."""
DEFAULT_FORM_VERSION = (1, 32)
"""The first onnxruntime that runs the default form of an artifact, and not only the portable one."""

# y = x + x over one float, serialized by onnx: the smallest session that shows whether a provider starts.
_PROBE = base64.b64decode("CAo6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAV")


def open_session(
    model: Path | bytes, execution: Execution, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """An onnxruntime session on `execution.provider`, a key of PROVIDERS.

    profile: the beginning of the path that `end_profiling` writes to. Raises ProviderError if the provider is unknown,
    not built in, or did not start (unless `allow_fallback`), or if onnxruntime is too old, and ArtifactError if
    onnxruntime refuses the graph.
    """
    if installed_version() < OLDEST_VERSION:
        raise ProviderError(
            f"onnxruntime {onnxruntime.__version__} computes attention wrongly; it must be at least "
            f"{spelt(OLDEST_VERSION)}"
        )
    wanted = full_name(execution.provider)
    options = _session_options(execution, profile)
    if execution.provider in ("cuda", "tensorrt"):
        onnxruntime.preload_dlls()
    names = [wanted] if wanted in onnxruntime.get_available_providers() else []
    if "CPUExecutionProvider" not in names:
        names.append("CPUExecutionProvider")
    own = _provider_options(execution, options)
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(
            source, options, providers=names, provider_options=[own if name == wanted else {} for name in names]
        )
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ArtifactError(f"onnxruntime cannot load {_name(model)}: {_one_line(error)}{_advice(error)}") from error
    if wanted not in session.get_providers() and not execution.allow_fallback:
        why = "did not start" if wanted in names else "is not part of this onnxruntime"
        raise ProviderError(
            f"execution provider {execution.provider!r} is not in use (in use: {', '.join(session.get_providers())}): "
            f"it {why}; run `doctor`, or allow it with {setting('allow_fallback')}"
        )
    return session


def run_bound(
    session: onnxruntime.InferenceSession,
    binding: onnxruntime.IOBinding,
    options: onnxruntime.RunOptions | None = None,
) -> None:
    """Run a session on what is bound. Raises ProviderError where onnxruntime cannot, for want of memory for example."""
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:
        if not is_onnxruntimes(error):
            raise
        name = session.get_providers()[0].removesuffix("ExecutionProvider")
        raise ProviderError(f"onnxruntime's {name} provider cannot run the graph: {_one_line(error)}") from error


def is_onnxruntimes(error: Exception) -> bool:
    """Whether an exception is one of onnxruntime's, which share no base class."""
    return type(error).__module__.startswith("onnxruntime")


def _session_options(execution: Execution, profile: Path | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = execution.threads or usable_cores()
    options.log_severity_level = 4  # errors are raised; onnxruntime would also print them
    if not execution.spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if execution.kernels and execution.provider == "cpu" and (library := own_kernels.library()) is not None:
        options.register_custom_ops_library(str(library))
    if execution.provider == "cuda":  # weights in memory of their size, not in an arena that doubles
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def _provider_options(execution: Execution, options: onnxruntime.SessionOptions) -> dict[str, str]:
    """The options of the wanted provider."""
    own = {}
    if execution.provider in THREAD_OPTIONS:
        own[THREAD_OPTIONS[execution.provider]] = str(options.intra_op_num_threads)
    if execution.provider == "cuda":
        own["use_tf32"] = "0"  # gate and logits are float32, and TF32 keeps 10 of its 23 bits
        own["enable_skip_layer_norm_strict_mode"] = "1"  # or norms of residual sums may overflow in float16
    if execution.cuda_graph:
        own["enable_cuda_graph"] = "1"
    return own


def installed_version() -> tuple[int, int]:
    """Major and minor version of onnxruntime."""
    major, minor = onnxruntime.__version__.split(".")[:2]
    return int(major), int(minor)


def spelt(number: tuple[int, int]) -> str:
    """A version as text."""
    return ".".join(map(str, number))


def usable_providers() -> dict[str, str]:
    """Every provider that this onnxruntime was built with, and "usable" or why it is not, by starting each."""
    names = {full: short for short, full in PROVIDERS.items()}
    found = {}
    for full in onnxruntime.get_available_providers():
        short = names.get(full)
        if short is None:
            continue
        try:
            open_session(_PROBE, Execution(short))
            found[short] = "usable"
        except (ProviderError, ArtifactError) as error:
            found[short] = f"not usable: {error}"
    return found


def installed_builds() -> dict[str, str]:
    """The onnxruntime distributions that are installed, with versions. Two at once overwrite each other's files."""
    names = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-webgpu")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def full_name(provider: str) -> str:
    """A provider as onnxruntime names it. Raises ProviderError for an unknown one."""
    if provider not in PROVIDERS:
        raise ProviderError(f"unknown execution provider {provider!r}; choose one of {', '.join(PROVIDERS)}")
    return PROVIDERS[provider]


def _name(model: Path | bytes) -> str:
    return "a probe graph" if isinstance(model, bytes) else shown(model)


def _advice(error: Exception) -> str:
    """What to do about a graph that is too new for this onnxruntime, or that it cannot capture."""
    if "graph capture" in str(error):
        return f"; run it without {setting('cuda_graph')}"
    if "GroupQueryAttention" not in str(error) or installed_version() >= DEFAULT_FORM_VERSION:
        return ""
    return (
        f"; it needs onnxruntime {spelt(DEFAULT_FORM_VERSION)} and this is {onnxruntime.__version__}: install that, or "
        "export the portable form"
    )


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))
