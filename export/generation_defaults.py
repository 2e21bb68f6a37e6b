"""How the model generates by default, by its generation_config as transformers applies it: the manifest's section."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import GenerationConfig

from .report import Report

_LARGEST = 1.7e308  # what a float can hold


class Limit(NamedTuple):
    """What a value may be. rule: it, in words. kinds: its types, exactly."""

    rule: str
    holds: Callable[[float], bool]
    kinds: tuple[type, ...] = (int, float)


_SHARE = Limit("above 0 and at most 1", lambda value: 0 < value <= 1)
_COUNT = Limit("a whole number of 0 or more", lambda value: 0 <= value < 2**31, (int,))
LIMITS = {
    "temperature": Limit("a number of 0.0001 or more", lambda value: 1e-4 <= value <= _LARGEST),
    "top_k": _COUNT,
    "top_p": _SHARE,
    "min_p": Limit("from 0 to below 1", lambda value: 0 <= value < 1),
    "typical_p": _SHARE,
    "repetition_penalty": Limit("a number from 1e-30 to 1e30", lambda value: 1e-30 <= value <= 1e30),
    "no_repeat_ngram_size": _COUNT,
}
"""By transformers' names."""
SAMPLING = {"temperature": 1.0, "top_k": 50}
"""What transformers samples with where a model says nothing, as far as it changes anything."""


def generation_defaults(config: GenerationConfig, report: Report) -> dict[str, Any]:
    """do_sample, and what else is set, by transformers' names. report: gets a line for each value that cannot be."""
    sampled = getattr(config, "do_sample", None)
    if sampled is not None and type(sampled) is not bool:
        _left_out("do_sample", sampled, "true or false", report)
    found: dict[str, Any] = {}
    for name, limit in LIMITS.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if type(value) in limit.kinds and limit.holds(value):
            found[name] = value
        else:
            _left_out(name, value, limit.rule, report)
    return {"do_sample": sampled is True} | (SAMPLING if sampled is True else {}) | found


def _left_out(name: str, value: object, rule: str, report: Report) -> None:
    report(
        f"warning   the model's generation_config has {name} {reprlib.repr(value)}; it must be {rule}, and is left out"
    )
