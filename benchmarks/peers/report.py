"""From a measured document to tables: medians, ratios within rounds, bandwidth used, bytes on disk."""

from __future__ import annotations

from statistics import median
from typing import Any

NOTHING = "–"


def summarize(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """name -> medians of one result; ratios are of the reference to the peer, medians over the rounds they share."""
    peers, reference = result["peers"], result["peers"].get(result["reference"], {})
    summary: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        row: dict[str, Any] = {"label": peer["label"], "disk_mb": peer.get("disk_mb"), "error": peer.get("error")}
        for context, blocks in peer["decode"].items():
            row[f"decode {context}"] = median(step for block in blocks for step in block)
            others = reference.get("decode", {}).get(context, [])
            row[f"decode {context} ratio"] = _ratio(map(median, others), map(median, blocks))
            read = peer["bytes_per_step"][context]
            row[f"decode {context} bandwidth"] = read / row[f"decode {context}"] / 1e6 / result["read_gb_per_s"]
        for tokens, times in peer["prefill"].items():
            row[f"prefill {tokens}"] = median(times)
            row[f"prefill {tokens} ratio"] = _ratio(reference.get("prefill", {}).get(tokens, []), times)
        for key in ("peak_mb", "load_to_first_token_ms", "start_to_first_token_ms"):
            if peer["fresh"]:
                row[key] = median(run[key] for run in peer["fresh"])
        summary[name] = row
    return summary


def table(result: dict[str, Any]) -> str:
    """One result as a Markdown table; what was not measured is a dash."""
    contexts = [str(context) for context in result["settings"]["contexts"]]
    prompts = [str(tokens) for tokens in result["settings"]["prompts"]]
    lines = [[cell.format(*contexts, *prompts) for cell in _header(len(contexts), len(prompts))]]
    for name, row in summarize(result).items():
        cells = [f"**{row['label']}**" if name == result["reference"] else row["label"]]
        for context in contexts:
            cells += [
                _number(row.get(f"decode {context}"), 2),
                _number(row.get(f"decode {context} ratio"), 2),
                _percent(row.get(f"decode {context} bandwidth")),
            ]
        for tokens in prompts:
            cells += [_number(row.get(f"prefill {tokens}"), 0), _number(row.get(f"prefill {tokens} ratio"), 2)]
        cells += [_number(row.get("peak_mb"), 0), _number(row.get("disk_mb"), 0)]
        cells += [_number(row.get("load_to_first_token_ms"), 0), _number(row.get("start_to_first_token_ms"), 0)]
        lines.append(cells)
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def page(document: dict[str, Any], picture: str | None) -> str:
    """docs/BENCHMARKS.md: how it was measured, the picture, a table per shape and precision."""
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks.peers`, which builds every model from one saved backbone with random weights "
        "(a LoRA of rank 16 on all seven projections, non-zero) and measures the peers in turns. Every figure is a "
        "median; \"siamese / it\" is our siamese model's time over the row's, the median over the rounds in which both "
        'ran. "Bandwidth used" is what a decode step must read (weights in the peer\'s own format, adapter, caches) '
        "by its time, as a share of the memory's measured read speed. Peak memory (MiB resident) "
        "and loading are of processes of their own that run one generation; files are in the page cache. A dash was "
        "not measured. Random weights have no quality to lose: see QUALITY.md for the KL of each format on real "
        "models.",
    ]
    if picture:
        parts.append(f"![Decoding, first token and memory of every peer]({picture})")
    for result in document["results"]:
        settings, machine = result["settings"], result["machine"]
        parts += [
            f"## {result['shape']}, {result['precision']}",
            f"{result['date']}; {machine['processor']}, {settings['threads']} threads of {machine['usable_cores']} "
            f"cores, {machine['memory_mb'] / 1024:.0f} GiB, reading {result['read_gb_per_s']:.1f} GB/s; "
            f"{settings.get('starts', 1)} starts of {settings['rounds']} rounds, in blocks of {settings['steps']} "
            f"steps; {settings['fresh_runs']} generations of {settings['fresh_prompt']} + {settings['fresh_tokens']} "
            "tokens for memory and loading. "
            f"Versions: {_versions(result)}.",
            table(result),
        ]
        for peer in result["peers"].values():
            if peer.get("error"):
                parts.append(f"Not (wholly) measured: {peer['label']}: {peer['error']}")
    return "\n\n".join(parts) + "\n"


def plain(result: dict[str, Any]) -> str:
    """A narrow table for a terminal."""
    columns = [f"decode {context}" for context in result["settings"]["contexts"]]
    columns += [f"prefill {tokens}" for tokens in result["settings"]["prompts"]] + ["peak_mb"]
    lines = [f"{result['shape']}, {result['precision']}", " " * 40 + "".join(f"{name:>16}" for name in columns)]
    for row in summarize(result).values():
        cells = "".join(f"{_number(row.get(name), 2):>16}" for name in columns)
        lines.append(f"{row['label']:40}{cells}" + (f"  {row['error']}" if row["error"] else ""))
    return "\n".join(lines)


def _header(contexts: int, prompts: int) -> list[str]:
    columns = ["peer"]
    for index in range(contexts):
        columns += [f"decode at {{{index}}}, ms", "siamese / it", "bandwidth used"]
    for index in range(contexts, contexts + prompts):
        columns += [f"TTFT of {{{index}}}, ms", "siamese / it"]
    return [*columns, "peak MB", "on disk, MB", "load to first token, ms", "... with imports, ms"]


def _ratio(reference: Any, own: Any) -> float | None:
    ratios = [a / b for a, b in zip(reference, own, strict=False)]
    return median(ratios) if ratios else None


def _versions(result: dict[str, Any]) -> str:
    found: dict[str, set[str]] = {}
    for peer in result["peers"].values():
        for run in peer["fresh"]:
            for name, version in run["versions"].items():
                found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' / '.join(sorted(versions))}" for name, versions in sorted(found.items()))


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"
