"""One format in one memory, judged on every kind of text: a result file each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import python_of
from benchmarks.quality.catalogue import FORMATS
from benchmarks.quality.models import Place
from benchmarks.quality.programs import opened, stored
from benchmarks.quality.reference import MEMORIES, Stored, write_reference
from benchmarks.quality.texts import examples
from export.verification.quality import Array, Side, in_pieces, measure_quality
from imsm_core.data.dataset import Example


def judge(place: Place, name: str, memories: list[str], threads: int) -> None:
    """Write PLACE/results/FORMAT-MEMORY.json for every memory of the format that has none. Raises Unavailable or
    RunnerError for a format that cannot run here."""
    format = FORMATS[name]
    wanted = [m for m in MEMORIES if m in memories and m in format.memories and not result(place, name, m).is_file()]
    if not wanted:
        return
    texts, folder, reference = place.texts(), place.model(name), place.folder / "reference"
    write_reference(place.checkpoint(), place.base, texts, tuple(wanted), reference)
    python = python_of("llama", place.work) if format.program == "llama.cpp" else Path(sys.executable)
    with opened(format, folder, threads, place.texts_from.longest, python) as found:
        for memory in wanted:
            kinds: dict[str, Any] = {}
            for kind, of_kind in texts.items():
                judged = examples(of_kind)
                expected = Stored(reference, memory, kind, judged)
                report = measure_quality(_alone(expected), _alone(partial(found, memory)), judged)
                assert report.base is not None
                kinds[kind] = {"texts": report.texts, "tokens": report.tokens, **asdict(report.base)}
            save_result(place, name, memory, {"bytes": asdict(stored(format, folder)), "kinds": kinds})


def _alone(logits: Callable[[Example], Array]) -> Side:
    """Whatever memory it is, under the name of the one that is always there."""
    return lambda text: in_pieces({"base": logits(text)}, len(text.answer_ids))


def result(place: Place, name: str, memory: str) -> Path:
    return place.folder / "results" / f"{name}-{memory}.json"


def save_result(place: Place, name: str, memory: str, document: dict[str, Any]) -> None:
    path = result(place, name, memory)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    kls = ", ".join(f"{kind} {found['mean_kl']:.4g}" for kind, found in document["kinds"].items())
    print(f"{place.name} {name} {memory}: KL {kls}; {document['bytes']['base'] / 1e6:.1f} MB", file=sys.stderr)
