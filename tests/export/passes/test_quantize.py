"""The quantizer on small graphs: which products and lookups it takes, and that they compute with the rounded values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from export.artifact import write_graph
from export.errors import TraceError
from export.passes import run_passes, weights
from export.passes.int8_compute import int8_compute
from export.passes.quantizable import OTHER_BIAS, ROUTER, SMALL, TRANSPOSED_OR_SCALED
from export.passes.quantization import Quantization, Quantized
from export.passes.quantize import Quantizer
from export.passes.quantize_experts import INT8_COMPUTE
from export.passes.rewrite import Declined, Outcome
from export.quantization.weight_format import dequantize, round_to_nearest
from tests.graphs import declared, graph, kinds, run, with_weights

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    values: np.ndarray = RNG.standard_normal(shape).astype(np.float32)
    return values


WEIGHTS = {
    "model.up.weight": normal(40, 64),  # (in, out)
    "model.up.bias": normal(64),
    "model.one.bias": normal(1),
    "model.row.bias": normal(1, 64),
    "model.up.adapter_bias": normal(64),
    "model.up.adapter_delta": normal(40, 64),
    "model.small.weight": normal(40, 25),
    "gate.gate_down.weight": normal(40, 64),
    "model.experts": normal(2, 40, 64),
    "model.lm_head.weight": normal(64, 30),
    "model.small_head.weight": normal(64, 15),
    "model.deep_head.weight": normal(2, 64, 30),
    "model.wide_head.weight": normal(40, 1024),
    "model.thin_head.weight": normal(25, 64),
    "model.embed.weight": normal(50, 40),  # (vocabulary, width)
    "model.even_embed.weight": normal(50, 64),
    "model.positions.weight": normal(50, 40),
}
X = normal(2, 3, 40)
IDS = np.array([[0, 49, 7], [3, 3, 12]])
PRODUCT = 'h = MatMul(x, "model.up.weight") '
HEAD = 'logits = MatMul(h, "model.lm_head.weight")'
BOTH = {"model.up.weight": True, "model.lm_head.weight": True}
INT4 = Quantization(4)


def made(lines: str, head: str = HEAD) -> ir.Model:
    """`lines` compute h out of x, (2, 3, 40), or of token ids."""
    text = f"""g (float[2, 3, 40] x, int64[2, 3] input_ids, int64[2, 3] others{declared(WEIGHTS, lines + head)})
        => (float[2, 3, v] logits)
        <int64[2] flat = {{6, 40}}, int64[1] first = {{0}}, int64[1] all = {{64}}, float scale = {{0.1}}>
        {{ {lines} {head} }}"""
    return with_weights(graph(text), WEIGHTS)


def logits(model: ir.Model) -> np.ndarray:
    output: np.ndarray = run(model, x=X, input_ids=IDS, others=IDS[::-1].copy())[0]
    return output


def rounded(model: ir.Model, names: dict[str, bool], settings: Quantization = INT4) -> ir.Model:
    """The same graph with its weights rounded; names: whether a weight is stored as (in, out)."""
    for name, in_by_out in names.items():
        channels = WEIGHTS[name].T if in_by_out else WEIGHTS[name]
        found = round_to_nearest(channels, settings.bits, settings.block_size, settings.symmetric)
        values = dequantize(found, channels.shape[1])
        values = np.ascontiguousarray(values.T if in_by_out else values)
        model.graph.initializers[name].const_value = ir.tensor(values, name=name)
    return model


def quantize(model: ir.Model, settings: Quantization) -> Quantized:
    """Run the pass; what it did."""
    quantizer = Quantizer(settings)
    quantizer(model)
    return quantizer.done


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * float(np.abs(expected).max()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_those_with_the_rounded_weights(bits: int, block_size: int, symmetric: bool) -> None:
    settings = Quantization(bits, block_size, symmetric)
    model = made(PRODUCT)
    done = quantize(model, settings)
    assert kinds(model) == ["MatMulNBits"] * 2
    assert {node.attributes.get_int("accuracy_level", -1) for node in model.graph} == {0}
    assert (done.matrices, done.embeddings, done.calibrated, done.kept) == (2, 0, 0, {})
    assert_same(logits(model), logits(rounded(made(PRODUCT), BOTH, settings)))


def test_what_the_weights_became_is_reported_by_their_names() -> None:
    model = made(PRODUCT)
    done = quantize(model, INT4)
    assert set(done.weights) == set(BOTH)
    expected = round_to_nearest(WEIGHTS["model.up.weight"].T, 4, 32, True)
    np.testing.assert_array_equal(done.weights["model.up.weight"].packed, expected.packed)
    assert done.bytes_before == 4 * (40 * 64 + 64 * 30)
    done.count_bytes(model)
    assert done.bytes_after == (64 + 30) * 2 * (16 + 4)  # two blocks an output, of 16 bytes and a scale


GEMM = 'f = Reshape(x, flat) g = Gemm(f, "model.up.weight"{bias}) h = Unsqueeze(g, first)'
ADDED = 'p = MatMul(x, "model.up.weight") '


@pytest.mark.parametrize(
    ("lines", "nodes"),
    [
        (ADDED + 'h = Add(p, "model.up.bias")', ["MatMulNBits"]),
        (ADDED + 'h = Add("model.up.bias", p)', ["MatMulNBits"]),
        (GEMM.format(bias=', "model.up.bias"'), ["Reshape", "MatMulNBits", "Unsqueeze"]),
        (GEMM.format(bias=""), ["Reshape", "MatMulNBits", "Unsqueeze"]),
        (ADDED + 'h = Add(p, "model.one.bias")', ["MatMulNBits", "Add"]),
        (ADDED + 'h = Add(p, "model.row.bias")', ["MatMulNBits", "Add"]),
        (ADDED + 'h = Add(p, "model.up.adapter_bias")', ["MatMulNBits", "Add"]),
        (ADDED + 's = Add(p, "model.up.bias") h = Add(s, p)', ["MatMulNBits", "Add", "Add"]),
        (ADDED + 'h = Mul(p, "model.up.bias")', ["MatMulNBits", "Mul"]),
    ],
    ids=["bias", "bias first", "Gemm", "Gemm without", "a number", "a row", "the adapter's", "two readers", "a scale"],
)
def test_a_bias_is_absorbed_where_nothing_else_reads_the_product(lines: str, nodes: list[str]) -> None:
    model = made(lines)
    assert quantize(model, INT4).matrices == 2
    assert kinds(model) == [*nodes, "MatMulNBits"]
    assert_same(logits(model), logits(rounded(made(lines), BOTH)))


UP = WEIGHTS["model.up.weight"].nbytes


@pytest.mark.parametrize(
    ("lines", "head", "kept", "declined"),
    [
        ('h = MatMul(x, "model.up.adapter_delta")', HEAD, {}, []),
        ('h = MatMul(x, "gate.gate_down.weight")', HEAD, {}, []),
        ('h = MatMul(x, "model.small.weight")', 'logits = MatMul(h, "model.thin_head.weight")', {}, [SMALL]),
        (
            GEMM.format(bias="").replace("Gemm", "Gemm<alpha = 2.0>"),
            HEAD,
            {"model.up.weight": UP},
            [TRANSPOSED_OR_SCALED],
        ),
        (GEMM.format(bias=', "model.row.bias"'), HEAD, {"model.up.weight": UP}, [OTHER_BIAS]),
        (
            GEMM.format(bias="").replace("Gemm(f", "Gemm<transA = 1>(t").replace(" g =", " t = Transpose(f) g ="),
            HEAD,
            {"model.up.weight": UP},
            [TRANSPOSED_OR_SCALED],
        ),
        ('a = Abs("model.up.weight") h = MatMul(x, a)', HEAD, {"model.up.weight": UP}, []),
        ('h = MatMul(x, "model.experts")', HEAD, {"model.experts": 2 * UP}, []),
        (
            'r = MatMul(x, "model.up.weight") s = Softmax(r) h, chosen = TopK(s, all)',
            HEAD,
            {"model.up.weight": UP},
            [ROUTER],
        ),
    ],
    ids=[
        "the adapter's",
        "the gate's",
        "small",
        "scaled",
        "of a bias in a row",
        "of a transposed input",
        "computed",
        "experts",
        "a router's",
    ],
)
def test_other_products_stay_and_the_backbones_are_listed(
    lines: str, head: str, kept: dict[str, int], declined: list[Declined]
) -> None:
    model, before = made(lines, head), made(lines, head)
    quantizer = Quantizer(INT4)
    assert quantizer(model) == Outcome(1, Counter(why.reason for why in declined))
    done = quantizer.done
    assert done.matrices == 1
    assert done.kept == kept
    assert kinds(model) == [*kinds(before)[:-1], "MatMulNBits"]
    assert_same(logits(model), logits(rounded(before, {name: True for name in done.weights})))


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_not_listed_among_what_was_kept(symmetric: bool) -> None:
    model = made("", 'logits = MatMul(x, "model.wide_head.weight")')
    done = quantize(model, Quantization(4, 32, symmetric))
    assert model.graph.initializers["model.wide_head.weight.scales"].shape == (1024, 2)
    assert done.kept == {}


def tied(name: str) -> ir.Model:
    """Embeddings that the head multiplies with."""
    head = f'logits = com.microsoft.FusedMatMul<transB = 1>(h, "{name}")'
    return made(f'e = Gather("{name}", input_ids) h = Mul(e, scale)', head)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("name", "block_size", "cut"),
    [("model.embed.weight", 32, ["Slice"]), ("model.even_embed.weight", 32, []), ("model.embed.weight", 16, ["Slice"])],
    ids=["of 40", "of 64", "of 40 in blocks of 16"],
)
def test_tied_embeddings_and_head_share_their_tensors(
    name: str, block_size: int, cut: list[str], bits: int, symmetric: bool
) -> None:
    settings = Quantization(bits, block_size, symmetric)
    model = tied(name)
    done = quantize(model, settings)
    assert (done.matrices, done.embeddings) == (1, 1)
    assert done.bytes_before == WEIGHTS[name].nbytes
    assert kinds(model) == ["Reshape", "GatherBlockQuantized", *cut, "Mul", "MatMulNBits"]
    reshape, gather, *_, head = model.graph
    assert reshape.inputs[0] is head.inputs[1]
    assert gather.inputs[2] is head.inputs[2]
    assert name not in model.graph.initializers
    assert_same(logits(model), logits(rounded(tied(name), {name: False}, settings)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_file_holds_tied_tensors_once_and_the_nodes_read_the_same_bytes(tmp_path: Path, symmetric: bool) -> None:
    model = tied("model.even_embed.weight")
    done = quantize(model, Quantization(4, 32, symmetric))
    before = logits(model)
    done.count_bytes(model)
    write_graph(model, tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size <= done.bytes_after
    written = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph
    assert [node.op_type for node in written.node] == ["GatherBlockQuantized", "Mul", "MatMulNBits"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": X, "input_ids": IDS, "others": IDS})[0], before)


def test_the_products_compute_in_int8_only_on_request() -> None:
    model = made(PRODUCT)
    quantize(model, INT4)
    exact = logits(model)
    assert int8_compute(model) == Outcome(2)
    assert {node.attributes.get_int("accuracy_level", 0) for node in model.graph} == {INT8_COMPUTE}
    difference = np.abs(logits(model) - exact).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()


def test_other_lookups_and_the_positions_table_stay_and_are_not_listed() -> None:
    lines = """a = Gather("model.embed.weight", input_ids) p = Gather("model.positions.weight", others)
        t = Gather<axis = 1>("model.even_embed.weight", first) e = Add(a, p) h = MatMul(e, "model.up.weight")"""
    model = made(lines)
    done = quantize(model, INT4)
    assert (done.matrices, done.embeddings, done.kept) == (2, 1, {})
    assert kinds(model).count("Gather") == 2
    assert_same(logits(model), logits(rounded(made(lines), {**BOTH, "model.embed.weight": False})))


def test_embeddings_of_the_adapter_stay() -> None:
    lines = 'a = Gather("model.embed.weight", input_ids) p = Gather("model.adapter_delta", input_ids) e = Add(a, p)'
    weights_ = {**WEIGHTS, "model.adapter_delta": normal(50, 40)}
    head = 'h = MatMul(e, "model.up.weight") ' + HEAD
    text = (
        f"g (int64[2, 3] input_ids{declared(weights_, lines + head)}) => (float[2, 3, v] logits) {{ {lines} {head} }}"
    )
    model = with_weights(graph(text), weights_)
    assert quantize(model, INT4).embeddings == 1
    assert "model.adapter_delta" in model.graph.initializers


@pytest.mark.parametrize(
    "head",
    [
        'logits = MatMul(h, "model.small_head.weight")',
        'logits = MatMul(h, "model.deep_head.weight")',
        'a = Abs("model.lm_head.weight") logits = MatMul(h, a)',
        "logits = Mul(h, scale)",
    ],
    ids=["small", "of three dimensions", "computed", "none"],
)
def test_a_head_that_is_not_quantized_is_an_error(head: str) -> None:
    with pytest.raises(TraceError, match="lm_head was not quantized"):
        run_passes(made(PRODUCT if "MatMul" in head else "h = Abs(x)", head), INT4)


def test_a_head_behind_a_scale_and_a_cap_is_found() -> None:
    head = 'l = MatMul(h, "model.lm_head.weight") s = Mul(l, scale) logits = Tanh(s)'
    model = made(PRODUCT, head)
    quantize(model, INT4)
    assert kinds(model) == ["MatMulNBits", "MatMulNBits", "Mul", "Tanh"]


def test_calibrated_weights_take_the_place_of_rounded_ones_by_their_layers_name() -> None:
    other = round_to_nearest(WEIGHTS["model.up.weight"].T + 0.1, 4, 32, True)
    model = made(PRODUCT)
    done = quantize(model, Quantization(4, calibrated={"up": other}))
    assert done.calibrated == 1
    assert done.weights["model.up.weight"] is other
    expected = rounded(made(PRODUCT), BOTH)
    values = np.ascontiguousarray(dequantize(other, 40).T)
    expected.graph.initializers["model.up.weight"].const_value = ir.tensor(values, name="model.up.weight")
    assert_same(logits(model), logits(expected))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [5, 6, 8])
def test_a_node_has_the_width_of_its_weight(bits: int, symmetric: bool) -> None:
    other = round_to_nearest(WEIGHTS["model.even_embed.weight"], bits, 32, symmetric)
    model = tied("model.even_embed.weight")
    done = quantize(model, Quantization(4, calibrated={"even_embed": other}))
    assert {node.attributes.get_int("bits", 0) for node in model.graph if node.domain} == {8}
    assert done.weights["model.even_embed.weight"] is other
    assert done.widths == {bits: 50 * 64}  # once, for the lookup and the product
    assert done.mean_bits == bits
    expected = tied("model.even_embed.weight")
    values = dequantize(other, 64)
    expected.graph.initializers["model.even_embed.weight"].const_value = ir.tensor(values, name="w")
    assert_same(logits(model), logits(expected))


@pytest.mark.parametrize("symmetric", [True, False])
def test_parts_of_different_widths_are_one_product(symmetric: bool) -> None:
    names, widths = [f"model.{part}.weight" for part in "qkv"], (4, 6, 5)
    channels = np.split(WEIGHTS["model.up.weight"].T, [32, 48])
    parts = [round_to_nearest(rows, bits, 32, symmetric) for rows, bits in zip(channels, widths, strict=True)]
    model = made(PRODUCT)
    weights.note_parts(model.graph.initializers["model.up.weight"], names, [32, 16, 16])
    done = quantize(model, Quantization(4, calibrated=dict(zip("qkv", parts, strict=True))))
    assert [done.weights[name].bits for name in names] == list(widths)
    expected = rounded(made(PRODUCT), BOTH)
    values = np.concatenate([dequantize(part, 40) for part in parts]).T.copy()
    expected.graph.initializers["model.up.weight"].const_value = ir.tensor(values, name="w")
    assert_same(logits(model), logits(expected))


def test_a_packed_weight_is_quantized_by_its_parts() -> None:
    names, sizes = [f"model.{part}.base_layer.weight" for part in "qkv"], [32, 16, 16]
    other = round_to_nearest(normal(16, 40), 4, 32, True)
    model = made(PRODUCT)
    weights.note_parts(model.graph.initializers["model.up.weight"], names, sizes)
    done = quantize(model, Quantization(4, calibrated={"k": other}))
    assert set(done.weights) == {*names, "model.lm_head.weight"}
    assert done.weights[names[1]] is other
    for name, rows in ((names[0], slice(0, 32)), (names[2], slice(48, 64))):
        expected = round_to_nearest(WEIGHTS["model.up.weight"].T[rows], 4, 32, True)
        np.testing.assert_array_equal(done.weights[name].packed, expected.packed)
    packed = weights.matrix(model.graph.initializers["model.up.weight.int4"])
    np.testing.assert_array_equal(packed, np.concatenate([done.weights[name].packed for name in names]))


def test_the_quantizer_runs_after_the_other_passes() -> None:
    model = made(PRODUCT.replace("h =", "p =") + "s = Sigmoid(p) h = Mul(p, s)")
    outcomes, quantized = run_passes(model, INT4)
    assert quantized is not None
    assert (outcomes["fuse_silu"], outcomes["quantize"]) == (Outcome(1), Outcome(2))
    assert kinds(model) == ["MatMulNBits", "QuickGelu", "MatMulNBits"]
    assert {str(value.name) for value in model.graph.inputs} == {"x"}


def test_without_settings_nothing_is_quantized() -> None:
    outcomes, quantized = run_passes(made(PRODUCT))
    assert quantized is None
    assert "quantize" not in outcomes
