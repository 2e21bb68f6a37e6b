"""Random nodes of every operator: valid ones, and ones that contradict themselves, as a damaged graph would have."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
_VALUES = np.random.default_rng(0).standard_normal(1 << 18, np.float32)


@dataclass
class Node:
    """An operator, its inputs (None: left out) and its attributes."""

    operator: str
    inputs: dict[str, Array | None]
    attributes: dict[str, Any]
    outputs: int = 1
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the outputs of a valid node


class Nodes:
    """Nodes of one seed. small: for mutations, which need no large ones."""

    def __init__(self, seed: int, small: bool = False) -> None:
        self.random, self.numbers, self.small = Random(seed), np.random.default_rng(seed), small

    def valid(self) -> Node:
        """A node that must run."""
        return self.random.choice((self._product, self._product, self._attention, self._attention, self._gather))()

    def contradicting(self) -> Node:
        """A valid node with one to three things changed; most of them contradict themselves."""
        node = self.valid()
        for _ in range(self.random.randint(1, 3)):
            self.random.choice((self._change_attribute, self._change_shape, self._change_type, self._change_values))(
                node
            )
        return node

    def _floats(self, *shape: int, half: bool = False) -> Array:
        start = self.random.randrange(_VALUES.size)
        values: Array = np.resize(_VALUES[start:] if math.prod(shape) <= _VALUES.size - start else _VALUES, shape)
        if values.size and self.random.random() < 0.05:
            values.flat[self.random.randrange(values.size)] = self.random.choice([np.nan, np.inf, 3e38, 1e-45, -0.0])
        with np.errstate(over="ignore"):
            return values.astype(np.float16) if half else values

    def _product(self) -> Node:
        pick = self.random.choice
        bits, block = pick([4, 5, 6, 8]), pick([32, 64, 128])
        k = pick([1, 7, 32, 33, 64, 65] if self.small else [1, 7, 16, 31, 33, 64, 100, 127, 128, 129, 257, 640])
        n = pick([1, 2, 17, 33] if self.small else [1, 2, 15, 16, 17, 31, 33, 64, 65, 129, 511])
        rows = pick([0, 1, 2, 5, 17, 20] if self.small else [1, 2, 3, 4, 5, 8, 15, 16, 17, 18, 33, 64, 257, 300])
        rows = min(rows, max(1, 2_000_000 // (k * n))) if rows else 0
        names, rank = pick([("",), ("gate_", "up_")]), pick([0, 0, 1, 5, 16, 17, 33])
        blocks = -(-k // block)
        inputs: dict[str, Array | None] = {"x": self._floats(rows, k)}
        for name in names:
            zeros, bias, half = (self.random.random() < 0.5 for _ in range(3))
            inputs |= {
                f"{name}weights": self._bytes(n, blocks, block if bits == 8 else block // 2),
                f"{name}scales": self._floats(n, blocks, half=half),
                f"{name}zeros": self._bytes(n, -(-blocks // 2) if bits == 4 else blocks) if zeros else None,
                f"{name}bias": self._floats(n) if bias else None,
            }
        operator = "QuantizedSwiGLU" if len(names) == 2 else "QuantizedMatMul"
        if rank:
            operator += "LowRank"
            count = pick([part for part in range(1, rows + 1) if rows % part == 0] or [0])
            inputs["rows"] = np.array([pick([0.0, 1.0, 0.5]) for _ in range(count)], np.float32)
            for name in names:
                half_a, half_b = (self.random.random() < 0.5 for _ in range(2))
                inputs[f"{name}a"] = self._floats(k, rank, half=half_a)
                inputs[f"{name}b"] = self._floats(rank, n, half=half_b)
        if bits in (5, 6):
            inputs |= {f"{name}more": self._bytes(n, -(-blocks * block // 128), 16 * (bits - 4)) for name in names}
        return Node(operator, inputs, {"K": k, "N": n, "bits": bits, "block_size": block}, 1, [(rows, n)])

    def _bytes(self, *shape: int) -> Array:
        return self.numbers.integers(0, 256, shape, np.uint8)

    def _gather(self) -> Node:
        pick = self.random.choice
        bits, block, blocks, n = pick([5, 6]), pick([32, 64, 128]), pick([0, 1, 2, 5]), pick([1, 2, 17, 300])
        ids = pick([(1, 1), (2, 1), (2, 3), (1, 20), (0, 4), (3,), (1, 2, 1)])
        inputs: dict[str, Array | None] = {
            "ids": self.numbers.integers(0, n, ids, np.int64),
            "weights": self._bytes(n, blocks, block // 2),
            "more": self._bytes(n, -(-blocks * block // 128), 16 * (bits - 4)),
            "scales": self._floats(n, blocks, half=self.random.random() < 0.5),
            "zeros": self._bytes(n, blocks) if self.random.random() < 0.5 else None,
        }
        return Node("QuantizedGather", inputs, {"bits": bits, "block_size": block}, 1, [(*ids, blocks * block)])

    def _attention(self) -> Node:
        pick = self.random.choice
        rows, heads = self.random.randint(1, 3 if self.small else 6), self.random.randint(1, 9)
        kv_heads = pick([part for part in range(1, heads + 1) if heads % part == 0])
        if not self.small and self.random.random() < 0.05:
            heads, kv_heads = 70, 1  # more than a task computes at once
        size = pick([16, 32] if self.small else [16, 32, 48, 64, 80, 128, 256])
        tokens = pick([1, 1, 2, 5] if self.small else [1, 1, 1, 2, 3, 7, 33, 65])
        lengths = [0, 1, 5, 20] if self.small else [0, 1, 5, 63, 64, 65, 100, 512, 513]
        if heads * size > 1000 or tokens > 1:  # long caches are read in parts for one token
            lengths = [length for length in lengths if length < 100]
        known = [pick(lengths) for _ in range(rows)]
        new = [pick([tokens, tokens, self.random.randint(0, tokens)]) for _ in range(rows)]
        after = [old + fresh for old, fresh in zip(known, new, strict=True)]
        capacity = max(known) + tokens + pick([0, 0, 3])
        past = pick([capacity, capacity, max(known)])
        total = capacity if past < capacity else max(after)
        packed, rotary = self.random.random() < 0.5, pick([None, "half", "pairs"])
        half = pick([size // 2, size // 4, 8])
        width, kv_width = heads * size, kv_heads * size
        table = (max(1, *after), half)
        inputs: dict[str, Array | None] = {
            "query": self._floats(rows, tokens, width + 2 * kv_width if packed else width),
            "key": None if packed else self._floats(rows, tokens, kv_width),
            "value": None if packed else self._floats(rows, tokens, kv_width),
            "past_key": self._floats(rows, kv_heads, past, size),
            "past_value": self._floats(rows, kv_heads, past, size),
            "seqlens_k": np.array(after, np.int32) - np.int32(1),
            "total": np.array(total, np.int32),
            "cos": self._floats(*table) if rotary else None,
            "sin": self._floats(*table) if rotary else None,
            "query_seqlens": np.array(new, np.int32),
        }
        attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": pick([0.3, 0.0])}
        attributes |= {"do_rotary": int(rotary is not None), "rotary_interleaved": int(rotary == "pairs")}
        attributes["local_window_size"] = pick([-1, -1, 1, 5, 64, 100])
        cache = (rows, kv_heads, max(past, total), size)
        return Node("GroupQueryAttention", inputs, attributes, 3, [(rows, tokens, width), cache, cache])

    def _change_attribute(self, node: Node) -> None:
        name = self.random.choice(list(node.attributes) or ["K"])
        value = node.attributes.get(name, 1)
        if self.random.random() < 0.1:
            node.attributes.pop(name, None)
        elif name == "scale":
            node.attributes[name] = self.random.choice([float("nan"), float("inf"), -1.0, 1e38, 1, "1"])
        else:
            near = [] if isinstance(value, str) else [int(value) - 1, int(value) + 1, int(value) * 2, -int(value)]
            far = [0, 1, 3, 16, 256, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1, -(2**31), -(2**63)]
            other = [1.0, "1"]
            choices: list[list[Any]] = [near or far, far, other]
            node.attributes[name] = self.random.choice(self.random.choice(choices))

    def _given(self, node: Node) -> str:
        return self.random.choice([name for name, values in node.inputs.items() if values is not None])

    def _change_shape(self, node: Node) -> None:
        name = self._given(node)
        values = node.inputs[name]
        assert values is not None
        kind = self.random.randrange(5)
        if kind == 0:
            node.inputs[name] = None if name not in ("x", "query", "ids") else values
        elif kind == 1:
            node.inputs[name] = values.reshape(-1)
        elif kind == 2:
            node.inputs[name] = values.T
        elif kind == 3:
            node.inputs[name] = values.reshape([1] * self.random.randint(1, 9) + list(values.shape))
        else:
            node.inputs[name] = np.zeros((), values.dtype)

    def _resize(self, node: Node) -> None:
        """Another size of a dimension, of one input or of all of the same shape: cos and sin, keys and values."""
        name = self._given(node)
        found = node.inputs[name]
        assert found is not None
        if found.ndim == 0:
            return
        shape, at = found.shape, self.random.randrange(found.ndim)
        size = self.random.choice([0, 1, max(shape[at] - 1, 0), shape[at] + 1, 2 * shape[at], 4 * shape[at]])
        alone = self.random.random() < 0.3
        for other, values in node.inputs.items():
            if values is not None and values.shape == shape and (other == name or not alone):
                node.inputs[other] = np.resize(values, (*shape[:at], size, *shape[at + 1 :]))

    def _change_type(self, node: Node) -> None:
        name = self._given(node)
        values = node.inputs[name]
        assert values is not None
        kinds = [np.float16, np.float32, np.float64, np.uint8, np.int8, np.int32, np.int64, np.bool_]
        with np.errstate(all="ignore"):
            node.inputs[name] = values.astype(self.random.choice(kinds))

    def _change_values(self, node: Node) -> None:
        """Numbers that address memory, if the node has them."""
        names = [
            name for name in ("seqlens_k", "total", "query_seqlens", "rows", "ids") if node.inputs.get(name) is not None
        ]
        if not names:
            return
        name = self.random.choice(names)
        values = node.inputs[name]
        assert values is not None
        changed = values.copy()
        if changed.size:
            place = self.random.randrange(changed.size)
            numbers: list[float] = [
                -1,
                0,
                1,
                2,
                5,
                21,
                1000,
                *(float(changed.flat[place]) + step for step in (-1, 1, 60)),
            ]
            if changed.dtype.kind == "i" and name != "total":  # AddressSanitizer has no exception for lack of memory
                numbers += [-5, 2**31 - 1, 2**31 - 2, -(2**31)]
            elif changed.dtype.kind == "f":
                numbers += [float("nan"), float("inf"), 60000]
            with np.errstate(all="ignore"):
                changed.flat[place] = np.array(self.random.choice(numbers)).astype(changed.dtype)
        node.inputs[name] = changed
