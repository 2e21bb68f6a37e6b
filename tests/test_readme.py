"""README's Python, as it stands there, by the names that the wheel installs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.builders import write_jsonl

ROOT = Path(__file__).resolve().parents[1]


def test_the_five_lines_of_python_run(base_folder: Path, tmp_path: Path) -> None:
    if find_spec("imsm_runtime") is None:
        pytest.skip("needs the names that the wheel installs, which scripts/setup makes importable in .venv")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"q{n}", "answer": f"a{n}"} for n in range(4)])
    code = code.replace("DIR_OR_HUB_ID", str(base_folder)).replace("max_new_tokens=64", "max_new_tokens=4")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "CKPT" / "imsm.json").is_file()
    assert (tmp_path / "ARTIFACT" / "imsm_model.json").is_file()
    assert done.stdout.strip()
