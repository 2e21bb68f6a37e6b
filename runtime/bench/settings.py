"""What a benchmark runs: one dataclass for the library and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..checks import check_fields
from ..engine.execution import Execution
from ..errors import SettingsError

MOST = 1_000_000
"""More of anything would never end."""


@dataclass(frozen=True)
class BenchSettings:
    """prompt_lengths, new_tokens: in tokens. batch: texts at once. repeats: runs per prompt length, after one that is
    not counted; results are their medians. execution: how every measured provider runs; its own `provider` is ignored,
    and `cuda_graph` is for CUDA alone. Raises SettingsError for values of another type or
    outside their range."""

    prompt_lengths: tuple[int, ...] = (32, 128)
    new_tokens: int = field(default=64, metadata={"help": "tokens to generate", "metavar": "N"})
    batch: int = field(default=1, metadata={"help": "texts at once", "metavar": "N"})
    repeats: int = field(default=3, metadata={"help": "measured runs per prompt length", "metavar": "N"})
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.prompt_lengths or min(self.prompt_lengths) < 1:
            raise SettingsError("prompt_lengths", self.prompt_lengths, "each must be at least 1")
        for name in ("new_tokens", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise SettingsError(name, getattr(self, name), "it must be at least 1")
            if getattr(self, name) > MOST:
                raise SettingsError(name, getattr(self, name), f"it must be at most {MOST}")
