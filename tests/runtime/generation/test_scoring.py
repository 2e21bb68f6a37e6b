"""Scores of given continuations, held to PyTorch's log-softmax, and where a continuation begins."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor

from imsm_core.backbone import apply_head
from imsm_core.siamese import SiameseModel
from runtime import Model, PromptError, Session, SettingsError, generate, load
from runtime.generation.score_settings import ScoreSettings
from runtime.generation.scoring import score_texts
from runtime.generation.text import TextCodec
from tests.builders import CHAT_TEMPLATE
from tests.exported import PROMPT, Exported


@pytest.fixture(scope="module")
def model(tiny: Exported) -> Model:
    return load(tiny.artifact)


@torch.no_grad()
def reference(model: SiameseModel, prompt: list[int], rest: list[int], memory: str, bias: float) -> Tensor:
    """(len(rest), vocab): log-softmax of what PyTorch gives at each token's place."""
    ids = torch.tensor([prompt + rest])
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    mask = torch.zeros_like(ids)
    mask[:, : len(prompt)] = 1
    states = model.stream_states(ids)
    if memory == "blend":
        logits, _ = model.fused_logits(states, mask, torch.zeros_like(places), places, bias)
    else:
        logits = apply_head(model.causal_lm, getattr(states, memory)[:, places])[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize(("memory", "bias"), [("blend", 0.0), ("blend", 1.5), ("base", 0.0), ("adapter", 0.0)])
def test_scores_are_pytorchs(model: Model, tiny: Exported, memory: str, bias: float) -> None:
    texts = ["x", "Hello, world", "é"]
    (scores,) = score_texts(model, [{"prompt": PROMPT, "continuation": texts}], memory=memory, memory_bias=bias)
    for text, score in zip(texts, scores, strict=True):
        rest = model.codec.encode_raw(text, beginning=False)
        expected = reference(tiny.model, PROMPT, rest, memory, bias)[range(len(rest)), rest]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        assert score.logprob == pytest.approx(float(expected.sum()), abs=1e-3)
        assert score.perplexity == pytest.approx(math.exp(-float(expected.mean())), rel=1e-3)
        assert (score.characters, score.bytes) == (len(text), len(text.encode()))


def test_greedy_is_what_generation_would_choose(model: Model) -> None:
    chosen = generate(model, PROMPT, max_new_tokens=5).token_ids
    other = [*chosen[:4], (chosen[4] + 1) % 259]
    scores = model.session.score_each(PROMPT, [chosen, other, chosen[:1]])
    assert [score.greedy.tolist() for score in scores] == [[True] * 5, [True] * 4 + [False], [True]]


def test_token_ids_may_be_numpys(model: Model) -> None:
    prompts: list[Any] = [PROMPT, np.array(PROMPT), list(map(np.int64, PROMPT))]
    one, *others = score_texts(model, [{"prompt": prompt, "continuation": "ab"} for prompt in prompts])
    assert others == [one, one]


def test_a_choice_scores_as_it_does_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rests = [[9, 8, 7, 6, 5, 4, 3, 9, 9, 10], [50], [8, 8]]
    alone = [model.session.score(PROMPT, rest, 0.5) for rest in rests]
    monkeypatch.setattr(model.session, "prefill_rows", 8)
    for score, expected in zip(model.session.score_each(PROMPT, rests, 0.5), alone, strict=True):
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)


def test_a_prompt_is_read_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    score_each = Session.score_each

    def noted(self: Session, prompt: list[int], *rest: Any) -> Any:
        read.append(prompt)
        return score_each(self, prompt, *rest)

    rows = [{"prompt": prompt, "continuation": text} for prompt, text in (("ab", "c"), ("ab", ["d", "e"]), ("b", "c"))]
    alone = [next(iter(score_texts(model, [row]))) for row in rows]
    monkeypatch.setattr(Session, "score_each", noted)
    together = list(score_texts(model, rows))
    assert len(read) == 2
    assert [len(scores) for scores in together] == [1, 2, 1]
    for scores, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose([one.logprob for one in scores], [one.logprob for one in expected], atol=1e-4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "row 2: it is text, not an object"),
        ({"prompt": "x"}, "row 2: it has no continuation; a row has the keys prompt and continuation"),
        ({"prompt": "x", "continuation": ""}, "row 2: the continuation is empty"),
        ({"prompt": "x", "continuation": []}, "row 2: the continuation is \\[\\]; it must be text"),
        ({"prompt": "x", "continuation": ["a", 5]}, "it must be text, or a list of texts"),
        ({"prompt": 5, "continuation": "a"}, "row 2: the prompt is 5; it must be text, messages or token ids"),
        ({"prompt": [5, 900], "continuation": "a"}, "row 2: token id 900 is outside the vocabulary of 259"),
        ({"prompt": [], "continuation": "a"}, "row 2: the prompt is empty"),
        ({"prompt": [1.5], "continuation": "a"}, "row 2: token id 1.5 is not a whole number"),
        ({"prompt": "x" * 100, "continuation": "a" * 28}, "row 2: prompt and continuation have 129 tokens; .* is 128"),
        ({"prompt": [{"role": "user", "content": "x"}], "continuation": "a"}, "row 2: this artifact has no chat"),
    ],
)
def test_a_wrong_row_is_told_before_anything_is_computed(model: Model, row: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        score_texts(model, [{"prompt": "x", "continuation": "a"}, row])


def test_settings_that_mean_nothing_are_refused() -> None:
    for changes, message in (
        ({"memory": "both"}, "memory is both; it must be one of blend, base, adapter"),
        ({"memory_bias": math.nan}, "memory_bias is nan; it must be a number"),
        ({"memory": "base", "memory_bias": 1.0}, "memory_bias is 1.0; it is of the blend, and memory is one alone"),
    ):
        with pytest.raises(SettingsError, match=message):
            ScoreSettings(**changes)


def codec_of_words(folder: Path, template: str | None = None) -> TextCodec:
    """Byte-level, with a few tokens that span what a prompt and a continuation may be cut at."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("(", ")"), ("a", "b"), ("Ċ", "Ċ")]
    tokens = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return TextCodec(folder, {}, eos_token_ids=(1,))


def pieces(codec: TextCodec, pair: tuple[list[int], list[int]]) -> tuple[list[str | None], list[str | None]]:
    begin, rest = ([codec.tokenizer.id_to_token(token) for token in ids] for ids in pair)
    return begin, rest


@pytest.mark.parametrize(
    ("prompt", "continuation", "expected"),
    [
        ("ab", " c", (["<s>", "ab"], ["Ġc"])),
        ("ab ", "c", (["<s>", "ab"], ["Ġc"])),  # the space belongs to the word that follows
        ("(", ")", (["<s>", "("], [")"])),  # one token, were they one text
        ("a", "bc", (["<s>", "a"], ["b", "c"])),
        ("", "ab", (["<s>"], ["ab"])),
        (" ", "c", (["<s>"], ["Ġc"])),
    ],
)
def test_a_continuation_begins_where_the_prompts_tokens_end(
    tmp_path: Path, prompt: str, continuation: str, expected: tuple[list[str], list[str]]
) -> None:
    codec = codec_of_words(tmp_path)
    assert pieces(codec, codec.encode_pair(prompt, continuation)) == expected


def test_a_reply_follows_the_prompt_that_generation_reads(tmp_path: Path) -> None:
    codec = codec_of_words(tmp_path, CHAT_TEMPLATE.replace("[assistant]", "[assistant]\n"))
    messages = [{"role": "user", "content": "Hello"}]
    for reply, expected in (("ab", ["ab"]), ("\nab", ["Ċ", "ab"]), ("</s>", ["<", "/", "s", ">"])):
        begin, rest = codec.encode_chat_pair(messages, reply)
        assert begin == codec.encode_chat(messages)
        assert [codec.tokenizer.id_to_token(token) for token in rest] == expected
    assert codec.encode_chat_pair(messages, "</s>", control_tokens=True)[1] == [1]
