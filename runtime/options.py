"""Settings dataclasses as options of a command line: names, types, defaults and help come from their fields.

A field is an option if its metadata has a `help`; `metavar` and `option` (another spelling, for a flag that turns off
what is on) are optional there, and so are `either`, a flag that can be turned on and off, and is neither unless said,
`repeated`, an option that is given once for each of several values, and `models`: where it is not said, it is what the
model has. `@FILE` stands for a file's text where the help says so.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import SettingsError

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
    return settings(**said_options(settings, args) | given)


def said_options(settings: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    """The fields of settings that the options give: all but those that are left to the model. Raises SettingsError for
    a file that cannot be read."""
    return {
        entry.name: _content(entry, getattr(args, entry.name))
        for entry in fields(settings)
        if hasattr(args, entry.name)
    }


def _content(entry: Field[Any], value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith("@") or "@FILE" not in entry.metadata["help"]:
        return value
    return text_of_file(entry.name, value[1:])


def text_of_file(name: str, file: str) -> str:
    """A setting's text that was given as @FILE. Raises SettingsError, with the setting's name."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise SettingsError(name, f"@{file}", f"the file cannot be read: {why}") from error


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
    if entry.metadata.get("models"):
        default, text = argparse.SUPPRESS, f"{text}; default: the model's own, or {default}"
    origin = typing.get_origin(kind)
    several = origin in _SEQUENCES
    repeated = entry.metadata.get("repeated")
    how: Any = "store"
    if repeated:
        how = IntoMapping if origin is Mapping else "append"
    parser.add_argument(
        option or spelt_option(entry.name),
        dest=entry.name,
        type=_pair(*typing.get_args(kind)) if origin is Mapping else _converter(_part(kind) if several else kind),
        action=how,
        nargs="+" if several and not repeated else None,
        default=argparse.SUPPRESS if default == () else default,
        metavar=entry.metadata.get("metavar"),
        help=text,
    )


class IntoMapping(argparse.Action):
    """Pairs, one at a time, as one mapping."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest, None) or {}), values[0]: values[1]})


def _pair(key: type[Any], value: type[Any]) -> Callable[[str], tuple[Any, Any]]:
    def pair(text: str) -> tuple[Any, Any]:
        before, sign, after = text.partition("=")
        if not sign:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
        return key(before), value(after)

    return pair


def _part(kind: Any) -> Any:
    return typing.get_args(kind)[0]


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
