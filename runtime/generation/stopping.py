"""Stop strings: text goes through, nothing of a stop string does.

Knows nothing about tokens. What comes out does not depend on how the text was cut into pieces: the stop string whose
last character comes first ends it, of several with the same end the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """A text that ends before the first of some strings. matched: the one that came, None before."""

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: none of them empty."""
        self.stops = tuple(stops)
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """What of the text so far is sure to be outside of a stop string, and was not given out before. Nothing after a
        match."""
        if self.matched is not None:
            return ""
        if not self.stops:
            return text
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.matched = min(ends)
            self._held = ""
            return text[:at]
        waits = max(self._beginning(text, stop) for stop in self.stops)
        self._held = text[len(text) - waits :]
        return text[: len(text) - waits]

    def finish(self) -> str:
        """What is left when no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """How many characters at the text's end may begin the stop string."""
        sizes = range(min(len(text), len(stop) - 1), 0, -1)
        return next((size for size in sizes if text.endswith(stop[:size])), 0)
