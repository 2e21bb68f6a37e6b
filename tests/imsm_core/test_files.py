"""Folders are published whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imsm_core.errors import OutputError, OutputExistsError
from imsm_core.files import publish_folder, refuse_existing, sha256_of_file

PROJECT = Path(__file__).resolve().parents[2]

MARKER = "file"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def publish(target: Path, text: str, force: bool = False, error: BaseException | None = None) -> None:
    with publish_folder(target, MARKER, force) as draft:
        (draft / "file").write_text(text)
        if error is not None:
            raise error


def test_folder_appears_under_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with publish_folder(target, MARKER) as draft:
        assert not target.exists()
        assert draft.parent == target.parent
        (draft / "file").write_text("whole")
    assert (target / "file").read_text() == "whole"
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        publish(tmp_path / "out", "half", error=error())
    assert names(tmp_path) == []


def test_existing_folder_is_kept_without_force(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    with pytest.raises(OutputExistsError, match="exists and is kept"):
        publish(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_force_replaces_everything_in_the_old_folder(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    (tmp_path / "out" / "other").write_text("old")
    publish(tmp_path / "out", "new", force=True)
    assert names(tmp_path / "out") == ["file"]
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_exception_under_force_keeps_the_old_folder(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="no"):
        publish(tmp_path / "out", "half", force=True, error=ValueError("no"))
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputExistsError, match="is a file, not a folder"):
        publish(tmp_path / "out", "new", force=True)


def test_target_below_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is not a folder"):
        refuse_existing(tmp_path / "file" / "out", MARKER, force=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_target_in_a_folder_without_permission_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission to write"):
        refuse_existing(tmp_path / "closed" / "out", MARKER, force=False)


def test_killed_process_leaves_nothing_that_looks_whole_and_the_next_call_cleans_up(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from imsm_core.files import publish_folder\n"
        "with publish_folder(Path(sys.argv[1]), 'marker.json') as draft:\n"
        "    (draft / 'file').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    assert subprocess.run(command, cwd=PROJECT, check=False).returncode == -9
    left = names(tmp_path)
    assert len(left) == 1
    assert left[0].startswith(".out.draft-")
    publish(tmp_path / "out", "whole")
    assert names(tmp_path) == ["out"]


def test_draft_left_under_our_own_process_id_is_in_nobodys_way(tmp_path: Path) -> None:
    """In a container the process that was killed and the one that follows it often have the same id."""
    (tmp_path / f".out.draft-{os.getpid()}").mkdir()
    publish(tmp_path / "out", "whole")
    assert names(tmp_path) == ["out"]


def test_draft_of_a_process_that_lives_and_of_another_target_stay(tmp_path: Path) -> None:
    others = [f".out.draft-{os.getppid()}", ".out2.draft-999999999"]
    for other in others:
        (tmp_path / other).mkdir()
    publish(tmp_path / "out", "whole")
    assert names(tmp_path) == sorted([*others, "out"])


def test_sha256_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_a_folder_moved_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced-999999999")
    with pytest.raises(OutputExistsError):
        publish(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "old"
