"""What nobody refers to any more is freed at once, without Python's cyclic collector; and copies are separate."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from runtime import DecodeState, Model, PromptError, generate, generate_step, load, make_sampler, stream_generate
from runtime.engine.providers import ON_DEVICE
from tests.exported import PROMPT, Exported


@pytest.fixture(params=["host", "device"])
def model(request: pytest.FixtureRequest, tiny: Exported, monkeypatch: pytest.MonkeyPatch) -> Model:
    if request.param == "device":
        monkeypatch.setitem(ON_DEVICE, "cpu", "cpu")
    return load(tiny.artifact, threads=1)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def failing(*arguments: Any) -> Any:
    raise RuntimeError("no")


def fails(model: Model, step: str, *arguments: Any) -> None:
    """Run a step with an onnxruntime that raises; the exception is caught and looked at, as users do."""
    setattr(model.session, "run", failing)  # noqa: B010  so that mypy lets it be deleted
    try:
        getattr(model.session, step)(*arguments)
        pytest.fail("it did not fail")
    except RuntimeError as error:
        print(error.__traceback__)
    del model.session.run


def refused(run: Callable[[], Any]) -> None:
    try:
        run()
    except PromptError:
        return
    pytest.fail("it was not refused")


def decoded(model: Model, state: DecodeState) -> None:
    model.session.decode_step(state, [5, 6])
    model.session.decode_likeliest(state, [5, 6], 3)


def rearranged(model: Model, state: DecodeState) -> None:
    state.join(state.take([1, 1]))
    state.drop([0])
    state.trim([len(PROMPT)] * 3)
    model.session.decode_step(state, [1, 2, 3])


def abandoned(model: Model, state: DecodeState) -> None:
    state.drop([0])
    next(generate_step(model.session, [5], state=state))
    next(iter(stream_generate(model, [5], state=state)))
    for _ in zip(stream_generate(model, [5], state=state), range(2), strict=False):
        pass


def generated(model: Model, state: DecodeState) -> None:
    state.drop([0])
    generate(model, [5], max_new_tokens=3, state=state)
    next(iter(generate_step(model.session, [5], sampler=make_sampler(1.0), state=state)))


USES: dict[str, Callable[[Model, DecodeState], Any]] = {
    "prefill": lambda model, state: None,
    "decode": decoded,
    "rows": rearranged,
    "generate": generated,
    "abandoned generators": abandoned,
    "failing prefill": lambda model, state: fails(model, "prefill", state, [[5], [6]]),
    "failing decode": lambda model, state: fails(model, "decode_step", state, [5, 6]),
    "refused": lambda model, state: refused(lambda: model.session.decode_step(state, [5, -1])),
    "refused trim": lambda model, state: refused(lambda: state.trim([1000, 0])),
    "copies": lambda model, state: [copy.copy(state), copy.deepcopy(state)],
}


@pytest.mark.parametrize("use", USES)
def test_a_state_is_freed_at_once(model: Model, use: str) -> None:
    state = model.session.new_state(2)
    model.session.prefill(state, [PROMPT, PROMPT])
    USES[use](model, state)
    freed: list[weakref.ref[Any]] = [weakref.ref(one) for one in (state, *state.caches.values())]
    del state
    assert [reference() for reference in freed] == [None] * len(freed)


def test_an_abandoned_generator_frees_its_state(model: Model) -> None:
    state = model.session.new_state()
    freed = weakref.ref(state)
    chunks = stream_generate(model, [5], state=state)
    list(islice(chunks, 2))
    del state
    assert freed() is not None
    del chunks
    assert freed() is None


@pytest.mark.parametrize("left", ["nothing", "a state", "a failed state"])
def test_a_model_is_freed_at_once(model: Model, left: str, tiny: Exported) -> None:
    del model  # the fixture holds it
    opened = load(tiny.artifact, threads=1)
    state = opened.session.new_state(2)
    opened.session.prefill(state, [PROMPT, PROMPT])
    opened.session.decode_step(state, [1, 2])
    if left == "a failed state":
        fails(opened, "decode_step", state, [5, 6])
    freed = [weakref.ref(one) for one in (opened, opened.session, opened.session.onnx, opened.codec)]
    if left == "nothing":
        del state
    del opened
    assert [reference() for reference in freed] == [None] * 4


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_state_is_separate(model: Model, copied: Callable[[DecodeState], DecodeState]) -> None:
    session = model.session
    states = [session.new_state(2, [0.0, 1.0]) for _ in range(2)]
    for state in states:
        session.prefill(state, [PROMPT, PROMPT[:4]])
        session.decode_step(state, [1, 2])
        state.pending[:] = [7, 8]
    made = copied(states[0])
    assert made.pending == [7, 8]
    assert [made.cut_lengths(row) for row in range(2)] == [states[0].cut_lengths(row) for row in range(2)]
    session.prefill(made, [[30, 31], [32]])  # and the first one knows nothing of it
    one, other = (session.prefill(state, [[9], [10, 11]]).logits for state in states)
    np.testing.assert_array_equal(one, other)
    assert states[0].lengths.tolist() != made.lengths.tolist()


def test_a_state_is_not_pickled(model: Model) -> None:
    with pytest.raises(TypeError, match="a state cannot be pickled: its caches are onnxruntime's"):
        pickle.dumps(model.session.new_state())
