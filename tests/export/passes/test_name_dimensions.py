"""Readable names of symbolic dimensions."""

from __future__ import annotations

from export.passes.name_dimensions import name_dimensions
from export.passes.rewrite import Outcome
from tests.graphs import graph


def test_dimensions_get_their_names_and_fixed_sizes_stay() -> None:
    model = graph(
        """g (int64[s1, s2] input_ids, float[s1, 2, s3, 16] past, float[s9] other)
        => (float[s1, 2, s3, 16] present, float[s9] logits_like)
        { present = Abs(past)  logits_like = Abs(other) }"""
    )
    model.graph.inputs[1].name = "past_key_values.base.0.key"
    model.graph.outputs[0].name = "present.base.0.key"
    assert name_dimensions(model) == Outcome(3)
    shapes = {value.name: str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}
    assert shapes["input_ids"] == "[batch,sequence]"
    assert shapes["past_key_values.base.0.key"] == "[batch,2,past_base,16]"
    assert shapes["present.base.0.key"] == "[batch,2,total_base,16]"
    assert shapes["other"] == "[s9]"
