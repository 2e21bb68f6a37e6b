"""A page of results and its picture, drawn where matplotlib is."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import Unavailable, python_of


def write_page(out: Path, page: Callable[[str | None], str], script: Path, panels: Any, work: Path) -> None:
    """page: the text for the picture's name, None where there is none. script: draws `panels`, from a JSON file, into
    the file that it is given; left out if matplotlib cannot be installed."""
    picture = out.with_suffix(".png")
    name: str | None = picture.name
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(panels, file)
            file.flush()
            subprocess.run([python_of("plot", work), script, file.name, picture], check=True)
    except (Unavailable, subprocess.CalledProcessError) as reason:
        print(f"no picture: {reason}", file=sys.stderr)
        name = None
    out.write_text(page(name), encoding="utf-8")
    print(f"written {out}", file=sys.stderr)
