"""The same backbone in this project's runtime and in other programs, measured in turns on one machine.

    python -m benchmarks.peers --shape qwen2.5-0.5b llama-3.2-1b --precision int4 fp32 --out docs/BENCHMARKS.md

Makes what it needs under --work, and reuses what exists: an environment per peer, the backbone with random
weights, and every peer's model of it. Tables go to --out with a picture beside it, progress to stderr, a narrow table
to stdout, whose last line is one JSON document. --from puts earlier runs' documents into the page without measuring.
Needs Linux, some 25 GB of disk for both large shapes, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.catalogue import PEERS, PRECISIONS, reference
from benchmarks.peers.environments import Unavailable, python_of
from benchmarks.peers.measure import MeasureSettings, Ready, measure
from benchmarks.peers.models import model_folder
from benchmarks.peers.pages import write_page
from benchmarks.peers.report import page, plain, summarize
from benchmarks.shapes import SHAPES, sizes
from runtime.bench.bandwidth import read_gb_per_s
from runtime.machine import describe_machine

HERE = Path(__file__).parent
DEFAULTS = MeasureSettings()


def main() -> int:
    args = parse()
    settings = MeasureSettings(
        args.starts,
        args.rounds,
        args.steps,
        args.threads,
        tuple(args.contexts),
        tuple(args.prompts),
        args.fresh_runs,
        fresh_tokens=args.new_tokens,
    )
    results: list[dict[str, Any]] = []
    for file in args.earlier:
        results += json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["results"]
    if not args.earlier:
        for shape in args.shape:
            for precision in args.precision:
                names = [name for name in args.peers if PEERS[name].precision == precision]
                if names and (result := measure_group(shape, precision, names, args, settings)):
                    results.append(result)
                    print(plain(result) + "\n", flush=True)
    document = {"results": results}
    if args.out and results:
        write_page(args.out, partial(page, document), HERE / "plot.py", drawn(document), args.work)
    print(json.dumps(document))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["qwen2.5-0.5b"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument(
        "--starts", type=int, default=DEFAULTS.starts, help="of every peer's process, each for all rounds"
    )
    parser.add_argument("--rounds", type=int, default=DEFAULTS.rounds, help="of alternating blocks after a start")
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps, help="counted decode steps a block")
    parser.add_argument("--threads", type=int, default=DEFAULTS.threads, help="of every peer")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(DEFAULTS.contexts), help="of decode blocks")
    parser.add_argument("--prompts", nargs="+", type=int, default=list(DEFAULTS.prompts), help="lengths of prefills")
    parser.add_argument("--fresh-runs", type=int, default=DEFAULTS.fresh_runs, help="whole generations per peer")
    parser.add_argument("--new-tokens", type=int, default=DEFAULTS.fresh_tokens, help="of a whole generation")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA on every projection")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "imsm-peers", help="kept and reused")
    parser.add_argument("--out", type=Path, help="Markdown file to write; the picture gets its name with .png")
    parser.add_argument("--build-only", action="store_true", help="environments and models, no measuring")
    parser.add_argument("--from", nargs="+", type=Path, default=[], dest="earlier", help="earlier runs' stdout")
    args = parser.parse_args()
    args.work = args.work.resolve()
    if min(args.starts, args.rounds, args.fresh_runs) < 1:
        parser.error("--starts, --rounds and --fresh-runs must be at least 1")
    return args


def measure_group(
    shape: str, precision: str, names: list[str], args: argparse.Namespace, settings: MeasureSettings
) -> dict[str, Any] | None:
    """Build and measure the peers of one shape and precision; None if there is nothing to measure."""
    ready: dict[str, Ready] = {}
    described: dict[str, dict[str, Any]] = {}
    counts = sizes(SHAPES[shape], args.rank)
    for name in names:
        peer = PEERS[name]
        described[name] = {"label": peer.label, "fresh": [], "decode": {}, "prefill": {}}
        try:
            folder = model_folder(peer.model, shape, args.rank, args.work)
            ready[name] = Ready(peer, python_of(peer.environment, args.work), folder)
        except Unavailable as reason:
            print(f"left out: {name}: {reason}", file=sys.stderr)
            described[name]["error"] = str(reason)
            continue
        described[name] |= {
            "disk_mb": peer.disk_mb(folder),
            "bytes_per_step": {str(n): peer.bytes_per_step(counts, n, folder) for n in settings.contexts},
        }
    if args.build_only or not ready:
        return None
    before = read_gb_per_s(args.threads)
    measured = measure(ready, settings, reference(precision))
    for name, result in measured.items():
        described[name] |= result
    return {
        "shape": shape,
        "precision": precision,
        "reference": reference(precision),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "read_gb_per_s": max(before, read_gb_per_s(args.threads)),
        "settings": asdict(settings),
        "peers": described,
    }


def drawn(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians as plot.py reads them."""
    panels = []
    for result in document["results"]:
        contexts, prompts = result["settings"]["contexts"], result["settings"]["prompts"]
        columns = {f"decode {n}": f"decode at {n}, ms/token" for n in contexts}
        columns |= {f"prefill {n}": f"first token of {n}, ms" for n in prompts} | {"peak_mb": "peak memory, MB"}
        rows = [
            {
                "label": row["label"],
                "reference": name == result["reference"],
                "ours": name.startswith("ours-"),
                "values": {title: row[key] for key, title in columns.items() if row.get(key) is not None},
            }
            for name, row in summarize(result).items()
            if not row["error"]
        ]
        title = f"{result['shape']}, {result['precision']}"
        panels.append({"title": title, "columns": list(columns.values()), "rows": rows})
    return panels


if __name__ == "__main__":
    sys.exit(main())
