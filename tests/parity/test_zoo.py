"""Architectures whose export takes a path of its own, each verified by the export itself and run by the runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imsm_core.reference import reference_generate
from runtime import Session
from tests.builders import make_siamese, save_tiny_checkpoint
from tests.exported import PROMPT, Exported, export_existing
from tests.zoo import make_zoo_base

# opt: positions with an offset; bloom: a bias on the scores; mixtral: experts and a window; gpt_oss: experts laid out
# otherwise, with biases, and attention sinks; deepseek_v3: values narrower than keys.
TARGETS = {
    "opt": ["q_proj", "v_proj"],
    "bloom": ["query_key_value"],
    "mixtral": ["q_proj", "v_proj"],
    "gpt_oss": ["q_proj", "v_proj"],
    "deepseek_v3": ["o_proj"],
}


@pytest.fixture(scope="module", params=TARGETS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder: Path = tmp_path_factory.mktemp("zoo")
    base = make_zoo_base(folder / "base", request.param)
    model = make_siamese(base, target_modules=TARGETS[request.param])
    return export_existing(folder, base, model, save_tiny_checkpoint(model, base, folder / "checkpoint"))


def test_the_graph_agrees_with_pytorch(exported: Exported) -> None:
    parity = exported.manifest["parity"]
    for differences in parity["max_abs_difference"].values():
        assert 0 < max(differences.values()) < 1e-3
    assert parity["greedy_tokens_equal"] == parity["decode_steps"] == 64


def test_decoding_with_a_cache_longer_than_the_text_equals_the_oracle(exported: Exported) -> None:
    session = Session(exported.artifact)
    state = session.new_state(1)
    output = session.prefill(state, [PROMPT])
    for step in reference_generate(exported.model, PROMPT, 12):
        np.testing.assert_allclose(output.logits[0], step.logits.numpy(), atol=1e-4, rtol=1e-4)
        output = session.decode_step(state, [step.token])
