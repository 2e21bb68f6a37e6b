"""`export --adapter`: what others trained, exported without any training here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import cli
from imsm_core.backbone import load_base_model
from runtime import Session
from tests.adapters import make_siamese_with
from tests.exported import PROMPT


@pytest.fixture(scope="module")
def adapter_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DoRA as PEFT itself saves it, beside a LoRA of another name."""
    folder = tmp_path_factory.mktemp("adapter")
    make_siamese_with(base_folder, "dora").peft_model.save_pretrained(str(folder))
    make_siamese_with(base_folder, "lora", seed=3).peft_model.save_pretrained(str(folder / "second"))
    return folder


def export(*arguments: object) -> int:
    return cli.main(["export", *map(str, arguments)])


def runtime_logits(artifact: Path) -> np.ndarray:
    session = Session(artifact)
    logits: np.ndarray = session.prefill(session.new_state(1), [PROMPT]).logits[0]
    return logits


@torch.no_grad()
def peft_logits(base: Path, adapter: Path) -> Tensor:
    """PEFT alone, without this project's code around it."""
    model = PeftModel.from_pretrained(load_base_model(str(base)), str(adapter))
    logits: Tensor = model(torch.tensor([PROMPT])).logits[0, -1]
    return logits


@torch.no_grad()
def base_logits(base: Path) -> Tensor:
    logits: Tensor = load_base_model(str(base))(torch.tensor([PROMPT])).logits[0, -1]
    return logits


def test_an_adapter_alone_gives_the_mean_of_both_models_logits(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = export(
        tmp_path / "a", "--adapter", adapter_folder, "--adapter-name", "default", "--base", base_folder,
        "--gate", "mean_logits",
    )  # fmt: skip
    assert code == 0
    assert json.loads(capsys.readouterr().out)["parity"]["greedy_tokens_equal"] == 64
    expected = 0.5 * (peft_logits(base_folder, adapter_folder) + base_logits(base_folder))
    np.testing.assert_allclose(runtime_logits(tmp_path / "a"), expected.numpy(), atol=1e-4, rtol=1e-4)


def test_another_adapter_of_the_folder_with_the_released_codes_gate(
    base_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    down, up = nn.Linear(4 * 32, 3, bias=False), nn.Linear(3, 32, bias=False)
    with torch.no_grad():
        down.weight.zero_()
        up.weight.fill_(1.0)
    torch.save(nn.Sequential(down, nn.Dropout(0.1)), gate / "2_linear_A.pth")
    torch.save(nn.Sequential(up, nn.Dropout(0.1)), gate / "2_linear_B.pth")
    code = export(
        "--adapter", adapter_folder, "--adapter-name", "second", "--base", base_folder, "--gate-from", gate,
        tmp_path / "a",
    )  # fmt: skip
    assert code == 0
    manifest = json.loads((tmp_path / "a" / "imsm_model.json").read_text())
    assert manifest["gate"] == {"kind": "query_aware", "rank": 3}
    assert manifest["adapter"]["peft_type"] == "LORA"
    expected = 0.5 * (peft_logits(base_folder, adapter_folder / "second") + base_logits(base_folder))
    np.testing.assert_allclose(runtime_logits(tmp_path / "a"), expected.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ARTIFACT"], "give a checkpoint folder and ARTIFACT, or --adapter, --base and ARTIFACT"),
        (["CKPT", "ARTIFACT", "--adapter", "DIR"], "--adapter is DIR; give it or the checkpoint CKPT, not both"),
        (["ARTIFACT", "--adapter", "DIR"], "--adapter is DIR; it needs --base"),
        (["CKPT", "ARTIFACT", "--gate", "token"], "--gate is token; it needs --adapter"),
        (["CKPT", "--adapter-name", "x", "ARTIFACT"], "--adapter-name is x; it needs --adapter"),
    ],
)
def test_a_wrong_combination_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(*arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_an_ambiguous_adapter_and_a_gate_of_the_wrong_kind_are_one_line(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path / "a", "--adapter", adapter_folder, "--base", base_folder) == 2
    assert "choose one of default, second" in capsys.readouterr().err
    assert export(tmp_path / "a", "--adapter", adapter_folder / "second", "--base", base_folder, "--gate", "token") == 2
    assert "the trained weights of the token gate" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
