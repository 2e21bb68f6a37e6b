"""Every manifest that differs from the one that was exported is refused in one line, or changes nothing."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export.settings import ExportSettings
from runtime import IMSMRuntimeError, generate, load
from runtime.cli.inspect import _inspect
from runtime.cli.verify import _verify
from runtime.console import Commands
from tests.exported import PROMPT, Exported, export_tiny

EDITABLE = {
    "adapter",
    "base_model",
    "created",
    "cuda_kernels",
    "files",
    "generation",
    "parity",
    "passes",
    "producers",
    "prompts",
    "quality",
    "tokens",
    "training",
    "activation_range",
}
"""Sections that may differ from the exported ones when an artifact is loaded."""
NEVER = object()
SECTIONS_THAT_GENERATION_READS = {"tokens", "prompts"}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to every leaf and container of a document."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def mutations(value: Any) -> Iterator[Any]:
    """What a value may become: another type, another size, twice, the other way round, gone."""
    yield NEVER
    yield from (None, True, False, 0, -1, 1, 1.5, 2**31, 10**30, "", "x", "\x1b[2J\n", [], {}, [[]], {"x": 1})
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -value, 2 * value, float(value), str(value))
    elif isinstance(value, float):
        yield from (-value, 2 * value, str(value))
    elif isinstance(value, str):
        yield from (value.upper(), value + "x", value[:-1], "../" + value, "\u202e" + value)
    elif isinstance(value, list):
        yield from (value + value, value[::-1], value[1:], value[:-1])
    elif isinstance(value, dict):
        yield from ({**value, "unknown": 1}, {key.upper(): item for key, item in value.items()})
        keys, items = list(value), list(value.values())
        yield dict(zip(keys, items[1:] + items[:1], strict=True))


def mutated(document: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The path of each change and the changed document."""
    for path in places(document):
        target = document
        for key in path:
            target = target[key]
        for new in mutations(target):
            if repr(new) == repr(target) or (not path and new is NEVER):
                continue
            if not path:
                yield path, new
                continue
            changed = copy.deepcopy(document)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            if new is NEVER:
                del holder[path[-1]]
            else:
                holder[path[-1]] = new
            yield path, changed


def attempt(action: Any) -> Any:
    """What it gives, or the error of a user's mistake; any other goes on."""
    try:
        return action()
    except IMSMRuntimeError as error:
        return error


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, tiny: Exported) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mutations")
    settings = {
        "base_only": ExportSettings(base_only=True),
        "int8": ExportSettings(precision="int8", kv_cache="int8"),
        "fp16": ExportSettings(precision="fp16"),
    }
    made = {name: export_tiny(folder / name, head_dim=16, settings=chosen) for name, chosen in settings.items()}
    made["virtual"] = export_tiny(folder / "virtual", adapter="prompt_tuning")
    return {"siamese": tiny.artifact} | {name: exported.artifact for name, exported in made.items()}


@pytest.mark.parametrize("kind", ["siamese", "base_only", "int8", "fp16", "virtual"])
def test_every_changed_manifest_is_refused_in_one_line_or_changes_nothing(
    kind: str, artifacts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = artifacts[kind]
    document = json.loads((artifact / "imsm_model.json").read_text())
    expected = generate(load(artifact), PROMPT, max_new_tokens=4).token_ids
    for name in document["files"]:
        os.link(artifact / name, tmp_path / name)
    commands = Commands(argparse.ArgumentParser())
    asked = argparse.Namespace(artifact=tmp_path, checkpoint=None, base=None, provider="cpu", json=True)
    count = 0
    stride = 15 if kind == "siamese" else 37  # all of them take many minutes
    for path, changed in itertools.islice(mutated(document), 0, None, stride):
        count += stride
        (tmp_path / "imsm_model.json").write_text(json.dumps(changed))
        what = f"{path} in {json.dumps(changed)[:80]}"
        seen = attempt(lambda: _inspect(asked))
        printed = capsys.readouterr().out
        if isinstance(seen, IMSMRuntimeError):
            assert str(seen).isprintable(), what
            continue  # the manifest is read in the same way by whoever reads it
        json.loads(printed, parse_constant=pytest.fail)
        asked.json = False
        _inspect(asked)
        asked.json = True
        assert all(line.isprintable() for line in capsys.readouterr().out.splitlines()), what
        found = attempt(lambda: _verify(asked, commands))
        assert isinstance(found, IMSMRuntimeError) or path == ("files", "model.onnx"), f"verified: {what}"
        capsys.readouterr()
        loaded = attempt(lambda: load(tmp_path))
        if isinstance(loaded, IMSMRuntimeError):
            assert str(loaded).isprintable(), what
            continue
        known = not path or path[0] in EDITABLE or path[0] not in document
        assert known or "unknown" in changed.get(path[0], ()), f"loaded: {what}"
        if not path or path[0] not in SECTIONS_THAT_GENERATION_READS:
            assert generate(loaded, PROMPT, max_new_tokens=4).token_ids == expected, what
    assert count > 1000
