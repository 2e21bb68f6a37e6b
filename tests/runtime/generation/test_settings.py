"""Generation's settings: a model's own, what is said in their place, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from runtime import GenerationSettings, SettingsError


def test_a_models_defaults_apply_unless_something_is_said() -> None:
    gemma = {"do_sample": True, "top_k": 64, "top_p": 0.95}
    own = GenerationSettings.of_model(gemma)
    assert (own.temperature, own.top_k, own.top_p) == (1.0, 64, 0.95)
    said = GenerationSettings.of_model(gemma, temperature=0.0, top_k=3)
    assert (said.temperature, said.top_k, said.top_p) == (0.0, 3, 0.95)


def test_a_model_that_does_not_sample_is_greedy_whatever_its_temperature() -> None:
    own = GenerationSettings.of_model({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1})
    assert (own.temperature, own.repetition_penalty) == (0.0, 1.1)
    assert GenerationSettings.of_model({}) == GenerationSettings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9; it must not be above max_new_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0"),
        ({"presence_penalty": float("inf")}, r"presence_penalty is inf; it must be -1e\+30 to 1e\+30"),
        ({"frequency_penalty": -1e39}, r"frequency_penalty is -1e\+39; it must be -1e\+30 to 1e\+30"),
        ({"repetition_penalty": 1e-46}, r"repetition_penalty is 1e-46; it must be above 0 \(1e-30 to 1e\+30\)"),
        ({"logprobs": 1001}, "logprobs is 1001; it must be 0 to 1000"),
        ({"trace": 0}, "trace is 0; it must be 1 to 1000"),
        ({"trace": -1}, "trace is -1; it must be 1 to 1000"),
        ({"stop": ["a", ""]}, "stop is ''; a stop string cannot be empty"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1; token ids are 0 or above"),
        ({"logit_bias": {3: float("nan")}}, r"logit_bias is 3=nan; a bias must be -1e\+30 to 1e\+30, or -inf"),
        ({"logit_bias": {3: 1e39}}, r"logit_bias is 3=1e\+39; a bias must be"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias is 3; it must be a whole number"),
        ({"typical_p": 0}, r"typical_p is 0; it must be in \(0, 1\]"),
        ({"top_n_sigma": -1}, r"top_n_sigma is -1; it must be 0 \(off\) or above"),
        ({"regex": "a", "json_object": True}, "regex is a; json_object is given too"),
    ],
)
def test_what_is_outside_its_range_or_contradicts_itself_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        GenerationSettings(**settings)


def test_one_stop_string_is_as_good_as_a_list_of_one() -> None:
    assert GenerationSettings(stop="ab").stop == ("ab",)


def test_a_schema_may_be_a_dict() -> None:
    assert GenerationSettings(json_schema={"type": "object"}).json_schema == '{"type": "object"}'  # type: ignore[arg-type]
