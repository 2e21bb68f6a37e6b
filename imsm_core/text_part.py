"""The text part of a multimodal base model, as an ordinary causal LM: pictures and sounds are left out.

A multimodal model that reads text alone runs its language model and its lm_head and nothing else. transformers has a
causal LM of the same layers for most of them, and its weights are read under the names that they have there.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .errors import BaseModelError

# Those whose text part gives the same logits as the whole model on text, which tests/imsm_core/test_text_part.py shows.
TAKEN_OUT = frozenset(
    {
        "aria",
        "deepseek_vl",
        "exaone4_5",
        "gemma3",
        "idefics2",
        "idefics3",
        "internvl",
        "lfm2_vl",
        "lighton_ocr",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "mistral3",
        "ovis2",
        "qwen2_5_vl",
        "qwen2_audio",
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
        "video_llava",
        "vipllava",
        "voxtral",
    }
)
# Text models without a causal LM of their own, and the model that equals them where all three positions of a token are
# the same, as in text.
_TWINS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
_ALWAYS = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}  # what the text model does whatever its config says
_HEAD = r"^(?:model\.)?(?:language_model|text_model)\.lm_head\."
_INSIDE = r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?!lm_head\.)"
_NAMES = {_HEAD: "lm_head.", _INSIDE: "model."}
_TEXT = re.compile(rf"{_HEAD}|{_INSIDE}|^lm_head\.|^model\.(?:embed_tokens|layers|norm)\.")


@dataclass(frozen=True)
class TextPart:
    """config: of the causal LM. key_mapping: the weights' names in the files -> in the causal LM, as regular
    expressions; None where transformers knows them."""

    config: PreTrainedConfig
    key_mapping: dict[str, str] | None

    def has(self, name: str) -> bool:
        """Whether a weight in the files is one of the text part."""
        return _TEXT.search(name) is not None


def text_part(name: str, config: PreTrainedConfig) -> TextPart | None:
    """The text part of the base model `name`; None for a model of text alone. Raises BaseModelError for a multimodal
    model whose text part is not taken out."""
    text: Any = getattr(config, "text_config", None)
    if not isinstance(text, PreTrainedConfig):
        return None
    kind = config.model_type
    if kind in TAKEN_OUT:
        text = _twin(text) if text.model_type in _TWINS else text
        if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            text.tie_word_embeddings = config.tie_word_embeddings  # the whole model goes by its own
            return TextPart(text, _NAMES)
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if model.config_class is type(text):
            return TextPart(text, None)
    raise BaseModelError(
        f"the base model {name!r} is multimodal ({kind} with {text.model_type}), and its text part is not taken out; "
        "give a model of text alone"
    )


def _twin(text: PreTrainedConfig) -> PreTrainedConfig:
    kind: Any = CONFIG_MAPPING[_TWINS[text.model_type]]
    known = {field.name for field in dataclasses.fields(kind)} | {"head_dim"}
    values = {name: getattr(text, name) for name in known if hasattr(text, name)} | _ALWAYS.get(text.model_type, {})
    rope = dict(values["rope_parameters"])
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    values["rope_parameters"] = {name: value for name, value in rope.items() if not name.startswith("mrope")}
    twin: PreTrainedConfig = kind(**values)
    return twin
