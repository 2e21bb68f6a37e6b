"""Folders are published whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from imsm_core.claims import claimed, refuse_existing
from imsm_core.errors import OutputError, OutputExistsError
from imsm_core.files import publish_folder, sha256_of_file

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


KILLED = (
    "import os, signal, sys; from pathlib import Path; from imsm_core.files import publish_folder\n"
    "with publish_folder(Path(sys.argv[1]), 'file', force=True) as draft:\n"
    "    (draft / 'file').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
)


def test_killed_process_leaves_nothing_that_looks_whole_and_the_next_call_cleans_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    assert subprocess.run(command, cwd=PROJECT, check=False).returncode == -9
    draft, lock = names(tmp_path)
    assert draft.startswith(".out.draft-")
    assert lock == ".out.lock"
    publish(tmp_path / "out", "whole")
    assert names(tmp_path) == ["out"]


def test_draft_of_any_process_number_is_abandoned_where_nobody_holds_the_lock(tmp_path: Path) -> None:
    """In a container the process that was killed and the one that follows it often have the same number, and a process
    of another one may have that of a process here."""
    for number in (os.getpid(), os.getppid(), 999999999):
        (tmp_path / f".out.draft-{number}").mkdir()
    (tmp_path / ".out2.draft-999999999").mkdir()
    publish(tmp_path / "out", "whole")
    assert names(tmp_path) == [".out2.draft-999999999", "out"]


HOLDING = (
    "import sys; from pathlib import Path; from imsm_core.files import publish_folder\n"
    "with publish_folder(Path(sys.argv[1]), 'file') as draft:\n"
    "    (draft / 'file').write_text('the first'); print('ready', flush=True); sys.stdin.readline()\n"
)


@contextmanager
def process_that_writes(target: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDING, str(target)]
    with subprocess.Popen(command, cwd=PROJECT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def test_a_second_process_for_the_same_target_is_refused_and_named_the_first(tmp_path: Path) -> None:
    with process_that_writes(tmp_path / "out") as process:
        with pytest.raises(OutputError, match=f"out is being written by process {process.pid} on .*; wait for it"):
            publish(tmp_path / "out", "the second", force=True)
        with pytest.raises(OutputError, match="is being written"), claimed(tmp_path / "out", MARKER):
            pass
    assert (tmp_path / "out" / "file").read_text() == "the first"
    assert names(tmp_path) == ["out"]


def test_another_thread_for_the_same_target_is_refused_and_the_same_one_is_not(tmp_path: Path) -> None:
    with claimed(tmp_path / "out", MARKER), ThreadPoolExecutor(1) as pool:
        with pytest.raises(OutputError, match="is being written"):
            pool.submit(publish, tmp_path / "out", "another's").result()
        publish(tmp_path / "out", "ours")
    assert names(tmp_path) == ["out"]


def publish_while_another_folder_appears(target: Path, text: str, force: bool = False) -> None:
    with publish_folder(target, MARKER, force) as draft:
        (draft / MARKER).write_text(text)
        target.mkdir()
        (target / "precious").write_text("another's")


def test_folder_that_appears_meanwhile_is_kept_and_so_is_the_work(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for number in (1, 2):
        with pytest.raises(OutputExistsError, match=f"kept in {tmp_path}/out.finished-{number}$"):
            publish_while_another_folder_appears(target, f"mine {number}")
        assert (target / "precious").read_text() == "another's"
        assert (tmp_path / f"out.finished-{number}" / MARKER).read_text() == f"mine {number}"
        shutil.rmtree(target)
    assert names(tmp_path) == ["out.finished-1", "out.finished-2"]


def test_folder_of_someone_else_that_appears_meanwhile_is_kept_even_under_force(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="has no file"):
        publish_while_another_folder_appears(tmp_path / "out", "mine", force=True)
    assert (tmp_path / "out" / "precious").read_text() == "another's"


def test_work_is_kept_where_the_name_cannot_be_had_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system of layers, which gives no other name to a folder of a lower one."""
    publish(tmp_path / "out", "old")
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path == tmp_path / "out" and ".replaced-" in to.name:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match=f"cross-device link; what was written is kept in {tmp_path}/out.finished-1$"):
        publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert (tmp_path / "out.finished-1" / "file").read_text() == "new"


def test_old_folder_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "out", "old")
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if ".draft-" in path.name and to == tmp_path / "out":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="kept in"):
        publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_what_a_symbolic_link_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "away").mkdir()
    (tmp_path / "out").symlink_to("far/away")
    with pytest.raises(OutputExistsError):
        publish(tmp_path / "out", "new")
    publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "far" / "away" / "file").read_text() == "new"
    assert names(tmp_path) == ["far", "out"]
    assert names(tmp_path / "far") == ["away"]


def test_a_link_to_a_folder_that_is_to_be_made_and_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to("far/away")
    publish(tmp_path / "out", "new")
    assert (tmp_path / "far" / "away" / "file").read_text() == "new"
    (tmp_path / "lost").symlink_to("unmounted/disk")
    with pytest.raises(OutputError, match=r"lost is a symbolic link to .*unmounted/disk, and there is no folder"):
        publish(tmp_path / "lost", "new")
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(OutputError, match="leads back to itself"):
        publish(tmp_path / "ring", "new")


def test_the_current_folder_is_filled_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    identity = Path.cwd().stat().st_ino
    publish(Path("."), "first", force=True)
    publish(tmp_path / "out", "second", force=True)
    assert Path("file").read_text() == "second"
    assert Path.cwd().stat().st_ino == identity == (tmp_path / "out").stat().st_ino
    assert names(Path.cwd()) == ["file"]
    assert names(tmp_path) == ["out"]


def test_a_current_folder_that_was_deleted_is_in_nobodys_way(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from imsm_core.files import publish_folder\n"
        "os.chdir(sys.argv[2]); os.rmdir(sys.argv[2])\n"
        "with publish_folder(Path(sys.argv[1]), 'file') as draft:\n    (draft / 'file').write_text('whole')\n"
    )
    (tmp_path / "gone").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "out"), str(tmp_path / "gone")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(PROJECT)}, check=True)
    assert names(tmp_path) == ["out"]


def test_a_mount_point_is_filled(mounted: Callable[[int], Path], tmp_path: Path) -> None:
    target = mounted(4096)
    with pytest.raises(OutputExistsError):
        publish(target, "new")
    publish(target, "first", force=True)
    (target / "old").mkdir()
    (target / "lost+found").mkdir()
    with publish_folder(target, MARKER, force=True) as draft:
        assert draft.stat().st_dev == target.stat().st_dev  # or files would have to be copied in the end
        (draft / "a").mkdir()
        (draft / "z").write_text("z")
        (draft / MARKER).write_text("second")
        assert (target / MARKER).read_text() == "first"
    assert names(target) == ["a", "file", "lost+found", "z"]
    assert (target / MARKER).read_text() == "second"
    assert [name for name in names(tmp_path) if "mounted" in name] == ["mounted"]


def test_a_folder_that_is_mounted_over_itself_is_filled(tmp_path: Path) -> None:
    """It has its parent's device number, so that only the system's answer tells."""
    target = tmp_path / "out"
    target.mkdir()
    command = ["mount", "--bind", str(target), str(target)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the permission to mount a file system")
    try:
        publish(target, "new", force=True)
        assert names(target) == ["file"]
    finally:
        subprocess.run(["umount", str(target)], check=True)
    assert (target / "file").read_text() == "new"


def test_what_fails_or_is_killed_in_a_mount_point_leaves_what_was_there(mounted: Callable[[int], Path]) -> None:
    target = mounted(4096)
    publish(target, "old", force=True)
    with pytest.raises(ValueError, match="no"):
        publish(target, "half", force=True, error=ValueError("no"))
    assert names(target) == ["file"]
    assert subprocess.run([sys.executable, "-c", KILLED, str(target)], cwd=PROJECT, check=False).returncode == -9
    assert (target / "file").read_text() == "old"
    assert len(names(target)) == 3
    publish(target, "new", force=True)
    assert names(target) == ["file"]


def test_files_that_were_being_moved_up_arrive_with_the_next_call(mounted: Callable[[int], Path]) -> None:
    target = mounted(4096)
    (target / ".imsm.finished-999").mkdir()
    (target / ".imsm.finished-999" / MARKER).write_text("whole")
    (target / ".imsm.finished-999" / "weights").write_text("1")
    (target / "other").write_text("arrived before")
    with pytest.raises(OutputExistsError, match="exists and is kept"):
        publish(target, "new")
    assert names(target) == ["file", "other", "weights"]
    assert (target / MARKER).read_text() == "whole"


def test_the_marker_goes_first_and_comes_last(mounted: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = mounted(4096), []
    publish(target, "old", force=True)
    (target / "a").mkdir()
    rename = Path.rename

    def watch(path: Path, to: Path) -> Path:
        seen.append((to.name, names(target)))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", watch)
    with publish_folder(target, MARKER, force=True) as draft:
        for name in ("a", MARKER, "z"):
            (draft / name).write_text(name)
    steps = [(to, [name for name in there if not name.startswith(".")]) for to, there in seen[-3:]]
    assert steps == [("a", []), ("z", ["a"]), (MARKER, ["a", "z"])]


def test_a_full_disk_is_one_line_with_numbers_and_leaves_nothing(mounted: Callable[[int], Path]) -> None:
    target = mounted(200) / "out"
    known = pytest.raises(OutputError, match=r"mounted: at least 1\.0 MB needed, 20\d\.\d KB free; make room")
    with known, publish_folder(target, MARKER, size=10**6):
        raise AssertionError("the work has begun")
    with pytest.raises(OutputError, match=r"no room to write in .*mounted: at least .* KB needed, .* free"):
        publish(target, "x" * 10**6)
    assert names(target.parent) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("11008 requested and 1024 written"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_every_librarys_way_to_say_that_a_disk_is_full(tmp_path: Path, error: Exception) -> None:
    wrapped = RuntimeError("could not write")
    wrapped.__cause__ = error
    for raised in (error, wrapped):
        with pytest.raises(OutputError, match="no room to write in"):
            publish(tmp_path / "out", "half", error=raised)
    assert names(tmp_path) == []


def test_a_folder_in_a_closed_one_is_filled() -> None:
    with somebody_unprivileged(), TemporaryDirectory() as place:
        closed = Path(place) / "closed"
        target = closed / "out"
        target.mkdir(parents=True)
        closed.chmod(0o500)
        try:
            publish(target, "new", force=True)
            assert names(target) == ["file"]
            with pytest.raises(OutputError, match=f"other cannot be written: no permission to write in {closed}"):
                publish(closed / "other", "new")
            target.chmod(0o500)
            with pytest.raises(OutputError, match=f"out cannot be written: no permission to write in {target}"):
                publish(target, "newer", force=True)
        finally:
            closed.chmod(0o700)
            target.chmod(0o700)


@contextmanager
def somebody_unprivileged() -> Iterator[None]:
    """Root may write everywhere."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_target_that_holds_what_is_read_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    for path in (tmp_path / "out", tmp_path / "out" / "file", str(tmp_path / "out" / "file")):
        refused = pytest.raises(OutputError, match="which is read")
        with refused, claimed(tmp_path / "out", MARKER, True, inputs=(None, "org/name", path)):
            raise AssertionError("the work has begun")
    with claimed(tmp_path / "out" / "below", MARKER, inputs=(tmp_path / "out",)):
        pass
    assert names(tmp_path / "out") == ["file"]


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"):
        publish(tmp_path / "deep" / "er" / "out", "half", error=ValueError("no"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    publish(tmp_path / "out", "old")
    rename = Path.rename

    def interrupt(path: Path, to: Path) -> Path:
        signal.raise_signal(number)
        return rename(path, to)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    monkeypatch.setattr(Path, "rename", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path / "out", "new", force=True)
    finally:
        signal.signal(number, before)
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_sha256_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_a_folder_moved_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced-999999999")
    with pytest.raises(OutputExistsError):
        publish(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "old"
