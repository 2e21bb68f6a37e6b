"""What a caller gives as a prompt, as token ids after what a state holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import instance
from ..engine.state import DecodeState
from ..errors import PromptError
from .chat_template import Message
from .settings import GenerationSettings

if TYPE_CHECKING:
    from .generation import Model


class Prompt(NamedTuple):
    """replaces_pending: whether the state's pending token is not to be read, because `ids` say how the turn ends."""

    ids: list[int]
    replaces_pending: bool = False


def encoded(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    settings: GenerationSettings,
    state: DecodeState,
) -> Prompt:
    """The prompt's tokens, after what the state holds."""
    instance("state", state, DecodeState)
    codec, raw = model.codec, settings.raw
    goes_on = state.batch == 1 and (state.lengths[0] > 0 or state.pending[0] is not None)
    messages: list[Message]
    if isinstance(prompt, str):
        if codec.is_raw(raw):
            return Prompt(codec.encode_raw(prompt, beginning=not goes_on))
        messages = [{"role": "user", "content": prompt}]
        if not prompt:
            raise PromptError("the prompt is empty")
    elif not are_messages(prompt):
        return Prompt(model.session.token_ids(prompt))  # type: ignore[arg-type]
    elif raw:
        raise PromptError("messages go through the chat template; give text to send it as it is (raw)")
    else:
        messages = list(prompt)  # type: ignore[arg-type]
    if not goes_on:
        return Prompt(codec.encode_chat(messages, settings.control_tokens))
    ids, pending = codec.encode_continuation(messages, settings.control_tokens), state.pending[0]
    ends = pending is not None and pending in model.session.manifest.eos_token_ids
    if pending is not None and pending == ids[0] and (ends or codec.is_special(pending)):
        return Prompt(ids[1:])  # the reply ended as the template ends a turn
    return Prompt(ids, replaces_pending=ends)  # as another end token says, or it was cut off


def are_messages(prompt: Any) -> bool:
    """Whether a prompt that is no text is meant as messages, and not as token ids."""
    return isinstance(prompt, list | tuple) and any(isinstance(item, Mapping | str) for item in prompt)
