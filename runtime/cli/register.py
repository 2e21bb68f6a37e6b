"""Which commands there are: generate, chat, serve, batch, score, embed, inspect, verify, bench, doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import batch, bench, chat, doctor, embed, generate, inspect, score, serve, verify

if TYPE_CHECKING:
    from ..console import Commands


def register(commands: Commands) -> None:
    """Add the commands, in the order in which `imsm --help` shows them."""
    for command in (generate, chat, serve, batch, score, embed, inspect, verify, bench, doctor):
        command.register(commands)
