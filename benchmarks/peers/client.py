"""The measuring side of the protocol: one loaded peer process, asked for one block of work at a time."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class RunnerError(Exception):
    """A peer's process ended without an answer."""


class Process:
    """A runner in its own environment; leaves when the block ends."""

    def __init__(
        self, python: Path, runner: str, folder: Path, modes: Sequence[str], threads: int, context: int
    ) -> None:
        command = [str(python), str(HERE / runner), str(folder), "--threads", str(threads)]
        command += ["--context", str(context), "--modes", *modes]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.name = f"{runner} {folder.name}"
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by close()
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.messages, text=True, env=environment
        )
        try:
            self.ready = self._read()
        except RunnerError:
            self.close()
            raise
        self.start_ms = (time.perf_counter() - self.started) * 1e3

    def ask(self, cmd: str, mode: str, **values: Any) -> dict[str, Any]:
        """One command and its answer. Raises RunnerError."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # _read says why
            self.process.stdin.write(json.dumps({"cmd": cmd, "mode": mode, **values}) + "\n")
            self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self.process.wait()
        self.messages.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.messages.seek(0)
            lines = self.messages.read().strip().splitlines() or ["it said nothing"]
            raise RunnerError(f"{self.name} ended with exit code {code}: {lines[-1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer
