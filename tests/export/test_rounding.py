"""How the backbone is rounded, as the settings ask: "best", "nearest" and "auto", and no weight by another rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import export.passes.quantized_tensors
from export.errors import ExportError
from export.pipeline import write
from export.prepare import Prepared, prepare
from export.rounding import TRIED
from export.settings import ExportSettings
from imsm_core.backbone import load_tokenizer
from imsm_core.errors import SettingsError
from imsm_core.siamese import SiameseModel
from runtime import Session
from runtime.inspect import format_summary, summarize
from tests.adapters import make_siamese_with
from tests.builders import make_base_folder, make_siamese, save_tiny_checkpoint, write_jsonl
from tests.exported import PROMPT, Exported, export_tiny
from tests.zoo import make_zoo_base

Making = Callable[..., tuple[Prepared, list[str]]]


@pytest.fixture
def prepared(tmp_path: Path) -> Making:
    """Prepares a model with settings; gives the lines of the report too."""

    def make(model: SiameseModel, base: Path, **settings: Any) -> tuple[Prepared, list[str]]:
        info = save_tiny_checkpoint(model, base, tmp_path / "checkpoint", force=True)
        lines: list[str] = []
        how = ExportSettings(**{"precision": "int4", **settings})
        return prepare(model, load_tokenizer(str(base)), info, how, lines.append), lines

    return make


def widths_of(prepared: Prepared) -> set[int]:
    assert prepared.quantization is not None
    return {weight.bits for weight in prepared.quantization.calibrated.values()}


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "lora_embeddings", {"symmetric": False}),
    ("mixtral", "lora", {}),
    ("qwen2", "trainable_tokens", {"precision": "auto", "max_kl": 3.0}),  # tied
]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of PEFT itself
@pytest.mark.parametrize(("kind", "adapter", "settings"), CASES, ids=lambda value: str(value)[:24])
def test_no_matrix_of_the_backbone_is_rounded_by_another_rule(
    kind: str, adapter: str, settings: dict[str, Any], prepared: Making, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_zoo_base(tmp_path / "base", kind)
    found, lines = prepared(make_siamese_with(base, adapter), base, **settings)
    others = {"activations", "portable"} & set(settings)
    assert widths_of(found) <= ({4, 8} if others else {4, 5, 6, 8})
    assert len(widths_of(found)) > 1
    assert not any("cannot write" in line for line in lines)
    monkeypatch.delattr(export.passes.quantized_tensors, "round_to_nearest")  # a call is an error
    (tmp_path / "draft").mkdir()
    quantized = write(found, tmp_path / "draft", lines.append).quantized
    assert quantized is not None
    assert quantized.calibrated == len(quantized.weights) > 5
    assert found.quantization is not None
    asked = quantized.as_dict(found.quantization)
    assert asked["rounding"] == "best"
    assert asked["bits"] == 4
    mean = quantized.mean_bits
    assert mean is not None
    assert min(quantized.widths) <= mean <= max(quantized.widths)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A whole export of a tied Llama by the default."""
    folder = tmp_path_factory.mktemp("tied")
    return export_tiny(folder, head_dim=16, tied=True, settings=ExportSettings(precision="int4", mean_bits=5.5))


def test_a_whole_export_says_how_it_was_rounded(tied: Exported) -> None:
    found = tied.manifest["quantization"]
    assert found["rounding"] == "best"
    assert set(found["widths"]) <= {"4", "5", "6", "8"}
    assert {"5", "6"} <= set(found["widths"])
    total = sum(found["widths"].values())
    tied_once = 259 * 64
    layers = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 124)
    assert total == tied_once + layers
    mean = sum(int(bits) * count for bits, count in found["widths"].items()) / total
    assert found["mean_bits"] == pytest.approx(mean)
    assert found["calibrated"] == 2 * 7 + 1
    parity = tied.manifest["parity"]
    assert parity["greedy_tokens_equal"] == parity["decode_steps"]
    assert max(parity["max_abs_difference"]["decode"].values()) < 1e-3
    first, *_ = format_summary(summarize(tied.artifact)).splitlines()
    assert first.endswith(f"int4, {mean:.3g} bits a weight")


def test_a_mixture_of_nearest_values_says_so(tmp_path: Path) -> None:
    settings = ExportSettings(precision="int4", rounding="nearest", mean_bits=4.5)
    exported = export_tiny(tmp_path, head_dim=16, tied=True, settings=settings)
    found = exported.manifest["quantization"]
    assert found["rounding"] == "nearest"
    assert set(found["widths"]) == {"4", "5", "6"}
    assert found["widths"]["6"] == 259 * 64
    layers = found["widths"]["4"] + found["widths"]["5"]
    assert 0.3 < found["widths"]["5"] / layers <= 0.5
    assert found["calibrated"] == 0  # no text was asked
    parity = exported.manifest["parity"]
    assert parity["greedy_tokens_equal"] == parity["decode_steps"]
    assert summarize(exported.artifact)["mean_bits"] == pytest.approx(found["mean_bits"])


def test_its_operators_have_the_widths(tied: Exported) -> None:
    graph = onnx.load(str(tied.artifact / "model.onnx"), load_external_data=False).graph
    bits = {attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "bits"}
    assert bits >= {5, 6}
    session = Session(tied.artifact, threads=1)
    assert np.isfinite(session.prefill(session.new_state(), [PROMPT]).logits).all()


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        ({"mean_bits": 4.0}, {4}),
        ({"mean_bits": 8.0}, {8}),
        ({"precision": "int8", "rounding": "best"}, {8}),
        ({"mean_bits": 4.75, "portable": True}, {4, 8}),
        ({"mean_bits": 4.75, "block_size": 16}, {4, 8}),  # for which there are no operators of 5 and 6
    ],
    ids=str,
)
def test_layers_have_the_widths_of_the_mean(
    base_folder: Path, prepared: Making, settings: dict[str, Any], widths: set[int]
) -> None:
    found, _ = prepared(make_siamese(base_folder, target_modules=None), base_folder, **settings)
    assert found.quantization is not None
    layers = {name: weight for name, weight in found.quantization.calibrated.items() if ".layers." in name}
    assert {weight.bits for weight in layers.values()} == widths
    assert found.settings.precision == settings.get("precision", "int4")


@pytest.mark.parametrize("context", [2, 3, 8])
def test_tiny_contexts_are_enough(base_folder: Path, prepared: Making, context: int) -> None:
    found, _ = prepared(make_siamese(base_folder), base_folder, context_length=context)
    assert len(widths_of(found)) > 1
    automatic, lines = prepared(
        make_siamese(base_folder), base_folder, context_length=context, precision="auto", max_kl=100.0
    )
    assert automatic.settings.precision == "int4"
    assert "int4 with 4 bits a weight is the smallest" in lines[-1]


def kls(lines: list[str]) -> dict[float, float]:
    """The worst KL by mean bits, as the lines say."""
    found = {}
    for line in lines:
        if "KL of the base stream" in line:
            words = line.replace(",", "").split()
            values = [float(words[place + 1]) for place, word in enumerate(words) if word in ("stream", "blend")]
            found[float(words[1])] = max(values)
    return found


def test_auto_takes_the_fewest_bits_that_keep_the_limit(base_folder: Path, prepared: Making) -> None:
    model = make_siamese(base_folder, target_modules=None)
    nothing, lines = prepared(model, base_folder, precision="auto", max_kl=1e-9)
    assert nothing.quantization is None
    assert nothing.settings.precision == "fp32"
    assert lines[-1] == "auto      no rounded weights keep a KL of 1e-09: fp32"
    measured = kls(lines)
    assert set(measured) <= set(TRIED)
    assert {5.5, 8.0} <= measured.keys()
    assert list(measured.values()) == sorted(measured.values(), reverse=True)

    bytes_, lines = prepared(model, base_folder, precision="auto", max_kl=measured[8.0] * 1.02)
    assert bytes_.settings.precision == "int8"
    assert bytes_.settings.mean_bits is None
    assert bytes_.quantization is not None
    assert bytes_.quantization.bits == 8
    assert widths_of(bytes_) == {8}
    assert lines[-1] == "auto      int8 with 8 bits a weight is the smallest that does"

    middle = measured[5.5] * 1.02
    some, lines = prepared(model, base_folder, precision="auto", max_kl=middle)
    assert some.settings.precision == "int4"
    mean = some.settings.mean_bits
    assert mean is not None
    assert mean <= 5.5
    tried = kls(lines)
    assert tried[mean] <= middle
    assert all(value > middle for bits, value in tried.items() if bits < mean)
    assert some.quantization is not None
    assert some.quantization.bits == 4
    assert all(("keeps" in line) == (kls([line]).popitem()[1] <= middle) for line in lines if "KL of the base" in line)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"activations": "fp16"}, "fp16"), ({"activations": "bf16"}, "bf16"), ({"base_only": True}, "fp32")],
    ids=str,
)
def test_auto_falls_back_to_what_the_activations_are(
    base_folder: Path, prepared: Making, settings: dict[str, Any], expected: str
) -> None:
    found, lines = prepared(make_siamese(base_folder), base_folder, precision="auto", max_kl=1e-12, **settings)
    assert found.quantization is None
    assert (found.settings.precision, found.settings.activations) == (expected, None)
    assert any("blend" in line for line in lines if line.startswith("auto")) == ("base_only" not in settings)


def test_auto_judges_on_the_users_texts(base_folder: Path, prepared: Making, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"once upon a time number {n} came"} for n in range(3)])
    model = make_siamese(base_folder)
    settings: dict[str, Any] = {"precision": "auto", "max_kl": 50.0}
    (own, lines), (_, with_file) = (
        prepared(model, base_folder, **settings, **how) for how in ({}, {"eval_data": file})
    )
    assert own.settings.precision == "int4"
    assert kls(lines).keys() == kls(with_file).keys()
    assert kls(lines) != kls(with_file)


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_auto_falls_back_from_everything_that_is_of_rounded_weights(
    base_folder: Path, prepared: Making, tmp_path: Path, kv_cache: str
) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", [{"body": "a question", "answer": "of the user's"}])
    found, _ = prepared(
        make_siamese(base_folder),
        base_folder,
        precision="auto",
        max_kl=1e-12,
        rounding="best",
        calibrate=file,
        prompt_field="body",
        skip_bad_rows=True,
        kv_cache=kv_cache,
    )
    assert found.settings.precision == "fp32"
    assert found.settings.calibrate == (file if kv_cache == "int8" else None)


def test_weights_that_are_not_finite_are_refused_before_texts_are_written(base_folder: Path, prepared: Making) -> None:
    model = make_siamese(base_folder)
    model.causal_lm.get_parameter("model.embed_tokens.weight").data[200, 0] = float("inf")
    with pytest.raises(ExportError, match=r"the weight of model\.embed_tokens has values that are not finite"):
        prepared(model, base_folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounding": "worst"}, "rounding is worst; choose one of best, nearest"),
        ({"precision": "fp16", "rounding": "best"}, "rounding is best; it needs int8 or int4 weights"),
        ({"rounding": "nearest", "calibrate": Path("x")}, "calibrate is x; rounding to nearest uses no texts"),
        ({"mean_bits": 3.9}, "mean_bits is 3.9; it must be a number from 4 to 8"),
        ({"mean_bits": float("nan")}, "mean_bits is nan; it must be a number from 4 to 8"),
        ({"precision": "int8", "mean_bits": 5.0}, "mean_bits is 5.0; it is of int4"),
        ({"precision": "int8", "rounding": "nearest", "mean_bits": 5.0}, "mean_bits is 5.0; it is of int4"),
        ({"precision": "auto", "mean_bits": 5.0}, "mean_bits is 5.0; it is of int4"),
        ({"precision": "auto", "rounding": "nearest"}, "rounding is nearest; auto chooses"),
        ({"precision": "auto", "max_kl": 0.0}, "max_kl is 0.0; it must be a number above 0"),
        ({"precision": "auto", "max_kl": float("nan")}, "max_kl is nan; it must be a number above 0"),
        ({"max_kl": 0.1}, "max_kl is 0.1; it is of precision auto"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        ExportSettings(**{"precision": "int4", **settings})
    assert "\n" not in str(error.value)


def test_calibration_texts_are_used_beside_the_models_own(tmp_path: Path, prepared: Making) -> None:
    base = make_base_folder(tmp_path / "base")
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": "a text of the user's own " * 3}])
    model = make_siamese(base)
    found = [prepared(model, base, **how)[0].quantization for how in ({}, {"calibrate": file})]
    weights = [each.calibrated["model.layers.0.mlp.up_proj"].packed for each in found if each is not None]
    assert (weights[0] != weights[1]).any()


def test_a_layer_that_stands_in_two_places_is_found_by_its_other_name(
    base_folder: Path, prepared: Making, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_siamese(base_folder, target_modules=["q_proj"])
    layers: Any = model.causal_lm.get_submodule("model.layers")
    layers[1].mlp = layers[0].mlp
    found, lines = prepared(model, base_folder)
    assert found.quantization is not None
    weights = found.quantization.calibrated
    assert weights["model.layers.1.mlp.up_proj"] is weights["model.layers.0.mlp.up_proj"]
    monkeypatch.delattr(export.passes.quantized_tensors, "round_to_nearest")  # a call is an error
    (tmp_path / "draft").mkdir()
    quantized = write(found, tmp_path / "draft", lines.append).quantized
    assert quantized is not None
    assert quantized.calibrated == len(quantized.weights)
