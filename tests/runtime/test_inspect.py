"""`inspect`: what an artifact is, whatever its texts hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.inspect import format_summary, summarize
from tests.exported import Exported, copied, edit_manifest
from tests.runtime.test_manifest import command, quality


def test_texts_of_an_artifact_cannot_move_the_cursor(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact\nparity       perfect")
    nasty = "\x1b[2J\ngate         none\r\u202e"
    edit_manifest(
        artifact,
        model=tiny.manifest["model"] | {"architecture": nasty},
        base_model=tiny.manifest["base_model"] | {"name": nasty},
        adapter=tiny.manifest["adapter"] | {"peft_type": nasty},
        created=nasty,
        quality=quality(file=nasty),
    )
    lines = format_summary(summarize(artifact)).splitlines()
    assert len(lines) == len(format_summary(summarize(tiny.artifact)).splitlines())
    assert all(line.isprintable() for line in lines)
    assert r"\x1b[2J\ngate         none\r\u202e" in lines[2]
    assert lines[1].endswith(r"5,047 tokens of \x1b[2J\ngate         none\r\u202e")


def test_json_is_json_for_everyone(tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("inspect", tiny.artifact, "--json") == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["context_length"] == 128
    assert facts["quality"] is None
    assert facts["cache_bytes_per_token"] == 2 * 2 * 2 * 2 * 8 * 4  # streams, layers, parts, heads, size, float32


def test_the_quality_is_the_line_after_the_artifacts_own(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    lines = format_summary(summarize(artifact)).splitlines()
    assert lines[1] == "quality      not measured; export with --eval-data"
    edit_manifest(artifact, quality=quality())
    measured = format_summary(summarize(artifact)).splitlines()
    expected = (
        "quality      blend KL 0.031, base KL 0.022, adapter KL 0.03; +1.1 % perplexity on 5,047 tokens of gsm.jsonl"
    )
    assert measured == [lines[0], expected, *lines[2:]]
    assert command("inspect", artifact, "--json") == 0
    assert json.loads(capsys.readouterr().out)["quality"] == quality()
    lost = quality()["blend"] | {"mean_kl": None, "perplexity_change": None}
    edit_manifest(artifact, quality=quality(blend=lost))
    assert (
        "blend KL not finite, base KL 0.022, adapter KL 0.03; a change that is not finite of the perplexity on"
        in format_summary(summarize(artifact))
    )


@pytest.mark.parametrize(
    ("generation", "line"),
    [
        ({"do_sample": False}, "greedy"),
        (
            {"do_sample": False, "top_k": 50, "temperature": 0.7, "repetition_penalty": 1.1},
            "greedy, repetition_penalty 1.1",
        ),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, "temperature 0.7, top_k 20"),
    ],
)
def test_how_the_model_generates_by_default_is_told(
    tiny: Exported, tmp_path: Path, generation: dict[str, Any], line: str
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, generation=generation)
    assert f"generation   {line}" in format_summary(summarize(artifact)).splitlines()
    assert summarize(artifact)["generation"] == generation


@pytest.mark.parametrize("differences", [{}, {"prefill": {}}, {"prefill": {"logits": None}}])
def test_an_artifact_without_a_measured_parity_says_so(
    tiny: Exported, tmp_path: Path, differences: dict[str, dict[str, None]]
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, parity=tiny.manifest["parity"] | {"max_abs_difference": differences})
    assert "parity       not recorded" in format_summary(summarize(artifact))
