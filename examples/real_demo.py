"""The whole path on a real model, SmolLM2-135M-Instruct, on a CPU, in minutes: tune it on facts about countries that
do not exist, export it in int8 and int4, and see what each memory still knows, what it has learned, and how fast it is.

    python examples/real_demo.py --output demo-output/real

Everything after the data is a command that a user can type.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from invented_world import write_jsonl
from new_countries import question_rows, test_rows, train_rows
from output_folder import fresh_folder, say
from real_model import SMOLLM2, NoModelError, make_smollm2
from show_artifact import prompts, run

PRECISIONS = ("int8", "int4")

# A short run: the learning rate is three times the authors'.
TRAINING = ("--steps", 50, "--batch-size", 8, "--learning-rate", 1e-3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output/real"), help="the folder to write")
    parser.add_argument("--model", type=Path, default=SMOLLM2, help="where the model is, or is to be made")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the rows")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        model = make_smollm2(args.model)
    except NoModelError as error:
        say(f"error: {error}")
        return 1
    fresh_folder(args.output)
    write_task(args.output)
    tune(model, args.output, args.seed)
    for precision in PRECISIONS:
        show_precision(args.output, precision)
    compare(args.output)
    say(f"\n{time.perf_counter() - start:.0f} s in all; written to {args.output}/")
    return 0


def write_task(output: Path) -> None:
    """Write new_train.jsonl, what is asked afterwards (new_test.jsonl and questions.jsonl), and both of these in
    held_out.jsonl."""
    new, old = test_rows(), question_rows()
    files = {"new_train": train_rows(), "new_test": new, "questions": old, "held_out": new + old}
    for name, rows in files.items():
        write_jsonl(output / f"{name}.jsonl", rows)
    first = train_rows()[0]
    say(f"\nTuning on {len(train_rows())} rows about countries that do not exist: {first.prompt} {first.answer}")


def tune(model: Path, output: Path, seed: int) -> None:
    """Write checkpoint/."""
    data, checkpoint = output / "new_train.jsonl", output / "checkpoint"
    run("cli.py", "train", "--model", model, "--data", data, "--out", checkpoint, *TRAINING, "--seed", seed)


def show_precision(output: Path, precision: str) -> None:
    """Write the artifact of one precision, told how far it is from float32 on held-out rows, and check it."""
    checkpoint, artifact = output / "checkpoint", output / precision
    held_out = ("--eval-data", output / "held_out.jsonl")
    run("cli.py", "export", checkpoint, artifact, "--precision", precision, *held_out)
    run("cli.py", "verify", artifact, "--checkpoint", checkpoint)


def compare(output: Path) -> None:
    """Answers side by side, the scores of every memory, and the speed, of each precision."""
    artifacts = [output / precision for precision in PRECISIONS]
    asked = prompts(output / "questions.jsonl", 3) + prompts(output / "new_test.jsonl", 2)
    for artifact in artifacts:
        run("examples/side_by_side.py", artifact, *asked)
    run("examples/score_memories.py", output, *artifacts)
    for artifact in artifacts:
        print(f"\n{artifact.name} differs from float32 on what is asked: {difference(artifact)}")
        run("cli.py", "bench", artifact, "--prompt-lengths", "32,128", "--new-tokens", "64")


def difference(artifact: Path) -> str:
    """How far the artifact's predictions are from float32, as its export measured: a speed alone says too little."""
    quality = json.loads((artifact / "imsm_model.json").read_text(encoding="utf-8"))["quality"]
    return "; ".join(
        f"{name}: KL {quality[name]['mean_kl']:.3f} nats a token, same likeliest token "
        f"{quality[name]['argmax_agreement']:.1%}"
        for name in ("blend", "base", "adapter")
    )


if __name__ == "__main__":
    sys.exit(main())
