"""From the JSON of a run to a page and a picture, on any machine: python -m benchmarks.cuda.report OUT PAGE [PICTURE].

Only a run on a GPU becomes a page: rehearsals, and runs on a CPU, are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cuda.document import COMPLETE, read_json
from benchmarks.cuda.stage import STAGES

Documents = Mapping[str, dict[str, Any]]
NOTHING = "–"
AIMS = {"fp16": 1.1, "int4": 1.2}
"""Siamese decoding of the 8B shape in times of base alone."""
HOST_SHARE = 0.05


class NoResults(Exception):
    """There is nothing that was measured on a GPU; the message is one line."""


def read(out: Path) -> dict[str, dict[str, Any]]:
    """The documents of a run by their stages."""
    found = {name: read_json(out / f"{name}.json") for name in STAGES}
    return {name: document for name, document in found.items() if document is not None}


def plain(out: Path) -> str:
    """What a run found, in lines for a terminal."""
    lines = []
    for name, document in read(out).items():
        lines.append(f"{name:<9} {document['state']}{_error(document)}")
        lines += [f"  {line}" for line in _plain_lines(name, document)]
    return "\n".join(lines)


def _plain_lines(name: str, document: dict[str, Any]) -> list[str]:
    if name == "parity":
        wrong = [result for result in document.get("results", []) if result["ok"] is False]
        summary = document.get("summary", {})
        lines = [f"{summary.get('ok', NOTHING)} of {summary.get('judged', NOTHING)} judged checks are right"]
        return lines + [f"WRONG {_check_name(result)}: {_difference(result)}" for result in wrong]
    if name == "tuning":
        return [f"loss on {task}: {losses}" for task, losses in document.get("losses", {}).items()]
    lines = []
    for group, result in _results(document):
        if result["name"] == "base":  # the others' ratio tells it
            continue
        share = f"  host {result['host_share']:.1%}" if "host_share" in result else ""
        ratio = f"  x{result['ratio']:.3f}" if "ratio" in result else ""
        lines.append(
            f"{_group_name(group):<16} {result['name']:<17} batch {result['batch']:>2} context {result['context']:>4}  "
            f"{result['ms']:9.3f} ms{ratio}{share}  first {result['first_ms']:.1f} ms"
        )
    return lines + [f"{_group_name(group)}: {group['error']}" for group in _groups(document) if "error" in group]


def page(documents: Documents, picture: str | None = None) -> str:
    """The Markdown page. Raises NoResults for anything but a run at the full size on a GPU."""
    device = _device(documents)
    versions = documents["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions["packages"].items() if number)
    parts = [
        "# On a GPU",
        f"Written by `python -m benchmarks.cuda.report` from a run of `benchmarks/cuda/run.sh` on one "
        f"{device['device']} ({device['memory_gb']:.0f} GB, compute capability {device['capability']}; a large copy "
        f"moves {versions.get('copy_gb_per_s', 0):,.0f} GB/s). Python {versions['python']}; {packages}.",
        "Stages: "
        + "; ".join(f"{name} {found['state']} in {found['seconds']:.0f} s" for name, found in documents.items()),
        *_aims(documents),
    ]
    if picture:
        parts.append(f"![A decode step of both streams beside one of the base alone]({picture})")
    if "parity" in documents:
        parts += [
            "## Beside PyTorch on the same GPU",
            _parity_text(documents["parity"]),
            _parity_table(documents["parity"]),
        ]
    titles = {"speed": "The 0.5B shape", "large": "The 8B shape", "genai": "onnxruntime-genai, one stream"}
    for name, title in titles.items():
        if name in documents:
            about = documents[name].get("about")
            parts += [f"## {title}", *([f"{about[0].upper()}{about[1:]}."] if about else [])]
            parts += [_speed_table(documents[name]), *_failures(documents[name])]
    if "tuning" in documents:
        parts += ["## A tuning run of SmolLM2", *_tuning(documents["tuning"])]
    return "\n\n".join(parts) + "\n"


def _device(documents: Documents) -> dict[str, Any]:
    versions = documents.get("versions")
    if versions is None or versions["state"] != COMPLETE:
        raise NoResults("the stage `versions` is not complete, so that nobody knows which GPU was measured")
    for name, document in documents.items():
        if document.get("rehearsal") or document.get("provider") != "cuda" or document.get("size") != "full":
            raise NoResults(f"the stage `{name}` is a rehearsal or did not run at the full size on a GPU")
    if not versions["torch"]["available"]:
        raise NoResults("PyTorch found no GPU in this run")
    device: dict[str, Any] = versions["torch"]
    return device


def _aims(documents: Documents) -> list[str]:
    """What was aimed at and what came of it, where it was measured."""
    rows = []
    for precision, aim in AIMS.items():
        found = [
            result["ratio"]
            for group, result in _results(documents.get("large", {}))
            if group["title"].startswith(precision) and result["name"] == "siamese" and group["cuda_graph"]
            and result["batch"] == 1
        ]  # fmt: skip
        if found:
            rows.append((f"siamese decoding of the 8B shape, {precision}, of base alone", f"at most {aim}x",
                         f"{min(found):.3f}x to {max(found):.3f}x", max(found) <= aim))  # fmt: skip
    shares = [
        result["host_share"]
        for name in ("speed", "large")
        for group, result in _results(documents.get(name, {}))
        if group["cuda_graph"]
    ]
    if shares:
        rows.append(("the host's share of a step with a CUDA graph", f"under {HOST_SHARE:.0%}",
                     f"{min(shares):.1%} to {max(shares):.1%}", max(shares) < HOST_SHARE))  # fmt: skip
    for precision in AIMS:
        for context, ratio in _against_genai(documents, precision).items():
            rows.append((f"siamese, 0.5B shape, {precision}, {context} tokens, of onnxruntime-genai's one stream",
                         "at most 1x", f"{ratio:.3f}x", ratio <= 1))  # fmt: skip
    if not rows:
        return []
    lines = ["| aim | wanted | measured | reached |", "|---|---|---|---|"]
    lines += [f"| {name} | {aim} | {found} | {'yes' if reached else 'no'} |" for name, aim, found, reached in rows]
    return ["## What was aimed at", "\n".join(lines)]


def _against_genai(documents: Documents, precision: str) -> dict[int, float]:
    """Our siamese step over their step by context, both at batch 1 and each in its fastest form."""

    def fastest(name: str, subject: str) -> dict[int, float]:
        found: dict[int, float] = {}
        for group, result in _results(documents.get(name, {})):
            if group["title"] == precision and result["name"] == subject and result["batch"] == 1:
                context = int(result["context"])
                found[context] = min(found.get(context, float("inf")), float(result["ms"]))
        return found

    ours, theirs = fastest("speed", "siamese"), fastest("genai", "onnxruntime-genai")
    return {context: ours[context] / theirs[context] for context in ours if context in theirs}


def _parity_text(document: dict[str, Any]) -> str:
    summary, limits = document.get("summary", {}), document.get("limits", {})
    return (
        f"{summary.get('ok', 0)} of {summary.get('judged', 0)} judged checks are right. A check is right if no logit "
        f"is off by more than {limits.get('tolerance')} (absolute, and relative to the largest logit) or twice what "
        "PyTorch's own half precision is off by, and the likeliest token is PyTorch's at "
        f"{limits.get('tokens_equal', 0):.0%} of the positions (logits within {limits.get('near_tie')} of each other "
        "count as equal); where the graph rounds to int8, if most positions are near PyTorch's. PyTorch computes in "
        "float32 with the weights of the file. `likeliest` compares tokens that are chosen on the device with the "
        "whole logits."
    )


def _parity_table(document: dict[str, Any]) -> str:
    lines = ["| case | check | CUDA graph | positions | largest difference | of the largest logit | PyTorch in half | "
             "same token | right |", "|---|---|---|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    for result in document.get("results", []):
        ok = {True: "yes", False: "**no**", None: NOTHING}[result["ok"]]
        graph = "yes" if result.get("cuda_graph") else "no"
        half = result.get("pytorch_half", {})
        cells = [result["case"], result["check"], graph, str(result.get("positions", NOTHING))]
        cells += [
            _number(result, "max_abs", ".4f"),
            _number(result, "relative", ".2%"),
            _number(half, "relative", ".2%"),
        ]
        cells += [_number(result, "tokens_equal", ".0%"), f"{ok}{_error(result)}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _speed_table(document: dict[str, Any]) -> str:
    lines = [
        "| precision | CUDA graph | what | batch | context | step, ms | p95, ms | of base alone | host's share | GB/s "
        "| first token, ms |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for group, result in _results(document):
        cells = [
            group["title"],
            "yes" if group["cuda_graph"] else "no",
            result["name"],
            str(result["batch"]),
            str(result["context"]),
            f"{result['ms']:.3f}",
            f"{result['ms_p95']:.3f}",
            _number(result, "ratio", ".3f"),
            _number(result, "host_share", ".1%"),
            _number(result, "gb_per_s", ",.0f"),
            f"{result['first_ms']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _failures(document: dict[str, Any]) -> list[str]:
    lines = [f"Not measured: {_group_name(group)}: {group['error']}" for group in _groups(document) if "error" in group]
    lines += [f"Left out for lack of time: {entry['title']}" for entry in document.get("left_out", [])]
    used = [group for group in _groups(document) if group.get("memory_mb", [None])[0] is not None]
    lines += [
        f"Memory of the device, {_group_name(group)}: {group['memory_mb'][0]:,.0f} MiB before, "
        f"{', '.join(f'{value:,.0f}' for value in group['memory_mb'][1:])} MiB loaded and after measuring (siamese and "
        "base alone together)"
        for group in used
    ]
    return lines


def _tuning(document: dict[str, Any]) -> list[str]:
    parts = []
    if training := document.get("training"):
        parts.append(
            f"{training['steps']} steps in {training['seconds']:.1f} s on {document['pytorch_on']}; the loss goes from "
            f"{training['first_loss']:.2f} to {training['final_loss']:.2f}."
        )
    tables = {"loss (nats a token)": document.get("losses"), "right answers": document.get("answers")}
    lines = ["| | on | base | adapter | blended |", "|---|---|---:|---:|---:|"]
    for title, table in tables.items():
        for task in ("questions", "new_test"):
            if table and task in table:
                values = list(table[task].values())[:3]
                lines.append(f"| {title} | {task} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return [*parts, "\n".join(lines)] if len(lines) > 2 else parts


def draw(documents: Documents, picture: Path) -> None:
    """Decode steps as bars: siamese beside base alone, by precision, batch and context. Raises NoResults."""
    _device(documents)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(name, title) for name, title in (("speed", "0.5B shape"), ("large", "8B shape"))
              if any(True for _ in _results(documents.get(name, {})))]  # fmt: skip
    if not panels:
        raise NoResults("no decode step was measured")
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 6), squeeze=False, layout="constrained")
    for axis, (name, title) in zip(axes[0], panels, strict=True):
        labels, bars, colours = [], [], []
        for group, result in _results(documents[name]):
            graph = "graph" if group["cuda_graph"] else "no graph"
            labels.append(f"{group['title']}, {graph}, batch {result['batch']}, {result['context']}: {result['name']}")
            bars.append(result["ms"])
            colours.append("#2f6f9f" if result["name"] == "siamese" else "#b9bec4")
        axis.barh(range(len(bars)), bars, color=colours)
        axis.set_yticks(range(len(bars)), labels, fontsize=5)
        axis.invert_yaxis()
        axis.set_title(f"{title}: ms a decode step", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def _groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document.get("groups", [])
    return found


def _results(document: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every measurement with its group."""
    return [(group, result) for group in _groups(document) for result in group.get("results", [])]


def _group_name(group: dict[str, Any]) -> str:
    return f"{group['title']}{', graph' if group['cuda_graph'] else ''}"


def _check_name(result: dict[str, Any]) -> str:
    return f"{result['case']}, {result['check']}{', graph' if result.get('cuda_graph') else ''}"


def _difference(result: dict[str, Any]) -> str:
    return str(result.get("error", f"off by {result.get('max_abs')} of at most {result.get('limit', NOTHING)}"))


def _error(document: dict[str, Any]) -> str:
    return f": {document['error']}" if "error" in document else ""


def _number(result: dict[str, Any], key: str, form: str) -> str:
    return format(result[key], form) if key in result else NOTHING


def main(argv: list[str] | None = None) -> int:
    """1 if there is nothing to report."""
    parser = argparse.ArgumentParser(prog="benchmarks.cuda.report", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder of the JSON files")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("picture", type=Path, nargs="?", help="the PNG file to write (needs matplotlib)")
    args = parser.parse_args(argv)
    documents = read(args.out)
    try:
        text = page(documents, None if args.picture is None else args.picture.name)
        if args.picture is not None:
            draw(documents, args.picture)
    except NoResults as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
