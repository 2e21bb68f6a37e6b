"""Added tokens: an adapter that was trained with a larger vocabulary brings the new rows of the embeddings and of the
lm_head in its file.

The rows of added tokens that the base model lacks belong to the backbone, for both streams; every other row of the
backbone stays as it is. Trained embeddings of tokens that the base model has are the adapter stream's alone, and the
lm_head, which both streams share, may differ from the base model's in the rows of added tokens only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import AdapterError
from .saved import SavedAdapter
from .stored_rows import StoredRows, stored_rows, without_rows

Source = Tensor | dict[int, Tensor]
"""Rows by token id."""


@dataclass(frozen=True)
class AddedRows:
    """taken: how many tokens' rows came from the adapter's file. averaged: how many are in no file, and are the mean of
    the base model's. total: how many the model has now."""

    taken: int
    averaged: int
    total: int


def fit_vocabulary(
    model: PreTrainedModel, saved: SavedAdapter, tokenizer: PreTrainedTokenizerBase | None = None, own: bool = False
) -> tuple[SavedAdapter, AddedRows]:
    """Give `model` the rows of added tokens, and return the adapter without what is now the backbone's.

    tokenizer: the texts'; without one nothing may be added. own: it came with the adapter, and the model grows to its
    size, as in PEFT's AutoPeftModel. Rows count as equal if they are after rounding to bfloat16 or float16, in which an
    adapter may have been trained. Raises AdapterError.
    """
    inputs, head = stored_rows(saved, model)
    tied = any(part.own is inputs.own for part in head)
    before = len(inputs.own)
    after = _wanted_rows(saved, inputs, head, tokenizer, own)
    both = min(before, after)
    changed = {index for part in (inputs, *head) for index in _differing(part.frozen, part.own, both)}
    if strange := sorted(changed - _added_tokens(tokenizer, both)):
        raise AdapterError(
            f"{saved.folder} stores embeddings or an lm_head unlike the base model's for tokens that were not added "
            f"({len(strange)}, such as {strange[0]}){saved.hint()}"
        )
    new = changed | set(range(before, after))
    _check_head(saved, head, tied, new, both)
    if after != before:
        model.resize_token_embeddings(after, mean_resizing=False)
        model.requires_grad_(False)
    averaged: set[int] = set()
    for part, parameter in zip((inputs, *head), _parameters(model), strict=True):
        sources: list[Source | None]
        if tied and parameter.dim() > 1:
            weight = next(other for other in head if other.own is inputs.own)
            sources = [weight.trained, weight.tokens or inputs.tokens, weight.frozen, inputs.frozen]
        elif part is inputs:
            sources = [part.frozen, part.tokens, part.trained]
        else:
            sources = [part.trained, part.tokens, part.frozen]
        averaged |= _write(parameter, new, before, [source for source in sources if source is not None])
    name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    rest = without_rows(saved, inputs, head, name)
    return rest, AddedRows(len(new) - len(averaged), len(averaged), after)


def _parameters(model: PreTrainedModel) -> list[Tensor]:
    """Those with a row for each token: the embeddings, and the lm_head's."""
    return [model.get_input_embeddings().weight, *model.get_output_embeddings().parameters(recurse=False)]


def _wanted_rows(
    saved: SavedAdapter,
    inputs: StoredRows,
    head: list[StoredRows],
    tokenizer: PreTrainedTokenizerBase | None,
    own: bool,
) -> int:
    """How many rows the model had when the adapter was trained."""
    before = len(inputs.own)
    stored = sorted({count for part in (inputs, *head) for count in part.rows()})
    if len(stored) > 1:
        raise AdapterError(f"{saved.folder} stores embeddings of different sizes: {', '.join(map(str, stored))} rows")
    if not stored:
        return max(before, len(tokenizer)) if own and tokenizer is not None else before
    if stored[0] != before and (tokenizer is None or stored[0] < min(before, len(tokenizer))):
        raise AdapterError(
            f"{saved.folder} stores embeddings of {stored[0]} rows, and the base model has {before}{saved.hint()}"
        )
    return stored[0]


def _check_head(saved: SavedAdapter, head: list[StoredRows], tied: bool, new: set[int], both: int) -> None:
    """Raise AdapterError if a row of the lm_head was trained that the base model has."""
    for part in head:
        trained = _differing(part.trained, part.own, both) - new
        if not tied:  # tied ones are those of the embeddings, which only the adapter stream has
            listed = {index: row for index, row in part.tokens.items() if index < both and index not in new}
            trained |= {index for index, row in listed.items() if not bool(_same(row[None], part.own[index][None]))}
        if trained:
            raise AdapterError(
                f"the adapter in {saved.folder} trains the lm_head for tokens that the base model has "
                f"({len(trained)}, such as {min(trained)}); IMSM keeps it frozen, for both streams: train again with "
                "modules_to_save of the embeddings alone, or with trainable_token_indices of the added tokens"
            )


def _differing(stored: Tensor | None, own: Tensor, rows: int) -> set[int]:
    """Which of the first `rows` rows differ."""
    if stored is None:
        return set()
    return set((~_same(stored[:rows], own[:rows])).nonzero().flatten().tolist())


def _same(stored: Tensor, own: Tensor) -> Tensor:
    """(rows,) bool: equal in the precision of one of the types that models are trained in."""
    stored, own = (tensor.float().reshape(len(tensor), -1) for tensor in (stored, own))
    equal = (stored == own).all(-1)
    for dtype in (torch.bfloat16, torch.float16):
        if bool(equal.all()):
            break
        equal |= (stored == own.to(dtype).float()).all(-1)
    return equal


def _added_tokens(tokenizer: PreTrainedTokenizerBase | None, rows: int) -> set[int]:
    """The tokens below `rows` that are no part of a tokenizer's model: added ones, and rows without a token."""
    if tokenizer is None:
        return set()
    return set(tokenizer.added_tokens_decoder) | set(range(len(tokenizer), rows))


@torch.no_grad()
def _write(parameter: Tensor, rows: Iterable[int], before: int, sources: list[Source]) -> set[int]:
    """Fill `rows` from the first source that has them, or with the mean of the first `before` if they are new; returns
    those."""
    mean, averaged = parameter[:before].mean(0), set()
    for index in rows:
        found = next((source[index] for source in sources if not isinstance(source, dict) or index in source), None)
        if found is not None:
            parameter[index] = found
        elif index >= before:
            parameter[index] = mean
            averaged.add(index)
    return averaged
