"""What a pass is, and how it runs: every candidate is checked, and a check that does not match says why.

A pass changes the graph in place and computes exactly what it replaces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import onnx_ir as ir

Candidate = TypeVar("Candidate")
Match = TypeVar("Match")


@dataclass(frozen=True)
class Declined:
    """Why a candidate stays as it is, in a few words that the report and the manifest show."""

    reason: str


@dataclass
class Outcome:
    """What a pass did. fired: how often it rewrote. declined: how many candidates stayed, by reason."""

    fired: int = 0
    declined: Counter[str] = field(default_factory=Counter)

    def decline(self, why: Declined) -> None:
        """Count one more candidate that stays."""
        self.declined[why.reason] += 1

    def as_dict(self) -> dict[str, Any]:
        """For the manifest; without `declined` where nothing was."""
        return {"fired": self.fired} | ({"declined": dict(self.declined)} if self.declined else {})

    def lines(self, name: str) -> Iterator[str]:
        """For the export's report: one line, and one for each reason."""
        yield f"pass      {name:22} {self.fired:5} times"
        for reason, count in self.declined.items():
            yield f"pass      {name:22} {count:5} declined: {reason}"


class Pass(Protocol):
    """pattern: what it replaces by what, in symbols or words."""

    @property
    def name(self) -> str: ...

    @property
    def pattern(self) -> str: ...

    def __call__(self, model: ir.Model) -> Outcome: ...


@dataclass(frozen=True)
class Rewrite(Generic[Candidate, Match]):
    """A pass that takes one match at a time. candidates: what one would expect to be rewritten, found while the graph
    changes, so that a candidate may be the result of an earlier match. check: the match, or why there is none.
    rewrite: puts the new nodes in the place of a match."""

    name: str
    pattern: str
    candidates: Callable[[ir.Model], Iterable[Candidate]]
    check: Callable[[Candidate], Match | Declined]
    rewrite: Callable[[ir.Model, Match], None]

    def __call__(self, model: ir.Model) -> Outcome:
        """Run it."""
        outcome = Outcome()
        for candidate in self.candidates(model):
            found = self.check(candidate)
            if isinstance(found, Declined):
                outcome.decline(found)
            else:
                self.rewrite(model, found)
                outcome.fired += 1
        return outcome


@dataclass(frozen=True)
class JointRewrite(Generic[Candidate, Match]):
    """A pass that knows all matches before it changes anything, because several become one or depend on each other.
    rewrite: gets all matches; returns how often it fired, and why those that do not fit the others stay."""

    name: str
    pattern: str
    candidates: Callable[[ir.Model], Iterable[Candidate]]
    check: Callable[[Candidate], Match | Declined]
    rewrite: Callable[[ir.Model, Sequence[Match]], Outcome]

    def __call__(self, model: ir.Model) -> Outcome:
        """Run it."""
        checked = [self.check(candidate) for candidate in self.candidates(model)]
        declined = Counter(found.reason for found in checked if isinstance(found, Declined))
        outcome = self.rewrite(model, [found for found in checked if not isinstance(found, Declined)])
        return Outcome(outcome.fired, declined + outcome.declined)


@dataclass(frozen=True)
class Sweep:
    """A pass over the whole graph that has nothing to decline. sweep: returns how often it fired."""

    name: str
    pattern: str
    sweep: Callable[[ir.Model], int]

    def __call__(self, model: ir.Model) -> Outcome:
        """Run it."""
        return Outcome(self.sweep(model))
