"""The quality of rounded models on real weights: this project's formats, llama.cpp's and onnxruntime-genai's.

    python -m benchmarks.quality --model smollm2=FOLDER gemma3=FOLDER \\
        --texts wikitext2=test.jsonl gsm8k=test.jsonl instruct=instruct.json --calibration valid.jsonl \\
        --out docs/QUALITY.md

Compares next-token distributions with PyTorch's float32 on the same token ids, in the base memory, in the adapter's
memory, and in the gate's blend. Everything is made under --work once: environments (shared with benchmarks.peers),
texts, adapter, formats, results; a run that was stopped goes on where it was. --only judges some formats, --report
none. Tables go to --out with a picture beside it, progress to stderr; the last line of stdout is one JSON document.
--speed measures decode time too, in turns, and needs a machine that does nothing else. Where llama.cpp ends with exit
code -11 on a processor with AMX, set BENCHMARK_WITHOUT_AMX=1. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.client import RunnerError
from benchmarks.peers.environments import Unavailable
from benchmarks.peers.measure import MeasureSettings
from benchmarks.peers.pages import write_page
from benchmarks.quality.catalogue import FORMATS
from benchmarks.quality.judge import judge, result
from benchmarks.quality.models import Place, TextSettings
from benchmarks.quality.reference import MEMORIES
from benchmarks.quality.report import page, panels, plain
from benchmarks.quality.speed import CONTEXT, decode_ms
from benchmarks.quality.texts import examples
from runtime.machine import describe_machine

HERE = Path(__file__).parent
DEFAULTS = MeasureSettings()


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    texts = TextSettings(args.texts, args.calibration, args.tokens, args.longest, args.calibration_tokens)
    places = [
        Place(name, folder, args.work, texts, args.adapter.get(name), args.context_length)
        for name, folder in args.model.items()
    ]
    for place in places:
        place.check_settings()
        if not args.report:
            run(place, args)
    document = {
        "settings": {"tokens": args.tokens, "longest": args.longest},
        "models": {place.name: collect(place) for place in places},
    }
    print(plain(document), flush=True)
    if args.out:
        write_page(args.out, partial(page, document), HERE / "plot.py", panels(document), args.work)
    print(json.dumps(document))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", type=named, required=True, metavar="NAME=FOLDER", help="Hugging Face's")
    parser.add_argument(
        "--texts", nargs="+", type=named, required=True, metavar="NAME=FILE", help="JSON lines, or JSON"
    )
    parser.add_argument("--calibration", type=Path, required=True, help="other text, for GPTQ and importance matrices")
    parser.add_argument("--adapter", nargs="+", type=named, default=[], metavar="NAME=CHECKPOINT", help="not random")
    parser.add_argument("--tokens", type=int, default=TextSettings.tokens, help="of each file of texts")
    parser.add_argument("--longest", type=int, default=TextSettings.longest, help="tokens of a text")
    parser.add_argument("--calibration-tokens", type=int, default=TextSettings.calibration_tokens)
    parser.add_argument("--context-length", type=int, default=Place.context_length, help="of our artifacts")
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT", help=known())
    parser.add_argument("--memories", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--threads", type=int, default=DEFAULTS.threads, help="of every program")
    parser.add_argument("--speed", action="store_true", help="measure decode time of --only too")
    parser.add_argument("--starts", type=int, default=DEFAULTS.starts, help="for --speed, as of benchmarks.peers")
    parser.add_argument("--rounds", type=int, default=DEFAULTS.rounds, help="for --speed")
    parser.add_argument("--report", action="store_true", help="write what is there, and judge nothing")
    parser.add_argument("--keep-reference", action="store_true", help="keep PyTorch's distributions for another run")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "imsm-peers", help="kept and reused")
    parser.add_argument("--out", type=Path, help="Markdown file to write; the picture gets its name with .png")
    args = parser.parse_args(arguments)
    for name in ("model", "texts", "adapter"):
        setattr(args, name, dict(getattr(args, name)))
    if unknown := sorted(args.adapter.keys() - args.model.keys()):
        parser.error(f"--adapter names {unknown[0]}, which is none of --model")
    args.work = args.work.resolve()
    return args


def named(text: str) -> tuple[str, Path]:
    """NAME=PATH of a command line."""
    name, _, path = text.partition("=")
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not a name, = and the path of something that exists")
    return name, Path(path)


def known() -> str:
    return ", ".join(FORMATS)


def run(place: Place, args: argparse.Namespace) -> None:
    """Judge, and time, what is missing; a format that fails leaves the others."""
    working = []
    for name in args.only:
        note = place.folder / "results" / f"{name}.left_out"
        note.unlink(missing_ok=True)
        try:
            judge(place, name, args.memories, args.threads)
            working.append(name)
        except (Unavailable, RunnerError) as reason:
            print(f"left out: {place.name} {name}: {reason}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(reason), encoding="utf-8")
    if args.speed:
        settings = MeasureSettings(args.starts, args.rounds, threads=args.threads)
        timing = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": describe_machine(),
            "threads": args.threads,
            "context": CONTEXT,
            "decode_ms": decode_ms(place, working, settings),
        }
        (place.folder / "results" / "timing.json").write_text(json.dumps(timing, indent=1) + "\n", encoding="utf-8")
    if not args.keep_reference:
        shutil.rmtree(place.folder / "reference", ignore_errors=True)


def collect(place: Place) -> dict[str, Any]:
    """All results of one model: {"weights", "tokens": {kind: judged ones}, "timing", "left_out": {format: why},
    "formats": {name: {"bytes", "memories": {memory: {kind: report}}, "decode_ms"}}}."""
    formats: dict[str, dict[str, Any]] = {}
    path = place.folder / "results" / "timing.json"
    timing = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"decode_ms": {}}
    times = timing.pop("decode_ms")
    for name in FORMATS:
        for memory in MEMORIES:
            if result(place, name, memory).is_file():
                found = json.loads(result(place, name, memory).read_text(encoding="utf-8"))
                entry = {"bytes": found["bytes"], "memories": {}, "decode_ms": times.get(name, {})}
                formats.setdefault(name, entry)["memories"][memory] = found["kinds"]
    judged = {kind: sum(len(text.answer_ids) for text in examples(of_kind)) for kind, of_kind in place.texts().items()}
    left_out = {note.stem: note.read_text(encoding="utf-8") for note in sorted(path.parent.glob("*.left_out"))}
    known = {"weights": place.weights(), "tokens": judged, "timing": timing or None, "left_out": left_out}
    return {**known, "formats": formats}


if __name__ == "__main__":
    sys.exit(main())
