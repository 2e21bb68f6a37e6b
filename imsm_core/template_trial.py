"""A chat template tried in a process of its own before transformers renders it in this one.

One from a stranger's folder may loop without end or ask for all memory, and neither can be stopped from within.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

SECONDS = 10.0
_MEMORY = 2**30
_MOST_TEXT = 2**24
_TRIAL = f"""
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
except ImportError:  # not on Windows
    pass
import jinja2, jinja2.ext, jinja2.sandbox

class Generation(jinja2.ext.Extension):
    tags = {{"generation"}}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

def refuse(message):
    raise jinja2.TemplateError(message)

environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
)
environment.filters["tojson"] = lambda value, *options, **more: json.dumps(value, default=str)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
turns = [{{"role": role, "content": "Hello"}} for role in ("system", "user", "assistant", "user")]
source = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
for messages in (turns[1:2], turns[1:3], turns):
    try:
        text = environment.from_string(source).render(
            messages=messages, add_generation_prompt=True, tools=None, documents=None, bos_token="", eos_token=""
        )
    except MemoryError:
        raise
    except Exception:  # it takes other turns, or is no template: who uses it says so
        continue
    if len(text) > {_MOST_TEXT}:
        raise MemoryError
"""


@cache
def why_not(template: str) -> str | None:
    """Why a template cannot be used at all; None where it ends, whatever it says."""
    content = template.encode("utf-8", "surrogatepass")
    command = [sys.executable, "-I", "-c", _TRIAL]
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "it does not come to an end"
    return "it computes something too large" if done.returncode else None


def check_templates(templates: Any) -> str | None:
    """What is wrong with a tokenizer's `chat_template`: a text, several by their names, or nothing; None if it can be
    used."""
    for template in templates.values() if isinstance(templates, dict) else [templates or ""]:
        if not isinstance(template, str):
            return f"it is no text but of type {type(template).__name__}"
        if template and (why := why_not(template)):
            return why
    return None
