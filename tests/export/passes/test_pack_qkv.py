"""Queries, keys and values from one product, with biases and low-rank changes, and which stay apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from export.passes import weights
from export.passes.low_rank import pack_low_rank
from export.passes.pack_qkv import pack_qkv
from export.passes.projections import OTHER_INPUT, OTHER_LOWS, OTHER_TERM, READ_TWICE
from export.passes.rewrite import Declined, Outcome
from tests.export.passes.projections import HEAD, KV_HEADS, MASK, RANKS, SIZES, WEIGHTS, WIDTH, X, assert_same
from tests.graphs import declared, graph, kinds, run, with_weights


def attention(lines: str) -> ir.Model:
    """One attention node over q, k and v, which `lines` compute from x and y (B, S, 32)."""
    text = f"""g (float[2, 3, 32] x, float[2, 3, 32] y, float[2, 1, 1] mask{declared(WEIGHTS, lines)},
        float[2, 2, past, 8] past_key, float[2, 2, past, 8] past_value, int32[2] lengths, int32 total)
        => (float[2, 3, 32] z, float[2, 2, all, 8] key, float[2, 2, all, 8] value)
        <int64[3] ranks = {{2, 3, 4}}, int64[2] qv_ranks = {{2, 4}}>
        {{ {lines}
        z, key, value = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>
            (q, k, v, past_key, past_value, lengths, total) }}"""
    return with_weights(graph(text), WEIGHTS)


def run_attention(model: ir.Model) -> list[np.ndarray]:
    empty = np.zeros((2, KV_HEADS, 0, HEAD), np.float32)
    return run(
        model,
        x=X,
        y=X[::-1].copy(),
        mask=MASK,
        past_key=empty,
        past_value=empty,
        lengths=np.full(2, 2, np.int32),
        total=np.array(3, np.int32),
    )


def product(part: str, output: str = "", x: str = "x") -> str:
    return f'{output or part} = MatMul({x}, "model.{part}.weight")\n'


def biased(part: str) -> str:
    return product(part, f"{part}w") + f'{part} = Add({part}w, "model.{part}.bias")\n'


def changed(part: str, low: str, bias: bool = False) -> str:
    frozen = product(part, f"{part}w") + (f'{part}s = Add("model.{part}.bias", {part}w)\n' if bias else "")
    change = f'{part}c = MatMul({low}, "model.{part}.adapter_b")\n'
    return frozen + change + f"{part} = Add({part}{'s' if bias else 'w'}, {part}c)\n"


ONE_LOW = """a = Concat<axis = 1>("model.q.adapter_a", "model.k.adapter_a", "model.v.adapter_a")
    m = MatMul(x, a) n = Mul(m, mask) ql, kl, vl = Split<axis = -1>(n, ranks)\n"""
QV_LOW = """a = Concat<axis = 1>("model.q.adapter_a", "model.v.adapter_a")
    m = MatMul(x, a) n = Mul(m, mask) ql, vl = Split<axis = -1>(n, qv_ranks)\n"""
OWN_LOWS = "".join(f'{p}a = MatMul(x, "model.{p}.adapter_a") {p}l = Mul({p}a, mask)\n' for p in "qkv")
PLAIN = product("q") + product("k") + product("v")
CHANGED = changed("q", "ql") + changed("k", "kl") + changed("v", "vl")


@pytest.mark.parametrize(
    ("lines", "nodes"),
    [
        (PLAIN, ["MatMul"]),
        (biased("q") + biased("k") + biased("v"), ["MatMul", "Add"]),
        (biased("q") + product("k") + biased("v"), ["MatMul", "Add"]),
        (ONE_LOW + CHANGED, ["Concat", "MatMul", "Mul", "MatMul", "MatMul", "Add"]),
        (
            ONE_LOW + changed("q", "ql", True) + changed("k", "kl") + changed("v", "vl", True),
            ["Concat", "MatMul", "Mul", "MatMul", "Add", "MatMul", "Add"],
        ),
        (
            QV_LOW + changed("q", "ql") + product("k") + changed("v", "vl"),
            ["Concat", "MatMul", "Mul", "MatMul", "MatMul", "Add"],
        ),
    ],
    ids=["plain", "biases", "biases of some", "low-rank changes", "biases and changes", "changes of q and v"],
)
def test_queries_keys_and_values_come_from_one_product(lines: str, nodes: list[str]) -> None:
    model = attention(lines)
    before = run_attention(model)
    assert pack_qkv(model) == Outcome(1)
    assert kinds(model) == [*nodes, "GroupQueryAttention"]
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert [value is None for value in node.inputs[:4]] == [False, True, True, False]
    packed = model.graph.initializers["model.q.weight.qkv"]
    assert weights.parts(packed) == tuple(f"model.{part}.weight" for part in "qkv")
    assert weights.part_sizes(packed, sum(SIZES.values())) == tuple(SIZES.values())
    assert not any(name in model.graph.initializers for name in weights.parts(packed))
    assert_same(run_attention(model), before)
    assert pack_qkv(model) == Outcome()


def test_the_passes_fit_together() -> None:
    model = attention(OWN_LOWS + CHANGED)
    before = run_attention(model)
    assert pack_low_rank(model) == Outcome(2)
    assert pack_qkv(model) == Outcome(1)
    assert sorted(kinds(model)) == ["Add", "GroupQueryAttention", "MatMul", "MatMul", "MatMul", "Mul"]
    factors = [value for value in model.graph.initializers.values() if weights.is_adapter(value)]
    assert {value.name: weights.matrix(value).shape for value in factors if weights.constant_matrix(value)} == {
        "model.q.adapter_a.packed": (WIDTH, sum(RANKS.values())),
        "model.q.weight.qkv.adapter_b": (sum(RANKS.values()), sum(SIZES.values())),
    }
    assert_same(run_attention(model), before)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            product("q", "qr") + "q = Abs(qr)" + product("k") + product("v"),
            Declined("Abs stands between a projection and attention"),
        ),
        (product("q") + product("k", x="y") + product("v"), OTHER_INPUT),
        (
            product("q") + product("k") + "v = Identity(x)",
            Declined("Identity stands between a projection and attention"),
        ),
        (PLAIN.replace("model.v.weight", "model.v.adapter_delta"), OTHER_TERM),
        (biased("q") + biased("k") + biased("v").replace("model.v.bias", "model.v.adapter_bias"), OTHER_TERM),
        (
            product("q") + product("k") + product("v", "vw") + 'vd = MatMul(x, "model.v.weight") v = Add(vw, vd)',
            OTHER_TERM,
        ),
        (OWN_LOWS + CHANGED, OTHER_LOWS),
        (OWN_LOWS + changed("q", "ql") + product("k") + product("v"), OTHER_LOWS),
        (ONE_LOW.replace("ql, kl, vl", "kx, kl, vl") + "ql = Neg(kx)\n" + CHANGED, OTHER_LOWS),
        (ONE_LOW + changed("q", "kl") + changed("k", "ql") + changed("v", "vl"), OTHER_LOWS),
        (ONE_LOW + changed("q", "ql") + product("k") + changed("v", "vl"), OTHER_LOWS),
        (PLAIN + "dead = Abs(k)", READ_TWICE),
    ],
    ids=[
        "something in between",
        "another input",
        "no product",
        "the adapter's matrix",
        "the adapter's bias",
        "two products",
        "lows of their own",
        "a change of one alone",
        "a low that is not the split's",
        "lows in another order",
        "a part of the split that is not read here",
        "another reader",
    ],
)
def test_other_queries_keys_and_values_stay_apart(lines: str, reason: Declined) -> None:
    model = attention(lines)
    before = kinds(model)
    assert pack_qkv(model) == Outcome(0, Counter({reason.reason: 1}))
    assert kinds(model) == before


SPLITS = "".join(f"{p}0, {p}1 = Split<axis = 0, num_outputs = 2>({p}) " for p in "qkv")


def two_streams(type_: str, lines: str) -> ir.Model:
    """A node of attention for each stream, over its row of q, k and v."""
    caches = ", ".join(f"{type_}[1, 2, past, 8] {name}" for name in ("ka", "va", "kb", "vb"))
    text = f"""g ({type_}[2, 3, 32] x, {type_}[2, 1, 1] mask{declared(WEIGHTS, lines).replace("float", type_)},
        {caches}, int32[1] lengths, int32 total) => ({type_}[2, 3, 32] z) <int64[3] ranks = {{2, 3, 4}}>
        {{ {lines}
        z0, pk0, pv0 = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>
            (q0, k0, v0, ka, va, lengths, total)
        z1, pk1, pv1 = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>
            (q1, k1, v1, kb, vb, lengths, total)
        z = Concat<axis = 0>(z0, z1) }}"""
    half = {name: values.astype(np.float16) for name, values in WEIGHTS.items()}
    return with_weights(graph(text), half if type_ == "float16" else WEIGHTS)


def test_in_half_precision_each_stream_takes_its_rows_of_one_product() -> None:
    model = two_streams(
        "float16", ONE_LOW + changed("q", "ql", True) + changed("k", "kl") + changed("v", "vl") + SPLITS
    )
    empty = np.zeros((1, KV_HEADS, 0, HEAD), np.float16)
    inputs: dict[str, np.ndarray] = {name: empty for name in ("ka", "va", "kb", "vb")} | {
        "x": X.astype(np.float16),
        "mask": MASK.astype(np.float16),
        "lengths": np.full(1, 2, np.int32),
        "total": np.array(3, np.int32),
    }
    (before,) = run(model, **inputs)
    assert pack_qkv(model) == Outcome(1)
    attention_nodes = ["Split", "GroupQueryAttention", "GroupQueryAttention", "Concat"]
    assert kinds(model) == ["Concat", "MatMul", "Mul", "MatMul", "Add", "MatMul", "Add", *attention_nodes]
    (after,) = run(model, **inputs)
    np.testing.assert_allclose(after, before, atol=0.05)  # sums of other float16 terms; values of up to 20
    assert np.abs(before).max() > 4
    assert not np.allclose(before[0], before[1], atol=1)


@pytest.mark.parametrize(
    ("type_", "lines"),
    [
        ("float", PLAIN + SPLITS),  # the portable form for CPUs
        ("float16", PLAIN + SPLITS.replace("q0, q1", "q1, q0")),
        ("float16", PLAIN + SPLITS + "again = Abs(k0)"),
    ],
    ids=["float32", "rows in another order", "another reader"],
)
def test_other_streams_keep_products_of_their_own(type_: str, lines: str) -> None:
    model = two_streams(type_, lines)
    before = kinds(model)
    assert pack_qkv(model) == Outcome(0, Counter({"Split stands between a projection and attention": 2}))
    assert kinds(model) == before
