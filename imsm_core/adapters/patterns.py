"""Regular expressions of a PEFT config, tried in a process of their own before PEFT runs them: one can take longer than
anybody waits, and Python cannot interrupt it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig
from torch import nn

from ..errors import AdapterError

SECONDS = 3.0
_WHOLE = ("target_modules", "exclude_modules", "feedforward_modules")
_INSIDE = {
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
}
_KEYS = (r"(.*\.)?({})$", r".*\.{}$")
_PLAIN = re.compile(r"[\w.]*")
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for index, (pattern, whole) in enumerate(patterns):
    print(index, flush=True)
    try:
        compiled = re.compile(pattern)
    except Exception as error:
        sys.exit(" ".join(f"{error or type(error).__name__}".split()))
    for name in names:
        (compiled.fullmatch if whole else compiled.match)(name)
"""


def check_patterns(config: PeftConfig, model: nn.Module) -> None:
    """Raise AdapterError naming the field and the pattern if one is no regular expression, or takes longer than SECONDS
    on the names of the modules of `model`."""
    found = [(field, text, pattern) for field, text, pattern in _patterns(config) if not _PLAIN.fullmatch(text)]
    if not found:
        return
    given = [(pattern, field in _WHOLE) for field, _, pattern in found]
    content = json.dumps([given, [name for name, _ in model.named_modules()]]).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY], input=content, capture_output=True, timeout=SECONDS, check=False
        )
        output, wrong = done.stdout, done.stderr.decode(errors="replace").strip() if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output, wrong = error.stdout or b"", f"it takes longer than {SECONDS:g} seconds on the model's modules"
    if wrong:
        field, text, _ = found[int(output.split()[-1]) if output.split() else 0]
        raise AdapterError(f"the adapter's {field} has the pattern {_short(text)}, which cannot be used: {wrong}")


def _patterns(config: PeftConfig) -> Iterator[tuple[str, str, str]]:
    """(field, what it says, the regular expression that PEFT makes of it)."""
    for field, value in vars(config).items():
        for text in _texts(value):
            if field in _WHOLE and isinstance(value, str):
                yield field, text, text
            elif field in _INSIDE:
                yield field, text, _INSIDE[field].replace("{}", text)
            elif field.endswith("_pattern"):
                yield from ((field, text, form.replace("{}", text)) for form in _KEYS)


def _texts(value: Any) -> list[str]:
    """A text, or those in a list, or the keys of a dict."""
    parts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple | set | dict) else []
    return [part for part in parts if isinstance(part, str)]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
