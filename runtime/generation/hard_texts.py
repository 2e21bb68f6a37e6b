"""Texts and conversations on which encoders differ, and a fingerprint of what a codec makes of them.

The exporter compares the tokenizer of training with the codec on them; `verify` computes the fingerprint again.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ArtifactError, PromptError
from .chat_template import Message
from .text import TextCodec

WORDS = (
    *("Hello", "hello world", " leading", "trailing ", "  two  spaces  between  ", "\ttab\tand\t\ttabs", "a\nb", "\n"),
    *("\n\n", "\r\n", "a\r\nb\r\n", "line one\n\n\nline four\n"),
    *(" \n \n ", "   ", "\u3000wide space\u3000", "a\u00a0b"),
    *("a\u2028b\u2029c", "a\u200bb", "\ufeffmark", "soft\u00adhyphen", "word\u2060joiner", "\u2009thin\u2009"),
    *("1", "12", "123", "1234", "1234567890", "3.14159", "1,000,000", "1e-10", "0x1F", "²³¼", "１２３", "٠١٢٣", "Ⅻ"),
    *("café", "cafe\u0301", "ﬁligree", "Ångström"),
    *("A\u030angstro\u0308m", "ÀÉÎÕÜ", "straße", "STRASSE", "İstanbul", "ı"),
    *("Zurich Zürich", "naïve façade", "ﷺ", "ℌ𝔢𝔩𝔩𝔬", "ｆｕｌｌｗｉｄｔｈ", "x̶y̶", "Z̸͝a̷l̶g̴o̵", "e\u0301\u0302\u0303\u0304"),
    *("東京", "日本語のテキスト。", "天气很好，孩子们在河边玩耍。", "한국어", "\u1112\u1161\u11ab"),
    *("ไทยไม่มีช่องว่าง", "हिन्दी"),
    *("עברית", "שלום (hello) עולם", "العربية ١٢٣", "\u202eright to left\u202c", "Ранним утром", "Ελληνικά", "ქართული"),
    *("🦊", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇯🇵", "☺️", "a🦊b 🦊c", "🦊" * 20, "❤️‍🔥", "\U000e0041tag"),
    *("\x00", "a\x00b", "\x01\x02\x03", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x9f", "\ufffd", "\ufffe", "\U0010ffff"),
    *("\u0378", "\ue000private", "𐍈𐌰", "𝕏" * 9, "ā" * 50, "a" * 1000, "ab " * 300, "é" * 300, "." * 200, "-" * 77),
    *("don't", "It's I'm we'll you'd they've", "'quoted' \"double\" `back`"),
    *("«guillemets» „low“", "—–-", "…...", "a/b\\c"),
    *("e-mail@example.com", "https://example.com/a?b=c&d=%20#e", "C:\\Users\\x", "/usr/bin/env", "#tag @name $5 100%"),
    *("def f(x):\n    return x ** 2\n\n\nprint(f(3))", "if (a&&b||!c) { x+=1; }", "<html><b>bold</b></html>", "a<b>c"),
    *('{"key": [1, 2.5, null, true], "ü": "\\u00e9"}', "SELECT * FROM t WHERE a='b';", "$$\\int_0^1 x^2\\,dx$$", "~~~"),
    *("\n    indented\n\t\ttabs\n  ", "| a | b |\n|---|---|\n"),
    *("# Title\n\n* item\n* item\n\n1. one\n", "```python\nx\n```"),
    *("MixedCASE camelCase snake_case SCREAMING", "ALL CAPS"),
    *("aAaAaA", "iPhone OpenGL LaTeX", "antidisestablishmentarianism"),
    "Donaudampfschifffahrtsgesellschaftskapitän",
    *("pneumonoultramicroscopicsilicovolcanoconiosis", "zzzzqqqqxxxx", "qwrtpsdf"),
    "The quick brown fox jumps over the lazy dog.",
    *("Sphinx of black quartz, judge my vow!", "Once upon a time, there was"),
    *("What is the capital of France?", "2 + 2 = 4", "a,b;c:d.e?f!g"),
    *("((()))[[[]]]{{{}}}", "!!!???", "x=y==z===w", "->=>|>"),
    *("▁", "▁a", "a▁b", "Ġ", "Ċ", "Ġa", "##ing", "</w>", "<0x0A>", "<0xFF>", "[CLS]", "[MASK]", "<unk>", "@@ "),
    *("<s>", "</s>", "<pad>", "<bos>", "<eos>", "<|endoftext|>"),
    *("<|im_start|>", "<|im_end|>", "<|im_end", "<|eot_id|>"),
    *("[INST] [/INST]", "<<SYS>>", "<start_of_turn>", "<|user|>"),
    *("<|assistant|>\n", "<think>x</think>", "<tool_call>{}"),
    *("user\nHello", "### Instruction:\n", "Human: hi\n\nAssistant:"),
    *("{{ bos_token }}", "{% if %}", "{# c #}", "%s %d {} {0}"),
)  # fmt: skip
QUESTION, ANSWER = "What is 1 + 1?", "It is 2."
DATE = datetime.datetime(2024, 2, 29, 12, 30, 45)


class Case(NamedTuple):
    """text: as it is, or messages: through the chat template."""

    text: str | None
    messages: Sequence[Message] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.text!r}" if self.text is not None else f"the conversation {list(self.messages)!r}"


def cases(special_tokens: Sequence[str], chat: bool) -> Iterator[Case]:
    """Hard texts, and with `chat` hard conversations. special_tokens: texts of the tokenizer's own."""
    words = [*WORDS, *special_tokens, *(f"a {token}b" for token in special_tokens)]
    yield from map(Case, words)
    if chat:
        for word in words:
            yield Case(None, [_message("user", word)])
        yield from (Case(None, messages) for messages in _conversations())


def encode_case(codec: TextCodec, case: Case) -> list[int]:
    """Token ids as transformers makes them (control tokens in content are such); none where the codec refuses."""
    try:
        if case.text is not None:
            return codec.encode_prompt(case.text, raw=True)
        return codec.encode_chat(case.messages, control_tokens=True)
    except PromptError:
        return []


def special_texts(codec: TextCodec, most: int = 32) -> list[str]:
    """The tokenizer's named special tokens, and the first of its other added tokens."""
    added = codec.tokenizer.get_added_tokens_decoder()
    others = [added[number].content for number in sorted(added)][:most]
    return list(dict.fromkeys([*sorted(codec.special_tokens.values()), *others]))


def steady_codec(folder: Path, special_tokens: dict[str, str]) -> TextCodec:
    """The codec of `folder`, whose templates are told a date that stays. Raises ArtifactError."""
    return TextCodec(folder, special_tokens, clock=lambda: DATE)


def fingerprint(codec: TextCodec) -> dict[str, Any]:
    """`compared`, the number of cases, and `fingerprint`, the sha256 over the token ids that a steady codec makes of
    them and their texts."""
    digest, count = hashlib.sha256(), 0
    for case in cases(special_texts(codec), codec.template is not None):
        ids = encode_case(codec, case)
        digest.update(f"{ids} {codec.decode(ids)!r}\n".encode("utf-8", "backslashreplace"))
        count += 1
    return {"compared": count, "fingerprint": digest.hexdigest()}


def check_prompts(folder: Path, special_tokens: dict[str, str], prompts: dict[str, Any]) -> int:
    """Compare with what the manifest's `prompts` say; returns how many cases were. Raises ArtifactError if this
    machine's libraries encode otherwise than those of the export."""
    found = fingerprint(steady_codec(folder, special_tokens))
    if any(prompts.get(key) != value for key, value in found.items()):
        raise ArtifactError(
            f"{folder}: prompts get other token ids here than at the export (fingerprint {found['fingerprint'][:12]} "
            f"of {found['compared']} texts, not {str(prompts.get('fingerprint'))[:12]} of {prompts.get('compared')}): "
            "the tokenizer or the template was changed, or tokenizers or jinja2 have another version"
        )
    return int(found["compared"])


def _message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _conversations() -> Iterator[list[dict[str, Any]]]:
    """One to four turns, with and without a system message, tools' results, parts, odd spaces and odd roles."""
    talk = [_message("user", QUESTION), _message("assistant", ANSWER)] * 2
    system = _message("system", "Be brief.")
    for count in range(1, 5):
        yield talk[:count]
        yield [system, *talk[:count]]
    yield [system]
    yield [_message("system", " \n spaces \n "), _message("user", "  \n x \n ")]
    yield [_message("user", "a"), _message("user", "b")]
    yield [_message("assistant", ANSWER), _message("user", QUESTION)]
    yield [_message("user", QUESTION), system, _message("user", QUESTION)]
    yield [_message("user", ""), _message("assistant", ""), _message("user", "")]
    yield [
        _message("user", QUESTION),
        _message("assistant", "<think>\nhm\n</think>\n\n" + ANSWER),
        _message("user", "?"),
    ]
    yield [_message("user", QUESTION), _message("assistant", ANSWER, reasoning="hm"), _message("user", "?")]
    call = {"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": "é\n"}}}
    called = _message("assistant", None, tool_calls=[call])
    yield [_message("user", QUESTION), called, _message("tool", '{"sum": 2}', name="add")]
    yield [_message("user", QUESTION), {**called, "content": ""}, _message("tool", "2", tool_call_id="call_1")]
    yield [
        _message("user", QUESTION),
        called,
        _message("tool", "2"),
        _message("tool", "3"),
        _message("assistant", ANSWER),
    ]
    yield [_message("user", [{"type": "text", "text": QUESTION}])]
    yield [
        _message("user", [{"type": "text", "text": "a "}, {"type": "text", "text": " b"}]),
        _message("assistant", "c"),
    ]
    yield [_message("developer", "Be brief."), _message("user", QUESTION)]
    yield [_message("ipython", "2"), _message("user", QUESTION)]
    yield [_message("user", QUESTION, name="Ann")]
