"""The facts about an architecture that every config spells in its own way, through optimum's normalized configs."""

from __future__ import annotations

from dataclasses import dataclass

from optimum.utils import NormalizedConfigManager, NormalizedTextConfig
from transformers import PreTrainedModel

from imsm_core.backbone import hidden_size
from imsm_core.errors import SettingsError, setting

from .errors import UnsupportedError

_LONGEST = ("max_position_embeddings", "max_seq_len", "seq_length")  # config fields, which optimum does not normalize
SHORTEST = 2  # a prompt's token and the one that follows


@dataclass(frozen=True)
class ModelFacts:
    """context_length: the longest text that the positions allow, in tokens."""

    architecture: str
    layers: int
    hidden_size: int
    vocab_size: int
    context_length: int


def model_facts(model: PreTrainedModel, context_length: int | None = None, virtual_tokens: int = 0) -> ModelFacts:
    """context_length: a shorter context than the model's, which makes the rotary tables smaller. virtual_tokens: how
    many stand before the text and take positions from it.

    Raises UnsupportedError if the config lacks one of the facts, SettingsError if the model does not allow a context of
    that length.
    """
    config = model.config
    kind = config.model_type
    try:
        normalized_class = NormalizedConfigManager.get_normalized_config_class(kind)
    except KeyError:
        normalized_class = NormalizedTextConfig
    normalized = normalized_class(config)
    try:
        layers, vocabulary = int(normalized.num_layers), int(normalized.vocab_size)
    except AttributeError as error:
        raise UnsupportedError(f"the config of architecture {kind!r} does not say how many layers it has") from error
    longest = next((int(getattr(config, name)) for name in _LONGEST if getattr(config, name, None)), context_length)
    if longest is None:
        raise UnsupportedError(
            f"the config of {kind!r} states no maximum length; give one with {setting('context_length')}"
        )
    if getattr(config, "max_position_embeddings", None):
        longest -= virtual_tokens
    wanted = longest if context_length is None else context_length
    if not SHORTEST <= wanted <= longest:
        beside = f" beside {virtual_tokens} virtual tokens" if virtual_tokens else ""
        if context_length is None:
            raise UnsupportedError(
                f"the positions of {kind!r} allow a text of {longest} tokens{beside}, which is too short"
            )
        raise SettingsError("context_length", context_length, f"the model allows {SHORTEST} .. {longest}{beside}")
    return ModelFacts(kind, layers, hidden_size(model), vocabulary, int(wanted))
