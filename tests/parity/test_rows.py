"""Rows of a state that are taken, joined, dropped and cut back go on as each text would alone, token by token, in every
form of an artifact."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.settings import ExportSettings
from runtime import DecodeState, PromptError, Session, SettingsError
from runtime.engine import own_kernels
from runtime.engine.marks import RECENT
from runtime.engine.memories import MEMORIES
from runtime.engine.pooling import check_states, pooled_states
from runtime.engine.prefix_cache import PrefixCache
from runtime.engine.providers import ON_DEVICE
from tests.adapters import make_siamese_with
from tests.builders import make_base_folder, save_tiny_checkpoint
from tests.exported import Exported, export_existing, export_tiny

FLOAT = 1e-4
ROUNDED = 0.05  # of the largest logit: rows that are read together may be rounded to int8 the other way


def trunk(folder: Path, settings: ExportSettings | None = None) -> Exported:
    """A LoRA on the second block alone, so that the first is shared."""
    base = make_base_folder(folder / "base", "llama", head_dim=16)
    model = make_siamese_with(base, "lora_layers")
    info = save_tiny_checkpoint(model, base, folder / "checkpoint")
    return export_existing(folder, base, model, info, settings)


def tiny_llama(settings: ExportSettings | None = None, **how: Any) -> Callable[[Path], Exported]:
    """One with heads of 16. how: to make and export it."""
    return lambda folder: export_tiny(folder, head_dim=16, settings=settings, **how)


ARTIFACTS: dict[str, Callable[[Path], Exported]] = {
    "fp32": tiny_llama(),
    "int4": tiny_llama(ExportSettings("int4", rounding="nearest")),
    "fp16": tiny_llama(ExportSettings("fp16")),
    "portable": tiny_llama(ExportSettings(portable=True)),
    "shared trunk": trunk,
    "shared trunk, portable": lambda folder: trunk(folder, ExportSettings(portable=True)),
    "virtual tokens": tiny_llama(adapter="prefix_tuning"),
    "virtual tokens, portable": tiny_llama(ExportSettings(portable=True), adapter="prefix_tuning"),
    "int8 caches": tiny_llama(ExportSettings(kv_cache="int8")),
    "gate without query": tiny_llama(gate_kind="token"),
    "base alone": tiny_llama(ExportSettings(base_only=True)),
}


@dataclass(frozen=True)
class Form:
    """How one of ARTIFACTS is run. device: as on a provider with a memory of its own. cuda_graph: as for one."""

    artifact: str
    tolerance: float = FLOAT
    kernels: bool = True
    device: bool = False
    cuda_graph: bool = False


FORMS = {
    "fp32": Form("fp32"),
    "int4": Form("int4", ROUNDED),
    "int4, without kernels": Form("int4", ROUNDED, kernels=False),
    "portable": Form("portable"),
    "shared trunk": Form("shared trunk"),
    "shared trunk, portable": Form("shared trunk, portable"),
    "virtual tokens": Form("virtual tokens"),
    "virtual tokens, portable": Form("virtual tokens, portable"),
    "int8 caches": Form("int8 caches", ROUNDED),
    "gate without query": Form("gate without query"),
    "base alone": Form("base alone"),
    "on a device": Form("fp32", device=True),
    "fp16, on a device, for a CUDA graph": Form("fp16", ROUNDED, device=True, cuda_graph=True),
    "int8 caches, on a device": Form("int8 caches", ROUNDED, device=True),
    "virtual tokens, portable, on a device": Form("virtual tokens, portable", device=True, cuda_graph=True),
    "base alone, on a device": Form("base alone", device=True),
}


@dataclass(frozen=True)
class Opened:
    session: Session
    tolerance: float

    def alone(self, *parts: Sequence[int], bias: float = 0.0) -> DecodeState:
        """A state of one row: the first part is a prompt, each later one is decoded token by token, and a part behind
        such a one is a prompt again."""
        state = self.session.new_state(1, bias)
        for number, part in enumerate(parts):
            if number % 2 == 0:
                self.session.prefill(state, [part])
            else:
                for token in part:
                    self.session.decode_step(state, [token])
        return state

    def assert_goes_on_alike(self, state: DecodeState, alone: Sequence[DecodeState]) -> None:
        """The same tokens, then a turn of the conversation, then tokens again, in the state and in each row's own."""
        tokens = [[41 + row, 17 + row, 99] for row in range(len(alone))]
        for step in range(3):
            self._step(state, alone, [row[step] for row in tokens])
        turn = [[60 + row, 61, 62][: 1 + row] for row in range(len(alone))]
        together = self.session.prefill(state, turn)
        for row, own in enumerate(alone):
            self._assert_close(together.logits[row], self.session.prefill(own, [turn[row]]).logits[0])
        for token in (7, 201):
            self._step(state, alone, [token] * len(alone))

    def _step(self, state: DecodeState, alone: Sequence[DecodeState], tokens: Sequence[int]) -> None:
        together = self.session.decode_step(state, tokens)
        for row, own in enumerate(alone):
            single = self.session.decode_step(own, [tokens[row]])
            self._assert_close(together.logits[row], single.logits[0])
            if together.gate_mean is not None and single.gate_mean is not None:
                np.testing.assert_allclose(together.gate_mean[row], single.gate_mean[0], atol=self.tolerance)

    def _assert_close(self, found: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found, expected, atol=self.tolerance * max(1.0, np.abs(expected).max()))


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports one of ARTIFACTS where it is first asked for."""
    return functools.cache(lambda name: ARTIFACTS[name](tmp_path_factory.mktemp("rows")).artifact)


@pytest.fixture(params=FORMS)
def opened(
    request: pytest.FixtureRequest, artifact_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Opened:
    monkeypatch.setattr("runtime.engine.cache.BLOCK", 8)  # so that rows meet buffers of different sizes
    form = FORMS[request.param]
    if form.device:  # the CPU provider's graphs do on the host what a device's do there
        monkeypatch.setitem(ON_DEVICE, "cpu", "cpu")
    session = Session(artifact_of(form.artifact), threads=1, kernels=form.kernels)
    session.cuda_graph = form.cuda_graph  # the CPU provider captures nothing, and binds the same
    return Opened(session, form.tolerance)


LONG, MIDDLE, SHORT = list(range(5, 28)), [100, 101, 102, 103, 104, 105], [9]
REPLY = [30, 31, 32, 33]


def ragged(opened: Opened, biases: Sequence[float] = (0.0, 0.3, -0.3)) -> DecodeState:
    """Three rows with a reply each."""
    state = opened.session.new_state(3, biases)
    opened.session.prefill(state, [LONG, MIDDLE, SHORT])
    for token in REPLY:
        opened.session.decode_step(state, [token] * 3)
    return state


def test_taken_rows_go_on_as_if_alone_and_leave_the_state_as_it_was(opened: Opened) -> None:
    state = ragged(opened)
    taken = state.take([2, 0, 2])
    assert list(taken.lengths) == [5, 27, 5]
    alone = [opened.alone(prompt, REPLY, bias=bias) for prompt, bias in ((SHORT, -0.3), (LONG, 0.0), (SHORT, -0.3))]
    opened.assert_goes_on_alike(taken, alone)
    opened.assert_goes_on_alike(
        state, [opened.alone(prompt, REPLY, bias=b) for prompt, b in ((LONG, 0.0), (MIDDLE, 0.3), (SHORT, -0.3))]
    )


def test_several_tokens_at_once_equal_one_after_the_other(opened: Opened) -> None:
    state, steps = opened.alone(MIDDLE, [29], bias=0.3), opened.alone(MIDDLE, [29], bias=0.3)
    together = opened.session.continue_step(state, REPLY)
    assert together.logits.shape == (len(REPLY), opened.session.manifest.vocab_size)
    for index, token in enumerate(REPLY):
        single = opened.session.decode_step(steps, [token])
        opened._assert_close(together.logits[index], single.logits[0])
        if opened.tolerance == FLOAT:
            assert together.logits[index].argmax() == single.logits[0].argmax()
        if together.gate_mean is not None and single.gate_mean is not None:
            np.testing.assert_allclose(together.gate_mean[index], single.gate_mean[0], atol=opened.tolerance)
    assert state.cut_lengths(0) == steps.cut_lengths(0)
    for name in ("lengths", "query_count", "reply_count"):
        np.testing.assert_array_equal(getattr(state, name), getattr(steps, name))
    opened._assert_close(state.reply_sum, steps.reply_sum)
    taken_back = state.take([0])
    taken_back.trim([len(MIDDLE) + 3])
    opened.assert_goes_on_alike(taken_back, [opened.alone(MIDDLE, [29, *REPLY[:2]], bias=0.3)])
    opened.assert_goes_on_alike(state, [steps])


@pytest.mark.skipif(own_kernels.library() is None, reason="needs the kernels")
@pytest.mark.parametrize("count", [4, 8])
def test_in_int4_a_few_tokens_at_once_give_exactly_the_logits_of_single_steps(
    artifact_of: Callable[[str], Path], count: int
) -> None:
    session = Session(artifact_of("int4"), threads=1)
    state, steps = session.new_state(), session.new_state()
    for each in (state, steps):
        session.prefill(each, [MIDDLE])
    tokens = LONG[:count]
    together = session.continue_step(state, tokens)
    np.testing.assert_array_equal(together.logits, [session.decode_step(steps, [token]).logits[0] for token in tokens])
    np.testing.assert_array_equal(state.reply_sum, steps.reply_sum)


def test_a_kept_text_goes_on_as_a_fresh_run_from_any_token_of_its_reply(opened: Opened, tmp_path: Path) -> None:
    kept = PrefixCache(opened.session, 10**8)
    assert kept.put([*LONG, *REPLY], opened.alone(LONG, REPLY, bias=1.0))
    kept.save(tmp_path / "kept")
    loaded = PrefixCache.load(opened.session, tmp_path / "kept", kept.nbytes)
    for cache in (kept, loaded):
        for reply in (0, 2, 4):
            text = [*LONG, *REPLY[:reply], 70, 71]
            state, length = cache.take(text, memory_bias=0.3)
            assert (length, list(state.lengths)) == (len(LONG) + reply, [len(LONG) + reply])
            output = opened.session.prefill(state, [text[length:]])
            fresh = opened.session.new_state(1, 0.3)
            opened._assert_close(output.logits[0], opened.session.prefill(fresh, [text]).logits[0])
            opened.assert_goes_on_alike(state, [fresh])


def test_joined_rows_go_on_as_if_alone(opened: Opened) -> None:
    state, newcomer = ragged(opened), opened.session.new_state(1, 0.7)
    opened.session.prefill(newcomer, [LONG[::-1]])
    state.join(newcomer)
    assert list(state.lengths) == [27, 10, 5, 23]
    opened.assert_goes_on_alike(
        state,
        [
            *(opened.alone(prompt, REPLY, bias=b) for prompt, b in ((LONG, 0.0), (MIDDLE, 0.3), (SHORT, -0.3))),
            opened.alone(LONG[::-1], bias=0.7),
        ],
    )
    opened.assert_goes_on_alike(newcomer, [opened.alone(LONG[::-1], bias=0.7)])  # which was copied


def test_each_memory_of_ragged_rows_is_what_a_forced_gate_gives(opened: Opened) -> None:
    session, prompts, tokens = opened.session, [LONG, MIDDLE, SHORT], [41, 42, 43]
    state = session.new_state(3, (0.0, 0.3, -0.3))
    if not session.siamese:
        with pytest.raises(SettingsError, match="by_memory is True; this artifact has the base memory alone"):
            session.prefill(state, prompts, by_memory=True)
        return
    found = session.prefill(state, prompts, by_memory=True), session.decode_step(state, tokens, by_memory=True)
    plain = session.decode_step(state, tokens)
    assert plain.memory_logits is None
    for memory, bias in enumerate((1e4, -1e4)):
        forced = session.new_state(3, bias)
        for output in (*found, plain):
            expected = session.decode_step(forced, tokens) if forced.lengths.any() else session.prefill(forced, prompts)
            if output.memory_logits is not None:
                opened._assert_close(output.memory_logits[:, memory], expected.logits)
    state = session.new_state(3, (0.0, 0.3, -0.3))
    session.prefill(state, prompts)
    blends = session.decode_step(state, tokens), session.decode_step(state, tokens)
    opened._assert_close(found[1].logits, blends[0].logits)
    opened._assert_close(plain.logits, blends[1].logits)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_texts_that_are_embedded_together_are_embedded_as_if_alone(opened: Opened, pooling: str) -> None:
    texts, session = [LONG, MIDDLE, SHORT], opened.session
    found = {}
    for memory in MEMORIES if session.siamese else ("blend", "base"):
        check_states(session, memory)
        found[memory] = pooled_states(session, texts, memory, pooling, 100)
        alone = [pooled_states(session, [text], memory, pooling, 3)[0] for text in texts]
        opened._assert_close(found[memory], np.stack(alone))
    if not session.siamese:
        np.testing.assert_array_equal(found["blend"], found["base"])
        with pytest.raises(SettingsError, match="memory is adapter; this artifact has the base memory alone"):
            check_states(session, "adapter")


def test_rows_join_a_state_that_has_read_nothing(opened: Opened) -> None:
    state, other = opened.session.new_state(1), ragged(opened)
    state.join(other)
    output = opened.session.prefill(state, [MIDDLE, [1], [2], [3]])
    expected = opened.session.prefill(opened.session.new_state(1), [MIDDLE])
    opened._assert_close(output.logits[0], expected.logits[0])


@pytest.mark.parametrize("prompt", [SHORT, LONG[::-1] * 2], ids=["shorter", "longer"])
def test_a_replaced_row_and_the_others_go_on_as_if_alone(opened: Opened, prompt: list[int]) -> None:
    state = ragged(opened)
    newcomer = opened.alone(prompt, REPLY[:1], bias=0.7)
    state.replace(1, newcomer)
    assert list(state.lengths) == [27, len(prompt) + 1, 5]
    expected = [
        opened.alone(LONG, REPLY),
        opened.alone(prompt, REPLY[:1], bias=0.7),
        opened.alone(SHORT, REPLY, bias=-0.3),
    ]
    opened.assert_goes_on_alike(state, expected)
    opened.assert_goes_on_alike(newcomer, [opened.alone(prompt, REPLY[:1], bias=0.7)])  # which was copied


def test_when_a_row_is_dropped_the_others_go_on_as_if_alone(opened: Opened) -> None:
    state = ragged(opened)
    before = state.cache_bytes
    state.drop([0])
    assert list(state.lengths) == [10, 5]
    assert state.cache_bytes < before / 2  # the long row's room is gone too
    opened.assert_goes_on_alike(
        state, [opened.alone(prompt, REPLY, bias=b) for prompt, b in ((MIDDLE, 0.3), (SHORT, -0.3))]
    )


def test_a_state_without_rows_takes_newcomers(opened: Opened) -> None:
    state = ragged(opened)
    state.drop([0, 1, 2])
    assert (state.batch, state.cache_bytes) == (0, 0)
    with pytest.raises(PromptError, match="the state has no rows"):
        opened.session.prefill(state, [])
    state.join(opened.alone(MIDDLE, REPLY))
    opened.assert_goes_on_alike(state, [opened.alone(MIDDLE, REPLY)])


@pytest.mark.parametrize("kept", [3, 1, 0])
def test_rows_that_are_cut_back_go_on_as_if_they_had_stopped_there(opened: Opened, kept: int) -> None:
    state = ragged(opened)
    state.trim([23 + kept, 6 + kept, 5])  # the last row stays
    alone = [opened.alone(LONG, REPLY[:kept]), opened.alone(MIDDLE, REPLY[:kept], bias=0.3)]
    opened.assert_goes_on_alike(state, [*alone, opened.alone(SHORT, REPLY, bias=-0.3)])


def test_a_prompt_is_cut_back_to_the_end_of_a_chunk_and_another_one_goes_on_there(opened: Opened) -> None:
    state = opened.session.new_state(2)
    opened.session.prefill(state, [LONG, MIDDLE], chunk=4)
    opened.session.decode_step(state, [1, 2])
    state.trim([12, 4])
    other = [[70, 71, 72], [80, 81]]
    output = opened.session.prefill(state, other)
    fresh = [opened.session.new_state(1) for _ in range(2)]
    whole = [[*LONG[:12], *other[0]], [*MIDDLE[:4], *other[1]]]
    for row, (own, text) in enumerate(zip(fresh, whole, strict=True)):
        opened._assert_close(output.logits[row], opened.session.prefill(own, [text]).logits[0])
    opened.assert_goes_on_alike(state, fresh)


def test_a_row_is_cut_back_to_nothing_and_reads_another_prompt(opened: Opened) -> None:
    state = ragged(opened, (0.0, 0.0, 0.0))
    state.trim([0, 10, 0])
    output = opened.session.prefill(state, [SHORT, [50], LONG])
    for row, text in ((0, SHORT), (2, LONG)):
        opened._assert_close(output.logits[row], opened.session.prefill(opened.session.new_state(1), [text]).logits[0])


def test_rows_are_taken_as_if_they_were_cut_back_then(opened: Opened) -> None:
    state = ragged(opened)
    taken = state.take([2, 0, 0], [1, 25, 27])
    assert list(taken.lengths) == [1, 25, 27]
    alone = [opened.alone(SHORT, bias=-0.3), opened.alone(LONG, REPLY[:2]), opened.alone(LONG, REPLY)]
    opened.assert_goes_on_alike(taken, alone)


@pytest.mark.parametrize("length", [len(MIDDLE) - 1, len(MIDDLE) + len(REPLY)])
def test_a_prompt_but_for_its_last_token_and_an_earlier_reply_are_cut_back_to(opened: Opened, length: int) -> None:
    state = opened.alone(MIDDLE, REPLY, [50, 51, 52])
    for _ in range(RECENT):  # the tokens of the first reply are not among the recent ones any more
        opened.session.decode_step(state, [5])
    state.trim([length])
    opened.assert_goes_on_alike(state, [opened.alone(MIDDLE[:length], REPLY[: max(0, length - len(MIDDLE))])])


def test_an_earlier_turn_is_cut_back_to(opened: Opened) -> None:
    state = opened.alone(MIDDLE, REPLY, [50, 51], [52])
    state.trim([len(MIDDLE) + 2])  # into the first reply, which is the query's by now
    opened.assert_goes_on_alike(state, [opened.alone(MIDDLE, REPLY[:2])])


def test_a_length_whose_query_is_not_known_is_refused_and_the_nearest_is_told(opened: Opened) -> None:
    state = opened.session.new_state(2)
    opened.session.prefill(state, [LONG, MIDDLE], chunk=10)
    lengths = list(state.lengths)
    if not state.gate_reads_query:
        assert state.cut_lengths(1) == list(range(7))
        state.trim([13, 3])
        assert list(state.lengths) == [13, 3]
        return
    assert state.cut_lengths(0) == [0, 10, 20, 22, 23]
    with pytest.raises(PromptError, match=r"row 0 cannot be cut back to 13 tokens: .* length below is 10"):
        state.trim([13, 0])
    assert list(state.lengths) == lengths


def test_a_token_that_was_chosen_and_not_fed_goes_with_what_is_cut(opened: Opened) -> None:
    state = opened.alone(MIDDLE, REPLY)
    state.pending[0] = 77
    state.trim([10])
    assert state.pending == [77]
    state.trim([9])
    assert state.pending == [None]


def test_bad_rows_and_lengths_are_refused(opened: Opened) -> None:
    state = ragged(opened)
    with pytest.raises(PromptError, match="row 3 is not in a state of 3 rows"):
        state.take([0, 3])
    with pytest.raises(PromptError, match="row -1 is not in"):
        state.drop([-1])
    with pytest.raises(PromptError, match="row False is not a whole number"):
        state.drop([False, False, True])
    with pytest.raises(PromptError, match=r"length 2\.5 is not a whole number"):
        state.trim([2.5, 1, 1])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="2 lengths for 3 rows"):
        state.trim([1, 2])
    with pytest.raises(PromptError, match="row 1 has 10 tokens and cannot be cut back to 11"):
        state.trim([27, 11, 5])


def test_states_of_different_artifacts_are_not_joined(artifact_of: Callable[[str], Path]) -> None:
    states = [Session(artifact_of(name), threads=1).new_state() for name in ("fp32", "base alone")]
    with pytest.raises(PromptError, match="different artifacts"):
        states[0].join(states[1])


def test_only_the_last_decoded_tokens_are_kept_to_be_cut_back_to(artifact_of: Callable[[str], Path]) -> None:
    session = Session(artifact_of("fp32"), threads=1)
    state = session.new_state(1)
    session.prefill(state, [MIDDLE])
    for _ in range(RECENT + 6):
        session.decode_step(state, [5])
    assert state.cut_lengths(0) == [0, 5, 6, *range(13, 13 + RECENT)]
