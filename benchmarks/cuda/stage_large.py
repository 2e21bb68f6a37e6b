"""Stage 5: the 8B shape with random weights, of which one layer is repeated in the file: siamese beside base alone."""

from __future__ import annotations

from benchmarks.cuda.document import Document, Plan
from benchmarks.cuda.models import SIZES, artifact
from benchmarks.cuda.speed import measure_group

SECONDS = 15.0  # of one group, at least
ABOUT = (
    "random weights; all layers but the first and the last name the same bytes of the data file, and each has its own "
    "copy in the device's memory"
)


def run(plan: Plan, document: Document) -> None:
    """The long prompt's first token and the decode steps of each precision."""
    import torch  # noqa: F401  # its CUDA libraries are the ones that onnxruntime uses

    size = SIZES[plan.size]
    document.note("about", ABOUT)
    document.note("shape", size.large)
    contexts = (size.large_prompt, *size.large_contexts)
    for precision in ("fp16", *(f"int4-{block}" for block in size.wide)):
        if not plan.wants(precision):
            continue
        if plan.left < SECONDS:
            document.add("left_out", {"title": precision, "seconds_left": round(plan.left, 1)})
            continue
        names = (f"large-{precision}", f"large-{precision}-base")
        folders = {kind: artifact(name, plan.work, plan.size)
                   for kind, name in zip(("siamese", "base"), names, strict=True)}  # fmt: skip
        measure_group(precision, folders, size.large_batches, contexts, size.steps, plan, document, seconds=SECONDS)
