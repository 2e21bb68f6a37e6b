"""Embeddings against PyTorch's hidden states, pooled by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from runtime import ArtifactError, EmbedSettings, Model, PromptError, SettingsError, embed, load
from runtime.generation.embedding import AT_ONCE, _batches
from tests.exported import Exported, copied
from tests.older_formats import as_format

TEXTS = ["once upon a time", "x", "The longest of these texts has two sentences. This is one.", "time", "été"]
MEMORIES = ("base", "adapter", "blend")


@pytest.fixture(scope="module")
def model(tiny: Exported) -> Model:
    return load(tiny.artifact, threads=1)


@torch.no_grad()
def by_hand(tiny: Exported, model: Model, text: str, memory: str, pooling: str) -> NDArray[np.float32]:
    ids = torch.tensor([model.codec.encode_raw(text)])
    states = tiny.model.stream_states(ids)
    places = torch.arange(ids.shape[1])
    fused = tiny.model.fused_states(states, torch.ones_like(ids), torch.zeros_like(places), places).fused
    found = {"base": states.base[0], "adapter": states.adapter[0], "blend": fused}[memory]
    pooled: NDArray[np.float32] = (found.mean(0) if pooling == "mean" else found[-1]).numpy()
    return pooled


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_an_embedding_is_pytorchs_states_pooled_whatever_is_read_with_it(
    tiny: Exported, model: Model, memory: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.stack([by_hand(tiny, model, text, memory, pooling) for text in TEXTS])
    plain = embed(model, TEXTS, memory=memory, pooling=pooling, normalize=False)
    np.testing.assert_allclose(plain.embeddings, expected, atol=1e-4)
    assert plain.embeddings.dtype == np.float32
    assert plain.tokens.tolist() == [len(model.codec.encode_raw(text)) for text in TEXTS]
    found = embed(model, TEXTS, EmbedSettings(memory, pooling)).embeddings
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=-1, keepdims=True), atol=1e-5)
    for size in (1, 2):
        again = embed(model, TEXTS[::-1], memory=memory, pooling=pooling, batch_size=size).embeddings[::-1]
        np.testing.assert_allclose(again, found, atol=1e-5)
    monkeypatch.setattr(model.session, "prefill_rows", 8)  # longer texts are read in pieces
    np.testing.assert_allclose(embed(model, TEXTS, memory=memory, pooling=pooling).embeddings, found, atol=1e-5)


def test_memories_and_poolings_differ(model: Model) -> None:
    found = [
        embed(model, TEXTS[:1], memory=memory, pooling=pooling).embeddings[0]
        for memory in MEMORIES
        for pooling in ("mean", "last")
    ]
    for index, one in enumerate(found):
        assert all(np.abs(one - other).max() > 0.01 for other in found[:index])


def test_more_texts_than_are_sorted_at_once_keep_their_order(model: Model) -> None:
    texts = [TEXTS[index % 5] for index in range(AT_ONCE + 7)]
    found = embed(model, texts, memory="base").embeddings
    np.testing.assert_allclose(
        found, embed(model, TEXTS, memory="base").embeddings[np.arange(len(texts)) % 5], atol=1e-5
    )
    assert embed(model, []).embeddings.shape == (0, 32)


def test_texts_of_similar_length_are_read_together_and_little_is_padded() -> None:
    lengths = [3, 40, 5, 41, 4, 38, 200, 5, 1000, 44]
    batches = list(_batches([[0] * length for length in lengths], most=3, tokens=150, padding=512))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert [[lengths[row] for row in batch] for batch in batches] == [[3, 4, 5], [5], [38, 40, 41], [44], [200], [1000]]
    few = _batches([[0] * 20] * 4, most=8, tokens=512, padding=10)
    assert [len(batch) for batch in few] == [1, 1, 1, 1]  # rows cannot be padded so far


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", ""], "text 2: it is empty"),
        (["a", 5], "text 2: it is 5, not a text"),
        (["x" * 500], "text 1: it has 501 tokens; the model's context is 128"),
        ("abc", "texts are abc, not a sequence of texts"),
    ],
)
def test_what_cannot_be_embedded_is_told(model: Model, texts: Any, message: str) -> None:
    with pytest.raises(PromptError, match=f"^{message}"):
        embed(model, texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": "both"}, "memory is both; it must be one of blend, base, adapter"),
        ({"pooling": "max"}, "pooling is max; it must be one of mean, last"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"normalize": 1}, "normalize is 1; it must be True or False"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{message}"):
        EmbedSettings(**change)


def test_states_that_are_not_finite_are_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.pooling._Reader.pooled", lambda reader: np.full((1, 32), np.inf))
    with pytest.raises(ArtifactError, match="hidden states that are not finite"):
        embed(model, ["a"])


def test_an_older_artifact_has_the_states_of_each_memory_but_not_of_the_blend(
    tiny: Exported, model: Model, tmp_path: Path
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    as_format(6, artifact, tiny.manifest)
    older = load(artifact, threads=1)
    with pytest.raises(SettingsError, match="memory is blend; this artifact is of format 6, which does not give the"):
        embed(older, TEXTS)
    for memory in ("base", "adapter"):
        for pooling in ("mean", "last"):
            found, expected = (embed(used, TEXTS, memory=memory, pooling=pooling).embeddings for used in (older, model))
            np.testing.assert_array_equal(found, expected)
