"""Execution providers that verify an export: names as the runtime has them, and sessions that really use them.

The runtime has rules of its own for running (threads, kernels, fallbacks); the two packages share no code.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import torch

from imsm_core.errors import first_line

from .errors import ExportError, VerificationError

CPU = "CPUExecutionProvider"
OPTIONS = {"CUDAExecutionProvider": {"enable_skip_layer_norm_strict_mode": "1", "use_tf32": "0"}}
"""CUDA's SkipSimplifiedLayerNormalization may otherwise take the mean square in float16, which ends at 65,504, and the
float32 gate is multiplied in TF32."""
_SMALLEST = '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Add(x, x) }'


def check_provider(provider: str) -> None:
    """Start `provider` (cpu, cuda, openvino, ...) on the smallest graph. Raises ExportError if it does not start."""
    _open(onnx.parser.parse_model(_SMALLEST).SerializeToString(), provider)


def open_graph(path: Path, provider: str = "cpu") -> onnxruntime.InferenceSession:
    """A session on `provider`. Raises ExportError if the provider does not start, VerificationError if onnxruntime
    refuses the graph."""
    return _open(str(path), provider)


def _open(source: str | bytes, provider: str) -> onnxruntime.InferenceSession:
    wanted = _full_name(provider)
    if provider in ("cuda", "tensorrt"):
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    options.intra_op_num_threads = torch.get_num_threads()  # one setting for both sides of a comparison
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch's turn follows
    names = [wanted] if wanted == CPU else [wanted, CPU]
    try:
        session = onnxruntime.InferenceSession(
            source, options, providers=[(name, OPTIONS.get(name, {})) for name in names]
        )
    except Exception as error:  # onnxruntime's own types, one for each of its status codes
        raise VerificationError(f"onnxruntime cannot load the graph on {provider}: {first_line(error)}") from error
    if wanted not in session.get_providers():
        raise ExportError(f"execution provider {provider!r} did not start here, so that it cannot verify the graph")
    return session


def _full_name(provider: str) -> str:
    """As onnxruntime names it. Raises ExportError unless this onnxruntime was built with it."""
    short: dict[str, str] = {
        name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_available_providers()
    }
    if provider not in short:
        raise ExportError(
            f"this onnxruntime ({onnxruntime.__version__}) has no execution provider {provider!r} to verify with; it "
            f"has {', '.join(short)}"
        )
    return short[provider]
