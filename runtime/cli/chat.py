"""`chat`: a conversation with an artifact in a terminal, or with a line a turn from a file or a pipe."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..engine.execution import Execution
from ..errors import IMSMRuntimeError
from ..generation.settings import GenerationSettings
from ..interrupts import Stop, interrupts_stop, loading
from ..options import read_options
from ..printable import printable
from .chat_commands import Conversation
from .chat_input import Lines
from .common import NEEDS, add_artifact, said_settings
from .token_lines import heading, token_line

if TYPE_CHECKING:
    from ..console import Commands
    from ..generation.chat import Chat
    from ..generation.results import Token

ENDED_BY_CTRL_C = 130


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation begins."""

    system: str | None = field(
        default=None, metadata={"help": "tell the model this first, or what is in @FILE", "metavar": "TEXT"}
    )


def register(commands: Commands) -> None:
    """Add `chat`."""
    parser = commands.add("chat", _chat, "talk with an artifact; /help tells the commands inside", **NEEDS)
    add_artifact(parser)
    commands.add_options(parser, ChatOptions)
    commands.add_options(parser, GenerationSettings, leave_out=("raw", "echo"))
    commands.add_options(parser, Execution)


def _chat(args: argparse.Namespace) -> int:
    options, execution = read_options(ChatOptions, args), read_options(Execution, args)
    said = said_settings(args)
    with loading():
        from ..generation.chat import Chat
        from ..generation.generation import load

    model = load(args.artifact, execution)
    settings = GenerationSettings.of_model(model.session.manifest.generation, **said)
    conversation = Conversation(Chat(model, settings, system=options.system))
    lines = Lines()
    if not lines.asks:  # a mistake, and Ctrl-C, end a script
        for turn in iter(lines.read, None):
            if not conversation.does(turn):
                _answer(conversation.chat, turn.text, Stop())
            if conversation.ended:
                break
        return 0
    note("/help tells the commands, Ctrl-C stops an answer, Ctrl-D ends")
    with interrupts_stop() as stop:
        while True:
            try:
                ended = _turn(conversation, lines, stop)
            except IMSMRuntimeError as error:
                note(f"error: {error}")
                continue
            if ended is not None:
                return ended


def _turn(conversation: Conversation, lines: Lines, stop: Stop) -> int | None:
    """What one turn in a terminal leads to; an exit code at the end."""
    try:
        turn = lines.read()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        if lines.interrupted:
            return ENDED_BY_CTRL_C
        lines.interrupted = True
        note("Ctrl-C once more, or Ctrl-D, ends")
        return None
    lines.interrupted = False
    if turn is None:
        print(file=sys.stderr)
        return 0
    if not conversation.does(turn):
        try:
            _answer(conversation.chat, turn.text, stop)
        except KeyboardInterrupt:
            note("stopped")
    return 0 if conversation.ended else None


def _answer(chat: Chat, text: str, stop: Stop) -> None:
    forgotten, tokens, shown = chat.forgotten, [], ""
    chunks = chat.send(text)
    stop.requested = False
    try:
        for chunk in chunks:
            stop.awaited = True
            if chat.forgotten > forgotten:
                note(f"the context is full: forgot the oldest turns ({chat.forgotten - forgotten})")
                forgotten = chat.forgotten
            print(chunk.text, end="", flush=True)
            shown = chunk.text or shown
            if chunk.token is not None:
                tokens.append(chunk.token._replace(logits=None))
            if stop.requested:
                break
    finally:
        chunks.close()
        stop.awaited = False
        if not shown.endswith("\n") and tokens:
            print(flush=True)
    if stop.requested:
        note("stopped")
    if chat.settings.logprobs is not None or chat.settings.trace is not None:
        _tell(chat, tokens)


def _tell(chat: Chat, tokens: list[Token]) -> None:
    print(heading(tokens[0]), file=sys.stderr)
    for token in tokens:
        print(token_line(token, chat.model.codec.token_text), file=sys.stderr)


def note(line: str) -> None:
    """Say something that is no answer."""
    print(f"[{printable(line)}]", file=sys.stderr, flush=True)
