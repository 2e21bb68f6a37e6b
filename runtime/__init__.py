"""Generate text from an exported IMSM model with NumPy and onnxruntime: no PyTorch, no transformers.

import runtime                     # `imsm_runtime` when installed from the wheel
model = runtime.load("ARTIFACT")
print(runtime.generate(model, "Once upon a time", max_new_tokens=64).text)

Names are imported when they are first used, so that the command line can report what is missing when onnxruntime is not
installed.
"""

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.execution import Execution
    from .engine.picks import TokenScores
    from .engine.prefix_cache import PrefixCache
    from .engine.prompt_logprobs import PromptLogprobs
    from .engine.session import Session
    from .engine.state import DecodeState, LikeliestOutput, StepOutput, StepsOutput
    from .errors import (
        ArtifactError,
        IMSMRuntimeError,
        IMSMWarning,
        MissingPackageError,
        PromptError,
        ProviderError,
        SettingsError,
    )
    from .generation.batching import Batch, Event, generate_batch, stream_batch
    from .generation.chat import Chat
    from .generation.embed_settings import EmbedSettings
    from .generation.embedding import EmbedResult, embed
    from .generation.generation import Model, generate, generate_step, load, stream_generate
    from .generation.history import History
    from .generation.logprobs import Candidate, Trace
    from .generation.results import Chunk, Generation, Timings, Token
    from .generation.sampling import greedy, make_sampler
    from .generation.score_settings import ScoreSettings
    from .generation.scoring import Score, score_texts
    from .generation.settings import GenerationSettings
    from .generation.speculation import Speculation

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
"""onnxruntime 1.32 reads this when it is imported. It would write a device's id into the home folder and report to
Microsoft."""

_HOMES = {
    "engine.execution": ("Execution",),
    "engine.picks": ("TokenScores",),
    "engine.prefix_cache": ("PrefixCache",),
    "engine.prompt_logprobs": ("PromptLogprobs",),
    "engine.session": ("Session",),
    "engine.state": ("DecodeState", "LikeliestOutput", "StepOutput", "StepsOutput"),
    "errors": (
        "ArtifactError",
        "IMSMRuntimeError",
        "IMSMWarning",
        "MissingPackageError",
        "PromptError",
        "ProviderError",
        "SettingsError",
    ),
    "generation.batching": ("Batch", "Event", "generate_batch", "stream_batch"),
    "generation.embed_settings": ("EmbedSettings",),
    "generation.embedding": ("EmbedResult", "embed"),
    "generation.chat": ("Chat",),
    "generation.generation": ("Model", "generate", "generate_step", "load", "stream_generate"),
    "generation.history": ("History",),
    "generation.logprobs": ("Candidate", "Trace"),
    "generation.results": ("Chunk", "Generation", "Timings", "Token"),
    "generation.sampling": ("greedy", "make_sampler"),
    "generation.score_settings": ("ScoreSettings",),
    "generation.scoring": ("Score", "score_texts"),
    "generation.settings": ("GenerationSettings",),
    "generation.speculation": ("Speculation",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArtifactError",
    "Batch",
    "Candidate",
    "Chat",
    "Chunk",
    "DecodeState",
    "EmbedResult",
    "EmbedSettings",
    "Event",
    "Execution",
    "Generation",
    "GenerationSettings",
    "History",
    "IMSMRuntimeError",
    "IMSMWarning",
    "LikeliestOutput",
    "MissingPackageError",
    "Model",
    "PrefixCache",
    "PromptError",
    "PromptLogprobs",
    "ProviderError",
    "Score",
    "ScoreSettings",
    "Session",
    "SettingsError",
    "Speculation",
    "StepOutput",
    "StepsOutput",
    "Timings",
    "Token",
    "TokenScores",
    "Trace",
    "__version__",
    "embed",
    "generate",
    "generate_batch",
    "generate_step",
    "greedy",
    "load",
    "make_sampler",
    "score_texts",
    "stream_batch",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("imsm-runtime")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
