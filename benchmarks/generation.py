"""What generation costs beside the graph's own runs, and what it saves.

    python -m benchmarks.generation ARTIFACT [--only loop trace shrink batch prefix lookup constraint]

loop        share of a step that is not onnxruntime's: greedy, and with every sampler and penalty on
trace       a step that tells what each memory alone would say, against one that does not
shrink      a step of a batch whose other rows have left, against a new batch of that size
batch       tokens/s of several texts that join and leave, against one after the other
prefix      first token after a long prompt whose beginning is kept, against reading it
lookup      drafts from the prompt, on texts that repeat theirs and on texts that do not, against plain steps
constraint  what a JSON schema's mask costs a step

Both sides of a comparison take turns; medians, and ratios of them. Prompts of all parts but `lookup` are random tokens.
`lookup` needs a real model: its texts are continued greedily. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import runtime
from runtime.engine.prefix_cache import PrefixCache
from runtime.generation.generation import own_processors
from runtime.machine import describe_machine
from runtime.options import add_options, read_options

CONTEXT = 128
LONG = 1000
EVERYTHING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.01,
    "typical_p": 0.98,
    "top_n_sigma": 4.0,
    "seed": 0,
    "repetition_penalty": 1.05,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "no_repeat_ngram_size": 6,
    "logit_bias": {1: -1.0},
}
SCHEMA = json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 2000})
REPEATING = (
    "Rewrite this function so that the parameter `values` is called `numbers`, and change nothing else.\n\n"
    "def summarize(values):\n    total = sum(values)\n    count = len(values)\n    mean = total / count\n"
    "    variance = sum((value - mean) ** 2 for value in values) / count\n    largest = max(values)\n"
    "    smallest = min(values)\n    return {'total': total, 'count': count, 'mean': mean, 'variance': variance,\n"
    "            'largest': largest, 'smallest': smallest}\n",
    "Repeat the following text word for word: The lighthouse keeper climbed the stairs every evening at six, lit the "
    "lamp, wrote the weather into his book, and climbed down again. In winter the stairs were cold and in summer they "
    "were warm, but he never missed an evening, and the ships that passed knew it.",
    "Correct the spelling and write the whole text again: Yesterday we went to the markett and bought apples, pears "
    "and a lot of vegetabels. The woman at the stand told us that the apples come from her own garden, and that the "
    "pears come from a friend who lives near the river. We paid and went home.",
)
FREE = (
    "Write a short story about a dragon who is afraid of heights.",
    "Explain how a rainbow forms.",
    "Give me three ideas for a birthday party.",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="some parts")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side")
    parser.add_argument("--steps", type=int, default=24, help="counted steps of a turn")
    add_options(parser, runtime.Execution)
    args = parser.parse_args(arguments)
    model = runtime.load(args.artifact, read_options(runtime.Execution, args))
    found = {}
    for part in args.only:
        found[part] = PARTS[part](model, args.rounds, args.steps)
        print(f"{part:10}  {json.dumps(found[part])}", flush=True)
    manifest = model.session.manifest
    document = {
        "machine": describe_machine(),
        "artifact": str(args.artifact),
        "precision": manifest.precision,
        "quality": manifest.quality,
        "vocabulary": manifest.vocab_size,
        "rounds": args.rounds,
        "steps": args.steps,
        "parts": found,
    }
    print(json.dumps(document))
    return 0


def prompt(model: runtime.Model, length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    vocab = model.session.manifest.vocab_size
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, length)]


class Steps:
    """One side of a comparison: a generation that goes on step by step, restarted where its context ends."""

    def __init__(self, model: runtime.Model, context: int = CONTEXT, **settings: Any) -> None:
        self.model, self.context, self.settings = model, context, settings
        self.tokens: Iterator[Any] = iter(())
        self.left = 0

    def take(self, count: int) -> list[float]:
        """Milliseconds of so many steps; the first of a turn, which finds others' data in the caches, is not told."""
        room = self.model.session.manifest.context_length - self.context
        if self.left < count + 1:
            self.tokens, self.left = self._fresh(), min(room, 512)
            next(self.tokens)
        found = []
        for _ in range(count + 1):
            start = time.perf_counter()
            next(self.tokens)
            found.append((time.perf_counter() - start) * 1e3)
        self.left -= count + 1
        return found[1:]

    def _fresh(self) -> Iterator[Any]:
        settings = runtime.GenerationSettings(**self.settings)
        return runtime.generate_step(
            self.model.session,
            prompt(self.model, self.context),
            sampler=settings.sampler(),
            processors=own_processors(self.model, settings),
            logprobs=settings.logprobs,
            trace=settings.trace,
        )


def turns(names: Iterable[str], side: Callable[[str], list[float]], rounds: int) -> dict[str, list[float]]:
    """All values of each side; every other round goes through them backwards."""
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in list(taken)[:: 1 if number % 2 == 0 else -1]:
            taken[name] += side(name)
    return taken


def loop(model: runtime.Model, rounds: int, steps: int) -> dict[str, Any]:
    """Percent of a step that is spent outside onnxruntime."""
    sides = {
        "greedy": Steps(model),
        "temperature": Steps(model, temperature=0.8, seed=0),
        "everything": Steps(model, **EVERYTHING),
        "logprobs": Steps(model, logprobs=5),
    }
    inside: dict[str, float] = dict.fromkeys(sides, 0.0)
    whole: dict[str, float] = dict.fromkeys(sides, 0.0)

    def turn(name: str) -> list[float]:
        runs: list[float] = []
        model.session.on_run = runs.append
        found = sides[name].take(steps)
        model.session.on_run = None
        inside[name] += sum(runs[-steps:]) * 1e3
        whole[name] += sum(found)
        return found

    taken = turns(sides, turn, rounds)
    return {
        name: {"ms": round(median(taken[name]), 3), "percent": round(100 * (1 - inside[name] / whole[name]), 2)}
        for name in sides
    }


def trace(model: runtime.Model, rounds: int, steps: int) -> dict[str, Any]:
    """With the five likeliest tokens of each memory."""
    sides = {"off": Steps(model), "on": Steps(model, trace=5)}
    return compared(turns(sides, lambda name: sides[name].take(steps), rounds), "on", "off")


def shrink(model: runtime.Model, rounds: int, steps: int) -> dict[str, Any]:
    """Batches of 8 that became 4 and 1."""
    return {f"8 to {size}": _shrunk(model, size, rounds, steps) for size in (4, 1)}


def _shrunk(model: runtime.Model, size: int, rounds: int, steps: int) -> dict[str, Any]:
    states = {"shrunk": filled(model, 8), "new": filled(model, size)}
    while states["shrunk"].batch > size:
        states["shrunk"].drop([1])
    return compared(turns(states, lambda name: stepped(model, states[name], steps), rounds), "shrunk", "new")


def filled(model: runtime.Model, rows: int) -> runtime.DecodeState:
    """Rows of different texts."""
    state = model.session.new_state(rows)
    model.session.prefill(state, [prompt(model, CONTEXT, row) for row in range(rows)])
    return state


def stepped(model: runtime.Model, state: runtime.DecodeState, count: int) -> list[float]:
    """Milliseconds of greedy steps, the first not told; the state is cut back afterwards."""
    tokens, found = np.zeros(state.batch, np.int64), []
    lengths = state.lengths.tolist()
    for _ in range(count + 1):
        start = time.perf_counter()
        tokens = model.session.decode_step(state, tokens).logits.argmax(-1)
        found.append((time.perf_counter() - start) * 1e3)
    state.trim(lengths)
    return found[1:]


def batch(model: runtime.Model, rounds: int, steps: int) -> dict[str, Any]:
    """16 texts with prompts of 16 to 128 tokens and replies of 8 to 64."""
    generator = np.random.default_rng(0)
    prompts = [prompt(model, int(length), number) for number, length in enumerate(generator.integers(16, 129, 16))]
    lengths = [int(length) for length in generator.integers(8, 65, len(prompts))]
    settings = [runtime.GenerationSettings(max_new_tokens=count, min_new_tokens=count) for count in lengths]

    def run(rows: str) -> list[float]:
        start = time.perf_counter()
        runtime.generate_batch(model, prompts, settings, most_rows=int(rows))
        return [sum(lengths) / (time.perf_counter() - start)]

    taken = turns(("1", "4", "8"), run, max(1, rounds // 3))
    rates = {rows: median(values) for rows, values in taken.items()}
    return {
        f"{rows} rows": {"tokens_per_s": round(rate, 1), "ratio": round(rate / rates["1"], 2)}
        for rows, rate in rates.items()
    }


def prefix(model: runtime.Model, rounds: int, steps: int) -> dict[str, Any]:
    """A prompt of 1,000 tokens, kept, and 8 more that are new each time."""
    session = model.session
    kept = prompt(model, min(LONG, session.manifest.context_length - 32))
    cache = PrefixCache(session, 2**32)
    state = session.new_state()
    session.prefill(state, [kept])
    cache.put(kept, state)
    seeds = iter(range(1, 10**6))

    def first(name: str) -> list[float]:
        tokens = [*kept, *prompt(model, 8, next(seeds))]
        start = time.perf_counter()
        if name == "kept":
            taken, count = cache.take(tokens)
        else:
            taken, count = session.new_state(), 0
        session.prefill_likeliest(taken, [tokens[count:]])
        return [(time.perf_counter() - start) * 1e3]

    taken = turns(("kept", "read"), first, rounds)
    return compared(taken, "read", "kept") | {"tokens": len(kept), "cache_mb": round(cache.nbytes / 1e6, 1)}


def lookup(model: runtime.Model, rounds: int, steps: int) -> dict[str, Any]:
    """160 greedy tokens of each text."""
    texts = {"repeating": REPEATING, "free": FREE}
    return {name: [_looked_up(model, text, rounds) for text in of_kind] for name, of_kind in texts.items()}


def _looked_up(model: runtime.Model, text: str, rounds: int) -> dict[str, Any]:
    results: dict[str, runtime.Generation] = {}

    def run(name: str) -> list[float]:
        start = time.perf_counter()
        results[name] = runtime.generate(
            model, text, max_new_tokens=160, memory_bias=1e4, speculate=7 if name == "drafts" else 0
        )
        return [(time.perf_counter() - start) * 1e3]

    told = compared(turns(("plain", "drafts"), run, max(2, rounds // 2)), "plain", "drafts")
    counts = results["drafts"].timings
    return told | {
        "equal": results["plain"].token_ids == results["drafts"].token_ids,
        "tokens": counts.new_tokens,
        "drafted": counts.drafted,
        "accepted": counts.accepted,
    }


def constraint(model: runtime.Model, rounds: int, steps: int) -> dict[str, Any]:
    """An array of numbers, as long as it goes on, against free text of the same context."""
    sides = {
        "free": Steps(model),
        "schema": Steps(model, json_schema=SCHEMA, min_new_tokens=10**6, max_new_tokens=10**6),
    }
    return compared(turns(sides, lambda name: sides[name].take(steps), rounds), "schema", "free")


def compared(taken: dict[str, list[float]], first: str, second: str) -> dict[str, Any]:
    """Medians of both sides, and the first's by the second's."""
    one, other = median(taken[first]), median(taken[second])
    return {f"{first}_ms": round(one, 3), f"{second}_ms": round(other, 3), "ratio": round(one / other, 3)}


PARTS: dict[str, Callable[[runtime.Model, int, int], dict[str, Any]]] = {
    "loop": loop,
    "trace": trace,
    "shrink": shrink,
    "batch": batch,
    "prefix": prefix,
    "lookup": lookup,
    "constraint": constraint,
}

if __name__ == "__main__":
    sys.exit(main())
