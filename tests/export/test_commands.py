"""The `export` command by itself: what it accepts, and what it refuses before anything heavy is imported."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import export.commands
from export.errors import ExportError
from export.settings import ExportSettings
from imsm_core.errors import IMSMError, SettingsError


class Recorder:
    """Stands in for the command line's runner."""

    def __init__(self) -> None:
        self.parser = argparse.ArgumentParser()
        self.options: list[type[Any]] = []
        self.services: dict[str, Any] = {}
        self.run: Any = None

    def add(self, name: str, run: Any, text: str, **needs: Any) -> argparse.ArgumentParser:
        assert name == "export"
        assert "torch" in needs["needs"]
        assert needs["extra"] == "export"
        self.run = run
        return self.parser

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def provide(self, name: str, function: Any, **needs: Any) -> None:
        self.services[name] = function

    def add_options(self, parser: argparse.ArgumentParser, settings: type[Any]) -> None:
        self.options.append(settings)

    def read_options(self, settings: type[Any], args: argparse.Namespace) -> Any:
        return settings()


def run(*words: str) -> int:
    commands = Recorder()
    export.commands.register(commands)
    code: int = commands.run(commands.parser.parse_args(words))
    return code


def test_the_options_are_the_settings_and_verify_gets_its_check() -> None:
    commands = Recorder()
    export.commands.register(commands)
    assert commands.options == [ExportSettings]
    assert list(commands.services) == ["check_parity"]


@pytest.mark.parametrize(
    ("words", "kind", "told"),
    [
        (["C", "A", "--adapter", "P"], SettingsError, "--adapter is P; give it or the checkpoint C, not both"),
        (["A", "--adapter", "P"], SettingsError, "--adapter is P; it needs --base, the model that it was trained on"),
        (["C", "A", "--gate", "token"], SettingsError, "--gate is token; it needs --adapter; .*"),
        (["A"], ExportError, "give a checkpoint folder and ARTIFACT, or --adapter, --base and ARTIFACT"),
    ],
)
def test_sources_that_contradict_each_other_are_refused(words: list[str], kind: type[IMSMError], told: str) -> None:
    with pytest.raises(kind) as caught:
        run(*words)
    message = caught.value.told(lambda name: f"--{name}")
    assert message == told or message.startswith(told.removesuffix(".*")), message


def test_a_missing_checkpoint_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(IMSMError, match="the folder does not exist"):
        run(str(tmp_path / "none"), str(tmp_path / "artifact"))
