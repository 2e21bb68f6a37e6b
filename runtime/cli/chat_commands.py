"""What a line that begins with a slash does in `chat`."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import PromptError, SettingsError
from ..generation.settings import GenerationSettings
from ..options import IntoMapping, add_options, said_options, spelt_option, text_of_file
from .chat_input import Turn

if TYPE_CHECKING:
    from ..generation.chat import Chat

TRACED = 3
"""Candidates of each memory that `/trace on` tells."""
_OTHERS = ("raw", "echo", "memory_bias", "trace")  # which have a command, or are none of a chat
_HELP = {
    "reset": "forget the conversation",
    "memory X": "turn the dial: above 0 towards the base memory, below 0 away; without X: tell it",
    "trace on|off": f"tell each token's gate, and the {TRACED} likeliest tokens of the blend and of each memory",
    "set NAME VALUE": "change a setting of generation (none: its default); without them: tell all",
    "system TEXT": "what the model is told first, or @FILE (none: nothing); the conversation is read again",
    "history": "show the conversation",
    "save FILE": "write it as JSON, a list of messages",
    "help": "show this",
    "quit": "end",
}


class Conversation:
    """A chat and its commands. ended: whether `/quit` came."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.ended = False

    def does(self, turn: Turn) -> bool:
        """Do what a turn commands; whether it is a command. Raises PromptError or SettingsError."""
        if not turn.command:
            return False
        name, _, rest = turn.text[1:].strip().partition(" ")
        if name not in {usage.split()[0] for usage in _HELP}:
            raise PromptError(f'there is no command /{name}; /help tells which there are (text is sent in """...""")')
        command: Callable[[str], None] = getattr(self, f"_{name}")
        command(rest.strip())
        return True

    def _reset(self, rest: str) -> None:
        self.chat.reset()
        _say("forgot the conversation")

    def _memory(self, rest: str) -> None:
        if rest:
            try:
                bias = float(rest)
            except ValueError:
                raise SettingsError("memory_bias", rest, "it must be a number") from None
            self.chat.change(memory_bias=bias)
        _say(f"memory_bias {self.chat.settings.memory_bias:g}")

    def _trace(self, rest: str) -> None:
        on = self.chat.settings.trace is None if not rest else {"on": True, "off": False}.get(rest)
        if on is None:
            raise PromptError(f"/trace is on or off, not {rest}")
        self.chat.change(trace=TRACED if on else None)
        _say(f"trace {'on' if on else 'off'}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name = name.replace("-", "_")
        if not name:
            for each in _settable():
                _say(f"{each} {_shown(getattr(self.chat.settings, each))}")
            return
        if name not in _settable():
            raise PromptError(f"there is no setting {name}; /set tells which there are")
        self.chat.change(**{name: _value(name, value.strip())})
        _say(f"{name} {_shown(getattr(self.chat.settings, name))}")

    def _system(self, rest: str) -> None:
        if rest:
            text = text_of_file("system", rest[1:]) if rest.startswith("@") else rest
            self.chat.system = None if rest == "none" else text
        _say(f"system {self.chat.system or 'none'}")

    def _history(self, rest: str) -> None:
        for message in self.chat.messages:
            _say(f"{message['role']}: {message['content']}")

    def _save(self, rest: str) -> None:
        if not rest:
            raise PromptError("/save needs a file's name")
        text = json.dumps(self.chat.messages, ensure_ascii=False, indent=2)
        try:
            Path(rest).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise PromptError(f"{rest} cannot be written: {error.strerror}") from error
        _say(f"wrote {len(self.chat.messages)} messages to {rest}")

    def _help(self, rest: str) -> None:
        for usage, text in _HELP.items():
            _say(f"/{usage:<16} {text}")
        _say('A line that ends with \\ goes on in the next one, and """ begins and ends a text of several lines.')

    def _quit(self, rest: str) -> None:
        self.ended = True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PromptError(re.sub(r"^argument --[\w-]+: ", "", message))


def _settable() -> list[str]:
    return [each.name for each in fields(GenerationSettings) if "help" in each.metadata and each.name not in _OTHERS]


def _value(name: str, text: str) -> Any:
    """A setting's value from its text, as its option reads it. Raises PromptError or SettingsError."""
    if not text:
        raise PromptError(f"/set {name} needs a value")
    if text == "none":
        return next(each.default for each in fields(GenerationSettings) if each.name == name)
    parser = _Parser(add_help=False)
    add_options(parser, GenerationSettings, leave_out=_OTHERS)
    action = next(action for action in parser._actions if action.dest == name)
    if action.nargs == 0:
        if text not in ("on", "off"):
            raise PromptError(f"{name} is on or off, not {text}")
        return text == "on"
    option, several = spelt_option(name), isinstance(action, argparse._AppendAction | IntoMapping)
    try:
        words = [f"{option}={word}" for word in (shlex.split(text) if several else [text])]
    except ValueError as error:
        raise PromptError(f"{name}: {error}") from error
    return said_options(GenerationSettings, parser.parse_args(words))[name]


def _shown(value: Any) -> str:
    return "none" if value in (None, ()) else str(value)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
