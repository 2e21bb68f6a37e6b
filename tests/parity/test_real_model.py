"""The real model: a trained Llama of 260 k parameters, tuned for a few steps on real data through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import cli
from imsm_core.checkpoint import load_checkpoint
from imsm_core.reference import reference_generate
from runtime import generate, load

PROMPT = "Once upon a time, there was a little girl"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, stories_folder: Path, shared_data: Path) -> Path:
    """checkpoint/ and artifact/ of the real model after a few steps on CoLA."""
    folder = tmp_path_factory.mktemp("real")
    data = folder / "cola.jsonl"
    data.write_text("".join((shared_data / "cola/train.jsonl").read_text().splitlines(keepends=True)[:64]))
    train = f"train --model {stories_folder} --data {data} --prompt-field input --answer-field output --steps 4"
    rates = "--batch-size 4 --learning-rate 1e-2 --gate-learning-rate 3e-2 --no-progress"
    assert cli.main([*train.split(), *rates.split(), "--out", str(folder / "checkpoint")]) == 0
    assert cli.main(["export", str(folder / "checkpoint"), str(folder / "artifact")]) == 0
    return folder


def test_greedy_tokens_and_logits_equal_the_oracle(tuned: Path) -> None:
    reference, _ = load_checkpoint(tuned / "checkpoint")
    model = load(tuned / "artifact")
    prompt_ids = model.codec.encode_prompt(PROMPT)
    expected = reference_generate(reference, prompt_ids, 48, model.session.manifest.eos_token_ids)
    result = generate(model, PROMPT, max_new_tokens=48)
    assert result.token_ids == [step.token for step in expected]
    state = model.session.new_state(1)
    output = model.session.prefill(state, [prompt_ids])
    for step in expected:
        np.testing.assert_allclose(output.logits[0], step.logits.numpy(), atol=1e-4, rtol=1e-4)
        output = model.session.decode_step(state, [step.token])


def test_the_gate_forced_to_the_base_memory_tells_the_base_models_story(tuned: Path) -> None:
    text = generate(load(tuned / "artifact"), PROMPT, max_new_tokens=32, memory_bias=1e4).text
    assert "named" in text


def test_verify_with_the_checkpoint_runs_the_parity_check_again(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(tuned / "artifact"), "--checkpoint", str(tuned / "checkpoint")]) == 0
    assert "largest difference from PyTorch" in capsys.readouterr().out


def test_generate_prints_one_json_object(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(tuned / "artifact"), "--prompt", PROMPT, "--max-new-tokens", "5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["token_ids"]) == len(document["gate_mean"]) == 5
    assert document["finish_reason"] == "length"
    assert document["timings"]["prompt_tokens"] > 5
