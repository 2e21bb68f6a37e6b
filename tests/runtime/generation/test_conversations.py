"""A conversation that goes on in a state: what the chat template writes between turns, and nothing again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import Model, PromptError, generate, load, stream_generate
from runtime.generation.text import TextCodec
from runtime.inspect import format_summary, summarize
from tests.chat_templates import TEMPLATES, make_chat_tokenizer
from tests.exported import Exported, copied, edit_manifest, export_tiny

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
QUESTION, ANSWER, NEXT = "What is 1 + 1?", "It is 2.\n\nReally.", "And 2 + 2?"
BEFORE_A_REPLY = {"Mistral": " ", "Llama 2": " "}  # that the model writes itself
AFTER_A_REPLY = {"Llama 2": " "}


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents, strict=False)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_reply_and_continuation_are_the_whole_conversation(name: str, tmp_path: Path) -> None:
    make_chat_tokenizer(tmp_path, name)
    codec = TextCodec(tmp_path, SPECIAL)
    reply = codec.tokenizer.encode(BEFORE_A_REPLY.get(name, "") + ANSWER, add_special_tokens=False).ids
    first, going_on = codec.encode_prompt(QUESTION), codec.encode_continuation(turns(NEXT))
    assert first + reply + going_on == codec.encode_chat(turns(QUESTION, ANSWER, NEXT))
    assert first + reply + going_on + reply + going_on == codec.encode_chat(turns(QUESTION, ANSWER, NEXT, ANSWER, NEXT))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("stories_folder", "plain words"),
        ("stories_folder", "Zephyr"),
        ("stories_folder", "Llama 2"),
        ("smollm2_folder", "ChatML"),
        ("smollm2_folder", "plain words"),
        ("gemma3_folder", "Gemma"),
        ("gemma3_folder", "plain words"),
    ],
)
def test_the_same_with_tokenizers_of_real_models(
    model: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(model)
    (tmp_path / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    codec = TextCodec(tmp_path, {"bos_token": "<bos>", "eos_token": "<eos>"} if "gemma" in model else SPECIAL)
    first, going_on = codec.encode_prompt(QUESTION), codec.encode_continuation(turns(NEXT))
    whole = codec.encode_chat(turns(QUESTION, ANSWER, NEXT))
    if "stories" not in model:  # where words at a beginning get a space, text is other tokens there
        assert whole[: len(first)] == first
    assert whole[len(whole) - len(going_on) :] == going_on
    text = codec.tokenizer.decode(whole, skip_special_tokens=False)
    assert text.endswith(codec.tokenizer.decode(going_on, skip_special_tokens=False).lstrip())


def test_smollm2s_own_template_goes_on_in_its_own_tokens(smollm2_folder: Path) -> None:
    codec = TextCodec(smollm2_folder, {})
    reply = codec.tokenizer.encode(ANSWER, add_special_tokens=False).ids
    whole = codec.encode_chat(turns(QUESTION, ANSWER, NEXT))
    assert codec.encode_prompt(QUESTION) + reply + codec.encode_continuation(turns(NEXT)) == whole
    assert codec.tokenizer.decode(codec.encode_continuation(turns(NEXT)), skip_special_tokens=False) == (
        f"<|im_end|>\n<|im_start|>user\n{NEXT}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_hides_replies_cannot_go_on(tmp_path: Path) -> None:
    make_chat_tokenizer(tmp_path, "ChatML")
    for source in ("{{ messages[-1].content }}", "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"):
        (tmp_path / "chat_template.jinja").write_text(source)
        with pytest.raises(PromptError, match="does not show where a reply ends"):
            TextCodec(tmp_path, SPECIAL).encode_continuation(turns(NEXT))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("talk"), chat_template=TEMPLATES["Zephyr"])


@pytest.fixture(scope="module")
def model(exported: Exported) -> Model:
    return load(exported.artifact)


class Says:
    """A sampler that writes these tokens, whatever the logits; it keeps those of the last step."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens: Iterator[int] = iter(tokens)
        self.last: NDArray[np.float32] | None = None

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        self.last = logits
        return np.array([next(self.tokens)])


def encode(model: Model, text: str) -> list[int]:
    ids: list[int] = model.codec.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


END, OTHER_END = 1, 2


@pytest.mark.parametrize("ending", ["stop", "length", "another end token"])
def test_a_continued_conversation_equals_the_whole_one(exported: Exported, tmp_path: Path, ending: str) -> None:
    artifact = copied(exported.artifact, tmp_path / "artifact")
    edit_manifest(artifact, tokens=exported.manifest["tokens"] | {"eos_token_ids": [END, OTHER_END]})
    model = load(artifact)
    answer = encode(model, "two")
    said = {"stop": [*answer, END], "length": answer, "another end token": [*answer, OTHER_END]}[ending]
    state = model.session.new_state(1)
    first = generate(model, "1+1?", sampler=Says(said), state=state, max_new_tokens=len(said))
    assert first.finish_reason == ("length" if ending == "length" else "stop")
    again = Says([5])
    second = generate(model, "2+2?", sampler=again, state=state, max_new_tokens=1)
    whole = model.codec.encode_chat(turns("1+1?", "two", "2+2?"))
    assert int(state.lengths[0]) == len(whole)
    fresh = model.session.prefill(model.session.new_state(1), [whole])
    assert again.last is not None
    np.testing.assert_allclose(again.last, fresh.logits, atol=1e-4, rtol=1e-4)
    assert second.timings.prompt_tokens in (len(model.codec.encode_continuation(turns("2+2?"))) - n for n in (0, 1))


def test_messages_are_a_prompt(model: Model) -> None:
    messages = turns("Hi", "Hello", "How are you?")
    expected = generate(model, model.codec.encode_chat(messages), max_new_tokens=4)
    assert generate(model, messages, max_new_tokens=4).token_ids == expected.token_ids
    with pytest.raises(PromptError, match="messages go through the chat template"):
        generate(model, messages, raw=True)
    prompts: list[Any] = [["Hello"], [{"role": "user"}], [{"content": "x"}], [*messages, 5]]
    for prompt in prompts:
        with pytest.raises(PromptError, match="message"):
            next(stream_generate(model, prompt))


def test_a_failed_continuation_leaves_the_state_as_it_was(exported: Exported, tmp_path: Path) -> None:
    artifact = copied(exported.artifact, tmp_path / "artifact")
    edit_manifest(artifact, tokens=exported.manifest["tokens"] | {"eos_token_ids": [OTHER_END]})
    model = load(artifact)
    state = model.session.new_state(1)
    generate(model, "1+1?", sampler=Says([9, OTHER_END]), state=state)
    before = int(state.lengths[0])
    with pytest.raises(PromptError, match="context"):
        generate(model, "x" * 200, state=state)
    assert state.pending == [OTHER_END]
    assert int(state.lengths[0]) == before


def test_raw_text_goes_on_without_a_beginning(tiny: Exported) -> None:
    model = load(tiny.artifact)
    state = model.session.new_state(1)
    generate(model, "Once", sampler=Says([9, 10]), state=state, max_new_tokens=2)
    generate(model, "upon", sampler=Says([11]), state=state, max_new_tokens=1)
    assert int(state.lengths[0]) == len(model.codec.encode_prompt("Once")) + 2 + len("upon")


def test_generation_follows_what_the_model_was_tuned_on(exported: Exported, tmp_path: Path) -> None:
    artifact = copied(exported.artifact, tmp_path / "artifact")
    edit_manifest(artifact, prompts=exported.manifest["prompts"] | {"raw": True})
    tuned_raw, tuned_chat = load(artifact), load(exported.artifact)

    def count(model: Model, raw: bool | None) -> int:
        return generate(model, "Hello", max_new_tokens=1, raw=raw).timings.prompt_tokens

    assert count(tuned_raw, None) == count(tuned_chat, True) == 6
    assert count(tuned_chat, None) == count(tuned_raw, False) > 6
    assert "prompts      as they are, as the model was tuned" in format_summary(summarize(artifact))
    assert "prompts      chat template" in format_summary(summarize(exported.artifact))


def test_a_reply_that_was_cut_off_after_a_special_token_keeps_it(tiny: Exported) -> None:
    model = load(tiny.artifact)
    ends = model.session.manifest.eos_token_ids
    special = next(token for token in range(20) if model.codec.is_special(token) and token not in ends)
    lengths = {}
    for last in (special, 9):
        state = model.session.new_state(1)
        generate(model, "1+1?", sampler=Says([9, last]), state=state, max_new_tokens=2, raw=True)
        generate(model, "2", sampler=Says([9]), state=state, max_new_tokens=1, raw=True)
        lengths[last] = int(state.lengths[0])
    assert lengths[special] == lengths[9]
