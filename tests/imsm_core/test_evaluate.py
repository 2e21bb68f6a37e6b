"""Evaluation, against the oracle and against transformers models of one stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from imsm_core.backbone import apply_head, load_base_model
from imsm_core.data.dataset import Example
from imsm_core.errors import DataError, SettingsError
from imsm_core.evaluate import Stream, answer_states, evaluate
from imsm_core.gates import GATES
from imsm_core.reference import reference_generate, reference_step
from imsm_core.siamese import SiameseModel
from imsm_core.training.loop import answer_loss
from tests.builders import PAD, make_siamese

EXAMPLES = [
    Example([0, 70, 80, 90], [33, 44, 55]),
    Example([0, 101], [66]),
    Example([0, 12, 200, 31, 64, 7, 150], [99, 18]),
]


def plain_loss(model: torch.nn.Module) -> float:
    """Mean answer loss of an ordinary causal LM, one unpadded example at a time."""
    losses = []
    for example in EXAMPLES:
        tokens = torch.tensor([example.prompt_ids + example.answer_ids])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, len(example.prompt_ids) - 1 : -1]
        losses.append(functional.cross_entropy(logits, torch.tensor(example.answer_ids), reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("kind", GATES)
def test_fused_logits_equal_the_reference_at_every_answer_token(base_folder: Path, kind: str) -> None:
    model = make_siamese(base_folder, kind)
    with torch.no_grad():
        states, targets, rows = answer_states(model, EXAMPLES, "fused", PAD, memory_bias=0.3)
        logits = apply_head(model.causal_lm, states[None])[0]
    assert rows.tolist() == [0, 0, 0, 1, 2, 2]
    assert targets.tolist() == [33, 44, 55, 66, 99, 18]
    index = 0
    for example in EXAMPLES:
        for count in range(len(example.answer_ids)):
            text = example.prompt_ids + example.answer_ids[:count]
            step = reference_step(model, text, len(example.prompt_ids), memory_bias=0.3)
            torch.testing.assert_close(logits[index], step.logits, atol=1e-4, rtol=1e-4)
            index += 1


def test_base_stream_is_the_plain_base_model(base_folder: Path) -> None:
    found = evaluate(make_siamese(base_folder), EXAMPLES, "base", PAD)
    assert found.loss == pytest.approx(plain_loss(load_base_model(str(base_folder))), rel=1e-4)


def test_adapter_stream_is_the_merged_model(base_folder: Path) -> None:
    found = evaluate(make_siamese(base_folder), EXAMPLES, "adapter", PAD)
    assert found.loss == pytest.approx(plain_loss(make_siamese(base_folder).peft_model.merge_and_unload()), rel=1e-4)


def test_fused_loss_is_the_training_loss_without_dropout(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    with torch.no_grad():
        total, tokens = answer_loss(model, EXAMPLES, PAD)
    found = evaluate(model, EXAMPLES, "fused", PAD)
    assert found.answer_tokens == tokens == 6
    assert found.loss == pytest.approx(float(total) / tokens, rel=1e-4)


def decoded(model: SiameseModel, prompt: list[int], memory_bias: float) -> Example:
    steps = reference_generate(model, prompt, 4, memory_bias=memory_bias)
    return Example(prompt, [step.token for step in steps])


@pytest.mark.parametrize(("stream", "bias"), [("base", 1e4), ("adapter", -1e4), ("fused", 0.0)])
def test_accuracy_is_one_for_what_greedy_decoding_says(base_folder: Path, stream: Stream, bias: float) -> None:
    model = make_siamese(base_folder)
    said = [decoded(model, example.prompt_ids, bias) for example in EXAMPLES]
    assert evaluate(model, said, stream, PAD).accuracy == 1


@pytest.mark.parametrize("place", [0, 1, 3])
def test_one_wrong_token_makes_the_whole_answer_wrong(base_folder: Path, place: int) -> None:
    model = make_siamese(base_folder)
    said = [decoded(model, example.prompt_ids, 0.0) for example in EXAMPLES]
    said[1].answer_ids[place] = (said[1].answer_ids[place] + 1) % 256
    assert evaluate(model, said, "fused", PAD).accuracy == pytest.approx(2 / 3)


def test_streams_differ_and_memory_bias_leads_from_one_to_the_other(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    base, adapter = (evaluate(model, EXAMPLES, stream, PAD).loss for stream in ("base", "adapter"))
    assert abs(base - adapter) > 0.01
    assert evaluate(model, EXAMPLES, "fused", PAD, memory_bias=1e4).loss == pytest.approx(base, rel=1e-5)
    assert evaluate(model, EXAMPLES, "fused", PAD, memory_bias=-1e4).loss == pytest.approx(adapter, rel=1e-5)


def test_batch_size_does_not_change_the_result(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    one, many = (evaluate(model, EXAMPLES, "fused", PAD, batch_size=size) for size in (1, 64))
    assert one.accuracy == many.accuracy
    assert one.loss == pytest.approx(many.loss, rel=1e-4)


def test_dropout_is_off_and_the_training_mode_is_put_back(base_folder: Path) -> None:
    model = make_siamese(base_folder, dropout=0.5)
    quiet = evaluate(model, EXAMPLES, "fused", PAD)
    model.train()
    assert evaluate(model, EXAMPLES, "fused", PAD) == quiet
    assert model.training
    assert model.gate.training


def test_refuses_what_it_cannot_measure(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    with pytest.raises(SettingsError, match=r"^stream is both; choose one of base"):
        evaluate(model, EXAMPLES, "both", PAD)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="batch_size is 0"):
        evaluate(model, EXAMPLES, "fused", PAD, batch_size=0)
    with pytest.raises(DataError, match="no examples"):
        evaluate(model, [], "fused", PAD)
    with pytest.raises(DataError, match="example 2 of 2 has no answer"):
        evaluate(model, [EXAMPLES[0], Example([0, 5], [])], "fused", PAD)
