"""The tokenizer and the chat template in an adapter's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from imsm_core.adapter_tokenizer import find_tokenizer
from imsm_core.errors import AdapterError, BaseModelError
from tests.added_tokens import NEW, TEMPLATE, save_tokenizer
from tests.builders import CHAT_TEMPLATE, EOS, VOCABULARY


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """An adapter's folder with a tokenizer, whose config names a base model that nothing may look for."""
    adapter = tmp_path / "adapter"
    save_tokenizer(base_folder, adapter)
    fields = {"peft_type": "LORA", "base_model_name_or_path": "nobody/has-it"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    return adapter


def encoded(tokenizer: Any) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_tokenizer_of_the_folder_is_taken_with_its_template(base_folder: Path, folder: Path) -> None:
    found = find_tokenizer([folder], str(base_folder))
    assert encoded(found.tokenizer) == encoded(AutoTokenizer.from_pretrained(folder, config=None))
    assert (found.folder, found.template, len(found.tokenizer)) == (folder, folder, VOCABULARY + 2)
    assert found.end_tokens == (NEW[1],)
    assert str(found) == f"of {folder}, {VOCABULARY + 2} tokens, with its chat template"


def test_folder_without_one_gives_the_base_models(base_folder: Path, chat_folder: Path, tmp_path: Path) -> None:
    found = find_tokenizer([tmp_path], str(base_folder))
    assert (found.folder, found.template, found.end_tokens) == (None, None, ())
    assert str(found) == f"of the base model, {VOCABULARY} tokens, without a chat template"
    assert find_tokenizer([tmp_path], str(chat_folder)).tokenizer.chat_template == CHAT_TEMPLATE


def test_tokenizer_at_the_root_serves_an_adapter_in_a_subfolder(base_folder: Path, folder: Path) -> None:
    (folder / "named").mkdir()
    assert find_tokenizer([folder / "named", folder], str(base_folder)).folder == folder


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_template_alone_is_used_with_the_base_models_tokenizer(base_folder: Path, tmp_path: Path, name: str) -> None:
    content = TEMPLATE if name.endswith("jinja") else json.dumps({"chat_template": TEMPLATE})
    (tmp_path / name).write_text(content)
    found = find_tokenizer([tmp_path], str(base_folder))
    assert (found.folder, found.template, found.tokenizer.chat_template) == (None, tmp_path / name, TEMPLATE)
    assert str(found).endswith(f"with the chat template of {tmp_path / name}")


def test_template_in_a_json_file_goes_with_the_tokenizer_beside_it(base_folder: Path, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert find_tokenizer([folder], str(base_folder)).tokenizer.chat_template == TEMPLATE


def test_end_tokens_come_from_the_generation_config_too(base_folder: Path, folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, NEW[1]]}))
    assert find_tokenizer([folder], str(base_folder)).end_tokens == (NEW[1], EOS)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no assistant') }}", "{% for m in messages %}{{ m['content'] }} {% endfor %}", "hello"],
)
def test_template_that_ends_no_turn_with_a_special_token_adds_none(
    base_folder: Path, folder: Path, template: str
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    assert find_tokenizer([folder], str(base_folder)).end_tokens == ()


def test_adapter_may_bring_the_only_tokenizer(base_folder: Path, folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base_folder / "config.json", bare)
    assert find_tokenizer([folder], str(bare)).folder == folder
    with pytest.raises(BaseModelError):
        find_tokenizer([bare], str(bare))


def rewritten(name: str, **fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | fields))

    return change


def other_ids(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: VOCABULARY - 1 - index for token, index in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "has tokenizer_config.json and no tokenizer.json",
        ),
        (written("tokenizer.json", b'{"version": "1.0", "trunc'), "cannot load the tokenizer in .*; mend its files"),
        (written("tokenizer.json", b""), "cannot load the tokenizer in"),
        (written("tokenizer.json", b"{}"), "cannot load the tokenizer in"),
        (written("tokenizer_config.json", b"[]"), "cannot load the tokenizer in"),
        (written("tokenizer_config.json", b"[" * 100_000), "cannot load the tokenizer in"),
        (
            written("chat_template.jinja", b"{% for %}"),
            "the chat template in .* cannot be used: Expected",
        ),
        (written("chat_template.jinja", b"\xff\xfe"), "cannot load the tokenizer in"),
        (written("special_tokens_map.json", b"[["), "cannot load the tokenizer in"),
        (written("generation_config.json", b"{"), r"generation_config\.json cannot be read"),
        (written("generation_config.json", b'{"eos_token_id": "x"}'), "cannot be used: eos_token_id is 'x'"),
        (rewritten("tokenizer_config.json", eos_token=5), "cannot load the tokenizer in"),
        (
            rewritten("tokenizer_config.json", tokenizer_class="Y", auto_map={"AutoTokenizer": ["x.Y", None]}),
            "cannot load the tokenizer in",
        ),
        (other_ids, "is another model's: .* of the base model's 259 tokens have another id in it"),
    ],
)
def test_damaged_tokenizer_is_one_line_and_never_replaced_by_the_base_models(
    base_folder: Path, folder: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(folder)
    with pytest.raises(AdapterError, match=message) as caught:
        find_tokenizer([folder], str(base_folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b" \n"),
        ("chat_template.json", b"[1]"),
        ("chat_template.json", b'{"chat_template": 5}'),
        ("chat_template.json", b"{"),
    ],
)
def test_damaged_template_alone_is_one_line(base_folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match="is no chat template: ") as caught:
        find_tokenizer([tmp_path], str(base_folder))
    assert "\n" not in str(caught.value)


def test_template_that_is_no_text_is_refused(base_folder: Path, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    rewritten("tokenizer_config.json", chat_template=5)(folder)
    with pytest.raises(AdapterError, match="cannot be used: it is no text but of type int"):
        find_tokenizer([folder], str(base_folder))


def test_a_base_model_on_a_hub_that_does_not_answer_is_not_asked(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def from_pretrained(name: str, **arguments: Any) -> Any:
        asked.append(arguments | {"name": name})
        raise OSError("not there")

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    assert find_tokenizer([base_folder], "org/name").folder == base_folder
    assert asked
    assert all(one.get("local_files_only") and one["trust_remote_code"] is False for one in asked)
