"""Arguments of every public function, of wrong types and values: the library's own error in one line, and nothing that
is silently taken for something else."""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime import (
    Execution,
    GenerationSettings,
    IMSMRuntimeError,
    Model,
    PrefixCache,
    PromptError,
    ScoreSettings,
    Session,
    SettingsError,
    Speculation,
    generate,
    generate_batch,
    generate_step,
    greedy,
    load,
    make_sampler,
    score_texts,
    stream_batch,
    stream_generate,
)
from runtime.bench.settings import BenchSettings
from tests.exported import PROMPT, Exported

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        ...,
        object(),
        int,
        len,
        lambda: 5,
        Path("a"),
        Decimal(1),
        Fraction(3, 2),
        1j,
        np.datetime64(1, "s"),
    ),
    *("", "5", "hot", "cpu", "\0", "a\nb", "x" * 300, b"", b"ab", bytearray(b"ab"), memoryview(b"ab")),
    *(0, 1, 5, -1, 1024, 2**31, 2**64 + 5, 2**70, -(2**70), 2**20000),
    *(0.0, 1.0, 1.5, -0.5, 0.5, 1e-320, 1e308, 1e400, float("nan"), float("-inf")),
    *(np.int64(3), np.uint64(2**63), np.int8(-1), np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("5")),
    *(
        [],
        [5],
        [5, 6],
        [1.5],
        [True],
        ["5"],
        [None],
        [[5]],
        [[5, 6]],
        [2**70],
        [-1],
        [float("nan")],
        [b"a"],
        [np.int64(3)],
    ),
    *((), (5,), (5, "a"), {5}, {5: 6}, range(3), range(0), iter([5]), (token for token in [5]), map(int, "5")),
    *(np.array(5), np.array([5]), np.array([[5]]), np.array([1.5]), np.array([True]), np.array([5], object)),
    *(np.array(["5"]), np.array([None]), np.array([[[5]]]), np.zeros((0, 3)), np.array([2**63], np.uint64)),
    *(np.zeros((1, 4), np.float32), np.zeros((1, 0), np.float32), np.zeros(4, np.float32), np.zeros((1, 4), np.int64)),
]


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or isinstance(value, float | np.floating | Fraction)


def is_tokens(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and all(is_whole(token) for token in value.tolist())
    return isinstance(value, list | tuple | range) and all(map(is_whole, value))


def is_rows_tokens(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and np.ndim(value) > 0 and all(map(is_tokens, value))


def is_numbers(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return is_number(value) or (isinstance(value, list | tuple) and all(map(is_number, value)))


def is_table(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind == "f"


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_path(value: Any) -> bool:
    return isinstance(value, str | Path)


def no(value: Any) -> bool:
    return False


def optional(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


@pytest.fixture(scope="module")
def model(tiny: Exported) -> Model:
    return load(tiny.artifact, threads=1)


@pytest.fixture(scope="module")
def call(model: Model, tiny: Exported) -> dict[str, Callable[[Any], Any]]:
    """Every argument of every public function, with something valid for all others."""
    session = model.session

    def state(rows: int = 1) -> Any:
        made = session.new_state(rows)
        session.prefill(made, [PROMPT] * rows)
        return made

    def first(tokens: Any) -> Any:
        return next(iter(tokens))

    return {
        "load folder": lambda value: load(value),
        "load execution": lambda value: load(tiny.artifact, value),
        "Session folder": lambda value: Session(value),
        "Session execution": lambda value: Session(tiny.artifact, value),
        "Session profile": lambda value: Session(tiny.artifact, profile=value),
        "Model session": lambda value: Model(value, model.codec),
        "Model codec": lambda value: Model(session, value),
        "new_state batch": lambda value: session.new_state(value),
        "new_state memory_bias": lambda value: session.new_state(1, value),
        "new_state memory_bias of 2": lambda value: session.new_state(2, value),
        "prefill state": lambda value: session.prefill(value, [PROMPT]),
        "prefill prompts": lambda value: session.prefill(state(), value),
        "prefill prompt": lambda value: session.prefill(state(), [value]),
        "prefill a second prompt": lambda value: session.prefill(state(2), [PROMPT, value]),
        "prefill chunk": lambda value: session.prefill(state(), [PROMPT], value),
        "prefill by_memory": lambda value: session.prefill(state(), [PROMPT], by_memory=value),
        "prefill_likeliest k": lambda value: session.prefill_likeliest(state(), [PROMPT], value),
        "prefill_likeliest probabilities": lambda value: session.prefill_likeliest(
            state(), [PROMPT], probabilities=value
        ),
        "decode_step state": lambda value: session.decode_step(value, [5]),
        "decode_step tokens": lambda value: session.decode_step(state(), value),
        "decode_step token": lambda value: session.decode_step(state(), [value]),
        "decode_step by_memory": lambda value: session.decode_step(state(), [5], value),
        "decode_likeliest k": lambda value: session.decode_likeliest(state(), [5], value),
        "continue_step state": lambda value: session.continue_step(value, [5]),
        "continue_step tokens": lambda value: session.continue_step(state(), value),
        "continue_step by_memory": lambda value: session.continue_step(state(), [5], value),
        "prompt_logprobs prompt": lambda value: session.prompt_logprobs(value),
        "prompt_logprobs memory_bias": lambda value: session.prompt_logprobs(PROMPT, value),
        "prompt_logprobs k": lambda value: session.prompt_logprobs(PROMPT, k=value),
        "PrefixCache session": lambda value: PrefixCache(value, 10**6),
        "PrefixCache max_bytes": lambda value: PrefixCache(session, value),
        "PrefixCache put tokens": lambda value: PrefixCache(session, 10**6).put(value, state()),
        "PrefixCache put state": lambda value: PrefixCache(session, 10**6).put(PROMPT, value),
        "PrefixCache put row": lambda value: PrefixCache(session, 10**6).put(PROMPT, state(6), value),
        "PrefixCache take tokens": lambda value: PrefixCache(session, 10**6).take(value),
        "PrefixCache take memory_bias": lambda value: PrefixCache(session, 10**6).take(PROMPT, value),
        "PrefixCache save path": lambda value: PrefixCache(session, 10**6).save(value),
        "PrefixCache load path": lambda value: PrefixCache.load(session, value, 10**6),
        "Speculation most": lambda value: Speculation(value),
        "score prompt": lambda value: session.score(value, [5]),
        "score continuation": lambda value: session.score([5], value),
        "score memory_bias": lambda value: session.score([5], [5], value),
        "score_each prompt": lambda value: session.score_each(value, [[5]]),
        "score_each continuations": lambda value: session.score_each([5], value),
        "score_each continuation": lambda value: session.score_each([5], [[5], value]),
        "score_each memory_bias": lambda value: session.score_each([5], [[5]], value),
        "score_each memory": lambda value: session.score_each([5], [[5]], memory=value),
        "check_memory memory": lambda value: session.check_memory(value),
        "score_texts model": lambda value: score_texts(value, []),
        "score_texts rows": lambda value: list(score_texts(model, value)),
        "score_texts row": lambda value: list(score_texts(model, [value])),
        "score_texts prompt": lambda value: list(score_texts(model, [{"prompt": value, "continuation": "a"}])),
        "score_texts continuation": lambda value: list(score_texts(model, [{"prompt": "a", "continuation": value}])),
        "score_texts settings": lambda value: score_texts(model, [], value),
        "take rows": lambda value: state(2).take(value),
        "take row": lambda value: state(6).take([value]),
        "take lengths": lambda value: state().take([0], value),
        "drop rows": lambda value: state(2).drop(value),
        "join other": lambda value: state().join(value),
        "trim lengths": lambda value: state().trim(value),
        "replace row": lambda value: state().replace(value, state()),
        "replace other": lambda value: state().replace(0, value),
        "trim length": lambda value: state().trim([value]),
        "cut_lengths row": lambda value: state(6).cut_lengths(value),
        "generate model": lambda value: generate(value, "Hello", max_new_tokens=1),
        "generate prompt": lambda value: generate(model, value, max_new_tokens=1),
        "generate settings": lambda value: generate(model, "Hello", value),
        "generate sampler": lambda value: generate(model, "Hello", max_new_tokens=1, sampler=value),
        "generate processors": lambda value: generate(model, "Hello", max_new_tokens=1, processors=value),
        "generate state": lambda value: generate(model, "Hello", max_new_tokens=1, state=value),
        "generate_batch prompts": lambda value: generate_batch(model, value, max_new_tokens=1),
        "generate_batch settings": lambda value: generate_batch(model, ["Hello"], value, max_new_tokens=1),
        "generate_batch most_rows": lambda value: generate_batch(model, ["Hello"], most_rows=value, max_new_tokens=1),
        "stream_batch prompts": lambda value: next(stream_batch(model, value), None),
        "stream_generate prompt": lambda value: first(stream_generate(model, value)),
        "stream_generate settings": lambda value: first(stream_generate(model, "Hello", value)),
        "stream_generate state": lambda value: first(stream_generate(model, "Hello", state=value)),
        "generate_step session": lambda value: first(generate_step(value, PROMPT)),
        "generate_step prompt_ids": lambda value: first(generate_step(session, value)),
        "generate_step sampler": lambda value: first(generate_step(session, PROMPT, sampler=value)),
        "generate_step state": lambda value: first(generate_step(session, PROMPT, state=value)),
        "generate_step speculation": lambda value: first(generate_step(session, PROMPT, speculation=value)),
        "generate_step held": lambda value: first(generate_step(session, PROMPT, held=value)),
        "generate_step memory_bias": lambda value: first(generate_step(session, PROMPT, memory_bias=value)),
        "a sampler's choice": lambda value: first(generate_step(session, PROMPT, sampler=lambda logits: value)),
        "embed model": lambda value: runtime.embed(value, ["Hello"]),
        "embed texts": lambda value: runtime.embed(model, value),
        "embed text": lambda value: runtime.embed(model, [value]),
        "embed settings": lambda value: runtime.embed(model, ["Hello"], value),
        "greedy logits": lambda value: greedy(value),
        "sampler logits": lambda value: make_sampler(1.0, 2, 0.5, 0.1, 1)(value),
        "make_sampler temperature": lambda value: make_sampler(value),
        "make_sampler top_k": lambda value: make_sampler(1.0, value),
        "make_sampler top_p": lambda value: make_sampler(1.0, top_p=value),
        "make_sampler min_p": lambda value: make_sampler(1.0, min_p=value),
        "make_sampler seed": lambda value: make_sampler(1.0, seed=value),
    }


ACCEPTED: dict[str, Callable[[Any], bool]] = {
    "load folder": no,
    "load execution": optional(no),
    "Session folder": no,
    "Session execution": optional(no),
    "Session profile": optional(is_path),
    "Model session": no,
    "Model codec": no,
    "new_state batch": is_whole,
    "new_state memory_bias": is_numbers,
    "new_state memory_bias of 2": is_numbers,
    "prefill state": no,
    "prefill prompts": is_rows_tokens,
    "prefill prompt": is_tokens,
    "prefill a second prompt": is_tokens,
    "prefill chunk": optional(is_whole),
    "prefill by_memory": is_bool,
    "prefill_likeliest k": is_whole,
    "prefill_likeliest probabilities": is_bool,
    "decode_step state": no,
    "decode_step tokens": is_tokens,
    "decode_step token": is_whole,
    "decode_step by_memory": is_bool,
    "decode_likeliest k": is_whole,
    "continue_step state": no,
    "continue_step tokens": is_tokens,
    "continue_step by_memory": is_bool,
    "prompt_logprobs prompt": is_tokens,
    "prompt_logprobs memory_bias": is_numbers,
    "prompt_logprobs k": is_whole,
    "PrefixCache session": no,
    "PrefixCache max_bytes": is_whole,
    "PrefixCache put tokens": is_tokens,
    "PrefixCache put state": no,
    "PrefixCache put row": is_whole,
    "PrefixCache take tokens": is_tokens,
    "PrefixCache take memory_bias": is_numbers,
    "PrefixCache save path": is_path,
    "PrefixCache load path": no,
    "Speculation most": is_whole,
    "score prompt": is_tokens,
    "score continuation": is_tokens,
    "score memory_bias": is_numbers,
    "score_each prompt": is_tokens,
    "score_each continuations": lambda value: is_rows_tokens(value) or not len(value),
    "score_each continuation": is_tokens,
    "score_each memory_bias": is_numbers,
    "score_each memory": no,
    "check_memory memory": no,
    "score_texts model": no,
    "score_texts rows": lambda value: isinstance(value, list | tuple | range) and not len(value),
    "score_texts row": no,
    "score_texts prompt": lambda value: is_text(value) or is_tokens(value),
    "score_texts continuation": lambda value: is_text(value) or (isinstance(value, list) and all(map(is_text, value))),
    "score_texts settings": optional(no),
    "take rows": is_tokens,
    "take row": is_whole,
    "take lengths": optional(is_tokens),
    "drop rows": is_tokens,
    "join other": no,
    "replace row": is_whole,
    "replace other": no,
    "trim lengths": is_tokens,
    "trim length": is_whole,
    "cut_lengths row": is_whole,
    "generate model": no,
    "generate prompt": lambda value: is_text(value) or is_tokens(value),
    "generate settings": optional(no),
    "generate sampler": optional(no),
    "generate state": optional(no),
    "generate processors": lambda value: isinstance(value, list | tuple | range) and not len(value),
    "generate_batch prompts": lambda value: (
        isinstance(value, list | tuple | range) and all(is_text(part) or is_tokens(part) for part in value)
    ),
    "generate_batch settings": lambda value: (
        value is None or (isinstance(value, list | tuple) and len(value) == 1 and value[0] is None)
    ),
    "generate_batch most_rows": is_whole,
    "stream_batch prompts": lambda value: (
        isinstance(value, list | tuple | range) and all(is_text(part) or is_tokens(part) for part in value)
    ),
    "stream_generate prompt": lambda value: is_text(value) or is_tokens(value),
    "stream_generate settings": optional(no),
    "stream_generate state": optional(no),
    "generate_step session": no,
    "generate_step prompt_ids": is_tokens,
    "generate_step sampler": no,
    "generate_step state": optional(no),
    "generate_step speculation": optional(no),
    "generate_step held": is_tokens,
    "generate_step memory_bias": is_numbers,
    "a sampler's choice": is_tokens,
    "embed model": no,
    "embed texts": lambda value: isinstance(value, list | tuple | range) and all(map(is_text, value)),
    "embed text": is_text,
    "embed settings": optional(no),
    "greedy logits": is_table,
    "sampler logits": is_table,
    "make_sampler temperature": is_number,
    "make_sampler top_k": is_whole,
    "make_sampler top_p": is_number,
    "make_sampler min_p": is_number,
    "make_sampler seed": optional(is_whole),
}
OWN_EXCEPTIONS = {"generate sampler", "generate_step sampler"}
"""A callable is a sampler, whose own exceptions are the caller's."""


def in_one_line(error: IMSMRuntimeError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 2000


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_argument_is_what_it_says_or_refused(
    call: dict[str, Callable[[Any], Any]], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call.keys() == ACCEPTED.keys()
    refused = 0
    for value in fresh_odd():
        if name in OWN_EXCEPTIONS and callable(value):
            continue
        try:
            call[name](value)
        except IMSMRuntimeError as error:
            refused += 1
            if not in_one_line(error):
                pytest.fail(f"{value!r}: {error}")
        else:
            assert ACCEPTED[name](value), f"{value!r} was accepted"
    assert refused > 20


def fresh_odd() -> list[Any]:
    """ODD, with new iterators."""
    return [iter([5]) if type(value) is type(iter([])) else value for value in ODD]


SETTINGS: dict[type[Any], dict[str, Any]] = {
    Execution: {},
    GenerationSettings: {"temperature": 1.0},
    BenchSettings: {},
    ScoreSettings: {},
}
FIELD_KINDS: dict[Any, Callable[[Any], bool]] = {
    int: is_whole,
    float: is_number,
    bool: is_bool,
    str: is_text,
    int | None: optional(is_whole),
    bool | None: optional(is_bool),
    str | None: optional(is_text),
    Sequence[str]: lambda value: (
        is_text(value) or (isinstance(value, list | tuple | range) and all(map(is_text, value)))
    ),
    Sequence[int]: lambda value: isinstance(value, list | tuple | range) and all(map(is_whole, value)),
    Mapping[int, float] | None: optional(lambda value: isinstance(value, dict) and all(map(is_whole, value))),
    tuple[int, ...]: lambda value: isinstance(value, list | tuple | range) and all(map(is_whole, value)),
    Execution: no,
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_field_of_settings_has_its_type_or_is_refused(settings: type[Any]) -> None:
    kinds = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        for value in ODD:
            if field.name == "json_schema" and isinstance(value, dict) and not value:
                continue  # a schema may be a dict
            try:
                made = settings(**SETTINGS[settings] | {field.name: value})
            except SettingsError as error:
                if not in_one_line(error) or error.name not in (field.name, "provider"):
                    pytest.fail(f"{value!r}: {error}")
            else:
                assert FIELD_KINDS[kinds[field.name]](value), f"{field.name}={value!r} was accepted"
                assert type(getattr(made, field.name)) in (int, float, bool, str, tuple, dict, type(None))


def test_an_unknown_setting_is_a_type_error(model: Model) -> None:
    for run in (lambda: generate(model, "a", colour=1), lambda: load("a", colour=1), lambda: GenerationSettings(a=1)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"colour|'a'"):
            run()


@pytest.mark.parametrize("seed", range(4))
def test_random_token_ids_are_read_as_they_are_or_refused(model: Model, seed: int) -> None:
    """Lists of right token ids with something odd in the middle, or nothing."""
    session, generator = model.session, random.Random(seed)
    parts = [value for value in ODD if not isinstance(value, type(iter([])))]
    for _ in range(60):
        prompt: list[Any] = [generator.randrange(259) for _ in range(generator.randint(1, 6))]
        if odd := generator.random() < 0.7:
            prompt.insert(generator.randint(0, len(prompt)), generator.choice(parts))
        right = all(is_whole(token) and 0 <= token < 259 for token in prompt)
        assert odd or right
        if right:
            found = session.prefill(session.new_state(), [prompt]).logits
            array: Any = np.array([prompt], np.int64)
            expected = session.prefill(session.new_state(), array).logits
            np.testing.assert_array_equal(found, expected)
        else:
            with pytest.raises(PromptError, match="token id"):
                session.prefill(session.new_state(), [prompt])


def test_numbers_of_numpy_are_those_of_python(model: Model) -> None:
    changes: dict[str, Any] = {"max_new_tokens": np.int64(4), "temperature": np.float32(0.5), "seed": np.uint8(3)}
    settings = GenerationSettings(**changes)
    assert settings == GenerationSettings(max_new_tokens=4, temperature=0.5, seed=3)
    assert type(settings.max_new_tokens) is int
    session = model.session
    numbers: list[Any] = [np.int32(1), np.float32(0)]
    prompts: Any = np.array([PROMPT], np.uint16)
    one, other = session.new_state(), session.new_state(*numbers)
    session.prefill(one, [PROMPT])
    session.prefill(other, prompts)
    tokens = np.array([7], np.int8)
    np.testing.assert_array_equal(session.decode_step(one, [7]).logits, session.decode_step(other, tokens).logits)


@pytest.mark.parametrize("bias", [np.zeros(2, np.float32), np.zeros(1), 0.5, [0.5], None])
def test_a_bias_that_the_graph_cannot_read_is_refused(model: Model, bias: Any) -> None:
    state = model.session.new_state()
    state.memory_bias = bias
    with pytest.raises(SettingsError, match=r"memory_bias is .*; a state's must be a float32 array"):
        model.session.prefill(state, [PROMPT])


def test_a_pending_token_that_is_none_is_refused(model: Model) -> None:
    state = model.session.new_state()
    state.pending = [1000]
    with pytest.raises(PromptError, match="token id 1000 is outside the vocabulary"):
        model.session.prefill(state, [PROMPT])


def test_a_sampler_that_raises_or_returns_nonsense_leaves_the_state_usable(model: Model) -> None:
    class Odd(Exception):
        pass

    def raising(logits: Any) -> Any:
        if len(calls) == 2:
            raise Odd
        calls.append(1)
        return greedy(logits)

    def nonsense(logits: Any) -> Any:
        calls.append(1)
        return greedy(logits) if len(calls) < 3 else np.array([1.5])

    for sampler, error in ((raising, Odd), (nonsense, SettingsError)):
        calls: list[int] = []
        said: list[int] = []
        state = model.session.new_state()
        tokens = generate_step(model.session, PROMPT, sampler=sampler, state=state)
        with pytest.raises(error):
            said.extend(token.id for token in tokens)
        assert len(said) == 2
        again = generate(model, [60, 61], max_new_tokens=4, state=state).token_ids
        assert again == generate(model, [*PROMPT, *said, 60, 61], max_new_tokens=4).token_ids


def test_generators_that_share_a_state_notice(model: Model) -> None:
    state = model.session.new_state()
    one = generate_step(model.session, PROMPT, state=state)
    said = [next(one).id, next(one).id]
    other = [token.id for token in islice(generate_step(model.session, [60], state=state), 3)]
    assert other == generate(model, [*PROMPT, *said, 60], max_new_tokens=3).token_ids
    with pytest.raises(PromptError, match="the state was used by others since the last token"):
        next(one)
    again = generate(model, [61], max_new_tokens=3, state=state).token_ids
    assert again == generate(model, [*PROMPT, *said, 60, *other, 61], max_new_tokens=3).token_ids


def test_what_is_public_is_covered() -> None:
    covered = {name.split()[0] for name in ACCEPTED} | {"GenerationSettings", "Execution", "ScoreSettings"}
    functions = {name for name in runtime.__all__ if callable(getattr(runtime, name)) and name[0].islower()}
    assert functions <= covered
    methods = {
        name for name in vars(Session) if not name.startswith("_") and name not in ("binding_of", "check_by_memory")
    }
    assert methods <= covered
    assert {name for name in vars(runtime.DecodeState) if not name.startswith("_")} - covered <= {
        "batch",
        "cache_bytes",
        "artifact",
        "ask",
        "gate_reads_query",
        "layout",
        "note",
    }
