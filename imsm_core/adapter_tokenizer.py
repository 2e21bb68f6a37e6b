"""The tokenizer and the chat template that an adapter was trained with, where its folder has them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .backbone import load_tokenizer
from .base_source import find_source
from .errors import AdapterError, BaseModelError, first_line
from .template_trial import check_templates

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_ABOUT = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TURNS = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"})


@dataclass(frozen=True)
class FoundTokenizer:
    """folder: the adapter's, if the vocabulary came from there. template: the file or folder that the chat template
    came from, if not from the base model. end_tokens: what ends a turn or a text by that folder, and by its chat
    template. unlike: how many of the base model's tokens have another id in it."""

    tokenizer: PreTrainedTokenizerBase
    folder: Path | None = None
    template: Path | None = None
    end_tokens: tuple[int, ...] = ()
    unlike: int = 0

    def __str__(self) -> str:
        origin = f"of {self.folder}" if self.folder is not None else "of the base model"
        template = "without a chat template" if not self.tokenizer.chat_template else "with its chat template"
        if self.template is not None and self.template != self.folder:
            template = f"with the chat template of {self.template}"
        unlike = f" ({self.unlike} of the base model's have another id)" if self.unlike else ""
        return f"{origin}, {len(self.tokenizer)} tokens{unlike}, {template}"


def find_tokenizer(folders: list[Path], base_model: str, revision: str | None = None) -> FoundTokenizer:
    """The tokenizer of the first of `folders` that has one, as PEFT's AutoPeftModel takes it, or else the base model's;
    with a chat template that a folder has in a file of its own. Raises AdapterError for one that is damaged or
    incomplete, BaseModelError for the base model's."""
    found: FoundTokenizer | None = None
    for folder in folders:
        there = [name for name in VOCABULARIES if (folder / name).is_file()]
        about = [name for name in _ABOUT if (folder / name).is_file()]
        if about and not there:
            raise AdapterError(
                f"{folder} has {about[0]} and no tokenizer.json beside it; add that, or remove {', '.join(about)} to "
                "take the base model's tokenizer"
            )
        if there:
            found = _own(folder, base_model, revision)
            break
        if template := next((folder / name for name in _TEMPLATES if (folder / name).is_file()), None):
            tokenizer = load_tokenizer(base_model, revision)
            tokenizer.chat_template = _read_template(template)
            found = FoundTokenizer(tokenizer, None, template)
            break
    if found is None:
        return FoundTokenizer(load_tokenizer(base_model, revision))
    source = found.folder or found.template
    ends = _end_of_turn(found.tokenizer, source) + _generation_ends(folders)
    return replace(found, end_tokens=tuple(dict.fromkeys(ends)))


def _own(folder: Path, base_model: str, revision: str | None) -> FoundTokenizer:
    try:
        source = find_source(base_model, revision)
        config: Any = AutoConfig.from_pretrained(source.place, **source.arguments())
    except Exception:  # the base model is refused where it is loaded; some have a tokenizer without a config
        config = PreTrainedConfig()
    try:
        # With a config given, transformers does not look for one in the base model that adapter_config.json names.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        usable = tokenizer.is_fast and len(tokenizer) > 0
    except Exception as error:  # transformers and tokenizers raise a dozen types
        raise AdapterError(
            f"cannot load the tokenizer in {folder}: {first_line(error)}; mend its files, or remove them to take the "
            "base model's"
        ) from error
    if not usable:
        raise AdapterError(f"the tokenizer in {folder} has no tokenizer.json form, which the runtime needs")
    if why := check_templates(tokenizer.chat_template):
        raise AdapterError(f"the chat template in {folder} cannot be used: {why}")
    template = folder if tokenizer.chat_template else None
    if template is None and (folder / _TEMPLATES[1]).is_file():
        template = folder / _TEMPLATES[1]
        tokenizer.chat_template = _read_template(template)
    return FoundTokenizer(tokenizer, folder, template, unlike=_unlike(tokenizer, folder, base_model, revision))


def _unlike(tokenizer: PreTrainedTokenizerBase, folder: Path, base_model: str, revision: str | None) -> int:
    """How many of the base model's tokens have another id or none. Raises AdapterError if it is most of them."""
    try:
        vocabulary = load_tokenizer(base_model, revision).get_vocab()
    except BaseModelError:  # an adapter may bring the only tokenizer that there is
        return 0
    own = tokenizer.get_vocab()
    unlike = sum(own.get(token) != index for token, index in vocabulary.items())
    if unlike > len(vocabulary) / 2:
        raise AdapterError(
            f"the tokenizer in {folder} is another model's: {unlike} of the base model's {len(vocabulary)} tokens have "
            "another id in it, or none; remove its files to take the base model's"
        )
    return unlike


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            text = json.loads(text)["chat_template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path} is no chat template: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(text, str) or not text.strip():
        raise AdapterError(f"{path} is no chat template: it holds no text")
    if why := check_templates(text):
        raise AdapterError(f"the chat template in {path} cannot be used: {why}")
    return text


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, source: Path | None) -> list[int]:
    """The special token that the chat template puts after an answer, if there is one. Raises AdapterError for a
    template that is no Jinja."""
    if not tokenizer.chat_template:
        return []
    try:
        text = tokenizer.apply_chat_template(list(_TURNS), tokenize=False)
    except TemplateError as error:
        if type(error).__name__ == "TemplateSyntaxError":
            raise AdapterError(f"the chat template in {source} cannot be used: {first_line(error)}") from error
        return []  # it takes other turns
    except Exception:  # whatever a template can do wrong: it takes other turns too
        return []
    after = str(text).rpartition(_TURNS[1]["content"])[2]
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    first: list[int] = ids[:1]
    return [index for index in first if index in tokenizer.added_tokens_decoder and _is_special(tokenizer, index)]


def _is_special(tokenizer: PreTrainedTokenizerBase, index: int) -> bool:
    return bool(tokenizer.added_tokens_decoder[index].special)


def _generation_ends(folders: list[Path]) -> list[int]:
    """The end tokens of a generation_config.json in the adapter's folder."""
    folder = next((folder for folder in folders if (folder / "generation_config.json").is_file()), None)
    if folder is None:
        return []
    try:
        ends: Any = GenerationConfig.from_pretrained(folder).eos_token_id
    except Exception as error:  # as for a tokenizer
        raise AdapterError(f"{folder / 'generation_config.json'} cannot be read: {first_line(error)}") from error
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(index) is int and index >= 0 for index in ids):
        raise AdapterError(f"{folder / 'generation_config.json'} cannot be used: eos_token_id is {ends!r}")
    return ids
