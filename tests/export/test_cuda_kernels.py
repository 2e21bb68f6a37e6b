"""Nodes without a CUDA kernel are named, and what is exported in half precision has none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.cuda.zoo import graphs_of
from export.cuda_kernels import CudaKernels, cuda_kernels
from export.errors import TraceError
from export.report import report_cuda_kernels
from export.settings import ExportSettings
from tests.adapters import make_siamese_with
from tests.graphs import graph
from tests.zoo import make_zoo_base

# An architecture -> precision and kinds of weights. Between them: experts as one node and one by one, routers in half
# precision, rotations of every kind, padded heads, biases of keys, norms that scale in float32, float32 positions,
# layers of one stream.
MODELS: dict[str, tuple[str, Sequence[str]]] = {
    "bloom": ("fp16", ["float", "int8"]),
    "codegen": ("fp16", ["float"]),
    "gemma3": ("fp16", ["float", "int4"]),
    "mixtral": ("fp16", ["float", "int4"]),
    "xglm": ("fp16", ["float", "int4"]),
    "deepseek_v3": ("bf16", ["float"]),
    "gpt_oss": ("bf16", ["float", "int8"]),
    "vaultgemma": ("bf16", ["float", "int4"]),
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of PEFT itself
@pytest.mark.parametrize("name", MODELS)
def test_every_node_of_a_half_precision_graph_has_a_cuda_kernel(name: str, tmp_path: Path) -> None:
    precision, weights = MODELS[name]
    base = make_zoo_base(tmp_path / "base", name)
    model = make_siamese_with(base, "lora")
    seen = []
    for kind, written in graphs_of(model, base, ExportSettings(precision=precision), tmp_path, weights):
        found = cuda_kernels(written)
        assert found.missing == {}, kind
        assert found.nodes == len(written.graph) > 50
        seen.append(kind)
    assert seen == weights


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ("y = Pad(x, ends)", "Pad of T bfloat16"),
        ("y = Relu(x)", None),
        ("y = Mish(x)", "Mish"),
        ("y = com.microsoft.NoSuchOperator(x)", "NoSuchOperator"),
    ],
)
def test_a_node_without_a_kernel_is_named(node: str, named: str | None) -> None:
    type_ = "float16" if named is None else "bfloat16"
    model = graph(f"g ({type_}[2, 3] x) => ({type_}[A, B] y) <int64[4] ends = {{0, 0, 0, 1}}> {{ {node} }}")
    assert cuda_kernels(model).missing == ({} if named is None else {named: 1})


def test_two_types_where_an_operator_wants_one_are_an_error() -> None:
    model = graph("g (float16[2] x, float[2] w) => (float16[2] y) { y = Add(x, w) }")
    with pytest.raises(TraceError, match=r"Add .* gets float and float16 as T"):
        cuda_kernels(model)


def test_an_unwritten_type_is_that_of_an_input_of_the_same_variable() -> None:
    model = graph(
        "g (bfloat16[2, 3] x) => (bfloat16[A, B] y) <int64[4] ends = {0, 0, 0, 1}> { a = Neg(x)\n y = Pad(a, ends) }"
    )
    value = next(node.outputs[0] for node in model.graph if node.op_type == "Neg")
    value.type = None
    assert cuda_kernels(model).missing == {"Pad of T bfloat16": 1}


def test_the_version_is_that_of_the_graphs_operator_set() -> None:
    model = graph("g (float16[2] x) => (float16[2] y) { y = Gelu(x) }")
    assert cuda_kernels(model).missing == {}
    model.graph.opset_imports[""] = 18  # before there was one
    assert cuda_kernels(model).missing == {"Gelu": 1}


def test_nodes_that_compute_sizes_are_counted_apart() -> None:
    model = graph(
        """g (float16[a, b] x, float16[b] z) => (float16[N] y, int64[1] most)
        <int64[1] zero = {0}, int64[1] two = {2}>
        { s = Shape(x)
          first = Gather(s, zero)
          twice = Mul(first, two)
          most = Max(twice, two)
          y = Expand(z, twice) }"""
    )
    assert cuda_kernels(model).shape_nodes == 3  # not Shape, nor Expand, which reads a size


def test_a_range_reads_its_size_on_the_host() -> None:
    model = graph(
        """g (float16[a] x) => (int64[N] y) <int64 zero = {0}, int64 one = {1}>
        { s = Shape(x)
          n = Squeeze(s)
          y = Range(zero, n, one) }"""
    )
    assert cuda_kernels(model).shape_nodes == 1


def test_the_report_is_one_line() -> None:
    lines: list[str] = []
    report_cuda_kernels(CudaKernels("1.31.1", 135, 1, {}), lines.append)
    report_cuda_kernels(CudaKernels("1.31.1", 135, 1, {"Mish": 2, "Pad of T bfloat16": 1}), lines.append)
    assert lines == [
        "cuda      135 nodes, all with kernels in onnxruntime-gpu 1.31.1 (1 of them computes sizes, on the CPU)",
        "warning   onnxruntime-gpu 1.31.1 has no CUDA kernel for 3 of 135 nodes: 2 Mish, 1 Pad of T bfloat16; what "
        "the CPU has a kernel for runs there, with copies, and no CUDA graph can be captured",
    ]


def test_a_graph_in_the_lists_own_terms() -> None:
    """float32 attention is the one that CUDA lacks."""
    inputs = "q, k, v, past_key, past_value, lengths, total"
    text = f"""g (T[1, 1, 8] q, T[1, 1, 8] k, T[1, 1, 8] v, T[1, 1, 4, 8] past_key, T[1, 1, 4, 8] past_value,
        int32[1] lengths, int32 total) => (T[1, 1, 8] y)
        {{ y, key, value = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1> ({inputs}) }}"""
    missing = {type_: cuda_kernels(graph(text.replace("T[", f"{type_}["))).missing for type_ in ("float", "float16")}
    assert missing["float16"] == {}
    assert list(missing["float"]) == ["GroupQueryAttention of M int32, T float, T_CACHE float"]


def test_inputs_that_the_lists_operator_does_not_have_are_of_no_type_variable() -> None:
    """As GroupQueryAttention's `query_seqlens`, which is newer."""
    model = graph("g (float16[2, 3] x, int32[1] n) => (float16[2, 3] y) { y = Relu(x, n) }")
    assert cuda_kernels(model).missing == {}
    model = graph("g (float16[2, 3] x, float[2, 3] z) => (float16[2, 9] y) { y = Concat<axis = 1>(x, x, z) }")
    with pytest.raises(TraceError):
        cuda_kernels(model)  # Concat's last one repeats
