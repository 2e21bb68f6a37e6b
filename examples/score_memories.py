"""What each memory of an artifact still knows and has learned: easy questions, and the new facts in held-out wordings.

    python examples/score_memories.py FOLDER ARTIFACT [ARTIFACT ...]

FOLDER holds questions.jsonl and new_test.jsonl. The three memories answer together, as three rows of one batch.
Runs without PyTorch: NumPy, onnxruntime and tokenizers only.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from side_by_side import BIASES

import runtime

MOST_TOKENS = 24  # of an answer


class Score(NamedTuple):
    """right: share of right answers of each memory, in the order of BIASES. gate: the blend's mean gate over its
    answers, 1 is only the base memory."""

    right: list[float]
    gate: float


def main() -> int:
    """Print one table per artifact. Forgotten is how many more of the easy questions the base memory answers."""
    folder, *artifacts = map(Path, sys.argv[1:])
    for artifact in artifacts:
        model = runtime.load(artifact)
        old, new = (score(model, folder / f"{name}.jsonl") for name in ("questions", "new_test"))
        print(f"\n{artifact.name:<12} {'easy questions':>14} {'forgotten':>9}   {'new facts':>9}")
        for name, kept, learned in zip(BIASES, old.right, new.right, strict=True):
            forgotten = "" if name == "base memory" else f"{old.right[0] - kept:.1%}"
            print(f"{name:<12} {kept:>14.1%} {forgotten:>9}   {learned:>9.1%}")
        print(f"{'mean gate':<12} {old.gate:>14.2f} {'':>9}   {new.gate:>9.2f}", flush=True)
    return 0


def score(model: runtime.Model, path: Path) -> Score:
    """Ask every prompt of a JSONL file; an answer is right if it holds the expected word, or one of several parted
    by |."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right, gates = np.zeros((len(rows), len(BIASES))), []
    for number, row in enumerate(rows):
        texts, gate = answers(model, row["prompt"])
        right[number] = [re.search(rf"\b({row['answer']})\b", text, re.IGNORECASE) is not None for text in texts]
        gates.append(gate)
    return Score(list(right.mean(0)), float(np.mean(gates)))


def answers(model: runtime.Model, prompt: str) -> tuple[list[str], float]:
    """The greedy answer of each memory, in the order of BIASES, and the mean gate of the blend over its own tokens."""
    session, blended = model.session, list(BIASES).index("blended")
    ids = model.codec.encode_prompt(prompt)
    state = session.new_state(len(BIASES), memory_bias=list(BIASES.values()))
    output = session.prefill(state, [ids] * len(BIASES))
    tokens: list[list[int]] = [[] for _ in BIASES]
    ended = [False] * len(BIASES)
    gates = []
    for _ in range(MOST_TOKENS):
        chosen = output.logits.argmax(-1)
        if not ended[blended] and output.gate_mean is not None:
            gates.append(output.gate_mean[blended])
        for row, token in enumerate(chosen):
            ended[row] = ended[row] or int(token) in session.manifest.eos_token_ids
            if not ended[row]:
                tokens[row].append(int(token))
        if all(ended):
            break
        output = session.decode_step(state, chosen)
    return [model.codec.decode(row).strip() for row in tokens], float(np.mean(gates))


if __name__ == "__main__":
    sys.exit(main())
