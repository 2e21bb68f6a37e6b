"""The benchmark of peers, as far as it goes without their environments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import runtime
from benchmarks.peers.catalogue import BACKBONE, FP32, MODELS, PEERS, PRECISIONS, Peer, reference
from benchmarks.peers.client import Process, RunnerError
from benchmarks.peers.environments import REQUIREMENTS
from benchmarks.peers.measure import MeasureSettings, Ready, batches, measure
from benchmarks.peers.report import NOTHING, page, plain, summarize, table
from benchmarks.shapes import SHAPES, sizes
from tests.exported import PROMPT, Exported

HERE = Path(sys.modules["benchmarks.peers"].__path__[0])


def _peer(mode: str = "one", **fields: Any) -> Peer:
    return Peer(f"ours, {mode}", "fp32", "own", "runner_ours.py", "tiny", FP32, mode, **fields)


def _document() -> dict[str, Any]:
    """Two peers, the reference half as slow in each round although the machine slows down between them."""

    def peer(label: str, decode: list[list[float]], **fields: Any) -> dict[str, Any]:
        fresh = {"peak_mb": 100.0, "load_to_first_token_ms": 5.0, "start_to_first_token_ms": 9.0}
        return {
            "label": label,
            "fresh": [fresh | {"versions": {"numpy": "2.4.6"}}],
            "decode": {"128": decode},
            "prefill": {"512": [8.0]},
            "bytes_per_step": {"128": 1e7},
            "disk_mb": 12.0,
        } | fields

    return {
        "shape": "tiny",
        "precision": "fp32",
        "reference": reference("fp32"),
        "date": "2026-01-02",
        "machine": {"processor": "a processor", "usable_cores": 2, "memory_mb": 2048},
        "read_gb_per_s": 20.0,
        "settings": {
            "contexts": [128],
            "prompts": [512],
            "threads": 2,
            "rounds": 2,
            "steps": 3,
            "fresh_runs": 1,
            "fresh_prompt": 128,
            "fresh_tokens": 64,
        },
        "peers": {
            reference("fp32"): peer("ours", [[1.0, 1.0, 9.0], [3.0, 3.0, 3.0]]),
            "torch": peer("theirs", [[2.0, 2.0, 2.0], [6.0, 6.0, 50.0]]),
            "optimum": {"label": "gone", "fresh": [], "decode": {}, "prefill": {}, "error": "no such thing"},
        },
    }


def test_our_runner_generates_what_the_runtime_generates(tiny: Exported) -> None:
    model = runtime.load(tiny.artifact)
    expected = [step.id for step, _ in zip(runtime.generate_step(model.session, PROMPT), range(6), strict=False)]
    with Process(Path(sys.executable), "runner_ours.py", tiny.artifact, ["one", "twice"], 1, 64) as process:
        for mode in ("one", "twice"):  # the first token is chosen while the prompt is read
            assert process.ask("tokens", mode, prompt=PROMPT, steps=5)["tokens"] == expected[1:]


def test_measuring_in_turns_fills_every_figure(tiny: Exported) -> None:
    sizes = {"fresh_prompt": 8, "fresh_tokens": 4}
    settings = MeasureSettings(2, 2, 3, 1, contexts=(16, 48), prompts=(8,), fresh_runs=1, **sizes)
    ready = {
        name: Ready(_peer(mode), Path(sys.executable), tiny.artifact)
        for name, mode in {"once": "one", "twice": "twice"}.items()
    }
    for result in measure(ready, settings, "once").values():
        assert {context: [len(block) for block in blocks] for context, blocks in result["decode"].items()} == {
            "16": [3, 3, 3, 3],  # two starts of two rounds
            "48": [3, 3, 3, 3],
        }
        assert len(result["prefill"]["8"]) == 2  # every second round
        assert result["fresh"][0]["peak_mb"] > 1
        assert result["fresh"][0]["start_to_first_token_ms"] > result["fresh"][0]["load_to_first_token_ms"] > 0


def test_a_peer_that_fails_leaves_the_others_measured(tiny: Exported, tmp_path: Path) -> None:
    settings = MeasureSettings(1, 1, 1, 1, contexts=(8,), prompts=(8,), fresh_runs=1, fresh_prompt=8, fresh_tokens=2)
    python = Path(sys.executable)
    results = measure(
        {"bad": Ready(_peer(), python, tmp_path), "good": Ready(_peer(), python, tiny.artifact)}, settings, "good"
    )
    assert "ArtifactError" in results["bad"]["error"]
    assert results["good"]["decode"]["8"]
    with pytest.raises(RunnerError, match="ArtifactError"):
        Process(python, "runner_ours.py", tmp_path, ["one"], 1, 64)


def test_ratios_are_taken_within_rounds() -> None:
    summary = summarize(_document())
    assert summary["torch"]["decode 128 ratio"] == pytest.approx(0.5)
    assert summary[reference("fp32")]["decode 128 ratio"] == 1
    assert summary["torch"]["decode 128"] == 4  # of all steps: 2 2 2 6 6 50
    assert summary["torch"]["decode 128 bandwidth"] == pytest.approx(1e7 / 4e-3 / 20e9)


def test_what_was_not_measured_is_a_dash() -> None:
    document = _document()
    lines = table(document).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[-1] == "| gone |" + f" {NOTHING} |" * (lines[-1].count("|") - 2)
    assert "| **ours** | 3.00 | 1.00 |" in lines[2]
    text = page({"results": [document]}, "picture.png")
    assert "numpy 2.4.6" in text
    assert "gone: no such thing" in text
    assert "(picture.png)" in text
    assert "no such thing" in plain(document)


def test_peers_that_do_not_fit_together_are_measured_in_groups_with_the_reference() -> None:
    peers = {name: Ready(_peer(apart=True, mode=name), Path(), Path()) for name in "abcd"}
    needs = dict.fromkeys(peers, 10.0)
    assert list(batches(peers, needs, 100.0, "b")) == [["a", "b", "c", "d"]]
    assert list(batches(peers, needs, 30.0, "b")) == [["a", "b", "c"], ["b", "d"]]
    assert list(batches(peers, needs, 5.0, "b")) == [["a", "b"], ["b", "c"], ["b", "d"]]
    assert list(batches({"b": peers["b"]}, needs, 5.0, "b")) == [["b"]]


def test_bytes_that_a_step_reads_follow_the_shape(tmp_path: Path) -> None:
    counts = sizes(SHAPES["qwen2.5-0.5b"], 16)
    assert counts.layer_weights + counts.head_weights == pytest.approx(494e6, rel=1e-3)
    assert counts.cache_values_per_token == 24 * 2 * 2 * 64
    once, twice = _peer(), _peer(passes=2, heads=2, streams=2)
    assert 2 * once.bytes_per_step(counts, 128, tmp_path) == twice.bytes_per_step(counts, 128, tmp_path)


def test_every_peer_names_files_that_are_there() -> None:
    environments = {model.environment for model in MODELS.values()} | {peer.environment for peer in PEERS.values()}
    for environment in environments - {"own"} | {"plot"}:
        pins = (REQUIREMENTS / f"{environment}.txt").read_text().splitlines()[1:]
        assert all("==" in pin for pin in pins)
    assert all((HERE / model.script).is_file() for model in MODELS.values())
    assert all((HERE / peer.runner).is_file() and peer.model in MODELS for peer in PEERS.values())
    assert {peer.precision for peer in PEERS.values()} == set(PRECISIONS)
    assert all(reference(precision) in PEERS for precision in PRECISIONS)
    assert BACKBONE in MODELS
