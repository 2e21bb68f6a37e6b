"""Logits that are no numbers to choose by are an error wherever they leave a session, and the state goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import cli
from runtime import ArtifactError, DecodeState, Session, generate, generate_step, greedy, load, make_sampler
from runtime.engine.device import Device
from runtime.engine.execution import Execution
from runtime.engine.picks import Likeliest, LogProbabilities, Picks, Whole
from runtime.engine.place import Host, Place
from runtime.engine.providers import ON_DEVICE, open_session
from tests.exported import PROMPT, Exported, copied

NAN, INF = float("nan"), float("inf")
BAD: dict[str, Callable[[Any], None]] = {
    "one nan": lambda row: row.__setitem__(17, NAN),
    "the first is nan": lambda row: row.__setitem__(0, NAN),
    "the last is nan": lambda row: row.__setitem__(-1, NAN),
    "all nan": lambda row: row.fill(NAN),
    "one inf": lambda row: row.__setitem__(17, INF),
    "inf and nan": lambda row: row.__setitem__(slice(5, 7), [INF, NAN]),
    "all -inf": lambda row: row.fill(-INF),
}
GOOD: dict[str, Callable[[Any], None]] = {
    "numbers": lambda row: None,
    "masked tokens": lambda row: row.__setitem__(slice(3, None), -INF),
    "all but one masked": lambda row: row.__setitem__(slice(1, None), -INF),
    "large": lambda row: row.__setitem__(17, 3e38),
}
PICKS: dict[str, Picks[Any]] = {
    "whole": Whole(),
    "likeliest": Likeliest(1, False),
    "likeliest with probabilities": Likeliest(1, True),
    "five likeliest": Likeliest(5, False),
    "as many as there are": Likeliest(40, False),
    "score": LogProbabilities([0, 1, 2]),
}
PLACES: dict[str, Callable[[], Place]] = {
    "host": Host,
    "device": lambda: Device("cpu", lambda graph: open_session(graph, Execution(threads=1))),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("picks", PICKS)
@pytest.mark.parametrize("change", [*BAD, *GOOD])
def test_a_row_is_sound_if_its_logits_are_numbers(change: str, picks: str, place: str) -> None:
    table = np.random.default_rng(0).normal(size=(3, 1, 40)).astype(np.float32)
    (BAD | GOOD)[change](table[1, 0])
    logits = PLACES[place]().logits(onnxruntime.OrtValue.ortvalue_from_numpy(table), 40)
    _, sound = PICKS[picks].pick(logits)
    assert sound.tolist() == [True, change in GOOD, True]


class Poisoned:
    """An onnxruntime session that puts a value into the logits of every run from number `start` on."""

    def __init__(self, real: Any, vocab: int, value: float, start: int = 0) -> None:
        self.real, self.vocab, self.value, self.left = real, vocab, value, start

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self.real.run_with_iobinding(binding, options)
        self.left -= 1
        if self.left >= 0:
            return
        for output in binding.get_outputs():
            if output.shape()[-1] == self.vocab:
                output.numpy()[..., 7] = self.value


STEPS: dict[str, Callable[[Session, DecodeState], Any]] = {
    "prefill": lambda session, state: session.prefill(state, [[7, 8, 9]]),
    "a prefill's second chunk": lambda session, state: session.prefill(state, [[7, 8, 9]], chunk=2),
    "prefill_likeliest": lambda session, state: session.prefill_likeliest(state, [[7, 8, 9]], 3),
    "decode_step": lambda session, state: session.decode_step(state, [41]),
    "decode_likeliest": lambda session, state: session.decode_likeliest(state, [41]),
    "decode_likeliest of 3": lambda session, state: session.decode_likeliest(state, [41], 3, probabilities=True),
    "score": lambda session, state: session.score(PROMPT, [5]),
    "generate_step": lambda session, state: list(islice(generate_step(session, [7], state=state), 3)),
    "sampling": lambda session, state: list(
        islice(generate_step(session, [7], sampler=make_sampler(1.0, top_k=4, seed=1), state=state), 3)
    ),
}


@pytest.fixture(params=["host", "device"])
def session(request: pytest.FixtureRequest, tiny: Exported, monkeypatch: pytest.MonkeyPatch) -> Session:
    if request.param == "device":
        monkeypatch.setitem(ON_DEVICE, "cpu", "cpu")
    return Session(tiny.artifact, threads=1)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_raises_and_its_state_goes_on(session: Session, name: str, value: float) -> None:
    states = [session.new_state() for _ in range(2)]
    for state in states:
        session.prefill(state, [PROMPT])
        session.decode_step(state, [40])
        state.pending[0] = 41
    real = session.onnx
    session.onnx = Poisoned(real, session.manifest.vocab_size, value, start=1 if "second" in name else 0)
    with pytest.raises(ArtifactError, match=r"logits that are not finite \(after \d+ tokens of a text\)"):
        STEPS[name](session, states[0])
    session.onnx = real
    assert states[0].pending == [41]
    assert states[0].lengths.tolist() == [len(PROMPT) + 1]
    one, other = (session.prefill(state, [[50, 51]]).logits for state in states)
    np.testing.assert_array_equal(one, other)


def test_a_score_raises_in_its_continuation_too(session: Session) -> None:
    session.onnx = Poisoned(session.onnx, session.manifest.vocab_size, NAN, start=1)
    with pytest.raises(ArtifactError, match="after 12 tokens"):
        session.score(PROMPT, [5, 6, 7])


def test_a_masked_token_has_no_probability(session: Session) -> None:
    session.onnx = Poisoned(session.onnx, session.manifest.vocab_size, -INF)
    assert session.score(PROMPT, [7, 8, 7]).tolist()[::2] == [-INF, -INF]
    assert session.prefill(session.new_state(), [PROMPT]).logits[0, 7] == -INF


def test_only_the_rows_that_a_chunk_ends_are_judged(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is over has outputs that mean nothing in the chunks that follow."""
    state = session.new_state(2)
    seen: list[tuple[int, ...]] = []
    run = session.run_tokens

    def poisoned(state: DecodeState, ids: Any, *rest: Any) -> Any:
        outputs = run(state, ids, *rest)
        seen.append(ids.shape)
        for value in (getattr(outputs.logits, "array", None), getattr(outputs.logits, "value", None)):
            if value is not None:
                table = (value if isinstance(value, np.ndarray) else value.numpy()).reshape(-1, 259)
                table[1 if len(seen) > 1 else 0] = NAN
        return outputs

    monkeypatch.setattr(session, "run_tokens", poisoned)
    output = session.prefill(state, [[5] * 9, [6] * 3], chunk=4)
    assert len(seen) == 3
    assert np.isfinite(output.logits).all()


@pytest.fixture(scope="module")
def damaged(tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose weights are not numbers."""
    artifact = copied(tiny.artifact, tmp_path_factory.mktemp("damaged") / "artifact")
    weights = artifact / "model.onnx.data"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    return artifact


@pytest.mark.parametrize("options", ["", "--temperature 1", "--temperature 1 --top-k 5", "--json"])
def test_the_command_line_says_it_in_one_line(damaged: Path, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(damaged), "--prompt", "Hello", *options.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "error: the graph gives logits that are not finite (after 6 tokens of a text)" in captured.err


def test_damage_that_begins_in_a_reply_is_an_error_after_the_text_so_far(tiny: Exported) -> None:
    model = load(tiny.artifact, threads=1)
    expected = generate(model, "Hello", max_new_tokens=8).token_ids
    said: list[int] = []
    state = model.session.new_state()
    model.session.onnx = Poisoned(model.session.onnx, model.session.manifest.vocab_size, NAN, start=3)
    tokens = generate_step(model.session, model.codec.encode_prompt("Hello"), state=state)
    with pytest.raises(ArtifactError, match="after 9 tokens"):  # 6 of the prompt, 3 of the reply
        said.extend(token.id for token in tokens)
    assert said == expected[:3]
    assert state.pending == [said[-1]]


def test_samplers_alone_refuse_them_too() -> None:
    for sampler in (greedy, make_sampler(1.0, seed=1), make_sampler(1.0, top_k=2, seed=1)):
        for value in (NAN, INF):
            with pytest.raises(ArtifactError, match="not finite"):
                sampler(np.array([[1, value, 3, 2]], np.float32))
        assert sampler(np.array([[-INF, -INF, 3, -INF]], np.float32)).tolist() == [2]


def test_a_result_of_numbers_is_json(tiny: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(tiny.artifact), "--prompt", "Hello", "--max-new-tokens", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert len(document["token_ids"]) == 3
