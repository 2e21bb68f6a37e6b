"""Stop strings: however a text comes, the same of it goes out."""

from __future__ import annotations

import itertools
import random

import pytest

from runtime.generation.stopping import StopStrings

TEXTS = ["abcabcabd!", "aaaaab", "ab", "", "xx\n\nUser: hi", "añb€🎉c", "aabaabaaab"]
STOPS = [("abd",), ("aab", "b"), ("abcabd",), ("\n\nUser:", "\n"), ("€🎉", "🎉c"), ("zzz",), ("abca", "bc"), ("aaab",)]


def simple(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Looks after every character whether the text ends with a stop string."""
    for length in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:length].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: length - len(longest)], longest
    return text, None


def streamed(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    stopping = StopStrings(stops)
    out = ""
    for piece in pieces:
        out += stopping.push(piece)
        assert not any(stop in out for stop in stops)
    return out + stopping.finish(), stopping.matched


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stops", STOPS)
def test_the_cut_of_a_text_into_pieces_changes_nothing(text: str, stops: tuple[str, ...]) -> None:
    expected = simple(text, stops)
    generator = random.Random(text)
    for _ in range(30):
        cuts = sorted(generator.choices(range(len(text) + 1), k=generator.randrange(len(text) + 2)))
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
        assert streamed(pieces, stops) == expected


def test_text_goes_out_as_soon_as_it_cannot_be_a_stop_string() -> None:
    stopping = StopStrings(["abc"])
    assert [stopping.push(letter) for letter in "xabdab"] == ["x", "", "", "abd", "", ""]
    assert stopping.finish() == "ab"


def test_nothing_comes_after_a_match() -> None:
    stopping = StopStrings(["b"])
    assert [stopping.push(letter) for letter in "abcb"] == ["a", "", "", ""]
    assert (stopping.matched, stopping.finish()) == ("b", "")
