"""Update the tables of options in docs/: a command's own --help is the source.

    .venv/bin/python scripts/write_options.py [--check]

A table is between <!-- options of NAME --> and <!-- end of options -->. With --check nothing is written, and the
exit code is 1 if a table is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli
from runtime.console import Commands

ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"(<!-- options of (\w+) -->\n).*?(<!-- end of options -->)", re.DOTALL)


def table(parser: argparse.ArgumentParser) -> str:
    """A Markdown table of a command's arguments: how they are written, their default, what they do."""
    rows = ["| option | default | what |", "|---|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        name = ", ".join(action.option_strings)
        value = str(action.metavar or "")
        if action.nargs == "+":
            value = f"{value} ..."
        words = f"{name} {value}".strip() if action.nargs != 0 else name
        unsaid = (
            not name or action.default in (None, argparse.SUPPRESS) or isinstance(action.default, bool)
        )  # the help tells it, if any
        default = "" if unsaid else f"`{action.default}`"
        needed = " (required)" if action.required and name else ""
        rows.append(f"| `{words}` | {default} | {str(action.help).replace('|', chr(92) + '|')}{needed} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is out of date")
    args = arguments.parse_args()
    commands = Commands(argparse.ArgumentParser())
    for register in cli.REGISTERS:
        register(commands)
    tables = {name: table(parser) for name, parser in commands.parsers.items()}
    found: set[str] = set()
    stale = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        found |= {match[2] for match in _TABLE.finditer(text)}
        fresh = _TABLE.sub(lambda match: match[1] + tables[match[2]] + match[3], text)
        if fresh != text:
            stale.append(path)
            if not args.check:
                path.write_text(fresh, encoding="utf-8")
    missing = sorted(tables.keys() - found)
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if args.check else 'was updated'}")
    for name in missing:
        print(f"no page of docs/ has the options of {name}")
    return 1 if missing or (args.check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
