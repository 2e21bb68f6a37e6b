"""Running a command line: a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .errors import IMSMError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def run_commands(
    name: str, description: str, register: Callable[[Any], None], argv: Sequence[str] | None = None
) -> int:
    """Parse `argv` with the sub-commands that `register` adds, run one, and return its exit code."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    register(parser.add_subparsers(required=True, metavar="COMMAND"))
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
