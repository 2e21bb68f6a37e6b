"""Families whose modelling code does not go through transformers' attention interface: one small file each.

A family is a context manager that, for the probe and for the trace, swaps what keeps a model away from the interface:
its attention's forward for one that ends in the interface's function. Everything else stays general.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Family = Callable[[PreTrainedModel], AbstractContextManager[None]]

FAMILIES: dict[str, Family] = {}


def register(model_type: str) -> Callable[[Family], Family]:
    """Register a family under its config's `model_type`."""

    def add(family: Family) -> Family:
        FAMILIES[model_type] = family
        return family

    return add


def through_interface(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside the block every attention layer of the model goes through the interface, if its family is known."""
    from . import bloom, codegen, falcon, gpt_neo, gptj, mpt, xglm  # noqa: F401  each registers itself

    family = FAMILIES.get(model.config.model_type)
    return nullcontext() if family is None else family(model)


def attention_function(model: PreTrainedModel) -> Callable[..., Any]:
    """The interface's function that the model's config names at the moment."""
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    return function
