"""The JSON of a stage: written whole at the end, and after every result on the way, so that a stage that is cut keeps
what it had."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNNING, COMPLETE, FAILED, CUT = "running", "complete", "failed", "cut"


@dataclass(frozen=True)
class Plan:
    """What a stage is told. out: the folder of the JSON files. work: of models and packages; nothing of it is a result.
    provider: an execution provider of the runtime. size: a key of `models.SIZES`. rehearse: the provider's values mean
    nothing (a fake CUDA), so that nothing is judged. deadline: in seconds of `time.monotonic`. only: names within a
    stage, such as one precision or one case of parity; empty: all. names: those that the stage has asked about."""

    out: Path
    work: Path
    provider: str = "cuda"
    size: str = "full"
    rehearse: bool = False
    deadline: float = float("inf")
    only: tuple[str, ...] = ()
    names: set[str] = field(default_factory=set)

    @property
    def left(self) -> float:
        """Seconds until this stage is cut."""
        return self.deadline - time.monotonic()

    def wants(self, name: str) -> bool:
        """Whether something within the stage was asked for."""
        self.names.add(name)
        return not self.only or name in self.only

    @property
    def unknown(self) -> str | None:
        """What is wrong with `only`, if nothing of this stage was asked for."""
        if not self.only or not self.names or self.names & set(self.only):
            return None
        return f"nothing here is called {', '.join(self.only)}; there are {', '.join(sorted(self.names))}"


class Document:
    """OUT/STAGE.json while the stage runs."""

    def __init__(self, plan: Plan, stage: str) -> None:
        self.path = plan.out / f"{stage}.json"
        self.start = time.perf_counter()
        self.data: dict[str, Any] = {
            "stage": stage,
            "state": RUNNING,
            "provider": plan.provider,
            "size": plan.size,
            "rehearsal": plan.rehearse,
            "only": list(plan.only),
            "seconds": 0.0,
        }
        self.save()

    def note(self, key: str, value: Any) -> None:
        """Set one entry."""
        self.data[key] = value
        self.save()

    def add(self, key: str, value: Any) -> None:
        """Append to one list."""
        self.data.setdefault(key, []).append(value)
        self.save()

    def finish(self, error: str | None = None) -> None:
        """The stage has ended. error: why it failed."""
        self.data["state"] = COMPLETE if error is None else FAILED
        if error is not None:
            self.data["error"] = error
        self.save()

    def save(self) -> None:
        """Replace the file by what is known now."""
        self.data["seconds"] = round(time.perf_counter() - self.start, 1)
        write_json(self.path, self.data)


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A document, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def mark_cut(path: Path, stage: str, why: str) -> None:
    """Note that the stage's process ended before the stage did."""
    data = read_json(path) or {"stage": stage}
    write_json(path, {**data, "state": CUT, "error": why})
