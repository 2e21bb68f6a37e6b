"""Chat templates: rendered as transformers renders them, and one line whatever is wrong with them."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from runtime.errors import ArtifactError, PromptError
from runtime.generation.chat_template import compile_template, render_chat
from tests.builders import make_tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " é <b> \U0001f98a "},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1, "a": "é"}}}],
    },
    {"role": "tool", "content": [{"type": "text", "text": "ok"}], "name": "f"},
    {"role": "assistant", "content": "x", "reasoning": "because"},
]
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {%- if m.role == 'user' %}U: {{ m.content | trim }}\n{% endif %}\n"
    "{% endfor %}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}{% if add_generation_prompt %}A:{% endif %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ eos_token }}"
    "",
    "{% if tools is not none %}tools{% endif %}{% if documents is defined %}documents{% endif %}{{ tools }}",
    "{{ cls_token }}|{{ sep_token }}|{{ unk_token }}|{{ mask_token }}|{{ pad_token }}",
    "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}{{ messages[1] | tojson(true, 2) }}",
    "{{ messages[2] | tojson(indent='--') }}{{ 'content' in messages[2] }}{{ messages[2].content is defined }}",
    "{{ messages[4].reasoning_content }}{{ messages[4].thinking }}{{ messages[4] | list }}",
    "{{ dict(a=1) }}{{ dict.fromkeys('ab') }}{{ namespace(self=1).self }}{{ strftime_now('%Y') }}",
    "{% macro say(m, end='!') %}{{ m.role ~ end }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{{ messages | map(attribute='role') | unique | join(', ') }}{{ messages[1].content.split('<')[0] | length }}",
    "{{ '%s: %5d' % ('a', 12345678) }}{{ '{:>4}'.format('x') }}{{ 2 ** 10 * 3 }}",
    "{{ messages[::-1] | length }}{{ 'ab' * 3 }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ loop.last }}{{ m.content }}{% else %}-{% endfor %}",
    "{% set text %}{% for m in messages %}{{ m.role | upper }}{% endfor %}{% endset %}{{ text | indent(2) }}"
    "{{ undefined_name }}",
]
REFUSED = [
    "{{ raise_exception('only one system') }}",
    "{{ messages | tojson(nonsense=1) }}",
    "{{ messages[0].content + 1 }}",
    "{{ namespace(_a=1) }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{{ messages.append(1) }}",
    "{{ undefined_name.attribute }}",
    "{{ ''.__class__.mro() }}",
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"sep_token": "<sep>", "cls_token": "<cls>"})
    return tokenizer


def rendered(source: str, theirs: PreTrainedTokenizerBase, messages: Any = MESSAGES) -> str:
    return render_chat(compile_template(source), messages, theirs.special_tokens_map)


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_render_as_transformers_renders_them(theirs: PreTrainedTokenizerBase, source: str) -> None:
    expected = theirs.apply_chat_template(MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=True)
    assert rendered(source, theirs) == expected


@pytest.mark.parametrize("source", REFUSED)
def test_templates_refuse_what_they_refuse_in_transformers(theirs: PreTrainedTokenizerBase, source: str) -> None:
    with pytest.raises(Exception, match=r"."):
        theirs.apply_chat_template(MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=True)
    with pytest.raises(PromptError, match="the chat template refuses the messages"):
        rendered(source, theirs)


def test_the_clock_can_be_set() -> None:
    template = compile_template("{{ strftime_now('%d %b %Y') }}", lambda: datetime.datetime(2020, 2, 29))
    assert render_chat(template, MESSAGES, {}) == "29 Feb 2020"


WRONG = [
    "{% if %}",
    "{% for x in %}",
    "{{ 'open",
    "{% break %}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% for i in [1] %}" * 25 + "x" + "{% endfor %}" * 25,
    "{{ x" + ".a" * 5000 + " }}",
    "{{ x" + "|trim" * 3000 + " }}",
    "{% if 1 %}" * 300 + "{% endif %}" * 300,
]


@pytest.mark.parametrize("source", WRONG)
def test_a_broken_template_is_one_error(source: str) -> None:
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja is not valid") as caught:
        compile_template(source)
    assert "\n" not in str(caught.value)


FAILING = [
    "{{ 1/0 }}",
    "{{ 'a' + 1 }}",
    "{% include 'x' %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ strftime_now(5) }}",
    "{{ '\\ud800' }}x",
    "{{ raise_exception('a\\nb') }}",
    "{{ lipsum(5) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
]
ENDLESS = [
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% set x = range(99999) | list %}{% for i in x %}{% set y = x + x %}{% endfor %}",
    "{% set x = range(99999) | list %}{% for i in x %}{% set y = x | sort %}{% endfor %}",
    "{{ 'a' * 10**12 }}",
    "{{ [1] * 10**12 }}",
    "{{ 9 ** 99999 }}",
    "{{ (9 ** 999) ** 999 }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a' | center(10000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ ('a\\n' * 9999) | indent('b' * 9999) }}",
    "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "{{ ('a' * 99999).join('b' * 99999) }}",
    "{{ ('a' * 99999) | join('b' * 99999) }}",
    "{{ ('a' * 99999).join(range(99999) | map('string')) }}",
    *(
        "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = " + grown + " %}{% endfor %}{{ ns.s }}"
        for grown in (
            "ns.s ~ ns.s",
            "ns.s + ns.s",
            "ns.s * 2",
            "[ns.s, ns.s]",
            "(ns.s, ns.s)",
            "{'a': ns.s, 'b': ns.s}",
            "dict(a=ns.s, b=ns.s)",
            "[ns.s, ns.s] | join",
            "ns.s.join([ns.s, ns.s])",
            "ns.s | replace('a', ns.s)",
            "'%s%s' % (ns.s, ns.s)",
            "'{0}{0}'.format(ns.s)",
        )
    ),
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = x %}{% endfor %}",
]


@pytest.mark.parametrize("source", [*FAILING, *ENDLESS])
def test_a_template_that_fails_or_does_not_end_is_one_error(source: str) -> None:
    template = compile_template(source)
    caught: list[BaseException] = []

    def render() -> None:
        try:
            render_chat(template, MESSAGES, {})
        except BaseException as error:
            caught.append(error)

    start = time.perf_counter()
    thread = Thread(target=render)  # where no signal would reach it
    thread.start()
    thread.join()
    assert time.perf_counter() - start < 30
    assert isinstance(caught[0], PromptError)
    assert "\n" not in str(caught[0])


def test_long_conversations_stay_within_the_limits() -> None:
    source = (
        "{% for m in messages %}{% for w in m.content.split('.') %}{% endfor %}{{ m.role ~ ': ' ~ (m.content | trim) }}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "A sentence of a long text. " * 200}] * 200  # a million characters
    assert len(render_chat(compile_template(source), messages, {})) > 1e6
    assert len(render_chat(compile_template("{% for i in range(99999) %}x{% endfor %}"), messages, {})) == 99999


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (["Hello"], "message 1 is no mapping with a role"),
        ([{"content": "x"}], "message 1 is no mapping with a role"),
        ([{"role": 1, "content": "x"}], "message 1 is no mapping with a role"),
        ([{"role": "user"}], "message 1 has a role and no content"),
        ([{"role": "user", "content": 5}], "message 1 has a content of type int"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, messages: Any, reason: str) -> None:
    from runtime.generation.text import TextCodec

    make_tokenizer(tmp_path, "{{ messages }}")
    with pytest.raises(PromptError, match=reason):
        TextCodec(tmp_path, {}).encode_chat(messages)
