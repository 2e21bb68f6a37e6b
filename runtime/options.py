"""Settings dataclasses as options of a command line: names, types, defaults and help come from their fields.

A field is an option if its metadata has a `help`; `metavar` and `option` (another spelling, for a flag that turns off
what is on) are optional there, and so is `either`: a flag that can be turned on and off, and is neither unless said.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")
_SEQUENCES = (tuple, list, Sequence)


def spelt_option(name: str) -> str:
    """A setting's name as an option: gate_rank is --gate-rank."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, settings: type[Any], leave_out: Collection[str] = ()) -> None:
    """Add an option for every field that has a help text, except those in `leave_out`."""
    kinds = typing.get_type_hints(settings)
    for entry in fields(settings):
        if "help" in entry.metadata and entry.name not in leave_out:
            _add_option(parser, entry, kinds[entry.name])


def read_options(settings: type[Settings], args: argparse.Namespace, **given: Any) -> Settings:
    """The settings from the options; `given`: fields that are not options, or whose value is given separately."""
    names = [entry.name for entry in fields(settings) if hasattr(args, entry.name)]  # type: ignore[arg-type]
    return settings(**{name: getattr(args, name) for name in names} | given)


def _add_option(parser: argparse.ArgumentParser, entry: Field[Any], kind: Any) -> None:
    default = None if entry.default is MISSING else entry.default
    option, kind, text = entry.metadata.get("option"), _without_none(kind), entry.metadata["help"]
    if kind is bool and entry.metadata.get("either"):
        action = argparse.BooleanOptionalAction
        parser.add_argument(spelt_option(entry.name), dest=entry.name, action=action, default=default, help=text)
        return
    if kind is bool:
        if default is True:
            option = option or f"--no-{entry.name.replace('_', '-')}"
            parser.add_argument(option, dest=entry.name, action="store_false", help=text)
        else:
            option = option or spelt_option(entry.name)
            parser.add_argument(option, dest=entry.name, action="store_true", default=default, help=text)
        return
    origin = typing.get_origin(kind)
    several = origin in _SEQUENCES
    parser.add_argument(
        option or spelt_option(entry.name),
        dest=entry.name,
        type=_converter(typing.get_args(kind)[0] if several else kind),
        nargs="+" if several else None,
        default=default,
        metavar=entry.metadata.get("metavar"),
        help=text,
    )


def _without_none(kind: Any) -> Any:
    """int for int | None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


def _converter(kind: Any) -> type[Any]:
    if kind not in (int, float, str, Path):
        raise TypeError(f"an option cannot be of the type {kind}")
    found: type[Any] = kind
    return found
