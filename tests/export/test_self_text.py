"""The model's own text: both streams', the same every time, of whatever length and model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from export.self_text import own_texts
from imsm_core.backbone import load_tokenizer
from imsm_core.siamese import SiameseModel
from tests.builders import BOS, CHAT_TEMPLATE, EOS, VOCABULARY, make_base_folder, make_siamese, randomize

STARTS = ("Once upon a time", "A second start")


def silent(line: str) -> None:
    pass


@pytest.fixture
def model(base_folder: Path) -> SiameseModel:
    return make_siamese(base_folder)


@pytest.fixture
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(base_folder))


def texts_of(model: SiameseModel, tokenizer: PreTrainedTokenizerBase, longest: int = 12, **how: Any) -> list[list[int]]:
    return own_texts(model, tokenizer, STARTS, longest, how.pop("report", silent), how.pop("rows", 8), **how)


def test_the_same_seed_gives_the_same_texts_and_leaves_torchs_own(
    model: SiameseModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = torch.get_rng_state()
    first = texts_of(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert texts_of(model, tokenizer) == first
    assert texts_of(model, tokenizer, seed=1) != first
    assert len(first) == 8
    assert {len(text) for text in first} == {12}
    assert all(text[0] == BOS and max(text) < VOCABULARY for text in first)


def test_half_of_the_texts_are_of_each_stream(model: SiameseModel, tokenizer: PreTrainedTokenizerBase) -> None:
    before = texts_of(model, tokenizer)
    randomize(model, seed=5)
    after = texts_of(model, tokenizer)
    assert after[:4] == before[:4]  # the base stream's
    assert all(new != old for new, old in zip(after[4:], before[4:], strict=True))


def test_tokens_are_drawn_as_the_model_predicts_them(model: SiameseModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whatever its own settings for generation say, and with the first token, which is that of padding here."""
    config: Any = model.causal_lm.generation_config
    plain = np.array(texts_of(model, tokenizer, 2, rows=4000))[:2000, 1]
    config.update(repetition_penalty=9.0, min_p=0.9, pad_token_id=BOS, suppress_tokens=list(range(3, 200)))
    penalized = np.array(texts_of(model, tokenizer, 2, rows=4000))[:2000, 1]
    np.testing.assert_array_equal(plain, penalized)
    assert model.causal_lm.generation_config is config
    with torch.no_grad(), model.adapter_disabled():
        logits = model.causal_lm(torch.tensor([[BOS]])).logits[0, -1]
    logits[EOS] = -torch.inf  # texts do not end early
    expected = logits.softmax(-1).numpy()
    found = np.bincount(plain, minlength=VOCABULARY) / len(plain)
    assert np.abs(found - expected).max() < 4 * np.sqrt(expected.max() / len(plain))


@pytest.mark.parametrize("longest", [2, 3, 5, 8])
@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_tiny_contexts_are_filled_and_not_more(tmp_path: Path, longest: int, template: str | None) -> None:
    base = make_base_folder(tmp_path / "base", chat_template=template)
    lines: list[str] = []
    found = texts_of(make_siamese(base), load_tokenizer(str(base)), longest, report=lines.append)
    assert {len(text) for text in found} == {longest}
    assert lines == []


def test_a_quarter_are_chats_where_there_is_a_template(chat_folder: Path) -> None:
    tokenizer = load_tokenizer(str(chat_folder))
    found = texts_of(make_siamese(chat_folder), tokenizer, 60, rows=16)
    begun = [str(tokenizer.decode(text)).startswith("[user]Once upon a time") for text in found]
    assert begun == [True] * 2 + [False] * 6 + [True] * 2 + [False] * 6


def test_a_template_that_takes_no_such_turns_is_left_out(tmp_path: Path) -> None:
    base = make_base_folder(tmp_path / "base", chat_template="{{ raise_exception('no') }}")
    found = texts_of(make_siamese(base), load_tokenizer(str(base)))
    assert {text[0] for text in found} == {BOS}


@pytest.mark.parametrize("change", ["without", "beyond"])
def test_models_without_a_first_token_begin_with_those_of_sentences(
    model: SiameseModel, tokenizer: PreTrainedTokenizerBase, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = type(tokenizer)
    bos = None if change == "without" else VOCABULARY + 7  # the tokenizer has more tokens than the model
    monkeypatch.setattr(kind, "bos_token_id", property(lambda self: bos), raising=False)
    first = [tokenizer(start)["input_ids"][0] for start in STARTS]
    assert {text[0] for text in texts_of(model, tokenizer)} == set(first)


def failing(message: str) -> Callable[..., Any]:
    def generate(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(message)

    return generate


def test_a_model_that_cannot_generate_gets_random_tokens_and_says_so(
    model: SiameseModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.causal_lm, "generate", failing("no cache\nof this kind"), raising=False)
    lines: list[str] = []
    found = texts_of(model, tokenizer, report=lines.append)
    assert texts_of(model, tokenizer) == found
    assert {len(text) for text in found} == {12}
    assert len(np.unique(found)) > 20
    assert lines == ["round     this model cannot write texts (no cache); random tokens take their place"]
