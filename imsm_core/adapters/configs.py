"""The JSON of a PEFT config: an adapter's adapter_config.json, or the file of `--peft-config`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..backbone import first_line
from ..errors import AdapterError
from .refusals import REFUSED_TYPES, check_finite, check_type

CONFIG_TYPES: dict[str, Any] = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
_shown: dict[Any, Any] = {}


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a PEFT config whose `peft_type` is one that IMSM takes. Raises AdapterError, before PEFT sees it
    and warns of what it does not know."""
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AdapterError(f"cannot read the PEFT config {path}: {error.strerror}") from error
    except RecursionError as error:
        raise AdapterError(f"{path} is no PEFT config: its JSON is nested too deeply") from error
    except ValueError as error:
        raise AdapterError(f"{path} is no PEFT config: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{path} is no PEFT config: it is not a JSON object")
    if "peft_type" not in fields:
        raise AdapterError(f"{path} is no PEFT config: it has no peft_type")
    kind = fields["peft_type"]
    if not isinstance(kind, str) or kind not in CONFIG_TYPES.keys() | REFUSED_TYPES.keys():
        there = ", ".join(sorted(CONFIG_TYPES.keys() - REFUSED_TYPES.keys()))
        raise AdapterError(f"{path} has the unknown peft_type {kind!r}; there are {there}")
    check_type(kind)
    if kind == "ADALORA" and fields.get("total_step") is None:
        fields["total_step"] = 10**9  # training sets it, and PEFT builds no config without it
    try:
        check_finite(fields)
    except RecursionError as error:  # a depth that the parser takes
        raise AdapterError(f"{path} is no PEFT config: its JSON is nested too deeply") from error
    return fields


@contextmanager
def warnings_unless_refused() -> Iterator[None]:
    """Shows the warnings at its end, and none if it ends in an error, whose one line says what matters."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno, registry=_shown)
