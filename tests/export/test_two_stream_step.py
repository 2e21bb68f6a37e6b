"""One step as PyTorch runs it, apart from its attention."""

from __future__ import annotations

from pathlib import Path

import torch

from export.adapters import base_layers, replaced_layers
from export.attention.plan import plan_attention
from export.streams import StreamLayout
from export.trace import _sample_inputs
from export.two_stream import TwoStreamStep
from tests.builders import CONTEXT, LAYERS, make_siamese


def test_what_attention_leaves_at_padding_does_not_enter_the_query(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    with replaced_layers(model.causal_lm, base_layers(model.peft_model)):
        plan = plan_attention(model.causal_lm, LAYERS, CONTEXT)
    step = TwoStreamStep(model.causal_lm, model.gate, plan, StreamLayout(2))
    sample = _sample_inputs(step)
    mask = torch.ones_like(sample.query_mask)
    mask[0, 3:] = 0
    mask[1, :] = 0  # an idle row
    states = [torch.randn(2, 5, 32) for _ in range(2)]
    for state in states:  # GroupQueryAttention's output is unspecified there: whatever the memory held
        state[0, 3:] = torch.nan
        state[1, 1:] = torch.inf
    inputs = sample._replace(query_mask=mask, past_query_count=torch.ones(2))
    outputs: dict[str, torch.Tensor] = {}
    step._fuse(inputs, states, [state[:, :1] for state in states], outputs)
    expected = torch.stack([state[0, :3].sum(0) for state in states])
    torch.testing.assert_close(outputs["present_query_sum"], torch.stack([expected, torch.zeros_like(expected)]))
    assert outputs["present_query_count"].tolist() == [4, 1]
