"""Caches of a group of rows: growth, virtual tokens, and what is bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.engine.cache import BLOCK, KVCache
from runtime.manifest import LayerCache

LAYER = LayerCache(kv_heads=2, head_size=8, groups=("both",))
VIRTUAL = {f"4.{part}": np.full((2, 3, 8), value, np.float32) for part, value in (("key", 5), ("value", 6))}


def values(cache: KVCache, name: str) -> Any:
    """A buffer's memory as float32, to be read and written."""
    return cache._buffers[name].numpy().view(np.float32)


def test_caches_grow_in_blocks_and_keep_their_content() -> None:
    cache = KVCache({0: LAYER}, batch=2)
    assert cache.nbytes == 0
    assert cache.reserve(3)
    values(cache, "0.key")[:, :, :3] = 7
    assert not cache.reserve(BLOCK)
    assert cache.reserve(BLOCK + 1)
    assert values(cache, "0.key").shape == (2, 2, 2 * BLOCK, 8)
    assert (values(cache, "0.key")[:, :, :3] == 7).all()
    assert (values(cache, "0.key")[:, :, 3:] == 0).all()
    assert cache.nbytes == 2 * 2 * 2 * 2 * BLOCK * 8 * 4


def test_only_the_last_rows_begin_with_virtual_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.cache.BLOCK", 4)
    cache = KVCache({4: LAYER}, batch=2, streams=2, virtual=VIRTUAL)
    cache.reserve(1)
    key = values(cache, "4.key")
    assert (key[:2] == 0).all()
    assert (key[2:, :, :3] == 5).all()
    assert (key[2:, :, 3:] == 0).all()
    assert (values(cache, "4.value")[2:, :, :3] == 6).all()
    del key
    values(cache, "4.key")[:2, :, :2] = 9  # text of the rows without
    cache.reserve(2)
    grown = values(cache, "4.key")
    assert cache.capacity == 8
    assert (grown[:2, :, :2] == 9).all()
    assert (grown[2:, :, :3] == 5).all()


def test_where_a_text_has_one_row_each_begins_with_them() -> None:
    cache = KVCache({4: LAYER}, batch=2, virtual=VIRTUAL)
    cache.reserve(1)
    assert (values(cache, "4.key")[:, :, :3] == 5).all()


def test_the_room_is_counted_without_virtual_tokens() -> None:
    cache = KVCache({4: LAYER}, batch=1, streams=2, virtual=VIRTUAL)
    assert cache.reserve(BLOCK - 3)
    assert cache.capacity == BLOCK
    assert cache.reserve(BLOCK - 2)
    assert cache.capacity == 2 * BLOCK


def test_a_group_binds_its_own_layers_whole_or_row_by_row() -> None:
    cache = KVCache({4: LAYER, 6: LayerCache(1, 16, ("shared",))}, batch=2, dtype="int8")
    cache.reserve(1)
    whole = {name: (shape, address) for name, shape, address in cache.bindings()}
    assert {name: shape for name, (shape, _) in whole.items()} == {
        "4.key": (2, 2, BLOCK, 8),
        "4.value": (2, 2, BLOCK, 8),
        "6.key": (2, 1, BLOCK, 16),
        "6.value": (2, 1, BLOCK, 16),
    }
    for name, shape, address in cache.bindings(row=1):
        assert shape == (1, *whole[name][0][1:])
        assert address - whole[name][1] == np.prod(shape)  # bytes of one row of int8
