"""The jobs of a batch file, done: scores, embeddings, and texts that are generated together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .batch_rows import Job, Key, embedding_document, error_document, result_document
from .batching import WHOLE, Batch
from .embedding import embed_prepared
from .generation import Model
from .results import Chunk, Gathering, Generation
from .scoring import facts_of_scores, score_prepared

AHEAD = 2
"""Texts that wait in the batch for a place; the others wait here, where they need less memory."""


class Answer(NamedTuple):
    """A line of the output, the tokens that were generated for it, and whether it is an error."""

    document: dict[str, Any]
    tokens: int = 0
    failed: bool = False


def answers(model: Model, jobs: Sequence[Job], most_rows: int) -> Iterator[Answer]:
    """An answer for each job, as soon as it is there. most_rows: texts that are generated together, at most."""
    yield from _scored(model, [job for job in jobs if job.score is not None])
    yield from _embedded(model, [job for job in jobs if job.embed is not None])
    yield from _generated(model, [job for job in jobs if job.texts], most_rows)


def _scored(model: Model, jobs: Sequence[Job]) -> Iterator[Answer]:
    """Those with the same settings go together, so that a prompt that they share is read once."""
    for settings, group in itertools.groupby(jobs, lambda job: job.score and job.score.settings):
        same = list(group)
        rows = [job.score.prepared for job in same if job.score is not None]
        if settings is None:
            continue
        for job, scores in zip(same, score_prepared(model, rows, settings), strict=True):
            assert job.score is not None
            yield Answer({job.key[0]: job.key[1]} | facts_of_scores(job.score.row, scores))


def _embedded(model: Model, jobs: Sequence[Job]) -> Iterator[Answer]:
    """Those with the same settings go together, so that texts of similar length are read at once."""
    for settings, group in itertools.groupby(jobs, lambda job: job.embed and job.embed.request.settings):
        wanted = [(job.key, job.embed) for job in group if job.embed is not None]
        if settings is None:
            continue
        found = embed_prepared(model.session, [ids for _, each in wanted for ids in each.ids], settings)
        for key, each in wanted:
            yield Answer(embedding_document(key, each, list(itertools.islice(found, len(each.ids)))))


class _UnderWay:
    """The texts of a job as they come."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._texts = [Gathering(len(text.ids)) for text in job.texts]
        self._left = len(job.texts)

    def take(self, number: int, chunk: Chunk) -> bool:
        """Take a chunk of a text; whether it was the last one of all."""
        self._left -= self._texts[number].take(chunk)
        return not self._left

    def results(self) -> list[Generation]:
        return [text.result() for text in self._texts]


def _generated(model: Model, jobs: Sequence[Job], most_rows: int) -> Iterator[Answer]:
    """An answer comes with the end of its job's last text."""
    batch = Batch(model, most_rows, WHOLE)
    waiting = ((job, number) for job in jobs for number in range(len(job.texts)))
    under_way: dict[Key, _UnderWay] = {}
    while True:
        for job, number in itertools.islice(waiting, max(0, AHEAD - batch.waiting)):
            under_way.setdefault(job.key, _UnderWay(job))
            batch.add((job.key, number), job.texts[number].ids.tolist(), job.texts[number].settings)
        if not (batch.active or batch.waiting):
            return
        for event in batch.step():
            key, number = event.key
            if event.error is not None:
                job = under_way.pop(key).job
                for other in range(len(job.texts)):
                    batch.cancel((key, other))
                yield Answer(error_document(key, event.error), failed=True)
            elif event.chunk is not None and key in under_way and under_way[key].take(number, event.chunk):
                found = under_way.pop(key)
                results = found.results()
                yield Answer(result_document(model, found.job, results), sum(len(result.tokens) for result in results))
