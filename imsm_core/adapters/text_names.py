"""An adapter that was trained on a multimodal model, for its text part: names are translated, and what changes how
pictures and sounds are read is left out, since text does not run it.

In the whole model the layers of the text part are model.language_model.layers (language_model.model.layers in older
versions of transformers), in its text part alone model.layers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor
from transformers import PreTrainedModel

from .patterns import check_patterns
from .saved import SavedAdapter

_PART = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")
_WHOLE = ("model.language_model.", "language_model.model.", "model.text_model.", "text_model.model.")
_ROOT = "base_model.model."


def for_text_part(model: PreTrainedModel, saved: SavedAdapter) -> SavedAdapter:
    """`saved`, under the names of `model` if it was trained on a multimodal model that `model` is the text part of.
    Prints how many weights are left out. Raises AdapterError for a pattern that cannot be used."""
    if not is_for_whole(model, saved.tensors):
        return saved
    check_patterns(saved.config, model)
    kept = text_tensors(saved.tensors)
    if left_out := len(saved.tensors) - len(kept):
        print(
            f"{left_out} of {len(saved.tensors)} weights of the adapter are not for the text part of its multimodal "
            "model and are left out",
            file=sys.stderr,
        )
    use_text_names(saved.config, model)
    return replace(saved, tensors=kept)


def is_for_whole(model: PreTrainedModel, tensors: dict[str, Tensor]) -> bool:
    """Whether the adapter's weights are named as in a multimodal model that `model` is the text part of."""
    if any(_PART.match(name) for name, _ in model.named_modules()):
        return False
    return any(_PART.match(name.removeprefix(_ROOT)) for name in tensors if name.startswith(_ROOT))


def text_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the text part and those that belong to no module, under the names that they have in the text part."""
    return {_text_name(name): value for name, value in tensors.items() if _is_text(name)}


def _is_text(name: str) -> bool:
    inside = name.removeprefix(_ROOT)
    return inside == name or _PART.match(inside) is not None or inside.startswith("lm_head.")


def _text_name(name: str) -> str:
    if not name.startswith(_ROOT):
        return name
    inside, found = _PART.subn("model.", name.removeprefix(_ROOT))
    return _ROOT + (inside.removeprefix("model.") if found and inside.startswith("model.lm_head.") else inside)


def use_text_names(config: PeftConfig, model: PreTrainedModel) -> None:
    """Change what `config` says about modules of the whole model into what it says about those of its text part."""
    options: Any = config
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    places = {name: [name.replace("model.", start, 1) for start in _WHOLE] for name in names}

    def chosen(names: Iterable[str], matches: Callable[[str], Any]) -> list[str]:
        """The names in the text part of the modules that `matches` in any form of the whole model."""
        return [name for name in names if any(matches(place) for place in places[name])]

    targets = getattr(options, "target_modules", None)
    if targets is not None and targets != "all-linear":
        found = chosen(places, partial(check_target_module_exists, config))
        for field in ("rank_pattern", "alpha_pattern"):
            pattern: dict[str, Any] = getattr(options, field, None) or {}
            values = {key: chosen(found, partial(_ends_with, key)) for key in reversed(pattern)}  # the first one counts
            if pattern:
                setattr(options, field, {re.escape(name): pattern[key] for key in values for name in values[key]})
        inner = getattr(options, "feedforward_modules", None)
        if isinstance(inner, str):
            options.feedforward_modules = set(chosen(found, partial(re.fullmatch, inner)))
        elif inner is not None:
            options.feedforward_modules = {_tail(name) for name in inner}
        options.target_modules = set(found)
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if getattr(options, field, None) is not None:
                setattr(options, field, None)
    for field in ("modules_to_save", "target_parameters"):
        if ends := getattr(options, field, None):
            setattr(options, field, chosen(places, partial(_ends_with_any, tuple(ends))) or None)
    if isinstance(tokens := getattr(options, "trainable_token_indices", None), dict):
        options.trainable_token_indices = {_tail(name): indices for name, indices in tokens.items()}


def _ends_with(pattern: str, name: str) -> bool:
    """As PEFT matches the keys of its patterns."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _ends_with_any(ends: tuple[str, ...], name: str) -> bool:
    return name.endswith(ends)


def _tail(name: str) -> str:
    return re.split(r"(?:^|\.)(?:language_model|text_model)\.", name)[-1]
