"""Stage 3: siamese beside base alone at the 0.5B shape: decoding, the first token, and the host's share of a step."""

from __future__ import annotations

from benchmarks.cuda.document import Document, Plan
from benchmarks.cuda.models import SIZES, artifact
from benchmarks.cuda.speed import measure_group

PRECISIONS = ("fp16", "int4")
SECONDS = 6.0  # of one group, at least


def run(plan: Plan, document: Document) -> None:
    """A group for each precision."""
    import torch  # noqa: F401  # its CUDA libraries are the ones that onnxruntime uses

    size = SIZES[plan.size]
    for precision in PRECISIONS:
        if plan.wants(precision):
            names = (f"middle-{precision}", f"middle-{precision}-base")
            folders = {kind: artifact(name, plan.work, plan.size)
                       for kind, name in zip(("siamese", "base"), names, strict=True)}  # fmt: skip
            measure_group(precision, folders, size.batches, size.contexts, size.steps, plan, document, seconds=SECONDS)
