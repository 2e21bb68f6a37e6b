"""What a caller can set when texts are embedded: one dataclass for the library and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..checks import check_fields
from ..engine.memories import MEMORIES
from ..errors import SettingsError

POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class EmbedSettings:
    """memory: whose last hidden states are pooled: the blend's, or those of one memory alone. pooling: "mean", over all
    tokens of a text, or "last", its last token's. normalize: whether embeddings have length 1. batch_size: texts that
    are read together, at most. Raises SettingsError."""

    memory: str = field(default="blend", metadata={"help": "whose states: blend, base or adapter", "metavar": "NAME"})
    pooling: str = field(
        default="mean", metadata={"help": "mean of all tokens' states, or the last token's", "metavar": "NAME"}
    )
    normalize: bool = field(default=True, metadata={"help": "leave embeddings as long as they are, not of length 1"})
    batch_size: int = field(default=32, metadata={"help": "texts that are read together, at most", "metavar": "N"})

    def __post_init__(self) -> None:
        check_fields(self)
        for name, choices in (("memory", MEMORIES), ("pooling", POOLINGS)):
            if getattr(self, name) not in choices:
                raise SettingsError(name, getattr(self, name), f"it must be one of {', '.join(choices)}")
        if self.batch_size < 1:
            raise SettingsError("batch_size", self.batch_size, "it must be at least 1")
