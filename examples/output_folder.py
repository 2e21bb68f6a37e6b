"""The folder that a demo writes, and the lines that it tells."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

MARKER = ".imsm-demo"  # only a folder that holds this file is ever replaced


def fresh_folder(output: Path) -> None:
    """Make `output`, in place of what this demo wrote there earlier; a folder of another demo inside it stays. A folder
    with anything else in it is kept as it is: exits 2."""
    found = set(output.iterdir()) if output.is_dir() else set()
    old = found - {marker.parent for marker in output.glob(f"*/{MARKER}")}
    if output.is_file() or (old and not (output / MARKER).is_file()):
        say(f"error: {output} was not written by this demo and is kept; give another --output")
        raise SystemExit(2)
    for path in old:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


def say(line: str) -> None:
    """Progress goes to stderr; the answers to stdout."""
    print(line, file=sys.stderr, flush=True)
