"""The GPU's benchmark on the CPU: parts that travel, stages that are cut, resumed and judged, and the report."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cuda import __main__ as driver
from benchmarks.cuda import deepen, models, parts, report, speed, stage_parity
from benchmarks.cuda.document import COMPLETE, CUT, Document, Plan, read_json
from export.settings import ExportSettings
from imsm_core.reference import reference_step
from runtime import Session
from tests.exported import Exported


@pytest.fixture
def travelling(tmp_path: Path) -> Path:
    """Parts of a large file and of a small one."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "large.whl").write_bytes(bytes(range(256)) * 10)
    (source / "small.whl").write_bytes(b"small")
    made = parts.split(source, tmp_path / "parts", largest=1000)
    assert [path.name for path in made] == ["large.whl.000", "large.whl.001", "large.whl.002", "small.whl.000"]
    return tmp_path / "parts"


def test_parts_become_the_files_that_were_split(travelling: Path, tmp_path: Path) -> None:
    joined = parts.join(travelling, tmp_path / "joined")
    assert [path.name for path in joined] == ["large.whl", "small.whl"]
    assert joined[0].read_bytes() == bytes(range(256)) * 10
    for part in travelling.glob("*.whl.*"):
        part.unlink()
    assert parts.join(travelling, tmp_path / "joined") == joined  # what is right already needs no parts


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "parts.json").write_text("{"), r"parts\.json is damaged"),
        (lambda folder: (folder / "parts.json").write_text("[{}]"), r"parts\.json is damaged"),
        (lambda folder: (folder / "parts.json").write_text("{}"), r"parts\.json lists nothing"),
        (lambda folder: (folder / "large.whl.001").unlink(), r"large\.whl\.001 is missing"),
        (lambda folder: (folder / "large.whl.001").write_bytes(b"?" * 1000), r"large\.whl\.001 is damaged"),
        (lambda folder: (folder / "parts.json").unlink(), r"parts\.json is missing"),
    ],
)
def test_a_damaged_part_is_named_and_leaves_nothing(
    travelling: Path, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(travelling)
    assert parts.main(["join", str(travelling), str(tmp_path / "joined")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("joined/*"))


def test_a_list_that_contradicts_its_parts_is_noticed(travelling: Path, tmp_path: Path) -> None:
    listed = json.loads((travelling / "parts.json").read_text())
    listed[0]["parts"].reverse()
    (travelling / "parts.json").write_text(json.dumps(listed))
    with pytest.raises(parts.PartsError, match=r"large\.whl is not the file"):
        parts.join(travelling, tmp_path / "joined")


def options(out: Path, *more: str) -> list[str]:
    return [str(out), "--provider", "cpu", "--size", "small", "--parts", str(out / "none"), *more]


def test_stages_are_run_skipped_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert driver.main(options(tmp_path, "--stages", "versions")) == 0
    found = read_json(tmp_path / "versions.json")
    assert found is not None
    assert found["state"] == COMPLETE
    assert found["doctor"]["providers"]["cpu"] == "usable"
    # A complete stage is not run again, and one that is cut keeps what it had.
    monkeypatch.setattr(driver, "GRACE", 0.2)
    monkeypatch.setattr(driver, "SHARES", {"versions": 1.0, "parity": 0.01})
    assert driver.main(options(tmp_path, "--stages", "versions", "parity", "--seconds", "60")) == 1
    assert "versions: " not in capsys.readouterr().out.split("\n", 2)[2]
    cut = read_json(tmp_path / "parity.json")
    assert cut is not None
    assert cut["state"] == CUT
    assert "cut after" in cut["error"]
    run = read_json(tmp_path / "run.json")
    assert run is not None
    assert run["stages"]["versions"]["skipped"]


def test_a_stage_that_fails_says_why_and_what_it_had_stays(tmp_path: Path) -> None:
    document = Document(Plan(tmp_path, tmp_path), "speed")
    document.add("groups", {"title": "fp16"})
    document.finish("RuntimeError: no device")
    found = read_json(tmp_path / "speed.json")
    assert found is not None
    assert (found["state"], found["error"]) == ("failed", "RuntimeError: no device")
    assert found["groups"] == [{"title": "fp16"}]


def test_parity_accepts_what_agrees_and_refuses_what_does_not(tiny: Exported, tmp_path: Path) -> None:
    session = Session(tiny.artifact, threads=1)
    case = stage_parity.Case(models.Recipe({}, ExportSettings()), ())
    plan = Plan(tmp_path, tmp_path, "cpu")
    halved = copy.deepcopy(tiny.model)
    halved.causal_lm.half()
    for name in ("ragged", "memories", "continued", "rows"):
        rows = stage_parity.CHECKS[name](session, 4)
        judged = stage_parity._judged(rows, tiny.model, halved, case, plan)
        assert judged["ok"], name
        assert judged["max_abs"] < 1e-3
        assert judged["pytorch_half"]["max_abs"] > judged["max_abs"]
        for row in rows:  # as if the base memory had answered
            row.bias = 1e4 if row.bias <= 0 else -1e4
        wrong = stage_parity._judged(rows, tiny.model, halved, case, plan)
        assert not wrong["ok"], name
        assert stage_parity._judged(rows, tiny.model, halved, case, replace(plan, rehearse=True))["ok"] is None


def test_a_parity_case_is_exported_run_and_judged(tmp_path: Path) -> None:
    plan = Plan(tmp_path, tmp_path / "work", "cpu", "small", only=("gate mean_logits", "nothing"))
    document = Document(plan, "parity")
    stage_parity.run(plan, document)
    assert document.data["summary"] == {"checks": 3, "judged": 3, "ok": 3}
    assert [result["check"] for result in document.data["results"]] == ["memories", "continued", "likeliest"]


def test_a_repeated_layer_computes_what_a_deep_model_computes(tmp_path: Path) -> None:
    recipe = models.recipes(models.SIZES["small"])["large-fp16"]
    assert recipe.layers == 6
    reference = models.export_unverified(models.siamese_model(recipe), recipe, tmp_path / "deep", "cpu")
    assert reference is not None
    session = Session(tmp_path / "deep", threads=1)
    assert len(session.manifest.layers) == 6
    deep = models.siamese_model(replace(recipe, shape={**recipe.shape, "num_hidden_layers": 6}, layers=None))
    values = reference.state_dict()
    traced = {0: 0, 5: 2}

    def name_in_reference(name: str) -> str:
        return re.sub(r"layers\.(\d+)\.", lambda match: f"layers.{traced.get(int(match[1]), 1)}.", name)

    deep.load_state_dict({name: values[name_in_reference(name)] for name in deep.state_dict()})
    text, state = [5, 7, 300, 22], session.new_state(1)
    logits = session.prefill(state, [text]).logits[0]
    for _ in range(3):
        expected = reference_step(deep, text, 4).logits.numpy()
        assert np.abs(logits - expected).max() < 0.01 * np.abs(expected).max()
        text.append(int(logits.argmax()))
        logits = session.decode_step(state, text[-1:]).logits[0]
    data = (tmp_path / "deep" / "model.onnx.data").stat().st_size
    assert session.manifest.reads.bytes_per_step(1, 2) > data  # the copies are read, but not in the file twice
    with pytest.raises(deepen.NotRepeatable, match="6 layers cannot become 8"):
        deepen.deepen(tmp_path / "deep", 8)


@pytest.fixture
def measured(tiny: Exported, tmp_path: Path) -> dict[str, Any]:
    """A document of the stage `speed`, measured on the CPU."""
    plan = Plan(tmp_path, tmp_path, "cpu", "full")
    document = Document(plan, "speed")
    folders = {"siamese": tiny.artifact, "base": tiny.artifact}
    speed.measure_group("fp16", folders, (1, 2), (8,), 16, plan, document)
    document.finish()
    return document.data


def test_speed_compares_in_turns_and_names_what_fails(measured: dict[str, Any], tiny: Exported, tmp_path: Path) -> None:
    results = measured["groups"][0]["results"]
    assert [(result["name"], result["batch"]) for result in results] == [
        ("siamese", 1), ("base", 1), ("siamese", 2), ("base", 2)
    ]  # fmt: skip
    for result in results:
        assert result["steps"] == 16
        assert 0 < result["inside_ms"] <= result["ms"] <= result["ms_p95"]
        assert 0 < result["host_share"] < 1
    assert [result["ratio"] for result in results if result["name"] == "base"] == [1, 1]
    plan = Plan(tmp_path, tmp_path, "cpu", "full")
    document = Document(plan, "speed")
    speed.measure_group("fp16", {"gone": tmp_path / "gone"}, (1,), (8,), 16, plan, document)
    assert "ArtifactError" in document.data["groups"][0]["error"]
    speed.measure_group("late", {}, (1,), (8,), 16, replace(plan, deadline=0.0), document, seconds=1.0)
    assert document.data["left_out"][0]["title"] == "late"


def test_only_a_run_on_a_gpu_becomes_a_page(measured: dict[str, Any], tmp_path: Path) -> None:
    torch_facts = {"available": False}
    versions: dict[str, Any] = {"stage": "versions", "state": COMPLETE, "provider": "cuda", "size": "full",
                                "rehearsal": False, "seconds": 1.0, "python": "3.12", "packages": {"torch": "2"},
                                "torch": torch_facts}  # fmt: skip
    with pytest.raises(report.NoResults, match="nobody knows which GPU"):
        report.page({"speed": measured})
    with pytest.raises(report.NoResults, match="`speed` is a rehearsal"):
        report.page({"versions": versions, "speed": measured})
    on_gpu = copy.deepcopy(measured) | {"provider": "cuda"}
    with pytest.raises(report.NoResults, match="no GPU"):
        report.page({"versions": versions, "speed": on_gpu})
    versions["torch"] = {"available": True, "device": "A", "memory_gb": 80.0, "capability": "9.0"}
    with pytest.raises(report.NoResults, match="rehearsal"):
        report.page({"versions": versions | {"rehearsal": True}, "speed": on_gpu})
    for group in on_gpu["groups"]:
        group["cuda_graph"] = True
        for result in group["results"]:
            result |= {"host_share": 0.5, "ms": 2.0}
    theirs = {"name": "onnxruntime-genai", "batch": 1, "context": 8, "ms": 4.0, "ms_p95": 4.0, "first_ms": 1.0}
    genai = {**versions, "stage": "genai", "groups": [{"title": "fp16", "cuda_graph": False, "results": [theirs]}]}
    text = report.page({"versions": versions, "speed": on_gpu, "genai": genai}, "picture.png")
    assert "| the host's share of a step with a CUDA graph | under 5% | 50.0% to 50.0% | no |" in text
    assert "onnxruntime-genai's one stream | at most 1x | 0.500x | yes |" in text
    assert report.main([str(tmp_path), str(tmp_path / "page.md")]) == 1
    assert not (tmp_path / "page.md").exists()


def test_random_models_are_the_same_in_every_process_and_choose_clearly() -> None:
    recipe = models.recipes(models.SIZES["small"])["middle-fp16"]
    first, second = (models.siamese_model(recipe) for _ in range(2))
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    step = reference_step(first, [3, 4, 5], 3)
    largest = step.logits.topk(2).values
    assert largest[0] - largest[1] > stage_parity.NEAR_TIE
    assert (step.hidden_base - step.hidden_adapter).abs().max() > 0.1


def test_what_a_stage_does_not_have_is_not_a_result(tmp_path: Path) -> None:
    plan = Plan(tmp_path, tmp_path, only=("nope",))
    assert plan.unknown is None  # a stage without names
    assert not plan.wants("fp16")
    assert plan.unknown == "nothing here is called nope; there are fp16"
    assert Plan(tmp_path, tmp_path, only=("fp16", "nope")).wants("fp16")


def test_a_run_with_other_settings_is_not_skipped(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--provider", "cpu", "--size", "small", "--parts", str(tmp_path / "none")]
    assert driver.main([*arguments, "--stages", "versions"]) == 0
    first = (tmp_path / "versions.json").stat().st_mtime_ns
    assert driver.main([*arguments, "--stages", "versions"]) == 0
    assert (tmp_path / "versions.json").stat().st_mtime_ns == first
    assert driver.main([*arguments, "--stages", "versions", "--rehearse"]) == 0
    assert (tmp_path / "versions.json").stat().st_mtime_ns != first


@pytest.mark.parametrize("arguments", [["--seconds", "-1"], []])
def test_odd_arguments_are_refused(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "file"
    out.write_text("")
    with pytest.raises(SystemExit):
        driver.main([str(tmp_path if arguments else out), *arguments])
    assert ("--seconds is -1" if arguments else "is no folder") in capsys.readouterr().err
