"""The passes that make one node of several, and the weights' names in the trace that they know whose is whose by."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript import optimizer

from export.passes import weights
from export.passes.low_rank import pack_low_rank
from export.passes.pack_qkv import pack_qkv
from export.passes.silu import fuse_silu
from export.trace import _should_fold
from tests.graphs import declared, graph, kinds, run, with_weight, with_weights

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


def low_rank(lines: str, outputs: str = "q, k") -> ir.Model:
    """Products of x and y with low-rank factors; two masks."""
    names = ", ".join(f"float[2, 3, r_{name}] {name}" for name in outputs.split(", "))
    text = (
        f"g (float[2, 3, 32] x, float[2, 3, 32] y, float[2, 1, 1] mask, float[2, 1, 1] other{declared(WEIGHTS, lines)})"
    )
    return with_weights(graph(f"{text} => ({names}) {{ {lines} }}"), WEIGHTS)


def run_low_rank(model: ir.Model) -> list[np.ndarray]:
    return run(model, x=X, y=X[::-1].copy(), mask=MASK, other=1 - MASK)


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)  # sums of 32 terms in another order


def lows(part: str, x: str = "x", mask: str = "mask") -> str:
    return f'p{part} = MatMul({x}, "model.{part}.adapter_a") {part} = Mul(p{part}, {mask})\n'


def test_first_products_of_low_rank_changes_become_one() -> None:
    model = low_rank(lows("q") + lows("k") + 'pv = MatMul(x, "model.v.adapter_a") v = Mul(mask, pv)', "q, k, v")
    before = run_low_rank(model)
    assert pack_low_rank(model) == 2
    assert kinds(model) == ["MatMul", "Mul", "Split"]
    packed = model.graph.initializers["model.q.adapter_a.packed"]
    assert weights.parts(packed) == tuple(f"model.{part}.adapter_a" for part in "qkv")
    assert weights.is_adapter(packed)
    assert list(model.graph.initializers) == ["model.q.adapter_a.packed", "model.q.adapter_a.packed.ranks"]
    assert [value.name for value in model.graph.outputs] == ["q", "k", "v"]
    assert_same(run_low_rank(model), before)


def test_a_factor_that_layers_share_stays_for_the_one_that_is_not_packed() -> None:
    line = 'pz = MatMul(y, "model.q.adapter_a") v = Mul(pz, mask)'
    model = low_rank(lows("q") + lows("k") + line, "q, k, v")
    before = run_low_rank(model)
    assert pack_low_rank(model) == 1
    assert "model.q.adapter_a" in model.graph.initializers
    assert_same(run_low_rank(model), before)


def test_products_are_packed_by_input() -> None:
    model = low_rank(
        lows("q") + lows("k") + 'a = MatMul(y, "model.v.adapter_a") v = Mul(a, mask)'
        'b = MatMul(y, "model.q.adapter_a") w = Mul(b, mask)',
        "q, k, v, w",
    )
    before = run_low_rank(model)
    assert pack_low_rank(model) == 2
    assert sorted(kinds(model)) == ["MatMul"] * 2 + ["Mul"] * 2 + ["Split"] * 2
    assert_same(run_low_rank(model), before)


@pytest.mark.parametrize(
    "lines",
    [
        lows("q") + lows("k", x="y"),
        lows("q") + lows("k", mask="other"),
        lows("q") + 'pk = MatMul(x, "model.k.weight") k = Mul(pk, mask)',
        lows("q") + 'pk = MatMul(x, "model.k.adapter_a") m = Mul(pk, mask) n = Abs(pk) k = Add(m, n)',
        lows("q") + 'pk = MatMul(x, "model.k.adapter_a") k = Add(pk, mask)',
        lows("q") + 'a = Abs("model.k.adapter_a") pk = MatMul(x, a) k = Mul(pk, mask)',
        lows("q") + "k = Mul(x, mask)",
    ],
    ids=["another input", "another mask", "the backbone's", "another reader", "no mask", "computed", "one alone"],
)
def test_other_products_are_not_packed(lines: str) -> None:
    model = low_rank(lines)
    before = kinds(model)
    assert pack_low_rank(model) == 0
    assert kinds(model) == before


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
    assert pack_qkv(model) == 1
    assert kinds(model) == [*nodes, "GroupQueryAttention"]
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert [value is None for value in node.inputs[:4]] == [False, True, True, False]
    packed = model.graph.initializers["model.q.weight.qkv"]
    assert weights.parts(packed) == tuple(f"model.{part}.weight" for part in "qkv")
    assert weights.part_sizes(packed, sum(SIZES.values())) == tuple(SIZES.values())
    assert not any(name in model.graph.initializers for name in weights.parts(packed))
    assert_same(run_attention(model), before)
    assert pack_qkv(model) == 0


def test_the_passes_fit_together() -> None:
    model = attention(OWN_LOWS + CHANGED)
    before = run_attention(model)
    assert pack_low_rank(model) == 2
    assert pack_qkv(model) == 1
    assert sorted(kinds(model)) == ["Add", "GroupQueryAttention", "MatMul", "MatMul", "MatMul", "Mul"]
    factors = [value for value in model.graph.initializers.values() if weights.is_adapter(value)]
    assert {value.name: weights.matrix(value).shape for value in factors if weights.constant_matrix(value)} == {
        "model.q.adapter_a.packed": (WIDTH, sum(RANKS.values())),
        "model.q.weight.qkv.adapter_b": (sum(RANKS.values()), sum(SIZES.values())),
    }
    assert_same(run_attention(model), before)


@pytest.mark.parametrize(
    "lines",
    [
        product("q", "qr") + "q = Abs(qr)" + product("k") + product("v"),
        product("q") + product("k", x="y") + product("v"),
        product("q") + product("k") + "v = Identity(x)",
        PLAIN.replace("model.v.weight", "model.v.adapter_delta"),
        biased("q") + biased("k") + biased("v").replace("model.v.bias", "model.v.adapter_bias"),
        product("q") + product("k") + product("v", "vw") + 'vd = MatMul(x, "model.v.weight") v = Add(vw, vd)',
        OWN_LOWS + CHANGED,
        OWN_LOWS + changed("q", "ql") + product("k") + product("v"),
        ONE_LOW.replace("ql, kl, vl", "kx, kl, vl") + "ql = Neg(kx)\n" + CHANGED,
        ONE_LOW + changed("q", "kl") + changed("k", "ql") + changed("v", "vl"),
        ONE_LOW + changed("q", "ql") + product("k") + changed("v", "vl"),
        PLAIN + "dead = Abs(k)",
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
def test_other_queries_keys_and_values_stay_apart(lines: str) -> None:
    model = attention(lines)
    before = kinds(model)
    assert pack_qkv(model) == 0
    assert kinds(model) == before


@pytest.mark.parametrize("operands", ["x, s", "s, x"])
def test_a_value_times_its_sigmoid_is_one_node(operands: str) -> None:
    model = graph(f"g (float[2, 3, 32] x) => (float[2, 3, 32] z) {{ s = Sigmoid(x) z = Mul({operands}) }}")
    before = run(model, x=10 * X)
    assert fuse_silu(model) == 1
    assert kinds(model) == ["QuickGelu"]
    assert [value.name for value in model.graph.outputs] == ["z"]
    np.testing.assert_allclose(run(model, x=10 * X)[0], before[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "lines",
    ["s = Sigmoid(x) m = Mul(x, s) z = Add(m, s)", "s = Sigmoid(x) z = Mul(s, y)", "s = Sigmoid(x) z = Mul(s, s)"],
    ids=["two readers", "another value", "squared"],
)
def test_other_sigmoids_stay(lines: str) -> None:
    model = graph(f"g (float[2, 3, 32] x, float[2, 3, 32] y) => (float[2, 3, 32] z) {{ {lines} }}")
    before = kinds(model)
    assert fuse_silu(model) == 0
    assert kinds(model) == before


def test_a_traced_weight_keeps_its_name_and_its_layout_while_other_constants_are_folded() -> None:
    text = """g (float[2, 3, 32] x, float[32, 32] "model.q.weight") => (float[2, 3, 32] z)
        <float one = {1}, float two = {2}>
        { t = Transpose<perm = [1, 0]>("model.q.weight")
          p = MatMul(x, t)
          three = Add(one, two)
          z = Mul(p, three) }"""
    model = with_weight(graph(text), "model.q.weight", WEIGHTS["model.q.weight"])
    before = run(model, x=X)
    optimizer.optimize_ir(model, should_fold=_should_fold)
    assert kinds(model) == ["Transpose", "MatMul", "Mul"]
    assert next(iter(model.graph)).inputs[0] is model.graph.initializers["model.q.weight"]
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])
