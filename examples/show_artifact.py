"""The second half of the demo: the checkpoint as an artifact, through the commands that a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLD_QUESTIONS, NEW_QUESTIONS = 3, 2


def show_artifact(output: Path) -> None:
    """Export, verify, generate side by side and measure; raises CalledProcessError if a command fails."""
    checkpoint, artifact = output / "checkpoint", output / "artifact"
    run("cli.py", "export", checkpoint, artifact)
    run("cli.py", "verify", artifact, "--checkpoint", checkpoint)
    questions = prompts(output / "facts.jsonl", OLD_QUESTIONS) + prompts(output / "task_test.jsonl", NEW_QUESTIONS)
    print(
        f"\nThe first {OLD_QUESTIONS} questions are old facts, the last {NEW_QUESTIONS} are about newcomers.",
        flush=True,
    )
    run("examples/side_by_side.py", artifact, *questions)
    run("cli.py", "bench", artifact, "--prompt-lengths", "32,128", "--new-tokens", "64")


def prompts(path: Path, count: int) -> list[str]:
    """The first prompts of a JSONL file that ask about different things."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    step = max(1, len(rows) // count)
    return [row["prompt"] for row in rows[::step][:count]]


def run(script: str, *arguments: object) -> None:
    """Print a command as a user would type it, then run it in a process of its own."""
    words = [str(argument) for argument in arguments]
    quoted = " ".join(f'"{word}"' if " " in word else word for word in words)
    print(f"\n$ python {script} {quoted}", flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *words], check=True)
