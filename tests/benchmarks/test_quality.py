"""The benchmark of quality, as far as it goes without other programs' environments."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers.environments import Unavailable
from benchmarks.quality.__main__ import main, parse
from benchmarks.quality.adapter import TARGET
from benchmarks.quality.catalogue import FORMATS
from benchmarks.quality.importance import write_importance
from benchmarks.quality.reference import MEMORIES
from benchmarks.quality.report import NOTHING, page, panels
from benchmarks.quality.texts import QUERY, SHORTEST, examples, load, read_texts
from export.settings import ExportSettings
from imsm_core.backbone import apply_head, load_base_model, load_tokenizer
from imsm_core.checkpoint import load_checkpoint, read_info
from imsm_core.errors import DataError
from tests.builders import write_jsonl

FORMATS_HERE = ("ours-int8", "ours-int4-nearest")


@pytest.fixture(scope="module")
def arguments(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a command that judges two formats of a tiny model, all of it under one folder."""
    folder = tmp_path_factory.mktemp("quality")
    stories = write_jsonl(
        folder / "stories.jsonl", [{"text": f"Story {n}: {'the sea was calm. ' * n}"} for n in range(9)]
    )
    sums = [
        {"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}, of course it is.", "id": n} for n in range(9)
    ]
    (folder / "sums.json").write_text(json.dumps(sums))
    command = ["--model", f"tiny={base_folder}", "--texts", f"stories={stories}", f"sums={folder / 'sums.json'}"]
    command += ["--calibration", str(stories), "--tokens", "60", "--longest", "24", "--threads", "1"]
    return [*command, "--context-length", "64", "--work", str(folder / "work"), "--only", *FORMATS_HERE]


@pytest.fixture(scope="module")
def document(arguments: list[str]) -> dict[str, Any]:
    """What the command's last line says."""
    return last_line(arguments)


def last_line(arguments: list[str]) -> dict[str, Any]:
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        assert main(arguments) == 0
    found: dict[str, Any] = json.loads(written.getvalue().splitlines()[-1])
    return found


def test_rounding_to_fewer_bits_is_further_from_pytorch_in_every_memory(document: dict[str, Any]) -> None:
    formats = document["models"]["tiny"]["formats"]
    for memory in MEMORIES:
        for kind in ("stories", "sums"):
            eight, four = (formats[name]["memories"][memory][kind] for name in FORMATS_HERE)
            # The other memory is TARGET nats away: a small distance shows that the right one was judged.
            assert 0 < eight["mean_kl"] < TARGET / 20
            assert eight["mean_kl"] < four["mean_kl"]
            assert eight["tokens"] == four["tokens"] == document["models"]["tiny"]["tokens"][kind]
    sizes = [formats[name]["bytes"]["base"] / document["models"]["tiny"]["weights"] for name in FORMATS_HERE]
    assert sizes[1] < sizes[0]


def test_the_random_adapter_is_as_far_from_the_base_as_a_tuned_one(
    arguments: list[str], document: dict[str, Any]
) -> None:
    work = Path(arguments[arguments.index("--work") + 1])
    checkpoint = work / "quality" / "tiny" / "checkpoint"
    assert read_info(checkpoint).metrics["kl_from_base"] == pytest.approx(TARGET, rel=0.11)
    model, _ = load_checkpoint(checkpoint)
    ids = torch.tensor([load(work / "quality" / "tiny" / "texts.json")["stories"][0]])
    with torch.no_grad():
        base, adapter = (apply_head(model.causal_lm, state)[0].log_softmax(-1) for state in model.stream_states(ids))
    assert 0.05 < float((base.exp() * (base - adapter)).sum(-1).mean()) < 1
    assert all(bool(parameter.abs().min() > 0) for parameter in model.gate.parameters())


def test_a_second_run_judges_nothing_again_and_the_report_alone_says_the_same(
    arguments: list[str], document: dict[str, Any], tmp_path: Path
) -> None:
    results = Path(arguments[arguments.index("--work") + 1]) / "quality" / "tiny" / "results"
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    assert len(before) == len(FORMATS_HERE) * len(MEMORIES)
    assert last_line(arguments) == last_line([*arguments, "--report"]) == document
    assert {path: path.stat().st_mtime_ns for path in results.iterdir()} == before
    assert not (results.parent / "reference").exists()


def test_other_texts_are_not_mixed_with_results_of_these(arguments: list[str], document: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="was made with tokens 60, not 61: remove it"):
        main(["61" if text == "60" else text for text in arguments])


def test_the_page_has_a_row_for_every_format_and_what_is_missing_is_a_dash(document: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(document))
    four = changed["models"]["tiny"]["formats"]["ours-int4-nearest"]
    four["decode_ms"] = {"base": 1.5}
    changed["models"]["tiny"]["weights"] = 2 * four["bytes"]["base"]  # a tiny model's graph is larger than its weights
    changed["models"]["tiny"]["timing"] = {
        "date": "2026-01-02",
        "machine": {"processor": "a processor"},
        "threads": 2,
        "context": 128,
    }
    changed["models"]["tiny"]["left_out"] = {"genai-default": "it cannot"}
    text = page(changed, "picture.png")
    assert "Not measured: onnxruntime-genai int4, default: it cannot" in text
    assert "(picture.png)" in text
    assert "a processor" in text
    for title in ("Base memory", "Adapter memory", "Both memories"):
        lines = text.split(f"tiny: {title}")[1].split("\n\n")[1].splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert [line.split(" | ")[0] for line in lines[2:]] == ["| ours int8", "| ours int4, nearest"]
        if title == "Base memory":
            assert lines[2].endswith(f"| {NOTHING} |")
            assert lines[3].endswith("| 1.50 |")
    sizes, times = panels(changed)[0]
    assert [point["label"] for point in sizes["points"]] == ["int8", "int4, nearest"]
    assert sizes["points"][1]["x"] == 0.5
    assert [(point["label"], point["x"]) for point in times["points"]] == [("int4, nearest", 1.5)]


def test_importance_is_the_mean_square_of_what_each_projection_reads(base_folder: Path, tmp_path: Path) -> None:
    texts = [[5, 6, 7, 8], [9, 10]]
    write_importance(base_folder, texts, tmp_path / "found.npz")
    found = np.load(tmp_path / "found.npz")
    model: Any = load_base_model(str(base_folder))
    assert len(found.files) == 7 * model.config.num_hidden_layers
    with torch.no_grad():
        embedded = torch.cat([model.get_input_embeddings()(torch.tensor(ids)) for ids in texts])
        normed = model.base_model.layers[0].input_layernorm(embedded)
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(found[f"blk.0.{name}.weight"], normed.square().mean(0), rtol=1e-5)
    assert found["blk.1.ffn_down.weight"].shape == (model.config.intermediate_size,)


def test_texts_are_rows_of_any_fields_cut_to_the_tokens_that_were_asked_for(base_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(base_folder))
    file = write_jsonl(tmp_path / "rows.jsonl", [{"a": "the sea was calm", "b": "", "n": 1, "c": "and cold " * 9}] * 4)
    [texts] = read_texts({"rows": file}, tokenizer, 50, 20).values()
    assert [len(ids) for ids in texts] == [20, 20, max(10, SHORTEST)]
    assert texts[0] == tokenizer("the sea was calm\n" + "and cold " * 9)["input_ids"][:20]
    assert examples(texts)[0].prompt_ids == texts[0][:QUERY]
    with pytest.raises(DataError, match="81 were asked for"):
        read_texts({"rows": file}, tokenizer, 81, 20)


def test_formats_say_what_their_programs_need() -> None:
    for name, format in FORMATS.items():
        assert name.startswith({"ours": "ours-", "llama.cpp": "llama-", "onnxruntime-genai": "genai-"}[format.program])
        if format.program == "ours":
            assert ExportSettings(**{**format.settings, "calibrate": None}).precision in format.label
    assert len({format.label for format in FORMATS.values()}) == len(FORMATS)


def test_a_format_that_cannot_run_leaves_the_others_and_is_named(
    arguments: list[str], document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(environment: str, work: Path) -> Path:
        raise Unavailable(f"no {environment} here")

    monkeypatch.setattr("benchmarks.quality.models.python_of", refuse)
    found = last_line([*arguments, "genai-default", "--memories", "base"])["models"]["tiny"]
    assert found["left_out"] == {"genai-default": "no genai here"}
    assert found["formats"] == document["models"]["tiny"]["formats"]


def test_a_model_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--model", "a=/no/such/folder", "--texts", "b=/dev/null", "--calibration", "c"])
    assert "'a=/no/such/folder' is not a name, = and the path" in capsys.readouterr().err
