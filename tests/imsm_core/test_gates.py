"""Every gate kind against its equation, written out here once more and in another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imsm_core.choices import GATE_KINDS
from imsm_core.errors import SettingsError
from imsm_core.gates import GATES, Gate, Memories, make_gate

D, RANK = 6, 2
LEARNED = [kind for kind in GATES if kind != "mean_logits"]


def random_gate(kind: str, seed: int = 0, dropout: float = 0.0) -> Gate:
    torch.manual_seed(seed)
    gate = make_gate(kind, D, RANK, dropout).eval()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate


def random_memories(dtype: torch.dtype = torch.float32, tokens: int = 5) -> Memories:
    torch.manual_seed(9)
    return Memories(*(torch.randn(tokens, D).to(dtype) for _ in range(4)))


def logistic(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def expected(gate: Gate, memories: Memories, bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """(fused, gate) in float64, one token at a time, with matrices taken apart into the blocks of z."""
    h_b, h_a, q_b, q_a = (state.double() for state in memories)
    if gate.kind == "query_mixed":
        h_b, h_a = (h_b + q_b) / 2, (h_a + q_a) / 2
    fused, gates = [], []
    for t in range(h_b.shape[0]):
        if gate.kind == "mean_logits":
            g = torch.full((D,), 1 / 2, dtype=torch.float64) if bias == 0 else logistic(torch.full((D,), bias).double())
        else:
            down, up = (gate.get_parameter(f"gate_{name}.weight").detach().double() for name in ("down", "up"))
            blocks = [q_b[t], h_b[t], h_a[t], q_a[t]] if gate.kind == "query_aware" else [h_b[t], h_a[t]]
            r = sum(down[:, D * i : D * (i + 1)] @ block for i, block in enumerate(blocks))
            g = logistic(up @ r + bias)
        h = h_a[t] + g * (h_b[t] - h_a[t])
        fused.append((h_b[t] + h) / 2 if gate.kind == "residual" else h)
        gates.append(g)
    return torch.stack(fused), torch.stack(gates)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("bias", [0.0, 0.7, -1.3])
def test_gate_is_its_equation(kind: str, bias: float) -> None:
    gate, memories = random_gate(kind), random_memories()
    fused, values = gate(memories, torch.tensor(bias))
    expected_fused, expected_values = expected(gate, memories, bias)
    torch.testing.assert_close(values.double(), expected_values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.double(), expected_fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", GATES)
def test_no_memory_bias_is_a_memory_bias_of_zero(kind: str) -> None:
    gate, memories = random_gate(kind), random_memories()
    assert torch.equal(gate(memories).fused, gate(memories, torch.tensor(0.0)).fused)


@pytest.mark.parametrize("kind", ["query_aware", "token", "mean_logits"])
def test_gate_forced_to_one_gives_the_base_memory_exactly(kind: str) -> None:
    memories = random_memories()
    fused, gate = random_gate(kind)(memories, torch.tensor(1e4))
    assert torch.equal(gate, torch.ones_like(gate))
    assert torch.equal(fused, memories.base)


@pytest.mark.parametrize("kind", ["query_aware", "token", "mean_logits"])
def test_gate_forced_to_zero_gives_the_adapter_memory_exactly(kind: str) -> None:
    memories = random_memories()
    fused, gate = random_gate(kind)(memories, torch.tensor(-1e4))
    assert torch.equal(gate, torch.zeros_like(gate))
    assert torch.equal(fused, memories.adapter)


def test_residual_gate_forced_to_zero_keeps_half_of_the_base_memory() -> None:
    memories = random_memories()
    fused, _ = random_gate("residual")(memories, torch.tensor(-1e4))
    torch.testing.assert_close(fused, (memories.base + memories.adapter) / 2)


def test_query_mixed_gate_forced_to_one_gives_the_mixed_base_memory() -> None:
    memories = random_memories()
    fused, _ = random_gate("query_mixed")(memories, torch.tensor(1e4))
    torch.testing.assert_close(fused, (memories.base + memories.query_base) / 2)


def test_memory_bias_may_differ_per_feature() -> None:
    memories = random_memories()
    bias = torch.tensor([1e4, -1e4] * (D // 2))
    fused, _ = random_gate("query_aware")(memories, bias)
    assert torch.equal(fused[:, 0::2], memories.base[:, 0::2])
    assert torch.equal(fused[:, 1::2], memories.adapter[:, 1::2])


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_computes_in_float32_and_rounds_once(kind: str, dtype: torch.dtype) -> None:
    gate, memories = random_gate(kind), random_memories(dtype, tokens=64)
    fused, values = gate(memories)
    assert values.dtype == torch.float32
    assert fused.dtype == dtype
    in_float32 = gate(Memories(*(state.float() for state in memories)))
    assert torch.equal(values, in_float32.gate)
    assert torch.equal(fused, in_float32.fused.to(dtype))


@pytest.mark.parametrize("kind", LEARNED)
def test_gate_up_of_zero_gives_one_half_everywhere(kind: str) -> None:
    gate = random_gate(kind)
    torch.nn.init.zeros_(gate.get_parameter("gate_up.weight"))
    _, values = gate(random_memories())
    assert torch.equal(values, torch.full_like(values, 0.5))


def test_query_means_broadcast_over_rows() -> None:
    gate, memories = random_gate("query_aware"), random_memories()
    one = Memories(memories.base, memories.adapter, memories.query_base[:1], memories.query_adapter[:1])
    repeated = Memories(*one[:2], *(query.repeat(5, 1) for query in one[2:]))
    torch.testing.assert_close(gate(one).fused, gate(repeated).fused)


@pytest.mark.parametrize(("kind", "blocks"), [("query_aware", 4), ("token", 2), ("residual", 2), ("query_mixed", 2)])
def test_gate_has_two_matrices_and_no_biases(kind: str, blocks: int) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make_gate(kind, D, RANK).state_dict().items()}
    assert shapes == {"gate_down.weight": (RANK, blocks * D), "gate_up.weight": (D, RANK)}


def test_paper_gate_has_5_d_r_parameters() -> None:
    assert sum(parameter.numel() for parameter in make_gate("query_aware", 4096).parameters()) == 5 * 4096 * 8


def test_mean_logits_has_no_parameters() -> None:
    assert not list(make_gate("mean_logits", D).parameters())


def test_gate_dropout_drops_in_training_mode_after_each_linear_layer() -> None:
    gate, memories = random_gate("query_aware", dropout=0.5), random_memories(tokens=400)
    evaluated = gate(memories).gate
    assert torch.equal(gate(memories).gate, evaluated)
    gate.train()
    torch.manual_seed(0)
    z = torch.logit(gate(memories).gate.double())
    # After gate_up: half of the features of each token are exactly zero before the sigmoid.
    rows_down_dropped = (z.abs() < 1e-6).all(dim=1)
    kept = z[~rows_down_dropped]
    assert 0.4 < (kept.abs() < 1e-6).double().mean() < 0.6
    # After gate_down: with rank 2, both entries are dropped in a quarter of the tokens.
    assert 0.18 < rows_down_dropped.double().mean() < 0.34


@pytest.mark.parametrize("kind", GATES)
def test_gradient_reaches_both_matrices_and_the_adapter_memory(kind: str) -> None:
    gate, memories = random_gate(kind), random_memories()
    adapter = memories.adapter.clone().requires_grad_()
    gate(memories._replace(adapter=adapter)).fused.square().sum().backward()
    assert adapter.grad is not None
    assert adapter.grad.abs().min() > 0
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in gate.parameters())


def test_unknown_gate_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"^gate is mode5; choose one of query_aware, token"):
        make_gate("mode5", D)


@pytest.mark.parametrize("kind", LEARNED)
def test_gate_rank_below_one_is_refused(kind: str) -> None:
    with pytest.raises(SettingsError, match=r"^gate_rank is 0"):
        make_gate(kind, D, 0)


def test_the_kinds_that_settings_offer_are_those_that_exist() -> None:
    assert tuple(GATES) == GATE_KINDS
