"""onnxruntime 1.32 writes a device's id and a database of events into the home folder as soon as it is imported, unless
told otherwise before. Nothing of this project lets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exported import Exported

ROOT = Path(__file__).resolve().parents[2]
RUN = "import cli; raise SystemExit(cli.main({arguments!r}))"
SCRIPTS = {
    "generate": RUN.format(arguments=["generate", "ARTIFACT", "--prompt", "Hi", "--max-new-tokens", "2"]),
    "verify": RUN.format(arguments=["verify", "ARTIFACT"]),
    "doctor": RUN.format(arguments=["doctor"]),
    "library": "import runtime; runtime.load('ARTIFACT')",
    "exporter": "from export.providers import check_provider; check_provider('cpu')",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_onnxruntime_writes_nothing_into_the_home_folder(name: str, tiny: Exported, tmp_path: Path) -> None:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    script = SCRIPTS[name].replace("ARTIFACT", str(tiny.artifact))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.rglob("*") if "onnxruntime" in str(path.relative_to(tmp_path))] == []


def test_a_user_can_leave_telemetry_on() -> None:
    script = "import os, runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = dict(os.environ) | {"ORT_DISABLE_TELEMETRY": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "0"
