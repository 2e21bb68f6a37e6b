"""Running a command line: a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .errors import IMSMError


def option(name: str) -> str:
    """A setting by its name on the command line and in Python, such as --gate-rank / gate_rank."""
    return f"--{name.replace('_', '-')} / {name}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class IntermixedParser(argparse.ArgumentParser):
    """Takes options anywhere between the positional arguments, of which the first may be left out."""

    _splitting = False

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


def run_commands(
    name: str, description: str, register: Callable[[Any], None], argv: Sequence[str] | None = None
) -> int:
    """Parse `argv` with the sub-commands that `register` adds, run one, and return its exit code."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    register(parser.add_subparsers(required=True, metavar="COMMAND", parser_class=IntermixedParser))
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except IMSMError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    return code
