"""Comparing execution providers on an artifact: one process per provider, one document, one table."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime

from ..engine.execution import Execution
from ..engine.providers import PROVIDERS, is_onnxruntimes, usable_providers
from ..engine.session import Session
from ..errors import IMSMRuntimeError, ProviderError, SettingsError
from ..interrupts import postponed
from ..machine import describe_machine, usable_cores
from ..manifest import Manifest, read_manifest
from ..printable import printable
from ..quality import ASK, kl_of, spoken, texts_of
from .bandwidth import read_gb_per_s
from .measure import BenchResult, measure
from .placement import Placement, place_nodes
from .settings import BenchSettings

HOST_MEMORY = ("cpu", "openvino", "xnnpack")
"""Providers that read the memory whose bandwidth is measured."""
COMPARED = ("ttft_ms", "ms_per_token")


@dataclass(frozen=True)
class _Measured:
    """What a provider's process sends back. tokens: (B, new tokens) by prompt length. spin: the session's setting."""

    results: list[BenchResult]
    tokens: list[list[list[int]]]
    threads: int
    spin: bool
    placement: Placement


def named_providers(text: str) -> list[str]:
    """The providers of a comma-separated list, or with "all" every usable one, the CPU's first. Raises ProviderError
    for an unknown name."""
    if text.strip() == "all":
        usable = [name for name, state in usable_providers().items() if state == "usable"]
        return sorted(usable, key=lambda name: name != "cpu")
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in PROVIDERS:
            raise ProviderError(f"unknown execution provider {name!r}; choose all or some of {', '.join(PROVIDERS)}")
    return names


def bench(folder: Path, providers: Sequence[str], settings: BenchSettings) -> dict[str, Any]:
    """Measure every provider in its own process; returns the document that `bench` prints.

    A provider that cannot run has an `error` in the document's `providers` and no results; the others are still
    measured. Ratios are against the first provider that ran. Raises IMSMRuntimeError with the providers' messages if
    none did.
    """
    manifest = read_manifest(folder)
    longest = max(settings.prompt_lengths) + settings.new_tokens
    if longest > manifest.context_length:
        raise SettingsError(
            "new_tokens",
            settings.new_tokens,
            f"with the longest of {{prompt_lengths}} it makes {longest}, more than the context of "
            f"{manifest.context_length}",
        )
    bandwidth = read_gb_per_s(settings.execution.threads or usable_cores())
    measured: dict[str, _Measured] = {}
    errors: dict[str, IMSMRuntimeError] = {}
    for provider in providers:
        try:
            measured[provider] = _in_own_process(folder, provider, settings)
        except IMSMRuntimeError as error:
            errors[provider] = error
    if not measured:
        if len(errors) == 1:
            raise next(iter(errors.values()))
        raise ProviderError("; ".join(f"{name}: {error}" for name, error in errors.items()))
    first = next(iter(measured.values()))
    return {
        "machine": {
            **describe_machine(),
            "onnxruntime": onnxruntime.__version__,
            "read_gb_per_s": round(bandwidth, 2),
        },
        "artifact": _describe_artifact(folder, manifest),
        "settings": asdict(settings),
        "providers": [
            {"provider": name, "error": str(errors[name])} if name in errors else _facts(name, measured[name], first)
            for name in providers
        ],
        "results": [
            _with_ratios(result, reference, bandwidth)
            for found in measured.values()
            for result, reference in zip(found.results, first.results, strict=True)
        ],
    }


def format_table(document: dict[str, Any]) -> str:
    """The results as an aligned table, and a line for each provider that ran. Ratios, where there are several, are
    against the first."""
    ran = [facts for facts in document["providers"] if "error" not in facts]
    quality = document["artifact"]["quality"]
    columns = ["provider", "prompt", "new", "batch", "TTFT ms", "ratio", "ms/token", "ratio", "p95", "tokens/s"]
    columns += ["KL", "overhead", "GB/s", "of peak", "peak MB", "cache KB"]
    rows = [columns]
    for result in document["results"]:
        percent = result["bandwidth_percent"]
        rows.append(
            [
                result["provider"],
                str(result["prompt_tokens"]),
                str(result["new_tokens"]),
                str(result["batch"]),
                f"{result['ttft_ms']:.1f}",
                _number(result["ratios"]["ttft_ms"], 2),
                _number(result["ms_per_token"], 2),
                _number(result["ratios"]["ms_per_token"], 2),
                _number(result["ms_per_token_p95"], 2),
                _number(result["tokens_per_s"], 1),
                kl_of(quality),
                _number(result["overhead_percent"], 1, " %"),
                _number(result["gb_per_s"], 1),
                _number(percent, 0, " %"),
                f"{result['peak_rss_mb']:.0f}",
                f"{result['cache_bytes'] / 1024:.0f}",
            ]
        )
    kept = [place for place, name in enumerate(columns) if name != "ratio" or len(ran) > 1]
    widths = {place: max(len(row[place]) for row in rows) for place in kept}
    lines = ["  ".join(row[place].rjust(widths[place]) for place in kept) for row in rows]
    speed = document["machine"]["read_gb_per_s"]
    lines.append(f"KL: {_explained(quality)}")
    lines.append("overhead: share of a step outside onnxruntime; GB/s: weights and caches that a step must read;")
    lines.append(f"of peak: against {speed:.1f} GB/s, the reading speed that NumPy reached here with as many threads")
    return "\n".join([*lines, *(_line(facts) for facts in ran)])


def _explained(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return f"how far a precision is from float32 was not measured; {ASK}"
    return (
        f"of the {spoken(quality)[0]}'s next-token distributions to float32's, nats a token, measured by the export on "
        f"{printable(texts_of(quality))}"
    )


def _line(facts: dict[str, Any]) -> str:
    name, nodes = PROVIDERS[facts["provider"]], facts["nodes_by_provider"]
    places = ", ".join(f"{count} of {facts['nodes_total']} nodes on {place}" for place, count in nodes.items())
    text = f"{facts['provider']}: {places}"
    if name not in nodes:
        text += f", none on {name}"
    if facts["fallback_ops"]:
        text += "; fell back: " + ", ".join(f"{operator} {count}" for operator, count in facts["fallback_ops"].items())
    if facts["same_tokens_percent"] is not None:
        text += f"; {facts['same_tokens_percent']:.0f} % of the greedy tokens match the first's"
    return text


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _describe_artifact(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "architecture": manifest.architecture,
        "precision": manifest.precision,
        "quality": manifest.quality,
        "streams": list(manifest.streams),
        "gate": manifest.gate_kind,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
    }


def _facts(provider: str, found: _Measured, first: _Measured) -> dict[str, Any]:
    """The document's entry about a provider that ran."""
    rows = [
        (ours, theirs)
        for run, reference in zip(found.tokens, first.tokens, strict=True)
        for row, expected in zip(run, reference, strict=True)
        for ours, theirs in zip(row, expected, strict=True)
    ]
    same = sum(ours == theirs for ours, theirs in rows) / len(rows)
    return {
        "provider": provider,
        "in_use": found.results[0].providers,
        "threads": found.threads,
        "spin": found.spin,
        "nodes_total": found.placement.nodes_total,
        "nodes_fallback": found.placement.nodes_fallback,
        "nodes_by_provider": found.placement.nodes_by_provider,
        "fallback_ops": found.placement.fallback_ops,
        "same_tokens_percent": None if found is first else round(100 * same, 2),
    }


def _with_ratios(result: BenchResult, first: BenchResult, bandwidth: float) -> dict[str, Any]:
    """A result, its ratios to the first provider's, and how much of the reading speed it uses."""
    document = asdict(result)
    reference = asdict(first)
    document["ratios"] = {
        name: None if document[name] is None else round(document[name] / reference[name], 3) for name in COMPARED
    }
    reads_host = result.provider in HOST_MEMORY or result.providers == [PROVIDERS["cpu"]]
    document["bandwidth_percent"] = (
        round(100 * result.gb_per_s / bandwidth, 1) if result.gb_per_s is not None and reads_host else None
    )
    return document


def _in_own_process(folder: Path, provider: str, settings: BenchSettings) -> _Measured:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(sender, folder, provider, settings))
    try:
        with postponed():
            process.start()
        sender.close()
        outcome = receiver.recv()
    except EOFError as error:
        process.join()
        raise IMSMRuntimeError(f"the benchmark of {provider!r} {_death(process.exitcode)}") from error
    except BaseException:  # Ctrl-C, or SIGTERM
        if process.is_alive():
            process.kill()
            process.join()
        raise
    process.join()
    if isinstance(outcome, Exception):
        raise outcome
    measured: _Measured = outcome
    return measured


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"died with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _worker(sender: Any, folder: Path, provider: str, settings: BenchSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    graph = settings.execution.cuda_graph and provider == "cuda"
    execution = replace(settings.execution, provider=provider, cuda_graph=graph)
    try:
        sender.send(_measure_alone(folder, execution, settings))
    except (IMSMRuntimeError, OSError, MemoryError) as error:  # for the process that waits to tell
        sender.send(error)
    except Exception as error:
        if not is_onnxruntimes(error):
            raise
        sender.send(ProviderError(" ".join(str(error).split())))


def _end_with_parent() -> None:
    """Nobody else ends this process when the one that waits for it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _measure_alone(folder: Path, execution: Execution, settings: BenchSettings) -> _Measured:
    start = time.perf_counter()
    session = Session(folder, execution)
    load_ms = (time.perf_counter() - start) * 1e3
    options = session.onnx.get_session_options()
    results, tokens = measure(session, settings, load_ms)
    del session  # one copy of the packed weights at a time
    prompts = [[0] * min(settings.prompt_lengths)] * settings.batch
    placement = place_nodes(folder, execution, prompts)
    return _Measured(results, tokens, options.intra_op_num_threads, _spins(options), placement)


def _spins(options: onnxruntime.SessionOptions) -> bool:
    """Whether idle threads busy-wait; onnxruntime's do by default."""
    try:
        return bool(options.get_session_config_entry("session.intra_op.allow_spinning") != "0")
    except RuntimeError:  # the entry was never set
        return True
