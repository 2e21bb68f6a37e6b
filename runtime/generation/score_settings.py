"""What a caller can set when given texts are judged: one dataclass for the library and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..checks import check_fields
from ..engine.memories import MEMORIES
from ..errors import SettingsError


@dataclass(frozen=True)
class ScoreSettings:
    """memory: whose logits are judged: the blend's, or those of one memory alone. memory_bias: added to the blend's
    gate before its sigmoid. raw, control_tokens: as in `GenerationSettings`. Raises SettingsError."""

    memory: str = field(default="blend", metadata={"help": "whose chances: blend, base or adapter", "metavar": "NAME"})
    memory_bias: float = field(
        default=0.0, metadata={"help": "above 0 towards the base memory, below 0 away", "metavar": "X"}
    )
    raw: bool | None = field(
        default=None,
        metadata={
            "help": "read the prompt as it is, without the chat template, or not; unsaid: as the model was tuned",
            "either": True,
        },
    )
    control_tokens: bool = field(
        default=False, metadata={"help": "let what a message spells be control tokens, as transformers does"}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.memory not in MEMORIES:
            raise SettingsError("memory", self.memory, f"it must be one of {', '.join(MEMORIES)}")
        if math.isnan(self.memory_bias):
            raise SettingsError("memory_bias", self.memory_bias, "it must be a number")
        if self.memory != "blend" and self.memory_bias:
            raise SettingsError("memory_bias", self.memory_bias, "it is of the blend, and {memory} is one alone")
