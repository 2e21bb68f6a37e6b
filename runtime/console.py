"""The command line's runner: finds the commands, runs one, and turns what goes wrong into one line and an exit code.

A package adds its commands by a function `register(commands)`; installed packages name theirs in the entry-point group
`imsm.commands`. Nothing heavy is imported before a command runs, so that `imsm` shows all of them whatever is
installed.

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import Any

from .errors import MissingPackageError
from .machine import usable_cores
from .options import add_options, read_options, spelt_option

GROUP = "imsm.commands"
DISTRIBUTION = "imsm-runtime"
DESCRIPTION = "Tune, export and run siamese language models (IMSM)."
INTERRUPTED, BROKEN_PIPE = 130, 141  # as a shell reports them
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
Register = Callable[["Commands"], None]
Run = Callable[[argparse.Namespace], int]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show, and breaks no word, so that what it says can be copied."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is None or isinstance(action.default, bool)
        return action.help if unsaid else super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class IntermixedParser(argparse.ArgumentParser):
    """Allows options anywhere between the positional arguments; the first of those may be left out."""

    _splitting = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = _NEGATIVE_NUMBER  # argparse's own does not know -1e4

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's intermixed parsing, which calls this once for the options and once for the rest."""
        if self._splitting:
            return super().parse_known_args(args, namespace)
        self._splitting = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._splitting = False


class Commands:
    """What a package's `register` receives: adds commands, and options from settings; and lets packages that do not
    know each other offer functions to each other's commands. parsers: of the commands so far, by name."""

    add_options = staticmethod(add_options)
    read_options = staticmethod(read_options)

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parsers: dict[str, argparse.ArgumentParser] = {}
        self._subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=IntermixedParser)
        self._services: dict[str, Callable[..., Any]] = {}

    def add(
        self, name: str, run: Run, text: str, needs: Collection[str] = (), extra: str | None = None
    ) -> argparse.ArgumentParser:
        """Add a command; returns its parser. text: its help and description. needs: packages that it imports when it
        runs, which the pip extra `extra` brings."""
        advice = f" (needs {_installation(extra)})" if _missing(needs) else ""
        parser = self._subparsers.add_parser(
            name, help=text + advice, description=text[0].upper() + text[1:] + ".", formatter_class=HelpFormatter
        )

        def checked(args: argparse.Namespace) -> int:
            _require(name, needs, extra)
            return run(args)

        parser.set_defaults(run=checked)
        self.parsers[name] = parser
        return parser

    def provide(self, name: str, function: Callable[..., Any], needs: Collection[str] = (), extra: str = "") -> None:
        """Offer a function to the commands of other packages. needs, extra: as `add` has them."""

        def checked(*args: Any, **kwargs: Any) -> Any:
            _require("this", needs, extra)
            return function(*args, **kwargs)

        self._services[name] = checked

    def service(self, name: str) -> Callable[..., Any]:
        """The function that a package offers. Raises MissingPackageError if none does."""
        if name not in self._services:
            raise MissingPackageError(f"no installed package offers {name}")
        return self._services[name]


def main(argv: Sequence[str] | None = None) -> int:
    """The command `imsm`: the commands of every installed package that has any."""
    registers = []
    for entry in entry_points(group=GROUP):
        try:
            registers.append(entry.load())
        except Exception as error:  # someone else's package; the other commands still work
            print(f"warning: the commands of {entry.value} are left out: {error}", file=sys.stderr)
    return run_commands("imsm", registers, argv)


def run_commands(name: str, registers: Iterable[Register], argv: Sequence[str] | None = None) -> int:
    """Parse and run a command of a program called `name`; returns its exit code: 0, 1 (a check failed), 2 (a
    user's mistake), 130 (Ctrl-C), 141 (the reader of stdout went away).

    An exception with an `exit_code` is a user's mistake and becomes one line; any other is a bug.
    """
    parser = argparse.ArgumentParser(prog=name, description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}", help="print the version")
    commands = Commands(parser)
    for register in registers:
        register(commands)
    args = parser.parse_args(argv)
    _settle_openmp()
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as `| head` does; what Python flushes at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if args.debug or not isinstance(exit_code, int):
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        return exit_code


def _settle_openmp() -> None:
    """For commands that import PyTorch, whose OpenMP reads these when it is loaded: as many threads as this process may
    use, which sleep while they wait. By default they spin, and starve each other where anything else runs."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def message(error: Exception) -> str:
    """An error's line, with settings named as their options."""
    told = getattr(error, "told", None)
    return str(error) if told is None else str(told(spelt_option))


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "(not installed)"


def _require(what: str, needs: Collection[str], extra: str | None) -> None:
    """Raise MissingPackageError if a package of `needs` is missing."""
    if missing := _missing(needs):
        raise MissingPackageError(
            f"{what} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"run {_installation(extra)}"
        )


def _missing(needs: Iterable[str]) -> list[str]:
    return [name for name in needs if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _installation(extra: str | None) -> str:
    return f"pip install '{DISTRIBUTION}[{extra}]'"
