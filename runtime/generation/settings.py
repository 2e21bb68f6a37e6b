"""What a caller can set for generation: one dataclass for the library, the command line and the server."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks import check_fields
from ..errors import SettingsError
from ..schema import LARGEST_PENALTY
from .sampling import Sampler, make_sampler
from .speculation import MOST_DRAFTED

MOST_LIKELIEST = 1000
"""Tokens that `logprobs` and `trace` tell of at each place."""
CONSTRAINTS = ("json_object", "json_schema", "regex", "grammar")


def _option(default: Any, text: str, metavar: str | None = None, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, "metavar": metavar, **more})


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated; the defaults are greedy. Other values outside a field's type or range, and fields that
    contradict each other, raise SettingsError.

    max_new_tokens: no more. min_new_tokens: no end token before so many; stop strings are not held back. raw: whether a
    prompt's text is sent as it is, without the chat template; None: as the model was tuned. control_tokens: whether
    control tokens that a message's content spells are such; else they are the text that they are (raw text may always
    spell them). memory_bias: added to the gate before its sigmoid, in a new state; above 0 towards the base memory.
    temperature, top_k, top_p, min_p, typical_p, top_n_sigma, seed: as in `make_sampler`.
    repetition_penalty: of tokens in the prompt and after it, 1 is none. presence_penalty, frequency_penalty: of
    generated tokens, 0 is none. no_repeat_ngram_size: no n-gram comes twice, 0 is off. logit_bias: by token id, what is
    added to its logit; -infinity forbids it. In a conversation they go by the present turn and reply.
    stop: text that ends generation and is left out. stop_token_ids: tokens that do, beside the model's end tokens.
    logprobs: tell the log-probability of every token and of so many of the likeliest. echo: of the prompt's, too.
    trace: tell the likeliest tokens of each memory alone. speculate: at most so many tokens are guessed and tried at
    once (see `Speculation`), and the same ones come; 0 is off. json_object, json_schema (JSON text, or a dict), regex,
    grammar (Lark): what the text must be.
    """

    max_new_tokens: int = _option(256, "stop after this many tokens", "N")
    min_new_tokens: int = _option(0, "no end token before this many tokens", "N")
    raw: bool | None = _option(
        None, "send the text as it is, without the chat template, or not; unsaid: as the model was tuned", either=True
    )
    memory_bias: float = _option(0.0, "above 0 towards the base memory, below 0 away", "X")
    control_tokens: bool = _option(False, "let what a message spells be control tokens, as transformers does")
    temperature: float = _option(0.0, "0 is greedy", "T", models=True)
    top_k: int = _option(0, "sample from the K likeliest tokens; 0 is all", "K", models=True)
    top_p: float = _option(1.0, "sample from the likeliest tokens that add up to P", "P", models=True)
    min_p: float = _option(0.0, "sample from tokens P times as likely as the likeliest", "P", models=True)
    typical_p: float = _option(1.0, "sample from tokens of typical surprise that add up to P", "P", models=True)
    top_n_sigma: float = _option(0.0, "sample from logits within N deviations of the highest; 0 is all", "N")
    seed: int | None = _option(None, "makes sampling repeatable", "N")
    repetition_penalty: float = _option(1.0, "make tokens of the text so far less likely; 1 is off", "P", models=True)
    presence_penalty: float = _option(0.0, "take P from the logit of every generated token", "P")
    frequency_penalty: float = _option(0.0, "take P for each time that a token was generated", "P")
    no_repeat_ngram_size: int = _option(0, "no N tokens in a row come twice; 0 is off", "N", models=True)
    logit_bias: Mapping[int, float] | None = _option(
        None, "add X to the logit of a token; may be given several times", "ID=X", repeated=True
    )
    stop: Sequence[str] = _option((), "end before this text; may be given several times", "TEXT", repeated=True)
    stop_token_ids: Sequence[int] = _option(
        (), "end at this token, too; may be given several times", "ID", repeated=True
    )
    logprobs: int | None = _option(None, "tell log-probabilities, and those of the N likeliest tokens", "N")
    echo: bool = _option(False, "tell the log-probabilities of the prompt's tokens, too; needs --logprobs")
    trace: int | None = _option(None, "tell what each memory alone would say: the N likeliest tokens", "N")
    speculate: int = _option(0, "guess up to N tokens from the text so far: sooner, not others; 0 is off", "N")
    json_object: bool = _option(False, "the text must be a JSON object (needs the extra `grammar`)")
    json_schema: str | None = _option(None, "it must be JSON of this schema, or of that in @FILE", "JSON")
    regex: str | None = _option(None, "it must match this regular expression, or that in @FILE", "REGEX")
    grammar: str | None = _option(None, "it must follow this grammar in Lark's form, or that in @FILE", "LARK")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        schema = self.json_schema
        if isinstance(schema, Mapping) and all(isinstance(key, str) for key in schema):  # as a row of JSON has it
            try:
                object.__setattr__(self, "json_schema", json.dumps(schema))
            except (TypeError, ValueError) as error:
                raise SettingsError("json_schema", schema, "it must be a schema that JSON can hold") from error
        check_fields(self)
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_ranges()
        self._check_together()
        self.sampler()

    @classmethod
    def of_model(cls, defaults: Mapping[str, Any], **said: Any) -> GenerationSettings:
        """The settings that a model's own `defaults` make (`Manifest.generation`), with what is said in their place. A
        model that samples by default does so at temperature 1 unless it has another."""
        own = {name: value for name, value in defaults.items() if name != "do_sample"}
        if not defaults.get("do_sample"):
            own.pop("temperature", None)
        else:
            own.setdefault("temperature", 1.0)
        return cls(**own | said)

    def sampler(self) -> Sampler:
        """A new sampler that these settings describe."""
        return make_sampler(
            self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.typical_p, self.top_n_sigma
        )

    def _check_ranges(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingsError("max_new_tokens", self.max_new_tokens, "it must be at least 1")
        if math.isnan(self.memory_bias):
            raise SettingsError("memory_bias", self.memory_bias, "it must be a number")
        for name in ("min_new_tokens", "no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                raise SettingsError(name, getattr(self, name), "it must be 0 (off) or above")
        if not 1 / LARGEST_PENALTY <= self.repetition_penalty <= LARGEST_PENALTY:
            rule = f"it must be above 0 ({1 / LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}); 1 is off"
            raise SettingsError("repetition_penalty", self.repetition_penalty, rule)
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= LARGEST_PENALTY:
                raise SettingsError(
                    name, getattr(self, name), f"it must be {-LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}; 0 is off"
                )
        for name, least in (("logprobs", 0), ("trace", 1)):
            if (value := getattr(self, name)) is not None and not least <= value <= MOST_LIKELIEST:
                raise SettingsError(name, value, f"it must be {least} to {MOST_LIKELIEST}")
        if not 0 <= self.speculate <= MOST_DRAFTED:
            raise SettingsError("speculate", self.speculate, f"it must be 0 (off) to {MOST_DRAFTED}")
        for token, bias in (self.logit_bias or {}).items():
            if not (abs(bias) <= LARGEST_PENALTY or bias == -math.inf):
                rule = f"a bias must be {-LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}, or -infinity"
                raise SettingsError("logit_bias", f"{token}={bias}", rule)
        if "" in self.stop:
            raise SettingsError("stop", "", "a stop string cannot be empty")
        if negative := [token for token in self.stop_token_ids if token < 0]:
            raise SettingsError("stop_token_ids", negative[0], "token ids are 0 or above")

    def _check_together(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise SettingsError("min_new_tokens", self.min_new_tokens, "it must not be above {max_new_tokens}")
        if self.echo and (self.logprobs is None or self.trace is not None):
            raise SettingsError("echo", True, "it needs {logprobs}, and does not go with {trace}")
        said = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(said) > 1:
            raise SettingsError(said[1], getattr(self, said[1]), f"{{{said[0]}}} is given too, and a text has one form")
