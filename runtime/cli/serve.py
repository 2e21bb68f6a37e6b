"""`serve`: a server for clients of OpenAI's API."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..engine.execution import Execution
from ..interrupts import loading
from ..options import read_options
from ..server.settings import ServeSettings
from .common import NEEDS, add_artifact

if TYPE_CHECKING:
    from ..console import Commands


def register(commands: Commands) -> None:
    """Add `serve`."""
    needs = (*NEEDS["needs"], "starlette", "uvicorn", "prometheus_client", "llguidance")
    parser = commands.add("serve", _serve, "answer clients of OpenAI's API over HTTP", needs=needs, extra="cpu,server")
    add_artifact(parser)
    commands.add_options(parser, ServeSettings)
    commands.add_options(parser, Execution)


def _serve(args: argparse.Namespace) -> int:
    settings, execution = read_options(ServeSettings, args), read_options(Execution, args)
    with loading():
        from ..generation.generation import load
        from ..server.serving import bound_socket, serve

    if not settings.on_loopback and settings.api_key is None:
        print(
            f"warning: anyone who can reach {settings.host} can use this server; --api-key asks for a key",
            file=sys.stderr,
        )
    with bound_socket(settings) as at:
        serve(load(args.artifact, execution), settings, at)
    return 0
