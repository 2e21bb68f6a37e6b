"""How a pass runs: what it counts, what it says, and that matches are taken in turn or together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from export.passes.graph import nodes_of
from export.passes.rewrite import Declined, JointRewrite, Outcome, Rewrite, Sweep
from tests.graphs import graph, kinds

ODD = Declined("its input is the graph's")


def negations(count: int) -> ir.Model:
    lines = " ".join(f"v{place + 1} = Neg(v{place})" for place in range(count))
    return graph(f"g (float[2] v0) => (float[2] v{count}) {{ {lines} }}")


def check(node: ir.Node) -> ir.Node | Declined:
    """A negation of a negation."""
    assert node.inputs[0] is not None
    return ODD if node.inputs[0].producer() is None else node


def drop(model: ir.Model, node: ir.Node) -> None:
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    assert before is not None
    node.replace_input_with(0, before.inputs[0])
    node.op_type = "Identity"
    model.graph.remove(before, safe=True)


def test_a_candidate_is_rewritten_or_says_why_not() -> None:
    model = negations(3)
    outcome = Rewrite("drop", "Neg(Neg(x)) -> x", lambda model: nodes_of(model, "Neg"), check, drop)(model)
    assert outcome == Outcome(2, Counter({ODD.reason: 1}))
    assert kinds(model) == ["Identity"]


def test_matches_that_depend_on_each_other_are_known_before_the_first_rewrite() -> None:
    seen: list[ir.Node] = []

    def rewrite(model: ir.Model, found: Sequence[ir.Node]) -> Outcome:
        seen.extend(found)
        return Outcome(1, Counter({ODD.reason: 1, "it is the last one": 1}))

    model = negations(3)
    outcome = JointRewrite("join", "", lambda model: nodes_of(model, "Neg"), check, rewrite)(model)
    assert outcome == Outcome(1, Counter({ODD.reason: 2, "it is the last one": 1}))
    assert seen == list(model.graph)[1:]


def test_a_sweep_only_counts() -> None:
    assert Sweep("count", "", lambda model: len(model.graph))(negations(3)) == Outcome(3)


def test_an_outcome_is_a_line_for_what_it_did_and_one_for_each_reason() -> None:
    outcome = Outcome(24, Counter({"blocks of 16 have no operator": 2}))
    assert list(outcome.lines("fuse_silu")) == [
        "pass      fuse_silu                 24 times",
        "pass      fuse_silu                  2 declined: blocks of 16 have no operator",
    ]
    assert outcome.as_dict() == {"fired": 24, "declined": {"blocks of 16 have no operator": 2}}
    assert Outcome(3).as_dict() == {"fired": 3}
