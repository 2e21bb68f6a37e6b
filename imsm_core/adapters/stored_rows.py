"""What an adapter's file holds of the model's embeddings and lm_head, and the adapter without it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import AdapterError
from .saved import SavedAdapter

_FROZEN = (".original_module.", ".base_layer.", ".token_adapter.base_layer.", ".")
_DELTAS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")


@dataclass(frozen=True)
class StoredRows:
    """What a file holds of one parameter with a row for each token.

    own: the model's parameter, (rows, ...). frozen: its rows as they were in training. trained: a copy of all of it
    that was trained (modules_to_save). tokens: trained rows by token id. names: what the file calls all of these that
    are the backbone's.
    """

    own: Tensor
    frozen: Tensor | None
    trained: Tensor | None
    tokens: dict[int, Tensor]
    names: tuple[str, ...]

    def rows(self) -> list[int]:
        """How many rows the file's tensors have."""
        return [len(tensor) for tensor in (self.frozen, self.trained) if tensor is not None]


def stored_rows(saved: SavedAdapter, model: PreTrainedModel) -> tuple[StoredRows, list[StoredRows]]:
    """Of the embeddings, and of the lm_head's parameters (weight, perhaps bias). Raises AdapterError for tensors that
    have another number of dimensions or columns than the model's."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    parameters = dict(head.named_parameters(recurse=False)) if head is not None else {}
    return (
        _read(saved, names[embeddings], "weight", embeddings.weight, True),
        [_read(saved, names[head], name, parameter, False) for name, parameter in parameters.items()],
    )


def without_rows(saved: SavedAdapter, inputs: StoredRows, head: list[StoredRows], head_name: str) -> SavedAdapter:
    """The adapter without the backbone's rows and without anything of the lm_head's."""
    names = {name for part in (inputs, *head) for name in part.names}
    config: Any = copy.copy(saved.config)
    if any(part.trained is not None for part in head):
        names |= {f"{saved.prefix}{head_name}.{kind}" for kind in ("weight", "bias")}
        config.modules_to_save = [end for end in config.modules_to_save or [] if not _ends(head_name, end)]
        config.ensure_weight_tying = False
    chosen = getattr(config, "trainable_token_indices", None)
    if isinstance(chosen, dict):
        config.trainable_token_indices = {end: ids for end, ids in chosen.items() if not _ends(head_name, end)} or None
    tensors = {name: tensor for name, tensor in saved.tensors.items() if name not in names}
    return replace(saved, config=config, tensors=tensors)


def _read(saved: SavedAdapter, module: str, kind: str, own: Tensor, inputs: bool) -> StoredRows:
    start = saved.prefix + module
    ends = getattr(saved.config, "modules_to_save", None)
    copied = isinstance(ends, list | tuple | set) and any(_ends(module, end) for end in ends)
    frozen = [start + middle + kind for middle in _FROZEN if not (copied and middle == ".")]
    deltas = [start + end for end in _DELTAS] if kind == "weight" else []
    names = [name for name in (*frozen, f"{start}.modules_to_save.{kind}") if name in saved.tensors]
    if not inputs:
        names += [name for name in deltas if name in saved.tensors]
    whole = [saved.tensors[name] for name in frozen if name in saved.tensors]
    trained = saved.tensors.get(f"{start}.{kind}") if copied else None
    for tensor in (*whole[:1], trained):
        if tensor is not None and (tensor.dim() != own.dim() or tensor.shape[1:] != own.shape[1:]):
            raise AdapterError(
                f"the adapter in {saved.folder} does not fit: it stores {module} as {tuple(tensor.shape)}, the base "
                f"model has {tuple(own.shape)}{saved.hint()}"
            )
        if tensor is not None and not tensor.is_floating_point():
            raise AdapterError(f"{saved.folder} holds integers for {module}, which must be floating-point")
    delta = next((saved.tensors[name] for name in deltas if name in saved.tensors), None)
    tokens = _token_ids(saved.config, module, inputs)
    fits = delta is not None and len(delta) == len(tokens) and delta.shape[1:] == own.shape[1:]  # else PEFT refuses it
    rows = dict(zip(tokens, delta, strict=True)) if fits and delta is not None else {}
    return StoredRows(own, whole[0] if whole else None, trained, rows, tuple(names))


def _token_ids(config: Any, module: str, inputs: bool) -> list[int]:
    """The tokens whose rows of `module` are trained, in the order of the file."""
    chosen = getattr(config, "trainable_token_indices", None)
    if isinstance(chosen, dict):
        found: Any = next((ids for end, ids in chosen.items() if _ends(module, end)), [])
    else:
        found = chosen if inputs and chosen is not None else getattr(config, "token_indices", [])
    return found if isinstance(found, list) and all(type(index) is int for index in found) else []


def _ends(module: str, end: Any) -> bool:
    return isinstance(end, str) and f".{module}".endswith(f".{end}")
