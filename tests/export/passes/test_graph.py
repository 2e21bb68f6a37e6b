"""Who reads a value, and what nodes leave out."""

from __future__ import annotations

from export.passes.graph import add_node, nodes_of, only_user, operand
from tests.graphs import graph, kinds

TEXT = """g (float[2] x) => (float[2] y, float[2] z, float[2] s)
    { a = Abs(x) y = Neg(a) b = Abs(x) c = Neg(b) d = Exp(b) z = Add(c, d) e = Exp(x) s = Mul(e, e) }"""


def test_the_only_user_is_one_node_that_reads_a_value_once() -> None:
    model = graph(TEXT)
    a, y, b, _, _, z, e, _ = (node.outputs[0] for node in model.graph)
    user = only_user(a)
    assert user is not None
    assert user.op_type == "Neg"
    assert only_user(a, "Exp") is None
    assert [only_user(value) for value in (y, b, z, e)] == [None] * 4  # an output, two readers, an output, read twice


def test_a_new_node_leaves_out_trailing_none_inputs() -> None:
    model = graph("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    x, negation = model.graph.inputs[0], next(iter(model.graph))
    node = add_node(negation, "Clip", [x, None, x, None, None])
    assert list(node.inputs) == [x, None, x]
    assert [operand(node, place) for place in (0, 1, 3)] == [x, None, None]
    assert kinds(model) == ["Clip", "Neg"]


def test_nodes_removed_on_the_way_are_left_out() -> None:
    model = graph("g (float[2] x) => (float[2] y, float[2] z) { y = Neg(x) a = Neg(x) z = Abs(x) }")
    seen = []
    for node in nodes_of(model, "Neg"):
        seen.append(node)
        model.graph.remove([other for other in model.graph if other.op_type == "Neg" and other is not node])
    assert len(seen) == 1
