"""The benchmark's document and table, and the machine's description."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cli
from runtime.errors import ProviderError, SettingsError
from runtime.machine import describe_machine, peak_rss_mb, usable_cores
from runtime.providers import usable_providers
from tests.exported import Exported

KEYS = {
    "provider",
    "prompt_tokens",
    "new_tokens",
    "batch",
    "ttft_ms",
    "ms_per_token",
    "ms_per_token_p95",
    "tokens_per_s",
    "peak_rss_mb",
    "cache_bytes",
}


def test_the_last_line_is_the_documented_json(
    tiny: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    options = f"--prompt-lengths 8,4 --new-tokens 5 --batch 2 --repeats 1 --json {file}"
    assert cli.main(["bench", str(tiny.artifact), *options.split()]) == 0
    out = capfd.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads(file.read_text())
    assert set(document) >= {"machine", "artifact", "results"}
    assert [result["prompt_tokens"] for result in document["results"]] == [4, 8]
    for result in document["results"]:
        assert set(result) >= KEYS
        assert result["providers"] == ["CPUExecutionProvider"]
        assert result["cache_bytes"] == 2 * 2 * 2 * 2 * 2 * 256 * 8 * 4  # two streams, layers, parts, rows, heads
        assert result["ms_per_token"] > 0
        assert result["peak_rss_mb"] > 10
    assert "TTFT ms" in out


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("--prompt-lengths 4,x", SettingsError, "not numbers"),
        ("--prompt-lengths 0", SettingsError, "at least 1"),
        ("--new-tokens 0", SettingsError, "new_tokens is 0"),
        ("--prompt-lengths 100 --new-tokens 100", SettingsError, "more than the context"),
        ("--providers quantum --prompt-lengths 4", ProviderError, "unknown execution provider"),
    ],
)
def test_bad_options_are_one_line(
    tiny: Exported, capsys: pytest.CaptureFixture[str], options: str, error: type[Exception], message: str
) -> None:
    assert cli.main(["bench", str(tiny.artifact), *options.split()]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert len(line.splitlines()) == 1
    with pytest.raises(error):
        cli.main(["--debug", "bench", str(tiny.artifact), *options.split()])


def test_the_machine_is_described() -> None:
    assert usable_cores() >= 1
    assert peak_rss_mb() > 10
    assert describe_machine()["usable_cores"] == usable_cores()


def test_the_probe_graph_starts_the_cpu() -> None:
    assert usable_providers()["cpu"] == "usable"
