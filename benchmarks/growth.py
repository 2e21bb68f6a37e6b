"""How the time of a decode step grows: with the context, which attention must read, and with the batch.

    python benchmarks/growth.py ARTIFACT [--contexts 128,256,512,1024,2048,4096] [--batches 1,2,4,8] [--picture FILE]

All states stay in memory and take turns, a block of steps each, so that a slow minute hits all of them equally;
medians. Contexts are filled with random tokens. Prints both tables, a plot, and the least-squares line of the time
against the context with each point's distance from it; `--picture` also draws it with matplotlib, if that is installed.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runtime
from runtime.machine import describe_machine
from runtime.options import add_options, read_options

LINEAR_PERCENT, BATCH_FACTOR = 10.0, 2.0
"""What the time against the context may deviate from a line, and how many times batch 1's tokens/s batch 4 reaches."""
PLOT_WIDTH = 60


@dataclass(frozen=True)
class Line:
    """milliseconds = start + slope * context; percent: how far each point is above it."""

    start: float
    slope: float
    percent: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    parser.add_argument("--contexts", default="128,256,512,1024,2048,4096", help="tokens in the caches, batch 1")
    parser.add_argument("--batches", default="1,2,4,8", help="rows; 1 is what the others are compared with")
    parser.add_argument("--batch-context", type=int, default=128, help="tokens in each row's caches")
    parser.add_argument("--rounds", type=int, default=8, help="turns that every state gets")
    parser.add_argument("--steps", type=int, default=12, help="decode steps a turn, of which the first is not counted")
    add_options(parser, runtime.Execution)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="a PNG file")
    args = parser.parse_args()
    contexts, batches = numbers(parser, args.contexts), numbers(parser, args.batches)
    if args.rounds < 1 or args.steps < 2:
        parser.error("it takes at least 1 round of 2 steps")

    session = runtime.Session(args.artifact, read_options(runtime.Execution, args))
    room = session.manifest.context_length - args.rounds * args.steps
    if room < max(min(contexts), args.batch_context):
        parser.error(f"the artifact's context of {session.manifest.context_length} has no room for these steps")
    by_context, lengths = measure_contexts(session, sorted({min(context, room) for context in contexts}), args)
    line = fit_line(lengths, by_context)
    by_batch = measure_batches(session, batches, args)
    rates = {batch: batch * 1e3 / milliseconds for batch, milliseconds in zip(batches, by_batch, strict=True)}
    print(context_table(lengths, by_context, line))
    print()
    print(text_plot(lengths, by_context, line))
    print()
    print(batch_table(by_batch, rates))
    print()
    worst = max(map(abs, line.percent))
    print(f"linear in the context within {worst:.1f} % (wanted: {LINEAR_PERCENT:g} %)")
    factor = rates[4] / rates[1] if {1, 4} <= rates.keys() else None
    if factor is not None:
        print(f"batch 4 makes {factor:.2f} times the tokens/s of batch 1 (wanted: {BATCH_FACTOR:g})")
    if args.picture is not None:
        draw(args.picture, lengths, by_context, line, rates)
    document: dict[str, Any] = {
        "machine": describe_machine(),
        "artifact": str(args.artifact),
        "providers": session.providers,
        "settings": {name: getattr(args, name) for name in ("batch_context", "rounds", "steps")},
        "execution": asdict(session.execution),
        "contexts": [
            {"context": length, "ms_per_token": ms, "percent_from_line": percent}
            for length, ms, percent in zip(lengths, by_context, line.percent, strict=True)
        ],
        "line": {"start_ms": line.start, "ms_per_1000_tokens": line.slope * 1e3, "worst_percent": worst},
        "batches": [
            {"batch": batch, "ms_per_step": ms, "tokens_per_s": rates[batch]}
            for batch, ms in zip(batches, by_batch, strict=True)
        ],
        "batch_4_factor": factor,
    }
    print(json.dumps(document))
    return 0


def numbers(parser: argparse.ArgumentParser, text: str) -> list[int]:
    """Ascending numbers above 0 of a list like 128,256."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        parser.error(f"{text!r} is not a list of numbers like 128,256")
    if found[0] < 1:
        parser.error(f"{text!r} has numbers below 1")
    return found


def measure_contexts(
    session: runtime.Session, contexts: Sequence[int], args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Median milliseconds of a step at each context, and the mean context of its steps."""
    states = {context: filled_state(session, 1, context) for context in contexts}
    medians = take_turns(session, states, args.rounds, args.steps)
    middle = args.rounds * args.steps / 2
    return [medians[context] for context in contexts], [context + middle for context in contexts]


def measure_batches(session: runtime.Session, batches: Sequence[int], args: argparse.Namespace) -> list[float]:
    """Median milliseconds of a step of each batch."""
    states = {batch: filled_state(session, batch, args.batch_context) for batch in batches}
    medians = take_turns(session, states, args.rounds, args.steps)
    return [medians[batch] for batch in batches]


def filled_state(session: runtime.Session, batch: int, context: int) -> runtime.DecodeState:
    """A state whose rows hold `context` random tokens."""
    generator = np.random.default_rng(context)
    state = session.new_state(batch)
    session.prefill(state, generator.integers(0, session.manifest.vocab_size, (batch, context)).tolist())
    print(f"filled {batch} x {context} tokens", file=sys.stderr)
    return state


def take_turns(
    session: runtime.Session, states: Mapping[int, runtime.DecodeState], rounds: int, steps: int
) -> dict[int, float]:
    """Median milliseconds of a greedy step of each state; every other round goes through them backwards."""
    taken: dict[int, list[float]] = {name: [] for name in states}
    for number in range(rounds):
        for name in list(states)[:: 1 if number % 2 == 0 else -1]:
            state = states[name]
            tokens = np.zeros(state.batch, np.int64)
            for step in range(steps):
                start = time.perf_counter()
                tokens = session.decode_step(state, tokens).logits.argmax(-1)
                if step:  # the first finds another state's tensors in the processor's caches
                    taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(times)) for name, times in taken.items()}


def fit_line(lengths: Sequence[float], milliseconds: Sequence[float]) -> Line:
    """The least-squares line; level with a single point."""
    slope, start = np.polyfit(lengths, milliseconds, 1) if len(lengths) > 1 else (0.0, milliseconds[0])
    percent = [
        100 * (taken / (start + slope * length) - 1) for length, taken in zip(lengths, milliseconds, strict=True)
    ]
    return Line(float(start), float(slope), [float(value) for value in percent])


def context_table(lengths: Sequence[float], milliseconds: Sequence[float], line: Line) -> str:
    """A row per context."""
    rows = [f"{'context':>8} {'ms/token':>9} {'line':>9} {'from the line':>14}"]
    for length, taken, percent in zip(lengths, milliseconds, line.percent, strict=True):
        rows.append(f"{length:8.0f} {taken:9.3f} {line.start + line.slope * length:9.3f} {percent:+13.1f} %")
    return "\n".join([*rows, f"line: {line.start:.3f} ms and {line.slope * 1e3:.3f} ms for every 1,000 tokens"])


def text_plot(lengths: Sequence[float], milliseconds: Sequence[float], line: Line) -> str:
    """A bar per context, of its milliseconds; | is the line."""
    fitted = [line.start + line.slope * length for length in lengths]
    scale = PLOT_WIDTH / max(*milliseconds, *fitted)
    rows = []
    for length, taken, wanted in zip(lengths, milliseconds, fitted, strict=True):
        cells = list("#" * round(taken * scale) + " " * (PLOT_WIDTH + 1 - round(taken * scale)))
        cells[max(0, round(wanted * scale))] = "|"
        rows.append(f"{length:8.0f} {''.join(cells).rstrip()} {taken:.2f} ms")
    return "\n".join(rows)


def batch_table(milliseconds: Sequence[float], rates: Mapping[int, float]) -> str:
    """A row per batch; ratios against the first."""
    first = next(iter(rates.values()))
    rows = [f"{'batch':>8} {'ms/step':>9} {'tokens/s':>9} {'ratio':>6}"]
    for (batch, rate), taken in zip(rates.items(), milliseconds, strict=True):
        rows.append(f"{batch:8} {taken:9.3f} {rate:9.1f} {rate / first:6.2f}")
    return "\n".join(rows)


def draw(
    picture: Path, lengths: Sequence[float], milliseconds: Sequence[float], line: Line, rates: Mapping[int, float]
) -> None:
    """Both curves as a PNG file; a note on stderr without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print(f"{picture} was not drawn: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    ends = np.array([0, max(lengths)])
    left.plot(ends, line.start + line.slope * ends, color="#b9bec4", label="least-squares line")
    left.plot(lengths, milliseconds, "o", color="#2f6f9f", label="measured")
    left.set(xlabel="tokens in the caches", ylabel="ms per token", xlim=(0, None), ylim=(0, 1.1 * max(milliseconds)))
    left.legend(frameon=False)
    right.plot(list(rates), list(rates.values()), "o-", color="#2f6f9f")
    right.set(
        xlabel="batch", ylabel="tokens/s", xlim=(0, None), ylim=(0, 1.1 * max(rates.values())), xticks=list(rates)
    )
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
