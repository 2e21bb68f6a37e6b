"""The runner of commands: exit codes, one line for a mistake, and packages that are missing."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import console
from runtime.console import Commands, run_commands
from runtime.errors import IMSMRuntimeError, SettingsError
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
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))


def test_in_python_a_setting_is_called_by_its_name() -> None:
    error = SettingsError("gate_rank", "", "it goes with {top_k}")
    assert str(error) == "gate_rank is ''; it goes with top_k"
    assert error.args == ("gate_rank", "", "it goes with {top_k}")  # so that it survives a pipe between processes


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
