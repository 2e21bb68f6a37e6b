"""Execution providers: short names, and sessions that really use what was asked for."""

from __future__ import annotations

import base64
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime

from ..errors import ArtifactError, ProviderError
from ..machine import usable_cores
from . import own_kernels

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
THREAD_OPTIONS = {"openvino": "num_of_threads"}
"""Providers that have threads of their own, and the option that sets their number."""
OLDEST_VERSION = (1, 20)
"""Below it, attention on the CPU continues a cache by several tokens wrongly and without an error (seen in 1.19.2)."""
DEFAULT_FORM_VERSION = (1, 32)
"""The first onnxruntime that runs the default form of an artifact, and not only the portable one."""

# y = x + x over one float, serialized by onnx: the smallest session that shows whether a provider starts.
_PROBE = base64.b64decode("CAo6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAV")


def open_session(
    model: Path | bytes,
    provider: str = "cpu",
    threads: int | None = None,
    spin: bool = True,
    allow_fallback: bool = False,
    kernels: bool = True,
    cuda_graph: bool = False,
    profile: Path | None = None,
) -> onnxruntime.InferenceSession:
    """An onnxruntime session on `provider`, a key of PROVIDERS.

    threads: None is the number of usable physical cores. spin: whether idle threads busy-wait, which is faster and
    uses the processor. kernels: whether the CPU provider runs this project's kernels where it has them. cuda_graph:
    whether runs can be captured and replayed, with the CUDA provider. profile: the beginning of the path that
    `end_profiling` writes to. Raises ProviderError if the provider is unknown, not built in, or did not start (unless
    `allow_fallback`), or if onnxruntime is too old, and ArtifactError if onnxruntime refuses the graph.
    """
    if installed_version() < OLDEST_VERSION:
        raise ProviderError(
            f"onnxruntime {onnxruntime.__version__} computes attention wrongly; it must be at least "
            f"{spelt(OLDEST_VERSION)}"
        )
    if threads is not None and threads < 1:
        raise ProviderError(f"threads is {threads}; it must be at least 1")
    wanted = _full_name(provider)
    if cuda_graph and provider != "cuda":
        raise ProviderError(f"a CUDA graph goes with execution provider cuda, not with {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = 4  # errors are raised; onnxruntime would also print them
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if kernels and provider == "cpu" and (library := own_kernels.library()) is not None:
        options.register_custom_ops_library(str(library))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if provider in ("cuda", "tensorrt"):
        onnxruntime.preload_dlls()
    names = [wanted] if wanted in onnxruntime.get_available_providers() else []
    own = {THREAD_OPTIONS[provider]: str(options.intra_op_num_threads)} if provider in THREAD_OPTIONS else {}
    if cuda_graph:
        own["enable_cuda_graph"] = "1"
    if "CPUExecutionProvider" not in names:
        names.append("CPUExecutionProvider")
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(
            source, options, providers=names, provider_options=[own if name == wanted else {} for name in names]
        )
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ArtifactError(
            f"onnxruntime cannot load {_name(model)}: {_one_line(error)}{_form_advice(error)}"
        ) from error
    if wanted not in session.get_providers() and not allow_fallback:
        why = "did not start" if wanted in names else "is not part of this onnxruntime"
        raise ProviderError(
            f"execution provider {provider!r} is not in use (in use: {', '.join(session.get_providers())}): it {why}; "
            "run `doctor`, or allow it with --allow-fallback"
        )
    return session


def installed_version() -> tuple[int, int]:
    """Major and minor version of onnxruntime."""
    major, minor = onnxruntime.__version__.split(".")[:2]
    return int(major), int(minor)


def spelt(number: tuple[int, int]) -> str:
    """A version as it is written."""
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
            open_session(_PROBE, short)
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


def _full_name(provider: str) -> str:
    if provider not in PROVIDERS:
        raise ProviderError(f"unknown execution provider {provider!r}; choose one of {', '.join(PROVIDERS)}")
    return PROVIDERS[provider]


def _name(model: Path | bytes) -> str:
    return "a probe graph" if isinstance(model, bytes) else str(model)


def _form_advice(error: Exception) -> str:
    """What to do about a graph that is too new for this onnxruntime."""
    if "GroupQueryAttention" not in str(error) or installed_version() >= DEFAULT_FORM_VERSION:
        return ""
    return (
        f"; it needs onnxruntime {spelt(DEFAULT_FORM_VERSION)} and this is {onnxruntime.__version__}: install that, or "
        "export the portable form"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
