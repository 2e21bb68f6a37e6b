"""Output folders of the commands where they are no ordinary folders, and disks that fill up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

import cli
from tests.builders import write_jsonl
from tests.exported import Exported

Found = TypeVar("Found")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "What? ", "answer": "That."}])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def train(base: Path, data: Path, out: Path, *more: str) -> int:
    options = ["--model", base, "--data", data, "--out", out, "--device", "cpu", "--no-progress", "--adapter-rank", "4"]
    return cli.main(["train", *map(str, options), "--steps", "4", "--save-every", "2", *more])


def test_train_fills_a_mount_point_and_resumes_there(
    mounted: Callable[[int], Path], base_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside it the snapshots would be lost with a container."""
    out = mounted(8192)
    write = "imsm_core.training.tuning.save_checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(write, lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(base_folder, data, out, "--force") == 130
    assert names(out) == ["imsm.partial"]
    assert names(out / "imsm.partial") == ["snapshot-00000004"]
    assert train(base_folder, data, out, "--force", "--resume") == 0
    assert names(out) == ["adapter", "gate.safetensors", "imsm.json"]


def test_train_foresees_a_disk_that_is_too_small(
    mounted: Callable[[int], Path],
    base_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = mounted(8) / "out"
    monkeypatch.setattr("imsm_core.training.tuning.train", None)  # is not reached
    assert train(base_folder, data, out) == 2
    assert capsys.readouterr().err.startswith(f"error: no room to write in {out.parent}: at least ")
    assert names(out.parent) == []


@pytest.mark.parametrize("kilobytes", [16, 160])
def test_export_to_a_small_disk_is_one_line_and_leaves_nothing(
    mounted: Callable[[int], Path], tiny: Exported, capsys: pytest.CaptureFixture[str], kilobytes: int
) -> None:
    """Foreseen from the weights before the trace, or where the rest of the folder is written."""
    out = mounted(kilobytes) / "out"
    assert cli.main(["export", str(tiny.checkpoint), str(out)]) == 2
    told = capsys.readouterr().err
    assert f"error: no room to write in {out.parent}: at least " in told.splitlines()[-1]
    assert ("\ntrace" in told) == (kilobytes > 16)
    assert names(out.parent) == []


def test_export_fills_a_mount_point(mounted: Callable[[int], Path], tiny: Exported) -> None:
    out = mounted(8192)
    assert cli.main(["export", str(tiny.checkpoint), str(out), "--force"]) == 0
    listed = set(json.loads((out / "imsm_model.json").read_text())["files"]) | {"imsm_model.json"}
    assert set(names(out)) == listed
    assert cli.main(["verify", str(out)]) == 0


def test_an_output_folder_that_holds_an_input_is_refused_before_the_work(
    base_folder: Path, data: Path, tmp_path: Path, tiny: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(base_folder, data, out) == 0
    inside = shutil.copy(data, out / "rows.jsonl")
    assert train(base_folder, Path(inside), out, "--force") == 2
    assert capsys.readouterr().err.endswith(f"error: {out} holds {inside}, which is read; give another name\n")
    artifact = shutil.copytree(tiny.artifact, tmp_path / "artifact")
    shutil.copytree(tiny.checkpoint, artifact / "ckpt")
    assert cli.main(["export", str(artifact / "ckpt"), str(artifact), "--force"]) == 2
    assert "which is read" in capsys.readouterr().err
    assert (artifact / "ckpt").is_dir()


def test_a_second_run_for_the_same_folder_is_refused_at_once(
    base_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    holding = (
        "import sys; from pathlib import Path; from imsm_core.claims import claimed\n"
        "with claimed(Path(sys.argv[1]), 'imsm.json'): print('ready', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", holding, str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert train(Path("/not/read"), data, out) == 2
        assert f"{out} is being written by process {other.pid} on " in capsys.readouterr().err
    assert train(base_folder, data, out) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_benchmark_that_is_ended_leaves_no_process(tiny: Exported, number: signal.Signals) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "bench", str(tiny.artifact), "--repeats", "1000000"]
    settings = ["--prompt-lengths", "4", "--new-tokens", "4"]
    with subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        # Nothing can be tidied up after SIGKILL: then the worker is past reading what to do.
        workers = wait_for(lambda: measuring(process.pid, loaded=number is signal.SIGKILL))
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        assert wait_for(lambda: all(not Path("/proc", worker).exists() for worker in workers))
    assert (process.returncode, told) in ((143, b"interrupted\n"), (-signal.SIGKILL, b""))


def measuring(parent: int, loaded: bool) -> list[str]:
    """The process that measures, of a benchmark; once it has onnxruntime's library, or at once."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = Path("/proc", process, "status").read_text()
            words = Path("/proc", process, "cmdline").read_text()
            libraries = Path("/proc", process, "maps").read_text() if loaded else "onnxruntime"
        except OSError:  # it has ended
            continue
        if f"PPid:\t{parent}\n" in status and "spawn_main" in words and "onnxruntime" in libraries:
            found.append(process)
    return found


def wait_for(look: Callable[[], Found]) -> Found:
    for _ in range(1200):
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen within a minute")
