"""How a graph is run: the settings that the library, the command line and the benchmarks share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ..checks import check_fields
from ..errors import IMSMWarning, SettingsError, shown
from ..machine import usable_processors


@dataclass(frozen=True)
class Execution:
    """provider: a key of `providers.PROVIDERS`. threads: None is the usable physical cores; more than the usable
    processors are cut to those, with an IMSMWarning. spin: whether idle threads
    busy-wait, which is faster and uses the processor. allow_fallback: whether onnxruntime may continue without the
    provider. kernels: whether the CPU provider runs this project's kernels where there are any. cuda_graph: whether
    decode steps are captured once and replayed, with the CUDA provider.

    Raises SettingsError for values of another type or outside their range.
    """

    provider: str = field(
        default="cpu", metadata={"help": "execution provider: cpu, cuda, openvino, ...", "metavar": "NAME"}
    )
    threads: int | None = field(
        default=None, metadata={"help": "threads; without it the usable physical cores", "metavar": "N"}
    )
    spin: bool = field(default=True, metadata={"help": "let idle threads sleep: slower, kinder to others"})
    allow_fallback: bool = field(default=False, metadata={"help": "continue if the provider does not start"})
    kernels: bool = field(default=True, metadata={"help": "run onnxruntime's own kernels only: slower"})
    cuda_graph: bool = field(default=False, metadata={"help": "capture decode steps and replay them (cuda only)"})

    def __post_init__(self) -> None:
        check_fields(self)
        if self.threads is not None and self.threads < 1:
            raise SettingsError("threads", self.threads, "it must be at least 1")
        most = usable_processors()
        if self.threads is not None and self.threads > most:
            wanted = f"{shown(self.threads)} threads"
            text = f"{wanted} are more than the {most} processors that this process may use; {most} run"
            warnings.warn(text, IMSMWarning, stacklevel=3)
            object.__setattr__(self, "threads", most)
        if self.cuda_graph and self.provider != "cuda":
            raise SettingsError("provider", self.provider, "{cuda_graph} needs cuda")
