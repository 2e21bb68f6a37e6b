"""What the export measured of an artifact's quality: the manifest's section, whatever its format, and for people."""

from __future__ import annotations

from typing import Any

MEMORIES = ("blend", "base", "adapter")
ASK = "export with --eval-data"


def read_quality(document: dict[str, Any]) -> dict[str, Any] | None:
    """The section of a checked manifest in the form of today's format; None where nothing was measured.

    Format 5 measured one of the three, which it does not name: the blend, or the base stream where there is no other.
    """
    quality: dict[str, Any] | None = document["quality"]
    if quality is None or document["format_version"] > 5:
        return quality
    sizes = {name: quality[name] for name in ("texts", "tokens")}
    difference = {name: value for name, value in quality.items() if name not in sizes}
    name = "blend" if len(document["streams"]) > 1 else "base"
    return {"file": None, **sizes, **dict.fromkeys(MEMORIES), name: difference}


def spoken(quality: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Who speaks where nobody turns the dial, the blend or the only stream, and what was measured of it."""
    return next((name, quality[name]) for name in MEMORIES if quality[name] is not None)


def kl_of(quality: dict[str, Any] | None) -> str:
    """KL of what speaks, nats a token; "-" where it was not measured."""
    return "-" if quality is None else _number(spoken(quality)[1]["mean_kl"], ".2g")


def texts_of(quality: dict[str, Any]) -> str:
    """What it was measured on."""
    return f"{quality['tokens']:,} tokens" + (f" of {quality['file']}" if quality["file"] else "")


def quality_line(quality: dict[str, Any] | None) -> str:
    """Everything in a line."""
    if quality is None:
        return f"not measured; {ASK}"
    kl = ", ".join(
        f"{name} KL {_number(quality[name]['mean_kl'], '.2g')}" for name in MEMORIES if quality[name] is not None
    )
    change = spoken(quality)[1]["perplexity_change"]
    share = "a change that is not finite of the" if change is None else f"{100 * change:+.1f} %"
    return f"{kl}; {share} perplexity on {texts_of(quality)}"


def _number(value: float | None, form: str) -> str:
    """None: it was not finite."""
    return "not finite" if value is None else format(value, form)
