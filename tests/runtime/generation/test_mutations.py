"""Damaged tokenizers and templates, by the command line's way: an answer or one line, never a traceback or a hang."""

from __future__ import annotations

import copy
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import IMSMRuntimeError
from runtime.generation.text import TextCodec
from tests.builders import make_tokenizer
from tests.chat_templates import TEMPLATES

VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 2**32, 2**63, 10**30, 1.5, "", "a", "\0", "▁", "</s>", "[", [], [[]], {}, ["a", "b"]),
    *({"type": "BPE"}, {"type": "CTC"}, {"type": "Fuse"}, {"String": ""}, {"Regex": "(("}, {"Regex": "(a|a)*$"}),
    {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]},
    {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]},
    {"type": "WordLevel", "vocab": {}, "unk_token": "x"},
    {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []},
    {"type": "Split", "pattern": {"Regex": "(a+)+b(?=$)"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Removed", "invert": True},
    {"type": "FixedLength", "length": 0},
    {"type": "Strip", "content": "a", "start": 1, "stop": 3},
    {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "x"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 99999999]},
]
INSERTED = [
    *("{{ 1/0 }}", "{{ x.y.z }}", "{{ messages[5] }}", "{{ messages | tojson(indent=-1) }}"),
    *("{{ range(10**9) }}", "{{ self }}", "{{ raise_exception('a\\nb') }}", "{{ strftime_now() }}"),
    *("{{ messages | groupby('x') }}", "{{ loop.index }}", "{{ '\\ud800' }}", "{{ 'a' | center(-5) }}"),
    *("{{ [] | first }}", "{{ 5() }}", "{{ -messages }}", "{{ {[]: 1} }}"),
    *("{% for a, b, c in messages %}{% endfor %}", "{% set ns.x = 1 %}", "{% import 'a' as b %}"),
    *("{% extends 'a' %}", "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"),
    *("{% continue %}", "{% raw %}", "{# ", "{{", "{%"),
    *("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", "{% generation %}"),
    *("{% endfor %}", "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}"),
    *("{% include messages %}", "{% do 1 %}", "\0", "é"),
]
PROMPTS = ["hello", "a" * 60 + " time", " ", "é🦊\n", "</s><s>", "\0"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    keys: list[Any] = list(value)[:8] if isinstance(value, dict) else []
    for key in keys or range(min(len(value), 3) if isinstance(value, list) else 0):
        yield from places(value[key], (*path, key))


def damaged_tokenizer(document: dict[str, Any], rng: random.Random) -> bytes:
    document = copy.deepcopy(document)
    *above, last = rng.choice(list(places(document)))
    owner: Any = document
    for key in above:
        owner = owner[key]
    if rng.random() < 0.25:
        del owner[last]
    else:
        owner[last] = rng.choice(VALUES)
    data = json.dumps(document).encode()
    at = rng.randrange(len(data))
    return data if rng.random() < 0.9 else data[:at] + bytes([rng.randrange(256)]) + data[at + rng.choice([0, 1, 50]) :]


def damaged_template(rng: random.Random) -> bytes:
    text = rng.choice(list(TEMPLATES.values()))
    at = rng.randrange(len(text))
    text = text[:at] + rng.choice([*INSERTED, ""]) + text[at + rng.choice([0, 0, 1, 9]) :]
    return text.encode()


def use(folder: Path, prompt: str) -> str:
    """What `generate` does with a codec, for every way of encoding; returns how it ended."""
    try:
        codec = TextCodec(folder, {"bos_token": "<s>", "eos_token": "</s>"}, eos_token_ids=(1,))
        ids = [*codec.encode_prompt(prompt, raw=True), *codec.encode_prompt(prompt)]
        ids += codec.encode_continuation([{"role": "user", "content": prompt}])
        for tokens in (ids, list(range(0, 300, 7))):
            stream = codec.stream()
            assert "".join([*map(stream.push, tokens), stream.finish()]) == codec.decode(tokens)
    except IMSMRuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "answered: "


@pytest.mark.parametrize("kind", ["tokenizer", "template"])
def test_damage_is_one_line(kind: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    rng, document = random.Random(11), json.loads(whole)
    endings: Counter[str] = Counter()
    for number in range(250):
        data = damaged_tokenizer(document, rng) if kind == "tokenizer" else whole
        template = damaged_template(rng) if kind == "template" else TEMPLATES["Zephyr"].encode()
        (tmp_path / "tokenizer.json").write_bytes(data)
        (tmp_path / "chat_template.jinja").write_bytes(template)
        start = time.perf_counter()
        ending = use(tmp_path, PROMPTS[number % len(PROMPTS)])
        assert time.perf_counter() - start < 60
        assert "\n" not in ending
        assert len(ending) < 800
        endings[ending.partition(":")[0]] += 1
    assert min(endings[name] for name in ("answered", "ArtifactError", "PromptError")) > 2, endings
