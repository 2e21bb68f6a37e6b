"""Real models in float32: against the uncached PyTorch oracle, transformers' generate and PEFT's own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from imsm_core.backbone import load_base_model
from imsm_core.reference import reference_generate
from runtime import generate, load
from tests.exported import Exported
from tests.real.exports import export_real

pytestmark = pytest.mark.real

PROMPTS = ["What is the capital of Japan?", "Write one sentence about the sea and the people who live beside it."]
TOKENS = 16
ATOL = RTOL = 1e-3  # 30 layers
BASE, ADAPTER = 1e4, -1e4  # memory biases

CASES = ["smollm2 lora", "smollm2 ia3", "smollm2 prefix_tuning", "gemma3 lora"]


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model, adapter = request.param.split()
    base: Path = request.getfixturevalue(f"{model}_folder")
    return export_real(tmp_path_factory.mktemp("real"), base, adapter)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_and_logits_equal_the_oracle(exported: Exported, prompt: str) -> None:
    model = load(exported.artifact)
    ids = model.codec.encode_prompt(prompt)
    expected = reference_generate(exported.model, ids, TOKENS, model.session.manifest.eos_token_ids)
    assert generate(model, prompt, max_new_tokens=TOKENS).token_ids == [step.token for step in expected]
    state = model.session.new_state(1)
    output = model.session.prefill(state, [ids])
    for step in expected:
        np.testing.assert_allclose(output.logits[0], step.logits.numpy(), atol=ATOL, rtol=RTOL)
        assert output.gate_mean is not None
        np.testing.assert_allclose(output.gate_mean[0], step.gate.mean(), atol=ATOL)
        output = model.session.decode_step(state, [step.token])


def test_the_base_memory_is_the_plain_model(exported: Exported) -> None:
    model = load(exported.artifact)
    plain = load_base_model(str(exported.base)).eval()
    for prompt in PROMPTS:
        ids = torch.tensor([model.codec.encode_prompt(prompt)])
        with torch.no_grad():
            text = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        found = generate(model, prompt, max_new_tokens=TOKENS, memory_bias=BASE).token_ids
        assert found == text[0, ids.shape[1] :].tolist()


def test_the_adapter_memory_is_pefts_own_model(exported: Exported) -> None:
    model = load(exported.artifact)
    tuned = PeftModel.from_pretrained(load_base_model(str(exported.base)), str(exported.checkpoint / "adapter")).eval()
    ids = model.codec.encode_prompt(PROMPTS[0])
    state = model.session.new_state(1, memory_bias=ADAPTER)
    output = model.session.prefill(state, [ids])
    for _ in range(TOKENS // 2):
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor([ids])).logits[0, -1]
        np.testing.assert_allclose(output.logits[0], logits.numpy(), atol=ATOL, rtol=RTOL)
        ids = [*ids, int(logits.argmax())]
        output = model.session.decode_step(state, ids[-1:])


def test_a_continued_conversation_equals_a_fresh_run(exported: Exported) -> None:
    session, codec = (model := load(exported.artifact)).session, model.codec
    first, second = map(codec.encode_prompt, PROMPTS)
    state = session.new_state(1)
    session.prefill(state, [first])
    answer = [11, 12, 13]
    for token in answer:
        session.decode_step(state, [token])
    continued = session.prefill(state, [second])
    whole = session.new_state(1)
    fresh = session.prefill(whole, [[*first, *answer, *second]])
    np.testing.assert_allclose(continued.logits, fresh.logits, atol=ATOL, rtol=RTOL)
    np.testing.assert_allclose(
        session.decode_step(state, [14]).logits, session.decode_step(whole, [14]).logits, atol=ATOL, rtol=RTOL
    )


def test_a_ragged_batch_equals_each_prompt_alone(exported: Exported) -> None:
    session, codec = (model := load(exported.artifact)).session, model.codec
    prompts = [codec.encode_prompt(PROMPTS[1]), codec.encode_prompt(PROMPTS[0])[-5:]]
    together = session.new_state(2)
    output = session.prefill(together, prompts)
    alone = [session.new_state(1) for _ in prompts]
    singles = [session.prefill(state, [prompt]) for state, prompt in zip(alone, prompts, strict=True)]
    for _ in range(4):
        for row, single in enumerate(singles):
            np.testing.assert_allclose(output.logits[row], single.logits[0], atol=ATOL, rtol=RTOL)
        tokens = output.logits.argmax(-1)
        output = session.decode_step(together, tokens)
        singles = [session.decode_step(state, [token]) for state, token in zip(alone, tokens, strict=True)]
