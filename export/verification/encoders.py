"""The runtime's encoder against the tokenizer of training: the same token ids for the same prompts, or no artifact."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from ..errors import VerificationError
from ..replaced import replaced


def compare_encoders(
    folder: Path, tokenizer: PreTrainedTokenizerBase, special_tokens: dict[str, str]
) -> dict[str, Any]:
    """Encode hard texts and conversations by the runtime, from the files in `folder`, and by `tokenizer`; returns
    `compared` and `fingerprint` for the manifest. special_tokens: as in the manifest.

    Where the template refuses messages, the runtime must refuse them too. Raises VerificationError with the first text
    that differs.
    """
    hard_texts = _runtime("hard_texts")
    codec = hard_texts.steady_codec(folder, special_tokens)
    with (
        replaced(chat_template_utils, "datetime", _FixedDate(hard_texts.DATE)),
        replaced(tokenizer, "model_max_length", sys.maxsize),  # it would warn of long texts
    ):
        for case in hard_texts.cases(hard_texts.special_texts(codec), codec.template is not None):
            expected, found = _expected(tokenizer, case), hard_texts.encode_case(codec, case)
            if expected != found:
                at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
                where = min(len(expected), len(found)) if at is None else at
                raise VerificationError(
                    f"the runtime encodes {_short(case.name)} as {_around(found, where)}, the tokenizer of training as "
                    f"{_around(expected, where)}"
                )
            texts = codec.decode(found), _decoded(tokenizer, expected)
            if texts[0] != texts[1]:
                raise VerificationError(
                    f"the runtime decodes {_around(found, 0)} as {_short(repr(texts[0]))}, "
                    f"the tokenizer of training as {_short(repr(texts[1]))}"
                )
    result: dict[str, Any] = hard_texts.fingerprint(codec)
    return result


class _FixedDate:
    """Stands for `datetime.datetime` where transformers asks it for the time."""

    def __init__(self, date: Any) -> None:
        self._date = date

    def now(self) -> Any:
        return self._date


def _runtime(name: str) -> ModuleType:
    """A module of the runtime's text codec, which is what is verified: the one place where an export runs the runtime.
    In the wheel both packages have other names."""
    package = "imsm_runtime" if __name__.startswith("imsm_export") else "runtime"
    return importlib.import_module(f"{package}.generation.{name}")


def _expected(tokenizer: PreTrainedTokenizerBase, case: Any) -> list[int]:
    """Token ids in transformers; none where the template refuses."""
    if case.text is not None:
        ids: list[int] = tokenizer(case.text)["input_ids"]
        return ids
    try:
        text = tokenizer.apply_chat_template(list(case.messages), tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise what they like
        return []
    chat_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return chat_ids


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _around(ids: list[int], at: int) -> str:
    """Token ids from a few before a position on."""
    start = max(at - 3, 0)
    shown = ", ".join(map(str, ids[start : start + 12]))
    return f"[{'…, ' if start else ''}{shown}{', …' if len(ids) > start + 12 else ''}]" if ids else "nothing (refused)"
