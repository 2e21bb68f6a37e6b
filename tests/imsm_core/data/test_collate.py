"""Batches of examples."""

from __future__ import annotations

import torch

from imsm_core.data.collate import IGNORED_LABEL, collate
from imsm_core.data.dataset import Example
from tests.builders import BOS, EOS, PAD


def test_batch_is_right_padded_and_only_answers_are_learned() -> None:
    batch = collate([Example([BOS, 10, 11], [12, EOS]), Example([BOS], [20, 21, EOS, 9, 9])], PAD)
    x = IGNORED_LABEL
    assert batch.input_ids.tolist() == [[BOS, 10, 11, 12, EOS, PAD], [BOS, 20, 21, EOS, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch.query_mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[x, x, x, 12, EOS, x], [x, 20, 21, EOS, 9, 9]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
