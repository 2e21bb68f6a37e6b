"""Adapters of a larger vocabulary than the base model's: what becomes of the rows of the added tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file

from imsm_core.adapter_tokenizer import find_tokenizer
from imsm_core.backbone import apply_head, fingerprint, load_base_model
from imsm_core.errors import AdapterError
from imsm_core.foreign import assemble
from imsm_core.siamese import SiameseModel
from tests.added_tokens import TEXT, WAYS, logits, resized, save_tokenizer, train
from tests.builders import VOCABULARY, make_base_folder

TIED = ("untied", "tied")
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_base_folder(folder / name, tied=name == "tied") for name in TIED}


def assembled(folder: Path, base: Path) -> tuple[SiameseModel, Any]:
    model, info = assemble(folder, str(base), "mean_logits", tokenizer=find_tokenizer([folder], str(base)))
    return model, info


@torch.no_grad()
def streams(model: SiameseModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of each stream alone over TEXT."""
    states = model.stream_states(TEXT)
    return apply_head(model.causal_lm, states.base), apply_head(model.causal_lm, states.adapter)


@pytest.mark.parametrize("on", ["base", "resized base"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", TIED)
def test_adapter_stream_is_what_peft_loads(
    bases: dict[str, Path], tmp_path: Path, tied: str, way: str, on: str
) -> None:
    base = bases[tied]
    trained = train(base, tmp_path / "adapter", way)
    given = base
    if on == "resized base":  # by the user, whose new rows are other random ones
        given = tmp_path / "resized"
        resized(base, 2).save_pretrained(str(given))
        save_tokenizer(base, given)
    model, info = assembled(tmp_path / "adapter", given)
    alone, adapter = streams(model)
    stored = {name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lm_head" in name}
    if stored or tied == "tied":
        torch.testing.assert_close(adapter, logits(trained), atol=1e-5, rtol=1e-4)
        reference = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
        torch.testing.assert_close(adapter, logits(reference), atol=1e-5, rtol=1e-4)
    else:  # PEFT has not stored the new rows of the lm_head, which its own loading sets to about the mean
        torch.testing.assert_close(adapter[..., :VOCABULARY], logits(trained)[..., :VOCABULARY], atol=1e-5, rtol=1e-4)
    old = TEXT[0, :2]  # before the first added token the base stream is the base model
    with torch.no_grad():
        expected = load_base_model(str(base))(old[None]).logits
    torch.testing.assert_close(alone[:, :2, :VOCABULARY], expected, atol=1e-5, rtol=1e-4)
    assert info.base_fingerprint not in (fingerprint(load_base_model(str(folder))) for folder in (base, given))
    averaged = 2 if on == "base" and not stored and tied == "untied" else 0
    assert info.training["added_rows"] == {"taken": 2 - averaged, "averaged": averaged, "total": VOCABULARY + 2}


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Other tensors in an adapter's file."""
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}, file)


@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("rows", [VOCABULARY + 5, VOCABULARY + 29])
def test_model_of_the_adapter_may_have_rows_without_a_token(
    bases: dict[str, Path], tmp_path: Path, tied: str, rows: int
) -> None:
    """resize_token_embeddings(pad_to_multiple_of=8), which PEFT's AutoPeftModel cannot load."""
    trained = train(bases[tied], tmp_path / "adapter", "frozen", rows)
    model, info = assembled(tmp_path / "adapter", bases[tied])
    torch.testing.assert_close(streams(model)[1], logits(trained), atol=1e-5, rtol=1e-4)
    assert info.training["added_rows"] == {"taken": rows - VOCABULARY, "averaged": 0, "total": rows}


@pytest.mark.parametrize("tied", TIED)
def test_model_of_the_adapter_may_have_fewer_rows_than_the_base_model(
    bases: dict[str, Path], tmp_path: Path, tied: str
) -> None:
    """resize_token_embeddings(len(tokenizer)) shrinks a model whose embeddings are padded."""
    padded = tmp_path / "padded"
    resized(bases[tied], 7, VOCABULARY + 29).save_pretrained(str(padded))
    save_tokenizer(bases[tied], padded)
    trained = train(padded, tmp_path / "adapter", "frozen")
    model, info = assembled(tmp_path / "adapter", padded)
    torch.testing.assert_close(streams(model)[1], logits(trained), atol=1e-5, rtol=1e-4)
    assert info.training["added_rows"]["total"] == VOCABULARY + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_were_rounded_in_training_stay_the_base_models(
    bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    train(bases["untied"], tmp_path / "adapter", "frozen")
    edit(tmp_path / "adapter", lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    model, info = assembled(tmp_path / "adapter", bases["untied"])
    base = load_base_model(str(bases["untied"]))
    for found, expected in zip(
        (model.causal_lm.get_input_embeddings(), model.causal_lm.get_output_embeddings()),
        (base.get_input_embeddings(), base.get_output_embeddings()),
        strict=True,
    ):
        assert torch.equal(found.weight[:VOCABULARY], expected.weight)
    assert info.training["added_rows"]["taken"] == 2


@pytest.mark.parametrize("tied", TIED)
def test_token_that_no_file_has_a_row_for_gets_the_mean(bases: dict[str, Path], tmp_path: Path, tied: str) -> None:
    """A [PAD] that was added to the tokenizer and never to the model; PEFT's loading sets it to about the mean."""
    base = bases[tied]
    train(base, tmp_path / "adapter", "frozen", VOCABULARY, save_embedding_layers=False)
    model, info = assembled(tmp_path / "adapter", base)
    assert info.training["added_rows"] == {"taken": 0, "averaged": 2, "total": VOCABULARY + 2}
    plain = load_base_model(str(base))
    reference = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).get_base_model()
    for part in ("get_input_embeddings", "get_output_embeddings"):
        found, original, loaded = (getattr(source, part)().weight for source in (model.causal_lm, plain, reference))
        torch.testing.assert_close(found[VOCABULARY], original.mean(0))
        torch.testing.assert_close(found, loaded, atol=1e-3, rtol=0.0)


def test_adapter_without_added_tokens_leaves_the_base_model_and_its_fingerprint(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    train(bases["tied"], tmp_path / "adapter", "lora on the embeddings", VOCABULARY)
    for file in tmp_path.glob("adapter/*token*"):
        file.unlink()
    _, info = assembled(tmp_path / "adapter", bases["tied"])
    assert info.base_fingerprint == fingerprint(load_base_model(str(bases["tied"])))
    assert info.training["added_rows"] == {"taken": 0, "averaged": 0, "total": VOCABULARY}


def change_row(part: str, row: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {name: tensor.clone() for name, tensor in tensors.items()}
        for name in found:
            if name.endswith(part):
                found[name][row] += 0.1
        return found

    return change


@pytest.mark.parametrize(
    ("way", "change", "message"),
    [
        (
            "frozen",
            change_row("embed_tokens.weight", 70),
            r"for tokens that were not added \(1, such as 70\)",
        ),
        (
            "frozen",
            change_row("lm_head.weight", 71),
            r"such as 71\); if the adapter was trained on another model, '.*un",
        ),
        (
            "copied embeddings and head",
            change_row("lm_head.weight", 72),
            r"trains the lm_head for tokens .* \(1, such as 72\)",
        ),
        (
            "frozen",
            lambda tensors: {name: t[:4] if "lm_head" in name or "embed" in name else t for name, t in tensors.items()},
            "stores embeddings of 4 rows, and the base model has 259",
        ),
        (
            "frozen",
            lambda tensors: {name: tensor[:260] if "lm_head" in name else tensor for name, tensor in tensors.items()},
            "stores embeddings of different sizes: 260, 261 rows",
        ),
        (
            "frozen",
            lambda tensors: {name: tensor[:, :8] if "embed" in name else tensor for name, tensor in tensors.items()},
            r"it stores model\.embed_tokens as \(261, 8\), the base model has \(259, 32\); .* give that one by base",
        ),
        (
            "frozen",
            lambda tensors: {name: t.to(torch.int32) if "embed" in name else t for name, t in tensors.items()},
            r"holds integers for model\.embed_tokens",
        ),
    ],
)
def test_rows_that_contradict_the_base_model_are_refused(
    bases: dict[str, Path], tmp_path: Path, way: str, change: Any, message: str
) -> None:
    train(bases["untied"], tmp_path / "adapter", way)
    edit(tmp_path / "adapter", change)
    with pytest.raises(AdapterError, match=message) as caught:
        assembled(tmp_path / "adapter", bases["untied"])
    assert "\n" not in str(caught.value)


def test_token_beyond_every_vocabulary_is_refused_before_the_model_grows(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    train(bases["untied"], tmp_path / "adapter", "trained tokens")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace("260", "1000000000"))
    with pytest.raises(AdapterError, match="the token id 1000000000 is not in the model's vocabulary of 261"):
        assembled(tmp_path / "adapter", bases["untied"])
