"""Text that a JSON schema, a regular expression or a grammar allows, by the package llguidance: a processor that gives
every token that cannot go on with such a text a logit of -infinity.

A text is judged by its bytes, so that a token may cross any border of the grammar. An end token is allowed where the
text may end, and alone where it must.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError, MissingPackageError, SettingsError, setting
from ..json_checks import parse_json
from .borders import border, told
from .history import History
from .settings import GenerationSettings
from .text import TextCodec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

Kind = Literal["json_schema", "json_object", "regex", "grammar"]
"""What constrains a text, named as the setting that it comes from."""
_STOPS = ("NotStopped", "NoExtension", "EndOfSentence")
"""How a matcher stands that can go on, or that has read all of a text."""
_NO_TOKEN = "no token of the vocabulary can follow"
_NO_SUCH_TEXT = "the tokens that were chosen are no such text"
_REFUSED = "doesn't satisfy the grammar"
"""What the matcher says of such tokens; else it met a limit of its own."""
_ASCII = "d"
"""Classes of a regular expression that mean those of ASCII: a number is one that every program reads."""
_COMPILED = 32
"""Compiled grammars that are kept for each tokenizer: the same schema comes with request after request."""
_SHOWN = 60
"""Characters of a text that a message shows, its last."""
_RULES: dict[Kind, str] = {
    "json_schema": "a JSON schema",
    "json_object": "an object",
    "regex": "a regular expression",
    "grammar": "a Lark grammar",
}
_STRICT: JsonCompileOptions = {"lenient": False, "coerce_one_of": False}
"""Options of the schema compiler: what it cannot hold a text to is an error, whatever the schema asks for."""


class Constraint:
    """A processor for one text: `constraint(history, logits)`. The history may have become shorter since the last call:
    what it no longer holds is taken back."""

    def __init__(self, kind: Kind, text: str, vocabulary: _Vocabulary, matcher: LLMatcher) -> None:
        self._kind, self._text = kind, text
        self._vocabulary = vocabulary
        self._start, self._matcher = matcher, matcher.deep_copy()
        self._read: list[int] = []

    def __call__(self, history: History, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits (vocab,), in place, with -infinity for what the text after `history` cannot go on with. Raises
        SettingsError where it cannot go on at all, and where the history is no text of the grammar."""
        self._read_up_to(history.new.tolist())
        np.putmask(logits, ~self._allowed(len(logits)), -np.inf)
        return logits

    def _read_up_to(self, tokens: list[int]) -> None:
        """Read the history's tokens, from the last one that it shares with what was read."""
        read = self._read
        shared = len(read)
        if tokens[:shared] != read:
            shared = next(
                (at for at, (old, new) in enumerate(zip(read, tokens, strict=False)) if old != new), len(tokens)
            )
        if self._matcher.is_error() or (shared < len(read) and not self._matcher.rollback(len(read) - shared)):
            self._matcher, shared = self._start.deep_copy(), 0
        self._read = tokens
        if len(tokens) > shared and not self._matcher.consume_tokens(tokens[shared:]):
            why = self._matcher.get_error()
            self._fail(_NO_SUCH_TEXT if not why or _REFUSED in why else why)

    def _allowed(self, vocab: int) -> NDArray[np.bool_]:
        """(vocab,): which tokens may follow."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if why := _trouble(self._matcher):
            self._fail(why)
        found = np.zeros(vocab, bool)
        known = min(vocab, len(bits))  # a model may have more rows than the tokenizer tokens, or fewer
        found[:known] = bits[:known]
        if self._matcher.is_accepting():
            ends = self._vocabulary.ends
            found[ends[ends < vocab]] = True
        else:
            found[self._vocabulary.spelt_ends] = False
        if not found.any():
            self._fail(_NO_TOKEN)
        return found

    def _fail(self, why: str) -> NoReturn:
        text = self._vocabulary.tokens.decode_str(self._read)[-_SHOWN:]
        raise SettingsError(self._kind, self._text, f"no text goes on after {json.dumps(text)}", told(why))


class _Vocabulary:
    """A tokenizer as llguidance knows it. ends: end tokens; spelt_ends: those of them that the tokenizer takes for
    text."""

    def __init__(self, codec: TextCodec) -> None:
        from llguidance import LLTokenizer

        known = sorted(end for end in codec.eos_token_ids if codec.tokenizer.id_to_token(end) is not None)
        if not known:
            raise ArtifactError("the artifact has no end token, so that a constrained text could not end")
        with border(ArtifactError, "the artifact's tokenizer.json allows no constrained texts"):
            self.tokens: LLTokenizer = LLTokenizer(codec.tokenizer.to_str(), eos_token=known)
        self.ends = np.array(sorted(codec.eos_token_ids), np.int64)
        self.spelt_ends = np.array([end for end in known if not self.tokens.is_special_token(end)], np.int64)
        self._drops_space = codec.drops_first_space()
        self.matcher = functools.lru_cache(_COMPILED)(self._matcher)

    def _matcher(self, kind: Kind, text: str) -> LLMatcher:
        """A matcher that has read nothing. Raises SettingsError for what does not compile."""
        from llguidance import LLMatcher, LLParserLimits

        grammars = [_grammar(kind, text) | {"name": "text"}]
        if self._drops_space:  # the first token has a space that the text does not show
            grammars.insert(0, {"lark_grammar": 'start: " " @text'})
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self.tokens, json.dumps({"grammars": grammars}), log_level=0, limits=limits)
        matcher.compute_bitmask()  # what contradicts itself shows here
        if why := _trouble(matcher) or "; ".join(matcher.get_grammar_warnings()):
            raise _refused(kind, text, why)
        return matcher


_vocabularies: WeakKeyDictionary[TextCodec, _Vocabulary] = WeakKeyDictionary()


def make_constraint(codec: TextCodec, kind: Kind, text: str = "") -> Constraint:
    """A constraint for one text that `codec` decodes. text: a JSON schema, a regular expression that all of the output
    matches, or a grammar in llguidance's form of Lark; nothing for `json_object`, any object. The first call for a
    codec prepares its tokenizer, which takes half a second for 49,152 tokens.

    Raises MissingPackageError without llguidance, SettingsError for what does not compile or asks for more than a text
    can be held to, and ArtifactError for a tokenizer that is neither byte-level nor falls back to bytes.
    """
    if find_spec("llguidance") is None:
        raise MissingPackageError(
            f"{setting(kind)} needs llguidance, which is not installed; run pip install 'imsm-runtime[grammar]'"
        )
    if codec not in _vocabularies:
        _vocabularies[codec] = _Vocabulary(codec)
    vocabulary = _vocabularies[codec]
    return Constraint(kind, text, vocabulary, vocabulary.matcher(kind, text))


def constraints_of(settings: GenerationSettings, codec: TextCodec) -> list[Constraint]:
    """The constraint that settings describe, for one text, if any. Raises as `make_constraint`."""
    kinds: tuple[Kind, ...] = ("json_object", "json_schema", "regex", "grammar")
    said = {kind: getattr(settings, kind) for kind in kinds}
    return [
        make_constraint(codec, kind, "" if value is True else value)
        for kind, value in said.items()
        if value is not None and value is not False
    ]


def schema_text(schema: Mapping[str, Any] | str) -> str:
    """A JSON schema as text, from a dict or from text. Raises SettingsError for what is no JSON object."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        document = parse_json(text.encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused("json_schema", schema, str(error)) from error
    if not isinstance(document, dict):
        raise SettingsError("json_schema", schema, "it must be a JSON object")
    return text


def _trouble(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on; "" if it can, or is at the text's end."""
    stop = matcher.stop_reason()
    why = matcher.get_error() or ("" if stop in _STOPS else stop)
    return _NO_TOKEN if why.startswith("NoExtension") else why


def _grammar(kind: Kind, text: str) -> dict[str, Any]:
    """One grammar in llguidance's own form."""
    from llguidance import LLMatcher, regex_to_lark

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refused(kind, text, f"character {error.start + 1} is {text[error.start]!r}") from error
    if kind == "grammar":
        return {"lark_grammar": text}
    if kind == "regex":
        return {"lark_grammar": f"start: /{regex_to_lark(text, _ASCII) or '(?:)'}/"}
    if kind == "json_object":
        made = LLMatcher.grammar_from_json_schema({"type": "object"})
    else:
        made = LLMatcher.grammar_from_json_schema(schema_text(text), overrides=_STRICT)
    (grammar,) = json.loads(made)["grammars"]
    return dict(grammar)


def _refused(kind: Kind, value: object, why: str) -> SettingsError:
    return SettingsError(kind, value, f"it must be {_RULES[kind]} that a text can be held to", told(why))
