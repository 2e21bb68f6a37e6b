"""From what was found to docs/QUALITY.md: one table a model and memory, and the panels of the picture."""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks.quality.catalogue import FORMATS
from benchmarks.quality.texts import QUERY

NOTHING = "–"
MEMORIES = {
    "base": "Base memory: the base model alone",
    "adapter": "Adapter memory: the base model with the adapter alone",
    "fused": "Both memories, blended by the gate",
}
LARGEST_DRAWN = 1.2  # bytes a weight: float formats would leave no room for the others


def page(document: dict[str, Any], picture: str | None) -> str:
    """docs/QUALITY.md. document: as `collect` makes it."""
    settings = document["settings"]
    parts = [
        "# Quality of rounded models",
        "Written by `python -m benchmarks.quality`: how far each format's next-token distributions are from PyTorch's "
        "in float32, on the same token ids for every program. KL is KL(float32 || format) in nats a token, computed in "
        "float64; perplexity is its relative change, and agreement the share of tokens with the same likeliest next "
        f"token, for each kind of text in turn. A kind has about {settings['tokens']:,} tokens, in texts of at most "
        f"{settings['longest']}, encoded as plain text; the first {QUERY} tokens of a text are not judged, and are the "
        "gate's query. Means are over kinds, each counted alike. A dash was not measured.",
        "Bytes are those of the base model's weights on disk over the number of its weights, tied ones counted once: "
        "of ours everything in the graph and its data but adapter, gate and tables of rotations; of llama.cpp the "
        "whole GGUF file, which has no vocabulary in it; of onnxruntime-genai the graph and its data without tables of "
        "rotations. llama.cpp rounds matrices whose rows 256 does not divide in other formats than the file's name "
        "says. "
        "The importance matrix, and ours where it is called calibrated, see a file of text that is not "
        "judged; our int4 sees what the model writes by itself. onnxruntime-genai's "
        "graph has no adapter here. The adapter is a random LoRA of rank 16 on all seven projections, scaled so that "
        "its change is as large as a tuned one's (0.25 nats), unless one is given.",
        "Models whose name ends in `dithered` were made from files in 4 and 8 bits with noise of a rounding step "
        "added, so that their weights lie on no grid. Without it, a format with the file's grid would look better than "
        "it is on real weights.",
    ]
    if picture:
        parts.append(f"![Bytes a weight, and decode time, against KL]({picture})")
    for name, model in document["models"].items():
        parts += [f"## {name}", _facts(model)]
        for memory, title in MEMORIES.items():
            if any(memory in found["memories"] for found in model["formats"].values()):
                parts += [f"### {name}: {title}", table(model, memory)]
        for key, reason in model["left_out"].items():
            parts.append(f"Not measured: {FORMATS[key].label}: {reason}")
    return "\n\n".join(parts) + "\n"


def table(model: dict[str, Any], memory: str) -> str:
    """One memory of one model as a Markdown table."""
    kinds = list(model["tokens"])
    timed = any(memory in found.get("decode_ms", {}) for found in model["formats"].values())
    header = ["format", "bytes a weight", "MB", *(["adapter, MB"] if memory != "base" else []), "mean KL"]
    header += [*(f"KL {kind}" for kind in kinds), "perplexity", "agreement", *(["decode, ms"] if timed else [])]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, found in in_order(model):
        reports = found["memories"].get(memory)
        if reports is None:
            continue
        size = found["bytes"]
        cells = [FORMATS[name].label, f"{size['base'] / model['weights']:.3f}", f"{size['base'] / 1e6:.1f}"]
        cells += [f"{size['adapter'] / 1e6:.1f}"] if memory != "base" else []
        cells += [_kl(mean_kl(reports)), *(_kl(reports[kind]["mean_kl"]) for kind in kinds)]
        cells.append(" / ".join(f"{reports[kind]['perplexity_change']:+.1%}" for kind in kinds))
        cells.append(" / ".join(f"{reports[kind]['argmax_agreement']:.1%}" for kind in kinds))
        if timed:
            taken = found.get("decode_ms", {}).get(memory)
            cells.append(NOTHING if taken is None else f"{taken:.2f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def panels(document: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Of every model: bytes a weight against KL, and decode time against KL where it was measured; base memory."""
    rows = []
    for name, model in document["models"].items():
        sizes, times = [], []
        for key, found in in_order(model):
            reports = found["memories"].get("base")
            per_weight = found["bytes"]["base"] / model["weights"]
            if reports is None or not mean_kl(reports) or per_weight > LARGEST_DRAWN:
                continue
            format = FORMATS[key]
            label = format.label.removeprefix(format.program).strip()
            point = {"label": label, "program": format.program, "y": mean_kl(reports)}
            sizes.append({**point, "x": per_weight})
            if (taken := found.get("decode_ms", {}).get("base")) is not None:
                times.append({**point, "x": taken})
        y = "KL(float32 || format), nats"
        row = [{"title": f"{name}, base memory", "x": "bytes a weight", "y": y, "points": sizes}]
        if times:
            row.append({"title": f"{name}, one stream", "x": "decode, ms a token", "y": y, "points": times})
        rows.append(row)
    return rows


def plain(document: dict[str, Any]) -> str:
    """A narrow table for a terminal."""
    lines = []
    for name, model in document["models"].items():
        lines.append(f"{name:44}{'bytes/weight':>14}" + "".join(f"{'KL ' + memory:>14}" for memory in MEMORIES))
        for key, found in in_order(model):
            kls = [_kl(mean_kl(found["memories"][m])) if m in found["memories"] else NOTHING for m in MEMORIES]
            size = f"{found['bytes']['base'] / model['weights']:.3f}"
            lines.append(f"{FORMATS[key].label:44}{size:>14}" + "".join(f"{kl:>14}" for kl in kls))
    return "\n".join(lines)


def mean_kl(reports: dict[str, Any]) -> float:
    """The mean over kinds of text, each counted alike."""
    return mean(float(report["mean_kl"]) for report in reports.values())


def in_order(model: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The formats of a model, the largest first."""
    return sorted(model["formats"].items(), key=lambda item: -item[1]["bytes"]["base"])


def _facts(model: dict[str, Any]) -> str:
    counted = ", ".join(f"{kind} {count:,}" for kind, count in model["tokens"].items())
    text = f"{model['weights']:,} weights; judged tokens: {counted}."
    if timing := model.get("timing"):
        text += (
            f" Decode times: {timing['date']}, {timing['machine']['processor']}, {timing['threads']} threads, at a "
            f"context of {timing['context']} tokens, medians of programs that took turns; of the base memory one "
            "stream alone, of both memories two streams and the gate."
        )
    return text


def _kl(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"
