"""Sessions: damaged artifacts, bad input, caches that grow, states that stay apart."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import ArtifactError, DecodeState, Execution, PromptError, ProviderError, Session, SettingsError
from runtime.engine import cache
from runtime.engine.marks import MOST_TOKENS
from runtime.engine.place import Host
from runtime.engine.session import CPU_PREFILL_ROWS
from runtime.folder import check_files
from runtime.manifest import read_manifest
from tests.exported import PROMPT, Exported, copied, edit_manifest


@pytest.fixture(scope="module")
def session(tiny: Exported) -> Session:
    return Session(tiny.artifact)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "imsm_model.json"])
def test_a_missing_file_is_named(tiny: Exported, tmp_path: Path, name: str) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    (artifact / name).unlink()
    with pytest.raises(ArtifactError, match=f"has no {name}"):
        Session(artifact)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_truncated_file_is_named(tiny: Exported, tmp_path: Path, name: str) -> None:
    path = copied(tiny.artifact, tmp_path / "artifact") / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=f"{name} has .* bytes, not"):
        Session(path.parent)


def test_a_changed_byte_is_found_by_its_hash(tiny: Exported, tmp_path: Path) -> None:
    path = copied(tiny.artifact, tmp_path / "artifact") / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data was changed"):
        check_files(path.parent, read_manifest(path.parent), hashes=True)


@pytest.mark.parametrize(
    ("find", "put", "message"),
    [
        (
            '"name": "seqlens_k"',
            '"name": "lengths"',
            "graph.inputs has no seqlens_k, which follows",
        ),
        (
            '"kv_heads": 2',
            '"kv_heads": "two"',
            r"cache\[0\].kv_heads is .two.; it must be a whole number from 1 to 65536",
        ),
        (
            '"format_version": 7',
            '"format_version": 4',
            "format version 4; this program reads 5, 6 and 7; export it again",
        ),
        (
            '"format_version": 7',
            '"format_version": 8',
            "format version 8; this program reads 5, 6 and 7; it is older than the artifact",
        ),
        (
            '"format_version": 7',
            '"format_version": 6',
            r"graph.inputs\[\d+\] \(memory_bias\) is .float32 .*; it must be float32 \[a name\], by the rest",
        ),
        ('"padding": ', '"most_padding": ', "graph.padding is missing"),
        ('"reads": {', '"weights": {', "reads is missing"),
        ('"model": {', '"modle": {', "damaged: model is missing"),
        ('"padding": 512', '"padding": 0', "damaged: graph.padding is 0; it must be a whole number from 1"),
        ('"padding": 512', '"padding": 1e999', "damaged: the number 1e999 is too large"),
        ('"dtype": "int32"', '"dtype": "int64"', r"graph.inputs\[2\] \(seqlens_k\) is .int64"),
        ('"tokenizer.json": {', '"../tokenizer.json": {', "the name of a file in the folder, without a path"),
    ],
)
def test_a_manifest_that_disagrees_is_one_error(
    tiny: Exported, tmp_path: Path, find: str, put: str, message: str
) -> None:
    path = copied(tiny.artifact, tmp_path / "artifact") / "imsm_model.json"
    text = path.read_text()
    assert find in text
    path.write_text(text.replace(find, put, 1))
    with pytest.raises(ArtifactError, match=message):
        Session(path.parent)


def test_an_output_that_the_manifest_does_not_name_is_found(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    graph = json.loads((artifact / "imsm_model.json").read_text())["graph"]
    edit_manifest(artifact, graph=graph | {"outputs": [value for value in graph["outputs"] if value["name"] != "gate"]})
    with pytest.raises(ArtifactError, match=r"graph\.outputs has no gate, which follows from the rest of the manifest"):
        Session(artifact)


def test_garbage_instead_of_a_graph_is_one_error(tiny: Exported, tmp_path: Path) -> None:
    path = copied(tiny.artifact, tmp_path / "artifact") / "model.onnx"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(ArtifactError, match="onnxruntime cannot load"):
        Session(path.parent)


def test_an_unknown_provider_is_named(tiny: Exported) -> None:
    with pytest.raises(ProviderError, match="unknown execution provider 'quantum'; choose one of cpu, cuda"):
        Session(tiny.artifact, provider="quantum")


def test_a_provider_that_does_not_start_is_an_error_unless_fallback_is_allowed(tiny: Exported) -> None:
    with pytest.raises(ProviderError, match="'coreml' is not in use"):
        Session(tiny.artifact, provider="coreml")
    session = Session(tiny.artifact, provider="coreml", allow_fallback=True)
    assert session.providers == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([5] * 129, "the prompt has 129 tokens; the model's context is 128"),
        ([5, 259], "token id 259 is outside the vocabulary of 259"),
        ([-1], "token id -1 is outside"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_state_is_unchanged(session: Session, prompt: list[int], message: str) -> None:
    state = session.new_state(1)
    with pytest.raises(PromptError, match=message):
        session.prefill(state, [prompt])
    assert state.lengths[0] == 0
    assert state.cache_bytes == 0


def test_a_text_may_fill_the_context_and_not_go_past_it(session: Session) -> None:
    state = session.new_state(1)
    session.prefill(state, [[5] * 127])
    session.decode_step(state, [6])
    assert state.lengths[0] == 128
    with pytest.raises(PromptError, match="reached the model's context of 128"):
        session.decode_step(state, [7])


def test_rows_and_prompts_must_agree(session: Session) -> None:
    with pytest.raises(PromptError, match="1 prompts for 2 rows"):
        session.prefill(session.new_state(2), [[1]])
    state = session.new_state(1)
    session.prefill(state, [[1]])
    with pytest.raises(PromptError, match="2 tokens for 1 rows"):
        session.decode_step(state, [1, 2])


def test_two_states_of_one_session_do_not_touch_each_other(session: Session) -> None:
    one, other = session.new_state(1), session.new_state(1)
    session.prefill(one, [PROMPT])
    expected = session.decode_step(one, [40]).logits
    again = session.new_state(1)
    session.prefill(again, [PROMPT])
    session.prefill(other, [[3, 4, 5]])
    session.decode_step(other, [41])
    np.testing.assert_array_equal(session.decode_step(again, [40]).logits, expected)


class Failing:
    """An onnxruntime session whose run number `last` and all later ones fail."""

    def __init__(self, real: Any, last: int) -> None:
        self.real, self.left = real, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def run_with_iobinding(self, *arguments: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of memory")
        self.real.run_with_iobinding(*arguments)


@pytest.mark.parametrize("failing", ["prefill", "second chunk", "decode"])
def test_after_a_failed_run_the_conversation_continues_as_if_nothing_had_happened(tiny: Exported, failing: str) -> None:
    session = Session(tiny.artifact, threads=1)
    state, undisturbed = session.new_state(1), session.new_state(1)
    for each in (state, undisturbed):
        session.prefill(each, [PROMPT])
        session.decode_step(each, [40])
        each.pending[0] = 41
    steps = {
        "prefill": lambda: session.prefill(state, [[7, 8, 9]]),
        "second chunk": lambda: session.prefill(state, [[7, 8, 9]], chunk=2),
        "decode": lambda: session.decode_step(state, [41]),
    }
    real = session.onnx
    session.onnx = Failing(real, 1 if failing == "second chunk" else 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        steps[failing]()
    session.onnx = real
    assert state.pending == [41]
    assert state.cut_lengths(0) == undisturbed.cut_lengths(0)
    for each in (state, undisturbed):
        session.prefill(each, [[50, 51]])
    np.testing.assert_array_equal(state.query_sum, undisturbed.query_sum)
    np.testing.assert_array_equal(session.decode_step(state, [3]).logits, session.decode_step(undisturbed, [3]).logits)


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_memory_that_runs_out_while_caches_grow_leaves_the_state_as_it_was(
    tiny: Exported, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BLOCK", 16)
    session = Session(tiny.artifact, threads=1)
    state, undisturbed = session.new_state(1), session.new_state(1)
    for each in (state, undisturbed):
        session.prefill(each, [PROMPT])
        session.decode_step(each, [40])
    copied, left = Host.copied, [failing]

    def failing_copied(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return copied(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Host, "copied", failing_copied)
        with pytest.raises(MemoryError):
            session.prefill(state, [[7] * 40])
    for token in (3, 4):
        np.testing.assert_array_equal(
            session.decode_step(state, [token]).logits, session.decode_step(undisturbed, [token]).logits
        )
    more = [session.prefill(each, [[7] * 40]).logits for each in (state, undisturbed)]
    np.testing.assert_array_equal(more[0], more[1])


def test_a_decode_step_that_is_interrupted_while_it_counts_has_not_been(
    tiny: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tiny.artifact, threads=1)
    state = session.new_state(1)
    session.prefill(state, [PROMPT])
    session.decode_step(state, [40])
    state.pending[0] = 41
    before = (list(state.lengths), state.reply_sum.copy(), list(state.reply_count), state.cut_lengths(0))

    def interrupted(state: DecodeState) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("runtime.engine.step._mark", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.decode_step(state, [41])
    assert (list(state.lengths), list(state.reply_count), state.cut_lengths(0)) == (before[0], before[2], before[3])
    np.testing.assert_array_equal(state.reply_sum, before[1])
    assert state.pending == [41]


def test_a_state_of_another_artifact_is_refused(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    files = {name: entry | {"sha256": "0" * 64} for name, entry in tiny.manifest["files"].items()}
    edit_manifest(artifact, files=files)
    one, other = Session(tiny.artifact, threads=1), Session(artifact, threads=1)
    state = other.new_state(1)
    with pytest.raises(PromptError, match="of another artifact"):
        one.prefill(state, [PROMPT])
    with pytest.raises(PromptError, match="different artifacts"):
        one.new_state(1).join(state)


def test_another_memory_bias_is_used_from_the_next_step_on(session: Session) -> None:
    state = session.new_state(1)
    session.prefill(state, [PROMPT])
    session.decode_step(state, [40])
    state.memory_bias = np.array([1e4], np.float32)
    output = session.decode_step(state, [41])
    assert output.gate_mean is not None
    assert output.gate_mean[0] == 1


def test_an_unused_state_is_freed_at_once(session: Session) -> None:
    state = session.new_state(1)
    session.prefill(state, [PROMPT])
    session.decode_step(state, [40])
    freed = weakref.ref(state)
    gc.disable()
    try:
        del state
        assert freed() is None
    finally:
        gc.enable()


def test_decoding_before_a_prompt_is_refused(session: Session) -> None:
    with pytest.raises(PromptError, match="no prompt yet"):
        session.decode_step(session.new_state(1), [5])
    with pytest.raises(SettingsError, match="batch is 0; it must be 1 to 65536"):
        session.new_state(0)


def test_several_tokens_at_once_that_do_not_fit_are_refused(session: Session) -> None:
    state = session.new_state(1)
    with pytest.raises(PromptError, match="no prompt yet"):
        session.continue_step(state, [5])
    session.prefill(state, [[5] * 60])
    for tokens, message in (
        ([], "0 tokens are fed at once; it must be 1 to 63"),
        ([5] * 64, "64 tokens are fed at once"),
        ([5, 259], "token id 259 is outside"),
    ):
        with pytest.raises(PromptError, match=message):
            session.continue_step(state, tokens)
    session.decode_step(state, [6])
    session.continue_step(state, [5] * MOST_TOKENS)
    with pytest.raises(PromptError, match="reached the model's context of 128"):
        session.continue_step(state, [5] * 5)
    assert state.lengths[0] == 61 + MOST_TOKENS
    state.trim([61])  # before the first of them
    session.continue_step(state, [5] * 4)
    assert state.lengths[0] == 65
    two = session.new_state(2)
    session.prefill(two, [[1], [2]])
    with pytest.raises(PromptError, match="a state of one row; this one has 2"):
        session.continue_step(two, [5])


def test_settings_that_execution_does_not_have_are_errors(tiny: Exported) -> None:
    with pytest.raises(TypeError, match="thread"):
        Session(tiny.artifact, thread=1)
    with pytest.raises(SettingsError, match="threads is 0; it must be at least 1"):
        Session(tiny.artifact, Execution(threads=0))
    with pytest.raises(SettingsError, match="provider is cpu; cuda_graph needs cuda"):
        Session(tiny.artifact, cuda_graph=True)
    assert Session(tiny.artifact, Execution(threads=2), spin=False).execution == Execution(threads=2, spin=False)


def test_memory_bias_is_per_row(session: Session) -> None:
    biases = [1e4, -1e4, 0.0]
    output = session.prefill(session.new_state(3, memory_bias=biases), [PROMPT] * 3)
    assert output.gate_mean is not None
    np.testing.assert_allclose(output.gate_mean[:2], [1, 0])
    for row, bias in enumerate(biases):
        alone = session.prefill(session.new_state(1, memory_bias=bias), [PROMPT])
        np.testing.assert_allclose(output.logits[row], alone.logits[0], atol=1e-5)
    with pytest.raises(SettingsError, match="memory_bias is nan; it must be a number"):
        session.new_state(1, memory_bias=float("nan"))


def test_results_of_a_step_survive_the_next_one(session: Session) -> None:
    state = session.new_state(1)
    session.prefill(state, [PROMPT])
    first = session.decode_step(state, [40])
    kept = first.logits.copy()
    session.decode_step(state, [41])
    np.testing.assert_array_equal(first.logits, kept)


def test_scores_are_the_log_probabilities_of_stepwise_decoding(session: Session) -> None:
    rest = [9, 8, 7, 6]
    state = session.new_state(1)
    logits = [session.prefill(state, [PROMPT]).logits[0]]
    logits += [session.decode_step(state, [token]).logits[0] for token in rest[:-1]]
    rows = np.array(logits, np.float64)
    expected = rows[range(len(rest)), rest] - np.log(np.exp(rows).sum(-1))
    np.testing.assert_allclose(session.score(PROMPT, rest), expected, atol=1e-4)


def test_a_continuation_longer_than_a_chunk_scores_the_same(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = list(range(9, 30))
    whole = session.score(PROMPT, rest)
    monkeypatch.setattr(session, "prefill_rows", 8)
    np.testing.assert_allclose(session.score(PROMPT, rest), whole, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_prefill_reads_no_more_rows_at_once_than_suit_the_provider(
    tiny: Exported, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tiny.artifact)
    assert session.prefill_rows == CPU_PREFILL_ROWS
    prompts = [list(range(3, 12 + index)) for index in range(batch)]
    whole = session.prefill(session.new_state(batch), prompts, chunk=100).logits
    sizes: list[int] = []
    run = session.run_tokens

    def counted(state: DecodeState, ids: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(ids.size)
        return run(state, ids, *rest, **named)

    monkeypatch.setattr(session, "run_tokens", counted)
    monkeypatch.setattr(session, "prefill_rows", 8)
    np.testing.assert_allclose(session.prefill(session.new_state(batch), prompts).logits, whole, atol=1e-4)
    assert max(sizes) == {1: 4, 2: 4, 5: 5}[batch]  # of the 8 rows, two streams; at least one token of every text


def test_a_text_longer_than_a_block_decodes_as_if_it_were_prefilled(
    tiny: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.engine.cache.BLOCK", 4)
    session = Session(tiny.artifact)
    state = session.new_state(1)
    session.prefill(state, [PROMPT])
    for token in range(20, 40):
        output = session.decode_step(state, [token])
    fresh = session.new_state(1)
    session.prefill(fresh, [PROMPT])
    whole = session.score(PROMPT, [*range(20, 40), 50])
    row = output.logits[0].astype(np.float64)
    np.testing.assert_allclose(row[50] - np.log(np.exp(row).sum()), whole[-1], atol=1e-4)


def test_without_kernels_the_same_tokens_follow(session: Session, tiny: Exported) -> None:
    other = Session(tiny.artifact, kernels=False)
    states = [used.new_state() for used in (session, other)]
    outputs = [used.prefill(state, [PROMPT]) for used, state in zip((session, other), states, strict=True)]
    for _ in range(8):
        np.testing.assert_allclose(outputs[0].logits, outputs[1].logits, atol=1e-5)
        tokens = outputs[1].logits.argmax(-1)
        outputs = [used.decode_step(state, tokens) for used, state in zip((session, other), states, strict=True)]
