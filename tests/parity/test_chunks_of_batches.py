"""Batches of different lengths in chunks, with layers that both streams share: against the uncached oracle.

The adapter is on the second layer alone, so that the first is the shared trunk. Buffers have no slack: the kernel would
refuse a padded chunk that its cache has no room for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.pipeline import export_model
from export.settings import ExportSettings
from imsm_core.backbone import load_tokenizer
from imsm_core.checkpoint import load_checkpoint
from imsm_core.reference import reference_generate, reference_step
from runtime import PromptError, Session
from runtime.engine.state import StepOutput
from runtime.inspect import cache_bytes_per_token
from tests.adapters import make_siamese_with
from tests.builders import CONTEXT, make_base_folder, save_tiny_checkpoint
from tests.exported import PROMPT, Exported, export_existing, export_tiny
from tests.zoo import make_zoo_base

ATOL = RTOL = 1e-4

# Rotation inside attention, by nodes, and as traced (of a part of each head); norms on q and k; learned positions and
# Conv1D; ALiBi; a window of 8 tokens.
BASES: dict[str, Callable[[Path], Path]] = {
    "llama, fused rotation": lambda path: make_base_folder(path, "llama", head_dim=16),
    "llama, rotation by nodes": lambda path: make_base_folder(path, "llama", head_dim=12),
    "qwen3": lambda path: make_base_folder(path, "qwen3", head_dim=16),
    "gpt2": lambda path: make_base_folder(path, "gpt2", head_dim=12),
    "bloom": lambda path: make_zoo_base(path, "bloom"),
    "glm": lambda path: make_zoo_base(path, "glm"),
    "mistral": lambda path: make_zoo_base(path, "mistral"),
}


def export_upper_layer(folder: Path, name: str) -> Exported:
    """A LoRA on every linear layer of the second block."""
    base = BASES[name](folder / "base")
    model = make_siamese_with(base, "lora_layers")
    return export_existing(folder, base, model, save_tiny_checkpoint(model, base, folder / "checkpoint"))


@pytest.fixture(scope="module", params=BASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_upper_layer(tmp_path_factory.mktemp("chunks"), request.param)


@pytest.fixture
def session(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr("runtime.engine.cache.BLOCK", 1)
    return Session(exported.artifact)


def tokens(count: int, start: int) -> list[int]:
    """`count` different tokens."""
    return [3 + (start + 37 * index) % 256 for index in range(count)]


def assert_follows(output: StepOutput, exported: Exported, texts: Sequence[Sequence[int]]) -> None:
    """The output is what the oracle has after each of the texts, all of which is the query."""
    assert output.gate_mean is not None
    for row, text in enumerate(texts):
        expected = reference_step(exported.model, text, len(text))
        np.testing.assert_allclose(output.logits[row], expected.logits.numpy(), atol=ATOL, rtol=RTOL)
        np.testing.assert_allclose(output.gate_mean[row], expected.gate.mean(), atol=ATOL)


def test_layers_below_the_adapter_are_shared_and_agree_with_pytorch(exported: Exported) -> None:
    assert exported.manifest["shared_layers"] == 1
    groups = [layer["groups"] for layer in exported.manifest["cache"]]
    assert groups == [["shared"], *[["both"]] * (len(groups) - 1)]
    for differences in exported.manifest["parity"]["max_abs_difference"].values():
        assert 0 < max(differences.values()) < 1e-4
    session = Session(exported.artifact)
    streams = [2 - ("shared" in layer.groups) for layer in session.manifest.layers]
    row = 2 * session.manifest.layers[0].kv_heads * session.manifest.layers[0].head_size * 4
    assert cache_bytes_per_token(session.manifest) == sum(streams) * row < 2 * len(streams) * row
    state = session.new_state(3)
    session.prefill(state, [PROMPT] * 3)
    assert [cache.rows for cache in state.caches.values()] == [3, 6]


def test_each_layer_has_one_attention_node(exported: Exported) -> None:
    graph = onnx.load(exported.artifact / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [node.input[3] for node in nodes] == [
        f"past_key_values.{layer['groups'][0]}.{index}.key" for index, layer in enumerate(exported.manifest["cache"])
    ]


def test_a_ragged_batch_decodes_like_the_oracle(exported: Exported, session: Session) -> None:
    prompts = [PROMPT, PROMPT[3:7], [9]]
    expected = [reference_generate(exported.model, prompt, 12) for prompt in prompts]
    state = session.new_state(3)
    output = session.prefill(state, prompts)
    for steps in zip(*expected, strict=True):
        for row, step in enumerate(steps):
            np.testing.assert_allclose(output.logits[row], step.logits.numpy(), atol=ATOL, rtol=RTOL)
        output = session.decode_step(state, [step.token for step in steps])


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_ragged_batch_in_small_chunks_equals_each_prompt_alone(
    exported: Exported, session: Session, chunk: int
) -> None:
    prompts = [tokens(20, 5), tokens(2, 50), tokens(13, 80)]
    state = session.new_state(3)
    assert_follows(session.prefill(state, prompts, chunk=chunk), exported, prompts)
    assert list(state.query_count) == list(state.lengths) == [20, 2, 13]


@pytest.mark.parametrize("chunk", [7, 64])
def test_rows_go_on_together_though_one_ends_where_the_context_ends(
    exported: Exported, session: Session, chunk: int
) -> None:
    texts = [tokens(CONTEXT - 8, 1), tokens(3, 60), tokens(30, 90)]
    state = session.new_state(3)
    session.prefill(state, texts, chunk=50)
    session.decode_step(state, [11, 12, 13])
    more = [tokens(7, 20), tokens(60, 30), tokens(1, 40)]
    output = session.prefill(state, more, chunk=chunk)
    whole = [[*text, 11 + row, *rest] for row, (text, rest) in enumerate(zip(texts, more, strict=True))]
    assert list(state.lengths) == [CONTEXT, 64, 32]
    assert_follows(output, exported, whole)
    with pytest.raises(PromptError, match="reached the model's context"):
        session.decode_step(state, [1, 1, 1])


def test_a_row_that_is_idle_for_several_chunks_goes_on_as_if_alone(exported: Exported, session: Session) -> None:
    prompts = [tokens(2, 7), tokens(40, 70)]
    state = session.new_state(2)
    together = session.prefill(state, prompts, chunk=4)
    alone = session.new_state(1)
    session.prefill(alone, prompts[:1])
    np.testing.assert_allclose(state.query_sum[0], alone.query_sum[0], atol=ATOL, rtol=RTOL)
    assert_follows(together, exported, prompts)
    for token in (20, 21, 22):
        output, single = session.decode_step(state, [token, 5]), session.decode_step(alone, [token])
        np.testing.assert_allclose(output.logits[0], single.logits[0], atol=ATOL, rtol=RTOL)


# The portable form: one attention node a stream, no `query_seqlens`.


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_upper_layer(tmp_path_factory.mktemp("default"), "llama, fused rotation")


@pytest.fixture(scope="module")
def portable(default: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model, info = load_checkpoint(default.checkpoint)
    target = tmp_path_factory.mktemp("portable") / "artifact"
    settings = ExportSettings(portable=True)
    manifest = export_model(model, load_tokenizer(str(default.base)), info, target, settings, report=lambda line: None)
    return Exported(default.base, default.checkpoint, target, model, manifest)


def test_the_portable_form_has_a_node_a_stream_and_none_of_the_newer_input(portable: Exported) -> None:
    assert [layer["groups"] for layer in portable.manifest["cache"]] == [["shared"], ["base", "adapter"]]
    assert "query_seqlens" not in {value["name"] for value in portable.manifest["graph"]["inputs"]}
    graph = onnx.load(portable.artifact / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == 3
    assert max(len(node.input) for node in nodes) <= 9  # up to the rotary tables


def test_the_portable_form_gives_the_logits_of_the_default_one(default: Exported, portable: Exported) -> None:
    prompts, more = [tokens(11, 5), tokens(2, 50)], [tokens(3, 9), tokens(8, 19)]
    found: list[StepOutput] = []
    expected: list[StepOutput] = []
    for artifact, outputs in ((portable.artifact, found), (default.artifact, expected)):
        session = Session(artifact)
        state = session.new_state(2)
        outputs.append(session.prefill(state, prompts))
        outputs += [session.decode_step(state, [token, token + 1]) for token in (20, 30)]
        outputs.append(session.prefill(state, more, chunk=2))  # row by row in the portable form
        outputs.append(session.decode_step(state, [40, 50]))
    for one, other in zip(found, expected, strict=True):
        assert one.gate_mean is not None
        assert other.gate_mean is not None
        np.testing.assert_allclose(one.logits, other.logits, atol=ATOL, rtol=RTOL)
        np.testing.assert_allclose(one.gate_mean, other.gate_mean, atol=ATOL)


def test_the_portable_form_continues_virtual_tokens_row_by_row(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, adapter="prefix_tuning", head_dim=16, settings=ExportSettings(portable=True))
    assert {tuple(layer["groups"]) for layer in exported.manifest["cache"]} == {("base", "adapter")}
    session = Session(exported.artifact)
    state = session.new_state(2)
    prompts = [tokens(9, 5), tokens(2, 50)]
    assert_follows(session.prefill(state, prompts), exported, prompts)
    session.decode_step(state, [7, 8])
    more = [[60, 61], [62, 63, 64]]
    whole = [[*prompts[0], 7, *more[0]], [*prompts[1], 8, *more[1]]]
    assert_follows(session.prefill(state, more, chunk=2), exported, whole)
