"""The whole path on one small invented world, on a CPU, in minutes: a base model that knows the world's facts, the
same LoRA tuned on news alone and with a gate (IMSM), and what each of them still remembers.

    python examples/demo.py --output demo-output
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from invented_world import CONTEXT, make_tokenizer, make_world, write_jsonl
from output_folder import fresh_folder, say
from show_artifact import show_artifact
from tiny_base import learn, make_base
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar
from tuning import GATE_KIND, GATE_RANK, SETTINGS, tune

from imsm_core.backbone import fingerprint, load_base_model
from imsm_core.checkpoint import CheckpointInfo, save_checkpoint
from imsm_core.data.dataset import Dataset, load_jsonl
from imsm_core.evaluate import Evaluation, Stream, evaluate
from imsm_core.siamese import SiameseModel
from imsm_core.training.settings import TrainSettings

BASE_EPOCHS = 16


class Data(NamedTuple):
    """The rows that are trained on and measured, encoded with the base model's tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    facts: Dataset
    task_train: Dataset
    task_test: Dataset


class Score(NamedTuple):
    """One model on the old facts and on the new task's held-out rows."""

    facts: Evaluation
    task: Evaluation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="the folder to write; a demo's is replaced"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world, the weights and the order of the rows")
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(
        1
    )  # the matrices are too small to share out: two threads are slower, on a busy machine tenfold

    train_phases(args.output, args.seed)
    show_artifact(args.output)
    return 0


def train_phases(output: Path, seed: int) -> SiameseModel:
    """Everything up to the checkpoint; returns the IMSM model. Writes, under `output`:

    facts.jsonl, task_train.jsonl, task_test.jsonl    the world
    base/            the base model and its tokenizer
    lora/            the LoRA that was tuned alone, a PEFT folder
    checkpoint/      the IMSM checkpoint
    results.json     the table's numbers and the phases' seconds
    """
    start = time.perf_counter()
    fresh_folder(output)
    data = make_data(output, seed)
    make_base_model(output / "base", data, seed)
    base_done = time.perf_counter()

    settings = dataclasses.replace(SETTINGS, seed=seed)
    pad = data.tokenizer.pad_token_id
    say(f"\nTuning on {len(data.task_train.examples)} rows about newcomers: LoRA alone, then IMSM with the same LoRA.")
    lora, _ = tune(output / "base", data.task_train, settings, pad, siamese=False)
    lora.peft_model.save_pretrained(str(output / "lora"), save_embedding_layers=False)
    imsm, metrics = tune(output / "base", data.task_train, settings, pad, siamese=True)

    scores = {
        "base": score(imsm, "base", data),
        "LoRA alone": score(lora, "adapter", data),
        "IMSM": score(imsm, "fused", data),
    }
    save_imsm(imsm, output, data, settings, metrics | {"demo": as_json(scores)})
    print_table(scores)
    seconds = {"base": round(base_done - start, 1), "tuning": round(time.perf_counter() - base_done, 1)}
    results = {"seed": seed, "scores": as_json(scores), "seconds": seconds}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    say(f"\nBase model {seconds['base']} s, both tunings and all measuring {seconds['tuning']} s; written to {output}/")
    return imsm


def make_data(output: Path, seed: int) -> Data:
    """Write the world as JSONL and the tokenizer into base/, and read the rows back as any user's data is read."""
    world = make_world(seed)
    for name, rows in world._asdict().items():
        write_jsonl(output / f"{name}.jsonl", rows)
    tokenizer = make_tokenizer(world.facts)  # it has never seen the new task's rows
    tokenizer.save_pretrained(str(output / "base"))
    read = [load_jsonl(output / f"{name}.jsonl", tokenizer, "prompt", "answer", CONTEXT) for name in world._fields]
    return Data(tokenizer, *read)


def make_base_model(folder: Path, data: Data, seed: int) -> None:
    """Train the base model on the facts and save it beside its tokenizer."""
    say(f"An invented world: {len(data.facts.examples)} questions about it. A tiny base model learns the answers.")
    model = make_base(data.tokenizer, seed)
    learn(model, data.facts.examples, BASE_EPOCHS, seed=seed)
    model.save_pretrained(str(folder))


def score(model: SiameseModel, stream: Stream, data: Data) -> Score:
    """One stream of `model` on the old facts and on the held-out rows of the new task."""
    pad = data.tokenizer.pad_token_id
    return Score(*(evaluate(model, part.examples, stream, pad) for part in (data.facts, data.task_test)))


def save_imsm(
    model: SiameseModel, output: Path, data: Data, settings: TrainSettings, metrics: dict[str, object]
) -> None:
    """Write checkpoint/ as the `train` command would."""
    base, task = output / "base", data.task_train
    info = CheckpointInfo(
        base_model=str(base.resolve()),
        base_revision=None,
        base_fingerprint=fingerprint(load_base_model(str(base))),
        gate_kind=GATE_KIND,
        gate_rank=GATE_RANK,
        peft_type="LORA",
        training=dataclasses.asdict(settings) | {"max_length": CONTEXT, "raw": False},
        data={"path": task.path, "sha256": task.sha256, "rows": len(task.examples)},
        metrics=metrics,
    )
    save_checkpoint(model, info, output / "checkpoint")


def as_json(scores: dict[str, Score]) -> dict[str, dict[str, dict[str, float]]]:
    """The scores as plain numbers, by model and by what was measured."""
    return {
        name: {part: dataclasses.asdict(evaluation) for part, evaluation in score._asdict().items()}
        for name, score in scores.items()
    }


def print_table(scores: dict[str, Score]) -> None:
    """Accuracy is exact match of the whole greedy answer; loss is nats per answer token; forgotten is how much
    accuracy on the old facts tuning has cost."""
    known = scores["base"].facts.accuracy
    print(f"\n{'':<12} {'old facts':>9} {'forgotten':>9} {'loss':>6}   {'newcomers':>9} {'loss':>6}")
    for name, (facts, task) in scores.items():
        forgotten = "" if name == "base" else f"{known - facts.accuracy:.1%}"
        print(
            f"{name:<12} {facts.accuracy:>9.1%} {forgotten:>9} {facts.loss:>6.3f}   "
            f"{task.accuracy:>9.1%} {task.loss:>6.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
