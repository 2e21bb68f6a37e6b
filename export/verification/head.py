"""What a written graph does with the last hidden states, without its backbone: one memory alone -> its logits.

The published graph gives logits of the blend only, and both streams' hidden states. A run of the whole graph for each
memory would cost the backbone twice more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.utils import Extractor

from imsm_core.errors import first_line

from ..errors import VerificationError
from ..providers import open_part

Array = NDArray[Any]
SATURATED = 1e4  # a memory bias with which every gate is exactly 1


class GraphHead:
    """The gate and the lm_head of the two-stream graph at `path`, as they are in the file, run by `provider`.

    Every kind of gate gives h where both memories and both queries are h, and exactly h where it is 1: the residual one
    adds halves of h, the query-mixed one mixes h with h. So that this is the state of one memory alone for kinds that
    `memory_bias` cannot bring to it either. Raises VerificationError or ExportError as `open_part`.
    """

    def __init__(self, path: Path, provider: str = "cpu") -> None:
        model = onnx.load(str(path), load_external_data=False)
        part = Extractor(model).extract_model([*_feed(np.zeros((1, 1), np.float32))], ["logits"])
        del part.functions[:]  # of several of one name, which overloads are, ONNX's extractor keeps the last one
        part.functions.extend(model.functions)
        read = {name for node in part.graph.node for name in node.input}
        for value in [value for value in part.graph.input if value.name not in read]:
            part.graph.input.remove(value)
        self.inputs = [value.name for value in part.graph.input]
        self.session = open_part(part.SerializeToString(), path.parent, provider)

    def __call__(self, states: Array) -> Array:
        """states: (N, d) float32, one stream's last hidden states. Returns logits (N, vocab) float32. Raises
        VerificationError."""
        feed = _feed(states)
        try:
            (logits,) = self.session.run(["logits"], {name: feed[name] for name in self.inputs})
        except Exception as error:  # onnxruntime's own types, one for each of its status codes
            raise VerificationError(f"onnxruntime cannot run the graph's head: {first_line(error)}") from error
        found: Array = logits[:, 0]
        return found


def _feed(states: Array) -> dict[str, Array]:
    """Where the graph is cut; and its inputs, of which the bias and the sizes alone are read behind that. A row of one
    token for each of `states` (N, d), since a row has one query."""
    rows = states[:, None]
    ones = np.ones((len(states), 1), np.float32)
    tokens = np.zeros(ones.shape, np.int64)
    return {
        "hidden_base": rows,
        "hidden_adapter": rows,
        "present_query_sum": np.concatenate([rows, rows], axis=1),
        "present_query_count": ones[:, 0],
        "memory_bias": SATURATED * ones[:, 0],
        "input_ids": tokens,
        "logit_positions": tokens,
        "query_mask": ones,
        "past_query_sum": np.zeros((len(states), 2, states.shape[1]), np.float32),
        "past_query_count": np.zeros(len(states), np.float32),
    }
