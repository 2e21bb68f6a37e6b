"""The JSON of a PEFT config: an adapter's adapter_config.json, or the file that the setting `peft_config` names."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..errors import AdapterError, first_line
from .refusals import REFUSED_TYPES, check_finite, check_new_config, check_type

CONFIG_TYPES: dict[str, Any] = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
_shown: dict[Any, Any] = {}


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a PEFT config whose `peft_type` is one that IMSM takes. Raises AdapterError before PEFT
    sees the file and warns of what it does not know."""
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AdapterError(f"cannot read the PEFT config {path}: {error.strerror}") from error
    except RecursionError as error:
        raise AdapterError(f"{path} is not a PEFT config: its JSON is nested too deeply") from error
    except ValueError as error:
        raise AdapterError(f"{path} is not a PEFT config: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{path} is not a PEFT config: it is not a JSON object")
    if "peft_type" not in fields:
        raise AdapterError(f"{path} is not a PEFT config: it has no peft_type")
    kind = fields["peft_type"]
    if not isinstance(kind, str) or kind not in CONFIG_TYPES.keys() | REFUSED_TYPES.keys():
        there = ", ".join(sorted(CONFIG_TYPES.keys() - REFUSED_TYPES.keys()))
        raise AdapterError(f"{path} has the unknown peft_type {kind!r}; choose one of {there}")
    check_type(kind)
    if kind == "ADALORA" and fields.get("total_step") is None:
        fields["total_step"] = 10**9  # training sets it; PEFT needs one to build the config
    try:
        check_finite(fields)
    except RecursionError as error:  # nested less deeply than the parser allows, but too deeply for this
        raise AdapterError(f"{path} is not a PEFT config: its JSON is nested too deeply") from error
    return fields


@contextmanager
def warnings_unless_refused() -> Iterator[None]:
    """Show the warnings at the end, or none of them after an error, whose one line says what matters."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno, registry=_shown)


@warnings_unless_refused()
def read_peft_config(path: Path) -> PeftConfig:
    """Any PEFT config, as PEFT writes it to adapter_config.json, for a new adapter. Raises AdapterError."""
    fields = read_fields(path)
    kind = CONFIG_TYPES[fields["peft_type"]]
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(fields.keys() - known - {"peft_version"}):
        raise AdapterError(f"{path} has fields that {kind.__name__} does not know, such as {unknown[0]}")
    about_saved = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "peft_type")
    values = {name: value for name, value in fields.items() if name not in about_saved}
    try:
        config: PeftConfig = kind(**values | {"inference_mode": False})
    except Exception as error:  # PEFT's configs raise several types
        raise AdapterError(f"{path} cannot be used as a {kind.__name__}: {first_line(error)}") from error
    check_new_config(config)
    if config.task_type is None:
        config.task_type = "CAUSAL_LM"
    return config
