"""Exceptions at every line of a step: afterwards the state is what it was, and a retry equals an undisturbed run."""

from __future__ import annotations

import copy
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import runtime
from runtime import (
    DecodeState,
    Model,
    PrefixCache,
    PromptError,
    Speculation,
    generate,
    generate_step,
    greedy,
    load,
    stream_generate,
)
from runtime.engine import cache
from runtime.engine.journal import Journal
from runtime.engine.providers import ON_DEVICE
from runtime.engine.state import LikeliestOutput
from tests.exported import PROMPT, Exported

COMPLETE = ("return output", "yield ")
"""Lines that begin when a change is complete. CPython looks for Ctrl-C at calls and in loops, and so not between one of
these and the line before it, where a tracer can stop."""
HOME = str(Path(runtime.__file__).parent)


class Injected(BaseException):
    """What is raised at a line."""


class Injection:
    """Raises when the line number `at` of the package begins in the block. over: whether the block had fewer. raised:
    whether the exception came out of the block, and not from a finalizer, say, whose exceptions go nowhere."""

    def __init__(self, at: int) -> None:
        self.left, self.over, self.raised = at, True, False

    def __enter__(self) -> Injection:
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        sys.settrace(None)
        self.raised = isinstance(error, Injected)
        return self.raised

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line" and not _source(frame).startswith(COMPLETE):
            self.left -= 1
            if self.left < 0:
                self.over = False
                raise Injected  # which ends the tracing
        return self._trace


def _source(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def disturbed(step: int = 1) -> Iterator[Injection]:
    """An injection at the first line, at the second, or `step` lines further, and so on, up to the last."""
    for at in count(step=step):
        injection = Injection(at)
        yield injection
        if injection.over:
            assert at > 30, "nothing was traced"
            return


@pytest.fixture(scope="module", params=["host", "device"])
def model(request: pytest.FixtureRequest, tiny: Exported) -> Iterator[Model]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "BLOCK", 16)  # so that caches grow
        if request.param == "device":
            patch.setitem(ON_DEVICE, "cpu", "cpu")
        yield load(tiny.artifact, threads=1)


@pytest.fixture(scope="module")
def prepared(model: Model) -> DecodeState:
    """Two rows in the middle of a conversation, whose caches are full."""
    state = model.session.new_state(2, [0.0, 0.3])
    model.session.prefill(state, [PROMPT, PROMPT[:5]])
    for token in range(40, 45):
        model.session.decode_step(state, [token, token + 1])
    state.pending[:] = [50, 51]
    return state


def contents(state: DecodeState) -> list[Any]:
    """Everything that decides what comes next, but the caches."""
    return [
        *[array.tolist() for array in state.arrays()],
        list(state.pending),
        [state.cut_lengths(row) for row in range(state.batch)],
    ]


def likeliest(output: LikeliestOutput) -> list[Any]:
    return [None if array is None else array.tolist() for array in output]


CHANGES: dict[str, tuple[list[int], Callable[[Model, DecodeState], Any]]] = {
    "prefill": ([0, 1], lambda model, state: model.session.prefill(state, [[7, 8, 9], [6]], chunk=2).logits.tolist()),
    "prefill_likeliest": (
        [0, 1],
        lambda model, state: likeliest(model.session.prefill_likeliest(state, [[7], [6]], 2)),
    ),
    "decode_step": ([0, 1], lambda model, state: model.session.decode_step(state, [50, 51]).logits.tolist()),
    "decode_likeliest": ([1], lambda model, state: likeliest(model.session.decode_likeliest(state, [3], 1, True))),
    "continue_step": ([1], lambda model, state: model.session.continue_step(state, [50, 3, 4]).logits.tolist()),
    "join": ([0], lambda model, state: state.join(state.take([0]))),
    "drop": ([0, 1], lambda model, state: state.drop([0])),
    "trim": ([0, 1], lambda model, state: state.trim([len(PROMPT) + 2, 5])),
    "generate": (
        [0],
        lambda model, state: [token.id for token in generate(model, [9], max_new_tokens=2, state=state).tokens],
    ),
}


UNRAISABLE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Of generators that are interrupted while they close."""


@UNRAISABLE
@pytest.mark.parametrize(
    ("model", "name"),
    [("host", name) for name in CHANGES] + [("device", name) for name in CHANGES if name != "generate"],
    indirect=["model"],
)
def test_a_change_that_is_interrupted_at_any_line_has_not_been(model: Model, prepared: DecodeState, name: str) -> None:
    rows, change = CHANGES[name]
    reference = prepared.take(rows)
    before = contents(reference)
    expected = change(model, reference)
    after = contents(reference)
    following = model.session.prefill(reference, [[5, 6]] * reference.batch).logits
    for injection in disturbed():
        state = prepared.take(rows)
        with injection:
            change(model, state)
        if injection.raised:
            assert contents(state) == before
            assert change(model, state) == expected
        assert contents(state) == after
        np.testing.assert_array_equal(model.session.prefill(state, [[5, 6]] * state.batch).logits, following)


def steps(model: Model, state: DecodeState, said: list[int]) -> None:
    said.extend(token.id for token in islice(generate_step(model.session, [9, 8], state=state), 2))


def streamed(model: Model, state: DecodeState, said: list[int]) -> None:
    said.extend(
        chunk.token.id for chunk in stream_generate(model, [9, 8], max_new_tokens=2, state=state) if chunk.token
    )


class Guessing(Speculation):
    """Guesses the same tokens at every step."""

    def draft(self, ids: Any, room: int) -> list[int]:
        return [5, 6]


def guessed(model: Model, state: DecodeState, said: list[int]) -> None:
    tokens = generate_step(model.session, [9, 8], state=state, speculation=Guessing(2), sampler=Scripted())
    said.extend(token.id for token in islice(tokens, 3))


class Scripted:
    """The first two tokens of a draft of `Guessing`, after another one."""

    def __init__(self) -> None:
        self.left = iter([77, 5, 6, 7])

    def __call__(self, logits: Any) -> Any:
        return np.array([next(self.left)])


@UNRAISABLE
@pytest.mark.parametrize("model", ["host"], indirect=True)
@pytest.mark.parametrize("stream", [steps, streamed, guessed])
def test_a_conversation_goes_on_from_the_tokens_that_were_given_out(
    model: Model, prepared: DecodeState, stream: Callable[[Model, DecodeState, list[int]], None]
) -> None:
    more, found = [60, 61], {}
    reference = prepared.take([0])
    whole: list[int] = []
    stream(model, reference, whole)
    for length in range(len(whole) + 1):
        fresh = prepared.take([0])
        if length:
            sampler = Scripted() if stream is guessed else greedy
            list(islice(generate_step(model.session, [9, 8], state=fresh, sampler=sampler), length))
        found[length] = generate(model, more, max_new_tokens=2, state=fresh).token_ids
    lengths = set()
    for injection in disturbed(step=3 if stream is guessed else 1):
        state = prepared.take([0])
        said: list[int] = []
        with injection:
            stream(model, state, said)
        assert said == whole[: len(said)]
        lengths.add(len(said))
        assert generate(model, more, max_new_tokens=2, state=state).token_ids == found[len(said)]
    assert lengths == set(found)


def test_a_new_state_reads_its_prompt_after_any_interruption(model: Model) -> None:
    session = model.session
    reference = session.new_state()
    expected = [session.prefill(reference, [PROMPT]).logits, session.decode_step(reference, [40]).logits]
    for injection in disturbed():
        state = session.new_state()
        with injection:
            session.prefill(state, [PROMPT])
            session.decode_step(state, [40])
        found = []
        if not state.lengths[0]:
            found.append(session.prefill(state, [PROMPT]).logits)
        if state.lengths[0] == len(PROMPT):
            found.append(session.decode_step(state, [40]).logits)
        np.testing.assert_array_equal(found, expected[2 - len(found) :])


def test_what_is_interrupted_while_it_is_put_back_is_put_back_by_the_next_use(
    model: Model, prepared: DecodeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, changed = contents(prepared), []

    def interrupted(self: Journal, arrays: Any) -> None:
        changed.append(contents(prepared))
        raise KeyboardInterrupt

    state = prepared.take([0, 1])
    with monkeypatch.context() as patch:
        patch.setattr("runtime.engine.session.read", lambda *arguments: 1 / 0)
        patch.setattr(Journal, "_set_arrays", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.session.prefill(state, [[7], [6]])
    assert state.note is not None
    assert contents(state.take([0, 1])) == before
    assert state.note is None
    assert contents(state) == before


def test_another_thread_is_refused_in_the_middle_of_a_step(
    model: Model, prepared: DecodeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, state, other = model.session, prepared.take([0]), prepared.take([1])
    attempts: dict[str, Callable[[], Any]] = {
        "prefill": lambda: session.prefill(state, [[5]]),
        "decode_step": lambda: session.decode_step(state, [5]),
        "generate": lambda: generate(model, [5], state=state, max_new_tokens=1),
        "continue_step": lambda: session.continue_step(state, [5]),
        "put": lambda: PrefixCache(session, 10**8).put(range(len(PROMPT) + 5), state),
        "take": lambda: state.take([0]),
        "join": lambda: state.join(other),
        "be joined": lambda: other.take([0]).join(state),
        "drop": lambda: state.drop([0]),
        "trim": lambda: state.trim([0]),
        "copy": lambda: copy.copy(state),
    }
    refused: dict[str, BaseException | None] = {}

    def attempt() -> None:
        for name, run in attempts.items():
            try:
                run()
            except PromptError as error:
                refused[name] = error

    run = session.run

    def slow(*arguments: Any) -> None:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        run(*arguments)

    expected = session.decode_step(prepared.take([0]), [50]).logits
    with monkeypatch.context() as patch:
        patch.setattr(session, "run", slow)
        found = session.decode_step(state, [50]).logits
    assert refused.keys() == attempts.keys()
    assert all("in the middle of a step in another thread" in str(error) for error in refused.values())
    np.testing.assert_array_equal(found, expected)
    done: list[Any] = []
    thread = threading.Thread(
        target=lambda: done.append(session.decode_step(state, [51]))
    )  # one after the other is fine
    thread.start()
    thread.join()
    assert len(done) == 1
