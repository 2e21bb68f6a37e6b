"""What a caller can set for generation: one dataclass for the library and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..checks import check_fields
from ..errors import SettingsError
from .sampling import Sampler, make_sampler


@dataclass(frozen=True)
class GenerationSettings:
    """max_new_tokens: generation stops here at the latest. raw: whether a prompt's text is sent as it is, without the
    chat template; None: as the model was tuned. control_tokens: whether control tokens that a message's content spells
    are such; else they are the text that they are (raw text may always spell them). memory_bias: added to the gate
    before its sigmoid, in a new state; above 0 towards the base memory. temperature, top_k, top_p, min_p, seed: as in
    `make_sampler`; the defaults are greedy.

    Raises SettingsError for values of another type or outside their range.
    """

    max_new_tokens: int = field(default=256, metadata={"help": "stop after this many tokens", "metavar": "N"})
    raw: bool | None = field(
        default=None,
        metadata={
            "help": "send the text as it is, without the chat template, or not; unsaid: as the model was tuned",
            "either": True,
        },
    )
    memory_bias: float = field(
        default=0.0, metadata={"help": "above 0 towards the base memory, below 0 away", "metavar": "X"}
    )
    control_tokens: bool = field(
        default=False, metadata={"help": "let what a message spells be control tokens, as transformers does"}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy", "metavar": "T"})
    top_k: int = field(default=0, metadata={"help": "sample from the K likeliest tokens; 0 is all", "metavar": "K"})
    top_p: float = field(
        default=1.0, metadata={"help": "sample from the likeliest tokens that add up to P", "metavar": "P"}
    )
    min_p: float = field(
        default=0.0, metadata={"help": "sample from tokens P times as likely as the likeliest", "metavar": "P"}
    )
    seed: int | None = field(default=None, metadata={"help": "makes sampling repeatable", "metavar": "N"})

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_new_tokens < 1:
            raise SettingsError("max_new_tokens", self.max_new_tokens, "it must be at least 1")
        if math.isnan(self.memory_bias):
            raise SettingsError("memory_bias", self.memory_bias, "it must be a number")
        self.sampler()

    def sampler(self) -> Sampler:
        """A new sampler that these settings describe."""
        return make_sampler(self.temperature, self.top_k, self.top_p, self.min_p, self.seed)
