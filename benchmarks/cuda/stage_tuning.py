"""Stage 6: a tuning run of SmolLM2 on the device, and how much each memory forgets: by loss in PyTorch, and by answers
from the artifact."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cuda.document import Document, Plan
from benchmarks.cuda.models import SIZES, fastest_device

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

LEARNING_RATE = 1e-3  # as in examples/real_demo.py: a short run
SECONDS_TO_ANSWER = 25.0


def run(plan: Plan, document: Document) -> None:
    """Tune, note the losses of all memories on the new and the old questions, export in fp16, and let it answer."""
    from invented_world import write_jsonl
    from new_countries import question_rows, test_rows, train_rows
    from real_model import make_smollm2

    from export.settings import ExportSettings
    from imsm_core.training.settings import TrainSettings
    from imsm_core.training.tuning import tune

    size = SIZES[plan.size]
    device = fastest_device()
    start = time.perf_counter()
    base = make_smollm2(plan.work / "smollm2")
    document.note("model_s", round(time.perf_counter() - start, 1))
    asked = {"new_test": test_rows()[: size.questions], "questions": question_rows()[: size.questions]}
    task = plan.work / "tuning"
    task.mkdir(exist_ok=True)
    for name, content in {"new_train": train_rows(), **asked}.items():
        write_jsonl(task / f"{name}.jsonl", content)
    training = TrainSettings(steps=size.tuning_steps, batch_size=size.tuning_batch, learning_rate=LEARNING_RATE)
    metrics = tune(
        str(base),
        task / "new_train.jsonl",
        task / "checkpoint",
        None,
        training,
        device=device,
        force=True,
        progress=False,
    )
    document.note("pytorch_on", device)
    document.note("training", metrics)
    document.note("losses", _losses(task, device))
    if plan.left < SECONDS_TO_ANSWER:
        document.note("answers", {"left_out": f"{plan.left:.0f} s were left"})
        return
    document.note("answers", _answers(task, plan, ExportSettings(precision="fp16")))


def _losses(task: Path, device: str) -> dict[str, Any]:
    """Mean loss of an answer's tokens (nats) by memory, on new facts in other words and on old questions."""
    from imsm_core.backbone import load_tokenizer
    from imsm_core.checkpoint import load_checkpoint
    from imsm_core.data.dataset import load_jsonl
    from imsm_core.evaluate import Stream, evaluate

    model, info = load_checkpoint(task / "checkpoint")
    tokenizer = load_tokenizer(info.base_model)
    model.to(device)
    pad = tokenizer.pad_token_id or 0
    streams: dict[str, Stream] = {"base": "base", "adapter": "adapter", "blended": "fused"}
    found: dict[str, Any] = {}
    for name in ("new_test", "questions"):
        examples = load_jsonl(task / f"{name}.jsonl", tokenizer, "prompt", "answer", 256).examples
        found[name] = {
            memory: round(evaluate(model, examples, stream, pad).loss, 4) for memory, stream in streams.items()
        }
    return found


def _answers(task: Path, plan: Plan, settings: Any) -> dict[str, Any]:
    """Shares of right answers by memory, from the artifact on the device."""
    from score_memories import score
    from side_by_side import BIASES

    import runtime
    from benchmarks.cuda.models import publish_unverified
    from imsm_core.backbone import load_tokenizer
    from imsm_core.checkpoint import load_checkpoint

    model, info = load_checkpoint(task / "checkpoint")
    publish_unverified(model, load_tokenizer(info.base_model), info, settings, task / "artifact")
    loaded = runtime.load(task / "artifact", provider=plan.provider)
    found: dict[str, Any] = {"judged": not plan.rehearse}
    for name in ("new_test", "questions"):
        scored = score(loaded, task / f"{name}.jsonl")
        found[name] = dict(zip(BIASES, (round(share, 4) for share in scored.right), strict=True))
        found[name]["mean gate"] = round(scored.gate, 4)
    return found
