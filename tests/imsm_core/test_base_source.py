"""What a base model's folder may hold: nothing in it runs, and what cannot be loaded is told in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imsm_core.backbone import load_base_model, load_tokenizer
from imsm_core.checkpoint import load_checkpoint
from imsm_core.errors import BaseModelError
from tests.builders import make_base_folder, make_siamese, save_tiny_checkpoint, write_base_folder, write_jsonl

PROJECT = Path(__file__).resolve().parents[2]
CODE = """open({marker!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig):
    model_type = "own"
class M(LlamaForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


@pytest.fixture
def base(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


@pytest.fixture
def marker(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that own.py in the base model's folder writes when it runs. Whoever is asked answers yes."""
    path = base.parent / "RAN"
    (base / "own.py").write_text(CODE.format(marker=str(path)), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    return path


def one_line(base: Path | str, load: Any = load_base_model) -> str:
    with pytest.raises(BaseModelError) as caught:
        load(str(base))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_own_model(base: Path) -> None:
    edit(base / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})


def with_own_tokenizer(base: Path) -> None:
    edit(base / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["own.T", "own.T"]})


def test_code_of_the_folder_does_not_run_for_the_model(base: Path, marker: Path) -> None:
    with_own_model(base)
    assert "needs its own Python code, which this program does not run; give a version" in one_line(base)
    assert not marker.exists()


def test_code_of_the_folder_does_not_run_for_the_tokenizer(base: Path, marker: Path) -> None:
    with_own_tokenizer(base)
    assert "needs its own Python code" in one_line(base, load_tokenizer)
    assert not marker.exists()


def test_architecture_that_transformers_knows_is_read_without_the_code_beside_it(base: Path, marker: Path) -> None:
    edit(base / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (base / "custom_generate").mkdir()
    shutil.copy(base / "own.py", base / "custom_generate" / "generate.py")
    assert type(load_base_model(str(base))).__module__.startswith("transformers.")
    assert not marker.exists()


@pytest.mark.parametrize("own", [with_own_model, with_own_tokenizer])
def test_commands_do_not_ask_whether_to_run_it(base: Path, marker: Path, tmp_path: Path, own: Any) -> None:
    adapter = tmp_path / "checkpoint" / "adapter"
    save_tiny_checkpoint(make_siamese(base), base, adapter.parent)
    own(base)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "b"}])
    train = ["train", "--model", base, "--data", data, "--steps", "1", "--out", tmp_path / "out"]
    for command in (train, ["export", "--adapter", adapter, "--base", base, tmp_path / "artifact"]):
        done = subprocess.run(
            [sys.executable, "cli.py", *map(str, command)],
            cwd=PROJECT,
            input="y\ny\ny\n",
            text=True,
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 2
        assert "[y/N]" not in done.stdout
        assert "its own Python code" in done.stderr.splitlines()[-1]
        assert not marker.exists()


def test_implementations_that_a_config_names_are_not_fetched(tmp_path: Path) -> None:
    """transformers takes ORG/REPO from the hub and runs it."""
    from transformers import MixtralConfig

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    config: Any = MixtralConfig
    config = config(vocab_size=259, hidden_size=32, intermediate_size=60, num_hidden_layers=1, **heads)
    base = write_base_folder(tmp_path / "base", config)
    edit(base / "config.json", attn_implementation="someone/attention", experts_implementation="someone/experts")
    edit(base / "config.json", _attn_implementation="someone/attention", fusion_config={"patch_embeddings": True})
    found = load_base_model(str(base)).config
    assert found._attn_implementation in ("sdpa", "eager")
    assert "/" not in found._experts_implementation


def test_adapter_beside_the_model_is_refused_and_not_put_on(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "has an adapter in its folder, which would change it" in one_line(base)
    (base / "config.json").unlink()
    assert "has no config.json: it is a PEFT adapter; give the model that it was trained on" in one_line(base)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json; give a folder in Hugging Face's form"),
        (b"[1]", "it is not a JSON object"),
        (b"{", "is damaged: Expecting property name"),
        (b"\xff\xfe{", "is damaged: 'utf-8' codec"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b"{}", "is damaged: it has no model_type"),
        (b'{"model_type": "bert-like-9"}', "architecture 'bert-like-9', which transformers"),
        (b'{"model_type": "vit"}', "is a 'vit' model, and transformers has no causal language model"),
    ],
)
def test_config_that_cannot_be_used_is_named(base: Path, content: bytes | None, message: str) -> None:
    (base / "config.json").unlink()
    if content is not None:
        (base / "config.json").write_bytes(content)
    assert message in one_line(base)


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": 10**9}, {"vocab_size": 10**10}, {"num_hidden_layers": 10**7}, {"intermediate_size": 10**8}],
)
def test_config_of_absurd_size_is_refused_before_anything_is_allocated(base: Path, fields: dict[str, int]) -> None:
    edit(base / "config.json", **fields)
    assert "does not fit its weights" in one_line(base)


def test_weight_of_another_shape_is_named_with_both(base: Path) -> None:
    edit(base / "config.json", intermediate_size=62)
    assert "mlp.down_proj.weight is (32, 60) in the files, (32, 62) by the config" in one_line(base)


def test_weights_that_the_model_does_not_use_are_refused(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    message = one_line(base)
    assert (
        "has 2 weights that a 'llama' model by its config.json does not use, such as model.layers.0.self_attn"
        in message
    )
    assert "save it without them" in message
    edit(base / "config.json", attention_bias=True)
    assert "lacks 6 weights" in one_line(base)  # biases of the other three projections


def test_what_is_known_to_change_nothing_is_not_refused(base: Path, gpt2_folder: Path, tmp_path: Path) -> None:
    """Masks and caches' scales, inverse frequencies, and layers that predict further tokens."""
    weights = load_file(base / "model.safetensors")
    weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "mtp.layers.0.fc.weight": torch.ones(4)}
    weights |= {"model.layers.1.self_attn.k_scale": torch.ones(1), "model.layers.2.eh_proj.weight": torch.ones(4)}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert "has 1 weights" in one_line(base)
    edit(base / "config.json", num_nextn_predict_layers=1)
    load_base_model(str(base))
    gpt2 = Path(shutil.copytree(gpt2_folder, tmp_path / "gpt2"))
    weights = load_file(gpt2 / "model.safetensors") | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    save_file(weights, gpt2 / "model.safetensors", metadata={"format": "pt"})
    load_base_model(str(gpt2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_named(base: Path, value: float) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert "holds values that are not finite, in model.layers.1.mlp.up_proj.weight" in one_line(base)


def test_shards_that_are_missing_or_damaged_are_named(base: Path) -> None:
    load_base_model(str(base)).save_pretrained(str(base), max_shard_size="20KB")
    index, shards = base / "model.safetensors.index.json", sorted(base.glob("model-*.safetensors"))
    (base / "model.safetensors").unlink(missing_ok=True)
    load_base_model(str(base))
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    assert f"{shards[1].name} is damaged or cut short" in one_line(base)
    shards[1].unlink()
    assert f"is not complete: it lacks {shards[1].name}, which its index names" in one_line(base)
    index.write_text("[]", encoding="utf-8")
    assert "model.safetensors.index.json is damaged" in one_line(base)


def test_pickled_weights_come_with_the_way_to_convert_them(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    message = one_line(base)
    assert "has no *.safetensors; its weights are pickled, and pickles are not read: convert them" in message
    assert "save_pretrained(NEW)" in message


def test_folder_without_a_tokenizer_says_what_to_copy(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "tokenizer.json").unlink()
    assert "has no tokenizer; copy tokenizer.json and tokenizer_config.json into it" in one_line(base, load_tokenizer)
    monkeypatch.setattr("imsm_core.base_source.find_spec", lambda name: None)
    for content, package in ((b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\n", "tiktoken")):
        (base / "tokenizer.model").write_bytes(content)
        message = one_line(base, load_tokenizer)
        assert f"needs {package}, which is not installed; run pip install {package}, or put" in message


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"{}", b'{"model": 3}'])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_is_no_other_error(base: Path, file: str, content: bytes) -> None:
    (base / file).write_bytes(content)
    with contextlib.suppress(BaseModelError):
        load_tokenizer(str(base))


@pytest.mark.parametrize("ends", ["</s>", 2.5, [2, None], {"a": 1}, True])
def test_end_tokens_that_are_none_are_named(base: Path, ends: Any) -> None:
    edit(base / "generation_config.json", eos_token_id=ends)
    assert "is damaged" in one_line(base)


def test_setting_of_the_tokenizer_that_has_the_wrong_type_is_told(base: Path) -> None:
    edit(base / "tokenizer_config.json", model_max_length="long")
    assert "cannot load the tokenizer of" in one_line(base, load_tokenizer)


def test_base_model_that_has_moved_is_asked_for(tmp_path: Path) -> None:
    base = make_base_folder(tmp_path / "before")
    save_tiny_checkpoint(make_siamese(base), base, tmp_path / "checkpoint")
    base.rename(tmp_path / "after")
    with pytest.raises(BaseModelError) as caught:
        load_checkpoint(tmp_path / "checkpoint")
    assert caught.value.told(lambda name: f"--{name}").endswith("; --base says where it is now")
    load_checkpoint(tmp_path / "checkpoint", str(tmp_path / "after"))


def test_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import imsm_core.base_source as source

    asked: list[str] = []

    class Nobody:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("no network")

    monkeypatch.setattr(source, "get_session", Nobody)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    source._hub_answers.cache_clear()
    try:
        for load in (load_base_model, load_tokenizer):
            message = one_line("nobody/no-such-model", load)
            assert "there is no folder of that name here, https://huggingface.co cannot be reached" in message
    finally:
        source._hub_answers.cache_clear()
    assert asked == ["https://huggingface.co"]
