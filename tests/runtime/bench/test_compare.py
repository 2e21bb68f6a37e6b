"""The benchmark's document and table, and providers that do not run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import cli
from runtime.bench import compare as bench_module
from runtime.bench.compare import bench, named_providers
from runtime.bench.measure import RunTimer
from runtime.bench.placement import read_events
from runtime.bench.settings import BenchSettings
from runtime.engine.execution import Execution
from runtime.engine.session import Session
from runtime.errors import ProviderError, SettingsError
from tests.exported import Exported
from tests.runtime.test_manifest import quality

KEYS = {
    "provider",
    "prompt_tokens",
    "new_tokens",
    "batch",
    "ttft_ms",
    "ms_per_token",
    "ms_per_token_p95",
    "tokens_per_s",
    "overhead_percent",
    "weight_bytes_read",
    "cache_bytes_read",
    "gb_per_s",
    "bandwidth_percent",
    "peak_rss_mb",
    "cache_bytes",
    "ratios",
}


def test_the_last_line_is_the_documented_json(
    tiny: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    options = f"--prompt-lengths 8,4 --new-tokens 5 --batch 2 --repeats 1 --threads 1 --no-spin --json {file}"
    assert cli.main(["bench", str(tiny.artifact), *options.split()]) == 0
    out = capfd.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads(file.read_text())
    assert set(document) >= {"machine", "artifact", "providers", "results"}
    assert document["machine"]["read_gb_per_s"] > 0.1
    assert [result["prompt_tokens"] for result in document["results"]] == [4, 8]
    per_token = 2 * 2 * 2 * 2 * 2 * 8 * 4  # two streams, layers, parts, rows, heads
    for result in document["results"]:
        assert set(result) >= KEYS
        assert result["providers"] == ["CPUExecutionProvider"]
        assert result["cache_bytes"] == 256 * per_token
        assert result["cache_bytes_read"] == (result["prompt_tokens"] + 2.5) * per_token
        assert result["ms_per_token"] > 0
        assert 0 < result["overhead_percent"] < 100
        assert result["peak_rss_mb"] > 10
        assert result["ratios"] == {"ttft_ms": 1.0, "ms_per_token": 1.0}
    (facts,) = document["providers"]
    assert facts["nodes_by_provider"] == {"CPUExecutionProvider": facts["nodes_total"]}
    assert facts["nodes_fallback"] == 0
    assert (facts["threads"], facts["spin"]) == (1, False)
    assert "TTFT ms" in out
    assert document["artifact"]["quality"] is None
    place = out.splitlines()[0].replace("TTFT ms", "TTFT").split().index("KL")
    assert out.splitlines()[1].split()[place] == "-"
    assert "KL: how far a precision is from float32 was not measured; export with --eval-data" in out
    assert "ratio" not in out.splitlines()[0]
    assert f"cpu: {facts['nodes_total']} of {facts['nodes_total']} nodes on CPUExecutionProvider" in out


def test_a_provider_that_cannot_run_keeps_the_others_results(tiny: Exported, capfd: pytest.CaptureFixture[str]) -> None:
    options = "--providers coreml,cpu --prompt-lengths 4 --new-tokens 1 --repeats 1"
    assert cli.main(["bench", str(tiny.artifact), *options.split()]) == 1
    out, err = capfd.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert [result["provider"] for result in document["results"]] == ["cpu"]
    assert document["results"][0]["ms_per_token"] is None  # no step follows the first token
    assert document["results"][0]["overhead_percent"] is None
    assert [("error" in facts) for facts in document["providers"]] == [True, False]
    assert document["providers"][1]["spin"] is True
    assert err.strip().startswith("error: coreml did not run: ")
    assert len(err.strip().splitlines()) == 1


def test_without_any_provider_that_runs_it_is_a_mistake(tiny: Exported, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(tiny.artifact), "--providers", "coreml,dml", "--prompt-lengths", "4"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "coreml: " in err
    assert "dml: " in err
    assert len(err.strip().splitlines()) == 1


def test_all_means_every_usable_provider_and_the_cpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"openvino": "usable", "tensorrt": "not usable: no library", "cpu": "usable"}
    monkeypatch.setattr(bench_module, "usable_providers", lambda: states)
    assert named_providers("all") == ["cpu", "openvino"]
    assert named_providers("cuda, cpu,cuda") == ["cuda", "cpu"]


def test_the_table_has_ratios_to_the_first_provider() -> None:
    result = dict.fromkeys(KEYS, 1) | {"provider": "cpu", "ratios": {"ttft_ms": 1.0, "ms_per_token": 1.0}}
    slower = result | {"provider": "openvino", "ratios": {"ttft_ms": 3.5, "ms_per_token": None}}
    facts: dict[str, Any] = {"fallback_ops": {}, "nodes_total": 9, "same_tokens_percent": None}
    document = {
        "machine": {"read_gb_per_s": 30.0},
        "artifact": {"quality": quality()},
        "results": [result, slower],
        "providers": [
            facts | {"provider": "cpu", "nodes_by_provider": {"CPUExecutionProvider": 9}},
            facts
            | {"provider": "openvino", "nodes_by_provider": {"CPUExecutionProvider": 9}}
            | {"fallback_ops": {"MatMul": 9}, "same_tokens_percent": 50.0},
            {"provider": "cuda", "error": "no GPU"},
        ],
    }
    lines = bench_module.format_table(document).splitlines()
    assert lines[0].split().count("ratio") == 2
    assert lines[2].split()[5:9] == ["3.50", "1.00", "-", "1.00"]
    place = lines[0].replace("TTFT ms", "TTFT").split().index("KL")
    assert [line.split()[place] for line in lines[1:3]] == ["0.031", "0.031"]
    assert lines[3] == (
        "KL: of the blend's next-token distributions to float32's, nats a token, measured by the export on 5,047 "
        "tokens of gsm.jsonl"
    )
    assert lines[-1] == (
        "openvino: 9 of 9 nodes on CPUExecutionProvider, none on OpenVINOExecutionProvider; fell back: MatMul 9; "
        "50 % of the greedy tokens match the first's"
    )


def test_only_the_last_run_counts_where_nodes_ran() -> None:
    def node(name: str, index: int, provider: str, start: int) -> dict[str, Any]:
        facts = {"node_index": str(index), "provider": provider, "op_name": name}
        return {"cat": "Node", "name": f"{name}_{index}_kernel_time", "ts": start, "dur": 1, "args": facts}

    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9, "args": {}},
        node("Prompt", 0, "OpenVINOExecutionProvider", 11),
        {"cat": "Session", "name": "model_run", "ts": 10, "dur": 9, "args": {}},
        node("Fused", 1, "OpenVINOExecutionProvider", 21),
        node("Attention", 2, "CPUExecutionProvider", 22),
        node("Attention", 3, "CPUExecutionProvider", 23),
        {"cat": "Node", "name": "Attention_3_fence_before", "ts": 23, "dur": 0, "args": {"op_name": "Attention"}},
        {"cat": "Session", "name": "model_run", "ts": 20, "dur": 9, "args": {}},
    ]
    placement = read_events(events, "OpenVINOExecutionProvider")
    assert placement.nodes_by_provider == {"CPUExecutionProvider": 2, "OpenVINOExecutionProvider": 1}
    assert placement.fallback_ops == {"Attention": 2}
    assert (placement.nodes_total, placement.nodes_fallback) == (3, 2)


def test_every_decode_step_passes_through_the_timer(tiny: Exported) -> None:
    session = Session(tiny.artifact, threads=1)
    timer = RunTimer(session)
    state = session.new_state()
    session.prefill(state, [[1, 2, 3]])
    before = timer.seconds
    session.decode_step(state, [4])
    assert timer.seconds > before > 0


def test_a_process_that_dies_is_named() -> None:
    assert bench_module._death(-11) == "was ended by SIGSEGV"
    assert bench_module._death(3) == "died with exit code 3"


def test_an_error_inside_onnxruntime_is_one_line(tiny: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    failure = onnxruntime.capi.onnxruntime_pybind11_state.Fail("first\nsecond")

    def fail(*arguments: Any) -> None:
        raise failure

    monkeypatch.setattr(bench_module, "measure", fail)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    sender = type("Sender", (), {"send": lambda self, outcome: sent.append(outcome)})()
    bench_module._worker(sender, tiny.artifact, "cpu", BenchSettings())
    assert isinstance(sent[0], ProviderError)
    assert str(sent[0]) == "first second"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("--prompt-lengths 4,x", SettingsError, "--prompt-lengths is 4,x; they must be numbers like 32,128"),
        ("--json /no/where/file.json", SettingsError, "--json is /no/where/file.json; its folder does not exist"),
        ("--prompt-lengths 0", SettingsError, "at least 1"),
        ("--batch 1000000000000000000000000000000", SettingsError, "it must be at most 1000000"),
        ("--json /", SettingsError, "--json is /; it is a folder"),
        ("--new-tokens 0", SettingsError, "--new-tokens is 0; it must be at least 1"),
        ("--prompt-lengths 100 --new-tokens 100", SettingsError, "more than the context"),
        ("--providers cpu,quantum --prompt-lengths 4", ProviderError, "unknown execution provider 'quantum'"),
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


def test_a_cuda_graph_is_for_cuda_alone(tiny: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(tiny.artifact), "--prompt-lengths", "4", "--cuda-graph", "--providers", "cpu"]) == 2
    assert capsys.readouterr().err == "error: --providers is cpu; --cuda-graph needs cuda\n"
    settings = BenchSettings(prompt_lengths=(4,), new_tokens=2, repeats=1, execution=Execution("cuda", cuda_graph=True))
    (facts,) = bench(tiny.artifact, ["cpu"], settings)["providers"]
    assert "error" not in facts
