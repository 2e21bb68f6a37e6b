"""What the manifest says of the model's own settings of generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import GenerationConfig

from export.generation_defaults import LIMITS, SAMPLING, generation_defaults
from runtime import GenerationSettings
from runtime.json_checks import DamagedError
from runtime.schema import FORMAT_VERSION, SCHEMAS


def found(**config: Any) -> tuple[dict[str, Any], list[str]]:
    """The section, and the lines that were reported."""
    made = GenerationConfig()
    for name, value in config.items():
        setattr(made, name, value)
    lines: list[str] = []
    return generation_defaults(made, lines.append), lines


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"do_sample": False}),
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"temperature": 1.0, "top_k": 64, "top_p": 0.95}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "temperature": 0.7}, {"temperature": 0.7, "top_k": 0}),
        ({"repetition_penalty": 1.1, "top_k": 20}, {"top_k": 20, "repetition_penalty": 1.1}),
        (
            {"do_sample": True, "min_p": 0.1, "typical_p": 0.9, "no_repeat_ngram_size": 3},
            {"temperature": 1.0, "top_k": 50, "min_p": 0.1, "typical_p": 0.9, "no_repeat_ngram_size": 3},
        ),
    ],
)
def test_what_is_set_is_told_and_what_transformers_samples_with(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    section, lines = found(**config)
    assert section == {"do_sample": config.get("do_sample", False)} | expected
    assert lines == []


def test_transformers_samples_with_these_where_nothing_is_said() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    assert {name: defaults[name] for name in SAMPLING} == SAMPLING
    off = {"top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    assert {name: defaults[name] for name in LIMITS if name in defaults and name not in SAMPLING} == off


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("temperature", math.nan, "temperature nan; it must be a number of 0.0001 or more, and is left out"),
        ("temperature", 0, "temperature 0; it must be a number of 0.0001 or more"),
        ("temperature", math.inf, "temperature inf"),
        ("temperature", 10**310, "temperature 1000"),
        ("temperature", "warm", "temperature 'warm'"),
        ("top_k", -1, "top_k -1; it must be a whole number of 0 or more"),
        ("top_k", 5.0, "top_k 5.0; it must be a whole number"),
        ("top_k", True, "top_k True"),
        ("top_p", 0, "top_p 0; it must be above 0 and at most 1"),
        ("top_p", 1.5, "top_p 1.5"),
        ("min_p", 1.0, "min_p 1.0; it must be from 0 to below 1"),
        ("typical_p", [], "typical_p []"),
        ("repetition_penalty", -math.inf, "repetition_penalty -inf; it must be a number from 1e-30 to 1e30"),
        ("no_repeat_ngram_size", 2**40, "no_repeat_ngram_size 1099511627776"),
        ("do_sample", "yes", "do_sample 'yes'; it must be true or false, and is left out"),
    ],
)
def test_what_cannot_be_is_left_out_with_a_warning_and_refused_in_a_manifest(name: str, value: Any, rule: str) -> None:
    section, lines = found(**{name: value})
    assert section == {"do_sample": False}
    assert len(lines) == 1
    assert lines[0].startswith(f"warning   the model's generation_config has {rule}")
    check = SCHEMAS[FORMAT_VERSION].fields["generation"]
    check(section, "generation")
    with pytest.raises(DamagedError, match=rf"generation\.{name} is "):
        check(section | {name: value}, "generation")


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (1e-4, 1, 1e300)),
        ("top_k", (0, 2**31 - 1)),
        ("top_p", (1e-300, 1)),
        ("min_p", (0, 0.999)),
        ("typical_p", (1e-300, 1)),
        ("repetition_penalty", (1e-30, 1e30)),
        ("no_repeat_ngram_size", (0, 2**31 - 1)),
    ],
)
def test_the_runtime_takes_every_value_that_is_let_pass(name: str, values: tuple[float, ...], sampled: bool) -> None:
    for value in values:
        section, lines = found(**{"do_sample": sampled, name: value})
        assert lines == []
        assert section[name] == value
        SCHEMAS[FORMAT_VERSION].fields["generation"](section, "generation")
        settings = GenerationSettings.of_model(section)
        assert sampled == (settings.temperature > 0)
        if sampled or name != "temperature":
            assert getattr(settings, name) == value
