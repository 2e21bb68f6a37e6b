"""Projections of queries, keys and values with their adapters, for the tests of the passes that pack them."""

from __future__ import annotations

import numpy as np

WIDTH, HEADS, KV_HEADS, HEAD = 32, 4, 2, 8
SIZES = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
RANKS = {"q": 2, "k": 3, "v": 4}
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    values: np.ndarray = RNG.standard_normal(shape).astype(np.float32)
    return values


WEIGHTS = {
    f"model.{part}.{name}": values
    for part, size in SIZES.items()
    for name, values in {
        "weight": normal(WIDTH, size),
        "bias": normal(size),
        "adapter_a": normal(WIDTH, RANKS[part]),
        "adapter_b": normal(RANKS[part], size),
        "adapter_delta": normal(WIDTH, size),
        "adapter_bias": normal(size),
    }.items()
}
X = normal(2, 3, WIDTH)
MASK = np.array([0, 1], np.float32).reshape(2, 1, 1)


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)  # sums of 32 terms in another order
