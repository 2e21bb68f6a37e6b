"""The runner of commands: exit codes, one line for a mistake, and packages that are missing."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import console
from runtime.console import Commands, run_commands
from runtime.errors import IMSMRuntimeError, IMSMWarning, SettingsError
from runtime.machine import usable_cores

ROOT = Path(__file__).resolve().parents[2]


def run(function: Callable[[argparse.Namespace], int], *words: str, **how: Any) -> int:
    """Run a program with the one command `act`."""

    def register(commands: Commands) -> None:
        commands.add("act", function, "do something", **how).add_argument("--number", type=int)

    return run_commands("program", [register], [*words, "act"])


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def act(args: argparse.Namespace) -> int:
        raise error

    return act


class Interrupted(Exception):
    exit_code = 130


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (IMSMRuntimeError("no such thing"), 2, "error: no such thing"),
        (Interrupted("after step 3"), 130, "error: after step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SettingsError("gate_rank", 0, "it goes with {top_k}"), 2, "error: --gate-rank is 0; it goes with --top-k"),
    ],
)
def test_a_mistake_is_one_line_and_its_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == code
    assert capsys.readouterr().err == line + "\n"
    with pytest.raises(type(error)):
        run(raising(error), "--debug")


def test_a_bug_is_not_reported_as_a_users_mistake() -> None:
    for bug in (ZeroDivisionError(), RuntimeError("shapes differ")):
        with pytest.raises(type(bug)):
            run(raising(bug))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "/no/where"), "/no/where: No such file or directory"),
        (PermissionError(1, "Not permitted", "a", None, "b"), "a: b: Not permitted"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("11008 requested and 1024 written"), "11008 requested and 1024 written"),
        (TimeoutError(), "TimeoutError"),
        (FileNotFoundError(2, "No such file", "two\nlines caf\udce9"), r"two\nlines caf\udce9: No such file"),
    ],
)
def test_an_error_of_the_system_is_one_line(error: OSError, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(error)) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 8.00 TiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_runs_out_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(error)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: memory ran out (")
    assert told.endswith("); use shorter texts, a smaller batch, or a smaller model or precision\n")
    assert told.count("\n") == 1


def test_a_very_long_line_loses_its_middle(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(IMSMRuntimeError("begin" + "x" * 10**6 + "end"))) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: begin")
    assert told.endswith("end\n")
    assert len(told) < 2000


def test_debug_may_follow_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def register(commands: Commands) -> None:
        commands.add("act", raising(IMSMRuntimeError("no")), "do something").add_argument("where", nargs="?")

    for words in (["act", "--debug"], ["act", "x", "--debug"], ["act", "--debug", "x"], ["--debug", "act", "x"]):
        with pytest.raises(IMSMRuntimeError):
            run_commands("program", [register], words)
    with pytest.raises(SystemExit):
        run_commands("program", [register], ["act", "--help"])
    assert "--debug" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("", "argument --path: a path cannot be empty"),
        ("a\0b", "an argument holds a NUL character"),
        ("caf\udce9", "argument --path: the path is not text in this locale's encoding; rename it"),
    ],
)
def test_a_path_that_cannot_be_one_is_refused(word: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    def register(commands: Commands) -> None:
        commands.add("act", lambda args: 0, "do something").add_argument("--path", type=Path)

    with pytest.raises(SystemExit) as ended:
        run_commands("program", [register], ["act", "--path", word])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {why}; see program")
    assert told.count("\n") == 1


def test_a_warning_of_ours_is_a_line_and_others_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    def act(args: argparse.Namespace) -> int:
        warnings.warn("2 run", IMSMWarning, stacklevel=1)
        warnings.warn("another's", UserWarning, stacklevel=1)
        return 0

    with pytest.warns(UserWarning, match="another") as others:
        assert run(act) == 0
    assert capsys.readouterr().err == "warning: 2 run\n"
    assert [str(warning.message) for warning in others] == ["another's"]


SIGNALLED = f"""
import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})
from runtime.console import run_commands
from runtime.interrupts import loading
def act(args):
    print("ready", flush=True)
    try:
        BODY
    finally:
        print("tidied up", flush=True)
sys.exit(run_commands("program", [lambda commands: commands.add("act", act, "wait")], ["act"]))
"""
WAIT = "time.sleep(30)"
CONVERTED = f"""
        try:
            {WAIT}
        except BaseException:
            raise ImportError("initialization failed")
"""
DROPPED = f"""
        class Slow:
            def __del__(self):
                {WAIT}
        Slow()
        {WAIT}
"""
LOADING = f"""
        with loading():
            {WAIT}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("body", [WAIT, CONVERTED, DROPPED, LOADING], ids=["waits", "converted", "dropped", "loading"])
def test_a_signal_ends_a_command_without_a_traceback(number: signal.Signals, body: str) -> None:
    """Also where C code makes another exception of it, and where Python drops it."""
    command = [sys.executable, "-c", SIGNALLED.replace("BODY", body)]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=take_signals
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (128 + number, "interrupted\n")
    assert out == ("" if body is LOADING else "tidied up\n")


def take_signals() -> None:
    """A runner in the background starts us with some of them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_signal_that_is_ignored_stays_so() -> None:
    body = "signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGHUP); return 0"
    done = subprocess.run(
        [
            "/bin/bash",
            "-c",
            'trap "" INT HUP; exec "$@"',
            "bash",
            sys.executable,
            "-c",
            SIGNALLED.replace("BODY", body),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\ntidied up\n", "")


def test_in_python_a_setting_is_called_by_its_name() -> None:
    error = SettingsError("gate_rank", "", "it goes with {top_k}")
    assert str(error) == "gate_rank is ''; it goes with top_k"
    assert error.args == ("gate_rank", "", "it goes with {top_k}", "")  # so that it survives a pipe between processes


def test_a_command_whose_packages_are_missing_says_which_extra_brings_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    how = {"needs": ("json", "no_such_package", "nor_this_one"), "extra": "train"}
    assert run(lambda args: 0, **how) == 2
    assert capsys.readouterr().err == (
        "error: act needs no_such_package, nor_this_one, which are not installed; "
        "run pip install 'imsm-runtime[train]'\n"
    )
    with pytest.raises(SystemExit):
        run(lambda args: 0, "--help", **how)
    assert "do something (needs pip install 'imsm-runtime[train]')" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("given", [None, "7"])
def test_pytorchs_threads_sleep_and_fit_the_process(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "unset later")
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    seen: dict[str, str] = {}

    def act(args: argparse.Namespace) -> int:
        seen.update(os.environ)
        return 0

    assert run(act) == 0
    assert seen["OMP_WAIT_POLICY"] == "PASSIVE"
    assert seen["OMP_NUM_THREADS"] == (given or str(usable_cores()))


def test_the_reader_may_go_away(tmp_path: Path) -> None:
    script = tmp_path / "many_lines.py"
    script.write_text(
        f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from runtime.console import run_commands
def act(args):
    for number in range(100000):
        print(number)
    return 0
sys.exit(run_commands("program", [lambda commands: commands.add("act", act, "print")], ["act"]))
"""
    )
    done = subprocess.run(
        f"{sys.executable} {script} | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 141)


def test_a_function_of_another_package_is_offered_or_reported_missing(capsys: pytest.CaptureFixture[str]) -> None:
    def register(commands: Commands) -> None:
        commands.provide("double", lambda number: 2 * number)
        commands.provide("far", lambda: 0, needs=("no_such_package",), extra="export")
        commands.add("near", lambda args: int(commands.service("double")(21)), "use what is there")
        commands.add("far", lambda args: int(commands.service("far")()), "use what cannot run")
        commands.add("none", lambda args: int(commands.service("nobody")()), "use what nobody offers")

    assert run_commands("program", [register], ["near"]) == 42
    assert run_commands("program", [register], ["far"]) == 2
    assert (
        "this needs no_such_package, which is not installed; run pip install 'imsm-runtime[export]'"
        in capsys.readouterr().err
    )
    assert run_commands("program", [register], ["none"]) == 2
    assert "no installed package offers nobody" in capsys.readouterr().err


def test_imsm_finds_the_commands_of_installed_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Entry:
        def __init__(self, value: str, loaded: Any) -> None:
            self.value, self.loaded = value, loaded

        def load(self) -> Any:
            if isinstance(self.loaded, Exception):
                raise self.loaded
            return self.loaded

    def register(commands: Commands) -> None:
        commands.add("act", lambda args: 7, "do something")

    entries = [Entry("broken:register", ImportError("no module")), Entry("fine:register", register)]
    monkeypatch.setattr(console, "entry_points", lambda group: entries if group == "imsm.commands" else [])
    assert console.main(["act"]) == 7
    assert capsys.readouterr().err == "warning: the commands of broken:register are left out: no module\n"


def test_a_default_is_shown_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def register(commands: Commands) -> None:
        parser = commands.add("act", lambda args: 0, "do something")
        parser.add_argument("--one", type=int, default=1, help="a number")
        parser.add_argument("--zero", type=float, default=0.0, help="another")
        parser.add_argument("--none", help="nothing")
        parser.add_argument("--no-spin", dest="spin", action="store_false", help="a flag")

    with pytest.raises(SystemExit):
        run_commands("program", [register], ["act", "--help"])
    shown = capsys.readouterr().out
    assert [line.split("(default: ")[1].rstrip(")") for line in shown.splitlines() if "(default" in line] == [
        "1",
        "0.0",
    ]


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(lambda args: 0, "--version")
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("program 0.")
