"""`inspect`: what an artifact is, whatever its texts hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.inspect import format_summary, summarize
from tests.exported import Exported, copied, edit_manifest
from tests.runtime.test_manifest import command


def test_texts_of_an_artifact_cannot_move_the_cursor(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact\nparity       perfect")
    nasty = "\x1b[2J\ngate         none\r\u202e"
    edit_manifest(
        artifact,
        model=tiny.manifest["model"] | {"architecture": nasty},
        base_model=tiny.manifest["base_model"] | {"name": nasty},
        adapter=tiny.manifest["adapter"] | {"peft_type": nasty},
        created=nasty,
    )
    lines = format_summary(summarize(artifact)).splitlines()
    assert len(lines) == len(format_summary(summarize(tiny.artifact)).splitlines())
    assert all(line.isprintable() for line in lines)
    assert r"\x1b[2J\ngate         none\r\u202e" in lines[1]


def test_json_is_json_for_everyone(tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("inspect", tiny.artifact, "--json") == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["context_length"] == 128
    assert facts["cache_bytes_per_token"] == 2 * 2 * 2 * 2 * 8 * 4  # streams, layers, parts, heads, size, float32


@pytest.mark.parametrize("differences", [{}, {"prefill": {}}, {"prefill": {"logits": None}}])
def test_an_artifact_without_a_measured_parity_says_so(
    tiny: Exported, tmp_path: Path, differences: dict[str, dict[str, None]]
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, parity=tiny.manifest["parity"] | {"max_abs_difference": differences})
    assert "parity       not recorded" in format_summary(summarize(artifact))
