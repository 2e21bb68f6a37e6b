"""What the runtime computes from a manifest."""

from __future__ import annotations

from runtime.manifest import StepReads


def test_a_table_costs_a_row_per_token_up_to_all_of_them() -> None:
    reads = StepReads(whole=1000, rows=((32, 100), (8, 3)), experts=())
    assert [reads.bytes_per_step(tokens) - 1000 for tokens in (1, 5, 500)] == [40, 5 * 32 + 24, 3200 + 24]
    assert reads.bytes_per_step(5, streams=2) == reads.bytes_per_step(5)  # both streams look up the same tokens


def test_experts_cost_those_that_the_tokens_of_both_streams_may_be_routed_to() -> None:
    reads = StepReads(whole=0, rows=(), experts=((80, 10, 2),))
    assert [reads.bytes_per_step(*size) for size in ((1,), (1, 2), (3, 2))] == [160, 320, 800]
