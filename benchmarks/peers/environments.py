"""A virtual environment per peer, with the exact versions of `requirements/`, made once under the work folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"


class Unavailable(Exception):
    """A peer's environment or model cannot be made here; it is left out and the reason reported."""


def python_of(environment: str, work: Path) -> Path:
    """The interpreter of one environment: of this process for "own", else of WORK/environment, made if missing. Raises
    Unavailable."""
    if environment == "own":
        return Path(sys.executable)
    folder = work / environment
    python = folder / "bin" / "python"
    if not python.is_file():
        print(f"installing {environment} into {folder}", file=sys.stderr)
        run([sys.executable, "-m", "venv", str(folder)])
        try:
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            run([*install, "--requirement", str(REQUIREMENTS / f"{environment}.txt")])
        except Unavailable:
            python.unlink()  # the next call starts over
            raise
    return python


def run(command: list[str]) -> None:
    """Run to the end, output to stderr only if it fails. Raises Unavailable with the last line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unavailable(f"{Path(command[1]).name}: {lines[-1]}")
