"""Constrained texts: whatever a model prefers, what comes out is what the schema, expression or grammar allows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from runtime import GenerationSettings, generate, generate_batch, load
from runtime.errors import ArtifactError, MissingPackageError, SettingsError
from runtime.generation import constraints
from runtime.generation.constraints import Constraint, Kind, make_constraint, schema_text
from runtime.generation.history import History
from runtime.generation.text import TextCodec
from tests.exported import Exported

END = 1
PIECES = ['{"', '":', '", "', '"}', "ab", "abc", "true", " 12", "é", "</end>"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def history(tokens: Sequence[int]) -> History:
    found = History([7, 8])
    for one in tokens:
        found.append(one)
    return found


def saved(tokenizer: Tokenizer, folder: Path, ends: tuple[int, ...] = (END,)) -> TextCodec:
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextCodec(folder, {}, eos_token_ids=ends)


def byte_level(folder: Path, ends: tuple[int, ...] = (END,)) -> TextCodec:
    """Specials, all bytes, and PIECES, which cross what a grammar takes for its borders."""
    pieces = [byte_level_word(piece) for piece in PIECES]
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet(), *pieces])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return saved(tokenizer, folder, ends)


def token(codec: TextCodec, piece: str) -> int:
    found = codec.tokenizer.token_to_id(piece)
    assert found is not None
    return found


def alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_word(text: str) -> str:
    splits = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(word for word, _ in splits)


def sentencepiece(folder: Path, drops_space: bool) -> TextCodec:
    """Bytes as <0x..> and pieces whose space is ▁; the first space is shown or not, as in Gemma and as in Llama 2."""
    pieces = ["▁", *'abcx019.-{}[]:,"', "▁a", "▁{", "▁1", '{"', '":', "é", "▁▁"]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    vocabulary |= {piece: len(vocabulary) + index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if drops_space else [])])
    return saved(tokenizer, folder)


CODECS: dict[str, Callable[[Path], TextCodec]] = {
    "byte-level": byte_level,
    "SentencePiece": lambda folder: sentencepiece(folder, False),
    "SentencePiece without the first space": lambda folder: sentencepiece(folder, True),
}


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest, tmp_path: Path) -> TextCodec:
    return CODECS[request.param](tmp_path)


def vocabulary_of(codec: TextCodec) -> int:
    return int(codec.tokenizer.get_vocab_size()) + 7  # a model may have rows that no token has


def written(codec: TextCodec, constraint: Constraint, seed: int, most: int = 300) -> str | None:
    """What a model that knows nothing writes; None if it does not end by itself."""
    random = np.random.default_rng(seed)
    tokens: list[int] = []
    for _ in range(most):
        logits = random.normal(size=vocabulary_of(codec)).astype(np.float32)
        logits[[END, *(codec.tokenizer.encode('"}1').ids)]] += 2  # so that strings and numbers end
        tokens.append(int(constraint(history(tokens), logits).argmax()))
        if tokens[-1] in codec.eos_token_ids:
            return codec.decode(tokens)
    return None


def test_a_schema_gives_json_that_it_describes(codec: TextCodec) -> None:
    for seed in range(5):
        text = written(codec, make_constraint(codec, "json_schema", json.dumps(SCHEMA)), seed)
        assert text is not None
        document = json.loads(text)
        assert set(document) == {"name", "age"}
        assert len(document["name"]) <= 5
        assert type(document["age"]) is int
        assert 0 <= document["age"] <= 150


@pytest.mark.parametrize("expression", [r"\d{3}-[a-c]+", "é{1,3}x?", r"[^a]*a", r" a", "", "a/b{2}", r"(?i)ABC|x\n"])
def test_an_expression_matches_all_of_the_text(codec: TextCodec, expression: str) -> None:
    for seed in range(5):
        text = written(codec, make_constraint(codec, "regex", expression), seed)
        assert text is None or re.fullmatch(expression, text)
        assert text is not None or "*" in expression or "+" in expression


def test_a_grammar_nests(codec: TextCodec) -> None:
    constraint = make_constraint(codec, "grammar", 'start: pair\npair: "(" pair? ")"')
    text = written(codec, constraint, 1)
    assert text
    assert text == "(" * (len(text) // 2) + ")" * (len(text) // 2)


def test_any_object_is_an_object(codec: TextCodec) -> None:
    found = [written(codec, make_constraint(codec, "json_object"), seed) for seed in range(5)]
    assert any(found)
    assert all(isinstance(json.loads(text), dict) for text in found if text is not None)


def allowed(constraint: Constraint, tokens: list[int], vocab: int) -> set[int]:
    logits = constraint(history(tokens), np.zeros(vocab, np.float32))
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def test_an_end_token_is_allowed_where_the_text_may_end_and_alone_where_it_must(tmp_path: Path) -> None:
    spelt = 2 + 256 + PIECES.index("</end>")  # an end token that the tokenizer takes for text
    codec = byte_level(tmp_path, (END, spelt, 5000))
    (a,), (b,) = codec.tokenizer.encode("a").ids, codec.tokenizer.encode("b").ids
    ab = token(codec, "ab")
    constraint = make_constraint(codec, "regex", "ab?")
    assert allowed(constraint, [], 6000) == {a, ab}
    assert allowed(constraint, [a], 6000) == {b, END, spelt, 5000}
    assert allowed(constraint, [a, b], 6000) == {END, spelt, 5000}
    assert allowed(constraint, [ab], 6000) == {END, spelt, 5000}
    assert spelt not in allowed(make_constraint(codec, "regex", "[^a]*a"), [], 6000)
    assert allowed(constraint, [ab], 300) == {END, spelt}  # of a model with fewer rows


def test_a_history_may_become_shorter_and_another(codec: TextCodec) -> None:
    constraint = make_constraint(codec, "regex", "(?:[ab]|[bc]c)*x" if not codec.drops_first_space() else "[abc]*x")
    vocab = vocabulary_of(codec)
    histories = [[], [6], [6, 7], [6], [6, 6, 7], [7], []]
    letters = [token(codec, letter) for letter in "ab"]
    begin = [token(codec, "▁")] if codec.drops_first_space() else []
    for text in histories:
        tokens = [*begin, *(letters[one - 6] for one in text)]
        fresh = make_constraint(codec, "regex", "(?:[ab]|[bc]c)*x" if not begin else "[abc]*x")
        assert allowed(constraint, tokens, vocab) == allowed(fresh, tokens, vocab)


def test_a_history_that_is_no_such_text_is_refused_and_does_no_harm(codec: TextCodec) -> None:
    constraint = make_constraint(codec, "regex", "[ab]*x")
    vocab, wrong = vocabulary_of(codec), token(codec, "{")
    before = allowed(constraint, [], vocab)
    for _ in range(2):
        with pytest.raises(
            SettingsError, match=r'regex is \[ab\]\*x; no text goes on after "{": the tokens .* no such'
        ):
            allowed(constraint, [wrong], vocab)
    assert allowed(constraint, [], vocab) == before


def test_a_limit_of_the_parser_is_told_as_such(tmp_path: Path) -> None:
    codec = byte_level(tmp_path)
    constraint, a = make_constraint(codec, "regex", "a{1000000}"), token(codec, "a")
    assert a in allowed(constraint, [], 300)
    with pytest.raises(SettingsError, match=r'a\{1000000\}; no text goes on after "a": lexer error: too many'):
        allowed(constraint, [a], 300)


def test_where_no_token_goes_on_it_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer(BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.ByteLevel()
    codec = saved(tokenizer, tmp_path)
    constraint = make_constraint(codec, "regex", "a{2}[b-d]é")
    assert allowed(constraint, [2, 2], 4) == {3}
    with pytest.raises(SettingsError, match=r'a\{2\}\[b-d\]é; no text goes on after "aab": no token of the vocabulary'):
        allowed(constraint, [2, 2, 3], 4)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", "{", "json_schema is {; it must be a JSON schema that a text can be held to: "),
        ("json_schema", "[1]", "it must be a JSON object"),
        ("json_schema", '{"a": 1, "a": 2}', 'the key "a" is there twice'),
        ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', 'Unimplemented keys: ["uniqueItems"]'),
        ("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"enum": []}', "Unsatisfiable schema"),
        ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf constraints are not supported"),
        ("regex", "(a", "regex is (a; it must be a regular expression that a text can be held to: "),
        ("regex", "(?=a{2})b", "look-around"),
        ("regex", "a\ud800", "character 2 is '\\ud800'"),
        ("grammar", "start: B", 'unknown name: "B"'),
        ("grammar", "start: A\nA: /a/ & /b/", "it must be a Lark grammar that a text can be held to: "),
        ("grammar", 'start: %json {"not": {}, "x-guidance": {"lenient": true}}', 'Unimplemented keys: ["not"]'),
    ],
)
def test_what_cannot_be_held_to_is_one_line(tmp_path: Path, kind: Kind, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make_constraint(byte_level(tmp_path), kind, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_braces_of_a_message_are_no_settings() -> None:
    error = SettingsError("regex", "a{3}", "it goes with {other_one}", "look at a{3}")
    assert error.told(lambda name: f"--{name}") == "--regex is a{3}; it goes with --other_one: look at a{3}"


def test_a_schema_is_a_dict_or_text() -> None:
    assert json.loads(schema_text(SCHEMA)) == SCHEMA
    assert schema_text('{"type": "string"}') == '{"type": "string"}'
    for wrong in ({"a": {1, 2}}, {"a": float("nan")}, "nothing"):
        with pytest.raises(SettingsError, match="json_schema"):
            schema_text(wrong)


def test_a_tokenizer_without_bytes_or_ends_is_refused(tmp_path: Path) -> None:
    codec = byte_level(tmp_path)
    codec.tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ArtifactError, match=r"allows no constrained texts.*decoder type"):
        make_constraint(codec, "regex", "a")
    with pytest.raises(ArtifactError, match="has no end token"):
        make_constraint(byte_level(tmp_path, (5000,)), "regex", "a")


def test_without_the_package_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"regex needs llguidance, .* pip install 'imsm-runtime\[grammar\]'"):
        make_constraint(byte_level(tmp_path), "regex", "a")


def test_a_tokenizer_is_prepared_once_and_a_grammar_compiled_once(tmp_path: Path) -> None:
    codec = byte_level(tmp_path)
    first, second = (make_constraint(codec, "regex", "a+") for _ in range(2))
    assert first._vocabulary is second._vocabulary
    assert first._start is second._start
    vocab = vocabulary_of(codec)
    (a,) = codec.tokenizer.encode("a").ids
    assert allowed(first, [a], vocab) != allowed(second, [], vocab)  # and each has a text of its own


def test_generation_writes_what_its_settings_demand(tiny: Exported) -> None:
    model = load(tiny.artifact)
    result = generate(model, "Hello", regex=r"[a-c]{3,5}", max_new_tokens=10)
    assert re.fullmatch("[a-c]{3,5}", result.text)
    assert result.finish_reason == "stop"
    drawn = [
        generate(model, "Hello", json_schema=json.dumps(SCHEMA), temperature=1.0, seed=seed, max_new_tokens=100)
        for seed in range(3)
    ]
    for result in drawn:
        assert result.finish_reason != "stop" or set(json.loads(result.text)) == {"name", "age"}
    assert any(result.finish_reason == "stop" for result in drawn)
    with pytest.raises(SettingsError, match="grammar is start: B; it must be a Lark grammar"):
        generate(model, "Hello", grammar="start: B")


def test_texts_of_a_batch_have_a_form_each(tiny: Exported) -> None:
    model = load(tiny.artifact)
    expressions = ["[ab]{2}", "[0-9]{3,4}", "x|yy"]
    settings = [GenerationSettings(regex=expression, max_new_tokens=8) for expression in expressions]
    together = generate_batch(model, ["Hello", "Hello", "y"], settings)
    for expression, prompt, found in zip(expressions, ("Hello", "Hello", "y"), together, strict=True):
        assert re.fullmatch(expression, found.text)
        assert found.text == generate(model, prompt, regex=expression, max_new_tokens=8).text
