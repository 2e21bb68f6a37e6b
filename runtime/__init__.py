"""Generate text from an exported IMSM model with NumPy and onnxruntime: no PyTorch, no transformers.

import runtime                     # `imsm_runtime` when installed from the wheel
model = runtime.load("ARTIFACT")
print(runtime.generate(model, "Once upon a time", max_new_tokens=64).text)
"""

from .engine.session import Session
from .engine.state import DecodeState, StepOutput
from .errors import ArtifactError, IMSMRuntimeError, PromptError, ProviderError, SettingsError
from .generation.generation import (
    Chunk,
    Generation,
    Model,
    Timings,
    Token,
    generate,
    generate_step,
    load,
    stream_generate,
)
from .generation.sampling import greedy, make_sampler

__all__ = [
    "ArtifactError",
    "Chunk",
    "DecodeState",
    "Generation",
    "IMSMRuntimeError",
    "Model",
    "PromptError",
    "ProviderError",
    "Session",
    "SettingsError",
    "StepOutput",
    "Timings",
    "Token",
    "generate",
    "generate_step",
    "greedy",
    "load",
    "make_sampler",
    "stream_generate",
]
