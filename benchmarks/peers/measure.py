"""Measuring the peers of one shape and precision in turns, so that neighbours' noise affects all of them equally."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.client import Process, RunnerError
from runtime.machine import memory_mb

PAUSE_S = 0.05  # between blocks, so that a peer's threads have stopped spinning
DROPPED = 2  # first steps of a block: the processor's caches still hold another peer's data
SLOW_ROUNDS, SLOW_STEPS = 3, 3
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class MeasureSettings:
    """starts: how often every peer is started and measured for `rounds`: where a process's pages lie in memory changes
    its speed by several percent. contexts, prompts: token counts of decode blocks and of prefills. fresh_runs:
    processes per peer that run one generation of fresh_prompt and fresh_tokens, for memory and loading."""

    starts: int = 3
    rounds: int = 4
    steps: int = 14
    threads: int = 2
    contexts: tuple[int, ...] = (128, 1024)
    prompts: tuple[int, ...] = (128, 512)
    fresh_runs: int = 3
    fresh_prompt: int = 128
    fresh_tokens: int = 64


@dataclass(frozen=True)
class Ready:
    """A peer whose environment and model exist."""

    peer: Peer
    python: Path
    folder: Path

    def process(self, modes: Sequence[str], threads: int, context: int) -> Process:
        return Process(self.python, self.peer.runner, self.folder, modes, threads, context)


def measure(peers: dict[str, Ready], settings: MeasureSettings, reference: str) -> dict[str, dict[str, Any]]:
    """name -> {"fresh": [...], "decode": {context: [[ms of a block's steps] per round]}, "prefill": {tokens: [ms]}}.

    A peer that fails is left out of what follows; its entry then has an "error".
    """
    results: dict[str, dict[str, Any]] = {name: {"fresh": [], "decode": {}, "prefill": {}} for name in peers}
    for number in range(settings.fresh_runs):
        for name in _turn(list(peers), number):
            if "error" in results[name]:
                continue
            with left_out_if_it_fails(results[name]):
                found = fresh_run(peers[name], settings)
                results[name]["fresh"].append(found)
                print(f"fresh run {number + 1}: {name}, {found['peak_mb']:.0f} MB", file=sys.stderr)
            time.sleep(PAUSE_S)
    working = {name: ready for name, ready in peers.items() if "error" not in results[name]}
    needs = {name: max(run["peak_mb"] for run in results[name]["fresh"]) for name in working}
    for batch in batches(working, needs, memory_mb().get("available", float("inf")) * MEMORY_SHARE, reference):
        for start in range(settings.starts):
            turn = {name: working[name] for name in batch if start == 0 or not working[name].peer.slow}
            _alternate(turn, settings, results)
    return results


def fresh_run(ready: Ready, settings: MeasureSettings) -> dict[str, Any]:
    """One whole generation in its own process: peak memory, and what comes before the first token."""
    steps = SLOW_STEPS if ready.peer.slow else settings.fresh_tokens
    context = settings.fresh_prompt + settings.fresh_tokens
    with ready.process([ready.peer.mode], settings.threads, context) as process:
        answer = process.ask("generate", ready.peer.mode, tokens=settings.fresh_prompt, steps=steps)
        return {
            "peak_mb": answer["peak_mb"],
            "load_to_first_token_ms": process.ready["load_ms"] + answer["ms"][0],
            "start_to_first_token_ms": process.start_ms + answer["ms"][0],
            "versions": process.ready["versions"],
        }


def batches(peers: dict[str, Ready], needs: dict[str, float], limit_mb: float, reference: str) -> Iterator[list[str]]:
    """The peers that are loaded together: all if memory allows, else several groups, each with the reference, and as
    few as the order given allows."""
    processes: dict[tuple[str, ...], list[str]] = {}
    for name, ready in peers.items():
        processes.setdefault(ready.peer.process, []).append(name)
    cost = {key: max(needs[name] for name in names) for key, names in processes.items()}
    always = [key for key, names in processes.items() if reference in names]
    rest = [key for key in processes if key not in always]
    floor = sum(cost[key] for key in always)
    while rest or always:
        group, used = list(always), floor
        while rest and (used + cost[rest[0]] <= limit_mb or len(group) == len(always)):
            used += cost[rest[0]]
            group.append(rest.pop(0))
        yield [name for name in peers if peers[name].peer.process in group]
        if not rest:
            return


def _alternate(peers: dict[str, Ready], settings: MeasureSettings, results: dict[str, dict[str, Any]]) -> None:
    """Rounds of short blocks over loaded peers; the first round is not counted."""
    longest = max(*settings.contexts, *settings.prompts)
    context = longest + max(longest // 8, settings.steps) + settings.steps
    modes: dict[tuple[str, ...], list[str]] = {}
    for ready in peers.values():
        modes.setdefault(ready.peer.process, []).append(ready.peer.mode)
    with ExitStack() as stack:
        loaded: dict[tuple[str, ...], Process] = {}
        for name, ready in peers.items():
            if (key := ready.peer.process) not in loaded:
                process = ready.process(modes[key], settings.threads, context)
                loaded[key] = stack.enter_context(process)
                print(f"loaded {name}", file=sys.stderr)
        for number in range(-1, settings.rounds):
            start = time.perf_counter()
            for name in _turn(list(peers), number):
                peer, result = peers[name].peer, results[name]
                if "error" not in result and not (peer.slow and number >= SLOW_ROUNDS):
                    with left_out_if_it_fails(result):
                        _round(loaded[peer.process], peer, settings, number, result)
            print(f"round {number + 1} of {settings.rounds}: {time.perf_counter() - start:.1f} s", file=sys.stderr)


def _round(process: Process, peer: Peer, settings: MeasureSettings, number: int, result: dict[str, Any]) -> None:
    """One peer's turn: a block at every context, and every second time the prefills."""
    for context in settings.contexts[:1] if peer.slow else settings.contexts:
        steps = SLOW_STEPS if peer.slow else settings.steps + DROPPED
        times = process.ask("decode", peer.mode, context=context, steps=steps)["ms"]
        if number >= 0:
            result["decode"].setdefault(str(context), []).append(times if peer.slow else times[DROPPED:])
        time.sleep(PAUSE_S)
    if number % 2 == 0:
        for tokens in settings.prompts:
            [taken] = process.ask("prefill", peer.mode, tokens=tokens)["ms"]
            result["prefill"].setdefault(str(tokens), []).append(taken)
            time.sleep(PAUSE_S)


def _turn(names: list[str], number: int) -> list[str]:
    """Forwards and backwards by turns, so that no peer always follows the same one."""
    return names if number % 2 == 0 else names[::-1]


@contextmanager
def left_out_if_it_fails(result: dict[str, Any]) -> Iterator[None]:
    """A peer's failure is recorded, and the others continue."""
    try:
        yield
    except RunnerError as error:
        result["error"] = str(error)
        print(f"left out: {error}", file=sys.stderr)
