"""Finding a window in the rule that a mask is made from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from export.attention.masks import MaskRule, causal_window
from export.errors import UnsupportedError


def test_a_causal_mask_has_no_window() -> None:
    rule: Any = causal_mask_function  # typed for single numbers; it broadcasts
    assert causal_window(rule, 4096) is None


@pytest.mark.parametrize(("window", "found"), [(1, 1), (8, 8), (1023, 1023), (1024, None), (5000, None)])
def test_a_window_is_found_to_the_token_and_only_where_the_context_is_longer(window: int, found: int | None) -> None:
    assert causal_window(sliding_window_causal_mask_function(window), 1024) == found


def later_tokens_too(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query + 1


@pytest.mark.parametrize(
    "rule",
    [
        bidirectional_mask_function,
        chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.int64)),
        later_tokens_too,
    ],
    ids=["bidirectional", "chunked", "one token ahead"],
)
def test_other_masks_are_refused(rule: MaskRule) -> None:
    with pytest.raises(UnsupportedError, match="neither causal nor a causal sliding window"):
        causal_window(rule, 64)


def test_chunks_longer_than_the_context_are_causal() -> None:
    assert causal_window(chunked_causal_mask_function(64, torch.zeros(1, dtype=torch.int64)), 64) is None
