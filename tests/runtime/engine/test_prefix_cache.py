"""Texts that were read: which beginning of a prompt is found, what is kept, and files of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from runtime import ArtifactError, DecodeState, PrefixCache, PromptError, Session
from runtime.engine import cache
from runtime.engine.cache import KVCache
from runtime.manifest import LayerCache
from tests.exported import PROMPT, Exported

REPLY = [30, 31, 32, 33, 34]
LARGE = 10**8


@pytest.fixture(scope="module")
def session(tiny: Exported) -> Session:
    return Session(tiny.artifact, threads=1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK", 16)


def read(session: Session, prompt: list[int], reply: list[int] | None = None, chunk: int | None = None) -> DecodeState:
    state = session.new_state()
    session.prefill(state, [prompt], chunk)
    for token in reply or []:
        session.decode_step(state, [token])
    return state


def assert_fresh(session: Session, state: DecodeState, held: int, text: list[int]) -> None:
    """A state that holds the first tokens of a text goes on as a fresh run over it, and so does what is decoded."""
    assert state.lengths[0] == held
    fresh = session.new_state(1, state.memory_bias.tolist())
    found = session.prefill(state, [text[held:]])
    np.testing.assert_allclose(found.logits, session.prefill(fresh, [text]).logits, atol=1e-4)
    np.testing.assert_allclose(state.query_sum, fresh.query_sum, atol=1e-4)
    assert state.query_count[0] == len(text)
    assert state.reply_count[0] == 0
    for token in (9, 7):
        expected = session.decode_step(fresh, [token]).logits
        np.testing.assert_allclose(session.decode_step(state, [token]).logits, expected, atol=1e-4)


def test_the_longest_beginning_of_all_texts_is_found(session: Session) -> None:
    kept = PrefixCache(session, LARGE)
    for prompt in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 7], [8, 9]):
        assert kept.put(prompt, read(session, prompt, chunk=1))
    text = [1, 2, 3, 7, 9]
    state, held = kept.take(text, 0.3)
    assert (held, state.memory_bias.tolist()) == (4, [np.float32(0.3)])
    assert_fresh(session, state, 4, text)
    state, held = kept.take([5, 1, 2])
    assert (held, state.lengths.tolist(), state.cache_bytes) == (0, [0], 0)


def test_a_prompt_that_was_read_before_is_read_again_but_for_one_token(session: Session) -> None:
    kept = PrefixCache(session, LARGE)
    kept.put(PROMPT, read(session, PROMPT))
    state, held = kept.take(PROMPT)
    assert held == len(PROMPT) - 1
    assert_fresh(session, state, held, PROMPT)
    assert kept.take(PROMPT[:1])[1] == 0


def test_a_text_that_differs_within_a_chunk_goes_on_from_the_chunk_before(session: Session) -> None:
    kept = PrefixCache(session, LARGE)
    kept.put(PROMPT, read(session, PROMPT, chunk=4))
    text = [*PROMPT[:7], 1, 1, 1]
    state, held = kept.take(text)
    assert held == 4
    assert_fresh(session, state, held, text)


def test_the_place_where_two_texts_part_is_found_by_the_third(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.engine.prefix_cache.MARK_EVERY", 4)
    kept = PrefixCache(session, LARGE)
    kept.put(PROMPT, read(session, PROMPT))
    texts = [[*PROMPT[:7], other, other] for other in (1, 2, 3)]
    runs: list[int] = []
    monkeypatch.setattr(session, "on_run", lambda seconds: runs.append(1))
    for number, text in enumerate(texts):
        before = len(runs)
        state, held = kept.take(text)
        assert (held, len(runs) - before) == (7, number == 0)
        assert_fresh(session, state, held, text)
        kept.put([*text, 9, 7], state)
    assert kept.take([*PROMPT[:3], 1])[1] == 0  # too little to be worth a run


def test_a_conversation_goes_on_from_its_last_reply_and_from_an_earlier_one(session: Session) -> None:
    kept = PrefixCache(session, LARGE)
    first = [*PROMPT, *REPLY]
    kept.put(first, read(session, PROMPT, REPLY))
    turns = [[60, 61, 62], [70, 71]]
    texts = []
    for turn in turns:  # another second turn, from the same first reply
        text = [*first, *turn]
        state, held = kept.take(text)
        assert held == len(first)
        assert_fresh(session, state, held, text)
        texts.append([*text, 9, 7])
        assert kept.put(texts[-1], state)
    assert len(kept) == 2  # the first reply's text begins both
    for text in texts:
        state, held = kept.take([*text, 5])
        assert held == len(text)
        assert_fresh(session, state, held, [*text, 5])


def test_a_taken_state_and_a_kept_one_are_separate(session: Session) -> None:
    kept, state = PrefixCache(session, LARGE), read(session, PROMPT, REPLY)
    state.pending[0] = 50
    kept.put([*PROMPT, *REPLY], state)
    assert state.pending == [50]
    session.prefill(state, [[3] * 20])
    text = [*PROMPT, *REPLY, 4]
    for _ in range(2):
        taken, held = kept.take(text)
        assert taken.pending == [None]
        assert_fresh(session, taken, held, text)


def test_one_row_of_several_is_kept(session: Session) -> None:
    state = session.new_state(2)
    session.prefill(state, [[1, 2], PROMPT])
    kept = PrefixCache(session, LARGE)
    kept.put(PROMPT, state, row=1)
    taken, held = kept.take([*PROMPT, 4])
    assert_fresh(session, taken, held, [*PROMPT, 4])


def test_what_was_not_used_for_the_longest_time_goes_first(session: Session) -> None:
    texts = [[number] * 20 for number in (1, 2, 3)]
    states = [read(session, text) for text in texts]
    one = PrefixCache(session, LARGE)
    one.put(texts[0], states[0])
    kept = PrefixCache(session, 2 * one.nbytes + 100)
    for text, state in zip(texts[:2], states[:2], strict=True):
        assert kept.put(text, state)
    kept.take([*texts[0], 5])
    assert kept.put(texts[2], states[2])
    assert kept.nbytes <= kept.max_bytes
    assert [kept.take([*text, 5])[1] for text in texts] == [20, 0, 20]
    small = PrefixCache(session, one.nbytes - 1)
    assert not small.put(texts[0], states[0])
    assert (len(small), small.nbytes) == (0, 0)
    kept.clear()
    assert kept.nbytes == 0


def test_the_beginning_of_a_kept_text_is_not_kept_beside_it(session: Session) -> None:
    kept = PrefixCache(session, LARGE)
    kept.put([*PROMPT, *REPLY], read(session, PROMPT, REPLY))
    before = kept.nbytes
    assert kept.put(PROMPT, read(session, PROMPT))
    assert kept.put([*PROMPT, *REPLY], read(session, [*PROMPT, *REPLY]))
    assert len(kept) == 1
    assert kept.nbytes <= before
    assert kept.put(PROMPT[:5], read(session, PROMPT[:5]))  # the longer one cannot be cut there
    assert len(kept) == 2


def test_a_short_beginning_of_a_long_text_takes_little_room(session: Session) -> None:
    kept = PrefixCache(session, LARGE)
    kept.put([5] * 100, read(session, [5] * 100, chunk=10))
    state, held = kept.take([5] * 31)
    assert held == 30
    assert state.caches["both"].capacity == 32
    assert kept.take([5] * 29)[1] == 0  # of every 32 tokens the last mark is kept, but for the end
    assert kept.take([5] * 42)[1] == 40


def test_what_does_not_fit_is_refused(session: Session, tiny: Exported) -> None:
    kept, state = PrefixCache(session, LARGE), read(session, PROMPT)
    with pytest.raises(PromptError, match="10 tokens for a row that holds 11"):
        kept.put(PROMPT[:-1], state)
    with pytest.raises(PromptError, match="row 1 is not in"):
        kept.put(PROMPT, state, row=1)
    with pytest.raises(PromptError, match="is outside the vocabulary"):
        kept.take([1, -1])
    state.artifact = "another"
    with pytest.raises(PromptError, match="another artifact"):
        kept.put(PROMPT, state)
    assert not kept.put([], session.new_state())
    assert len(kept) == 0


def test_what_is_interrupted_leaves_the_cache_as_it_was(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, state = PrefixCache(session, LARGE), read(session, [1, 2, 3])
    kept.put(PROMPT, read(session, PROMPT))

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kept.put([1, 2, 3], state)
        with pytest.raises(KeyboardInterrupt):
            kept.take([*PROMPT, 5])
    assert_fresh(session, state, 3, [1, 2, 3, 9])
    taken, held = kept.take([*PROMPT, 5])
    assert len(kept) == 1
    assert_fresh(session, taken, held, [*PROMPT, 5])


def test_threads_share_one(session: Session) -> None:
    texts = [[number] * 18 for number in range(4)]
    states = [read(session, text) for text in texts]
    one = PrefixCache(session, LARGE)
    one.put(texts[0], states[0])
    kept = PrefixCache(session, 3 * one.nbytes)
    wrong: list[Any] = []

    def work(text: list[int], state: DecodeState) -> None:
        try:
            for _ in range(50):
                kept.put(text, state)
                taken, held = kept.take([*text, 5])
                if held not in (0, 18) or taken.lengths[0] != held or kept.nbytes > kept.max_bytes:
                    wrong.append(held)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(texts, states, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(kept) == 3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_caches_of_every_type_come_back_from_their_bytes(dtype: str) -> None:
    layers = {0: LayerCache(2, 8, ("both",)), 3: LayerCache(1, 16, ("both",))}
    made = KVCache(layers, 1, 2, dtype)
    made.reserve(20)
    generator = np.random.default_rng(0)
    for value in made._buffers.values():
        values = value.numpy().view(np.uint8)
        values[...] = generator.integers(0, 256, values.shape)
        if dtype != "int8":  # exponents that are not all ones
            values[..., 1::2] &= 0x3F
    content = made.content(18)
    assert {name: array.shape for name, array in content.items()} == made.content_shapes(18)
    other = KVCache(layers, 1, 2, dtype)
    other.fill(content, 18)
    assert other.capacity == 32
    for name, array in other.content(18).items():
        np.testing.assert_array_equal(array, content[name])
    if dtype != "int8":
        content["3.value"][0, 0, 3] = 0xFF
        with pytest.raises(ArtifactError, match=r"the cache 3\.value has values that are not finite"):
            other.fill(content, 18)


def test_what_was_saved_is_found_again_with_the_newest_first(session: Session, tmp_path: Path) -> None:
    kept, path = PrefixCache(session, LARGE), tmp_path / "kept.safetensors"
    for number in (1, 2, 3):
        kept.put([number] * 20, read(session, [number] * 17, [number] * 3))
    kept.take([1] * 21)  # the second is the oldest now
    kept.save(path)
    loaded = PrefixCache.load(session, path, LARGE)
    assert (len(loaded), loaded.nbytes) == (3, kept.nbytes)
    for number in (1, 2, 3):
        text = [number] * 19 + [200]
        state, held = loaded.take(text)
        assert_fresh(session, state, held, text)
        assert held == 19
    few = PrefixCache.load(session, path, kept.nbytes * 2 // 3)
    assert [few.take([number] * 21)[1] for number in (1, 2, 3)] == [20, 0, 20]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_is_written_whole_or_not_at_all(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, path = PrefixCache(session, LARGE), tmp_path / "kept"
    kept.put(PROMPT, read(session, PROMPT))
    kept.save(path)
    before = path.read_bytes()
    kept.put([7, 8], read(session, [7, 8]))

    def interrupted(tensors: Any, draft: Path, metadata: Any) -> None:
        draft.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("runtime.engine.prefix_file.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kept.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ArtifactError, match="cannot be written: No such file"):
        kept.save(tmp_path / "nowhere" / "kept")


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any], dict[str, str]], Any]:
    return lambda tensors, metadata: tensors.update({name: change(tensors[name])})


def with_nan(array: Any) -> Any:
    array.view(np.float32)[0] = np.nan
    return array


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, str]], Any]]] = {
    "another artifact": ("another artifact", lambda tensors, metadata: metadata.update(artifact="0" * 64)),
    "no format": ("does not say", lambda tensors, metadata: metadata.pop("format")),
    "another number of texts": ("as many texts", lambda tensors, metadata: metadata.update(texts="9")),
    "no tokens": ("as many texts", lambda tensors, metadata: tensors.pop("0.tokens")),
    "a cache too few": (r"0\.both\.0\.key is missing", lambda tensors, metadata: tensors.pop("0.both.0.key")),
    "a tensor too many": ("belong to no text", lambda tensors, metadata: tensors.update(more=np.zeros(3))),
    "tokens outside": ("outside the vocabulary", changed("0.tokens", lambda array: array + 300)),
    "tokens below": ("outside the vocabulary", changed("0.tokens", lambda array: array - 1000)),
    "tokens as a table": ("no list of numbers", changed("0.tokens", lambda array: array[None])),
    "tokens of another type": (r"0\.tokens is I32", changed("0.tokens", lambda array: array.astype(np.int32))),
    "fewer tokens": ("is U8 .*, not U8", changed("0.tokens", lambda array: array[:-1])),
    "no tokens at all": ("have 0 and", changed("0.tokens", lambda array: array[:0])),
    "marks that do not ascend": ("do not ascend", changed("0.mark_lengths", lambda array: array[::-1].copy())),
    "a mark at nothing": ("do not ascend", changed("0.mark_lengths", lambda array: array * (array != array[0]))),
    "a mark past the end": ("do not ascend", changed("0.mark_lengths", lambda array: array + 1)),
    "other sums": (r"0\.mark_sums is F32", changed("0.mark_sums", lambda array: array[:, :1])),
    "sums that are no numbers": ("mark_sums has values", changed("0.mark_sums", with_nan)),
    "a cache with no numbers": ("the cache 1.value has values", changed("0.both.1.value", with_nan)),
    "a cache of another type": ("is F32", changed("0.both.0.key", lambda array: array.view(np.float32))),
}


@pytest.fixture(scope="module")
def saved(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept, path = PrefixCache(session, LARGE), tmp_path_factory.mktemp("saved") / "kept"
    kept.put([*PROMPT, *REPLY], read(session, PROMPT, REPLY))
    kept.save(path)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_of_this_artifact_is_one_line(
    session: Session, saved: Path, tmp_path: Path, damage: str
) -> None:
    message, change = DAMAGES[damage]
    with safe_open(saved, framework="numpy") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, tmp_path / "kept", metadata)
    with pytest.raises(ArtifactError, match=message) as raised:
        PrefixCache.load(session, tmp_path / "kept", LARGE)
    assert "\n" not in str(raised.value)
    assert "cannot be read as a prefix cache" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"no tensors", None, "half", "folder"])
def test_what_is_no_such_file_is_one_line(session: Session, saved: Path, tmp_path: Path, content: Any) -> None:
    path = tmp_path / "kept"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(saved.read_bytes()[:-10] if content == "half" else content)
    with pytest.raises(ArtifactError, match="cannot be read as a prefix cache") as raised:
        PrefixCache.load(session, path, LARGE)
    assert "\n" not in str(raised.value)


def test_bytes_changed_anywhere_are_refused_or_do_no_harm(session: Session, saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "kept"
    generator = np.random.default_rng(0)
    refused = 0
    for place in generator.integers(0, 2000, 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            state, held = PrefixCache.load(session, path, LARGE).take([*PROMPT, *REPLY, 5])
        except ArtifactError:
            refused += 1
            continue
        session.prefill(state, [[*PROMPT, *REPLY, 5][held:]])
    assert refused > 20
