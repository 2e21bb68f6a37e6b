"""What float16 cannot hold is found in float32, named, and refused before the trace; and it really fails in float16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from export.activation_range import ActivationRange, Place, find_range
from export.errors import UnsupportedError
from export.float16_range import HEADROOM, LARGEST, NEAR, check_activations, check_weights, warn_of_activations
from export.pipeline import export_model
from export.prepare import Prepared, prepare
from export.quantization.precision import computing_in
from export.settings import ExportSettings
from export.virtual_tokens import VirtualCache
from imsm_core.backbone import load_tokenizer
from imsm_core.siamese import SiameseModel
from runtime.inspect import format_summary, summarize
from tests.adapters import VIRTUAL_TOKENS, make_siamese_with
from tests.builders import LAYERS, make_siamese, save_tiny_checkpoint, write_jsonl
from tests.exported import Exported, export_tiny
from tests.zoo import make_zoo_base

TEXTS = [[0, 80, 104, 77, 35, 102], [0, 9, 200]]
FP16 = ExportSettings(precision="fp16")


def scale(model: SiameseModel, factors: dict[str, float]) -> SiameseModel:
    """Multiply the parameters whose names contain a key."""
    with torch.no_grad():
        for part, factor in factors.items():
            found = [parameter for name, parameter in model.named_parameters() if part in name]
            assert found, part
            for parameter in found:
                parameter.mul_(factor)
    return model


def prepared(model: SiameseModel, base: Path, folder: Path, settings: ExportSettings = FP16) -> tuple[Prepared, str]:
    """What is known before the trace, and what was reported."""
    info = save_tiny_checkpoint(model, base, folder / "checkpoint")
    lines: list[str] = []
    found = prepare(model, load_tokenizer(str(base)), info, settings, lines.append)
    return found, "\n".join(lines)


def ranges(model: SiameseModel, virtual: VirtualCache | None = None, base_only: bool = False) -> ActivationRange:
    return find_range(model, TEXTS, LAYERS, virtual or {}, base_only)


def largest_of(found: ActivationRange, module: str, stream: str, what: str) -> float:
    return found.found[Place(stream, module, what)]


# gate_proj and up_proj grow, down_proj shrinks: only the product of gate and up is large, which no module computes.
MIDDLE = "layers.1.mlp.down_proj"


def only_the_middle_of_an_mlp(base: Path, factor: float) -> SiameseModel:
    names = {"layers.1.mlp.up_proj.base_layer.weight": factor, f"{MIDDLE}.weight": 1 / factor}
    return scale(make_siamese(base, target_modules=["up_proj"]), names | {"layers.1.mlp.up_proj.lora_B": factor})


@pytest.fixture
def plain(base_folder: Path) -> SiameseModel:
    return make_siamese(base_folder)


def test_the_residual_stream_is_what_transformers_returns(plain: SiameseModel) -> None:
    found = ranges(plain)
    for stream, disabled in (("base", True), ("adapter", False)):
        largest = [0.0] * (LAYERS + 1)
        for text in TEXTS:
            with torch.no_grad():
                inputs = {"input_ids": torch.tensor([text]), "output_hidden_states": True}
                if disabled:
                    with plain.peft_model.disable_adapter():
                        states = plain.causal_lm(**inputs).hidden_states
                else:
                    states = plain.causal_lm(**inputs).hidden_states
            largest = [max(value, float(state.abs().max())) for value, state in zip(largest, states, strict=True)]
        names = ["model.embed_tokens", "model.layers.0", "model.norm"]  # the last state is after the norm
        for name, value in zip(names, largest, strict=True):
            assert largest_of(found, name, stream, "output") == pytest.approx(value, rel=1e-5)
    assert found.tokens == sum(map(len, TEXTS))


def test_every_layer_and_what_is_outside_of_them_has_its_largest(plain: SiameseModel) -> None:
    found = ranges(plain)
    layers = found.by_layer()
    expected = {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head", "logits"}
    assert set(layers) == expected
    assert max(layers.values()) == found.largest[1]
    document = found.as_dict()
    assert document["largest"] == found.largest[1]
    assert document["by_layer"] == layers


def test_the_blend_runs_through_the_head_too(plain: SiameseModel) -> None:
    found = ranges(plain).found
    assert {place.stream for place in found if place.module == "lm_head"} == {"base", "adapter", "blend"}
    assert {place.stream for place in found if place.module == "model.layers.0"} == {"base", "adapter"}


def test_an_activation_between_modules_is_found_by_name_and_refused(base_folder: Path, tmp_path: Path) -> None:
    model = only_the_middle_of_an_mlp(base_folder, 1e4)
    found = ranges(model)
    assert found.largest[0].module in (f"model.{MIDDLE}", "model.layers.1.mlp.up_proj")
    with pytest.raises(UnsupportedError, match=r"float16 ends at 65,504 and the largest .*layers\.1\.mlp"):
        prepared(model, base_folder, tmp_path)


@pytest.mark.parametrize(
    ("settings", "option"),
    [(FP16, "precision"), (ExportSettings(precision="int8", activations="fp16"), "activations")],
)
def test_the_refusal_says_what_to_take_and_bf16_and_fp32_are_not_asked(
    base_folder: Path, tmp_path: Path, settings: ExportSettings, option: str
) -> None:
    model = only_the_middle_of_an_mlp(base_folder, 1e4)
    with pytest.raises(UnsupportedError, match=f"take {option} bf16"):
        prepared(model, base_folder, tmp_path / "fp16", settings)
    for other in ("bf16", "fp32"):
        kept, _ = prepared(model, base_folder, tmp_path / other, ExportSettings(precision=other))
        assert kept.activations is None


@torch.no_grad()
def test_what_is_refused_is_not_finite_in_pytorchs_float16(base_folder: Path) -> None:
    """onnxruntime's CPU provider would not show it: it computes products and their neighbours in float32."""
    for factor, finite in ((1.0, True), (3e4, False)):
        model = only_the_middle_of_an_mlp(base_folder, factor)
        assert (ranges(model).largest[1] < LARGEST) is finite
        with computing_in(model.causal_lm, torch.float16):
            states = model.stream_states(torch.tensor(TEXTS[:1]))
        assert bool(torch.isfinite(states.adapter).all()) is finite


def test_what_is_near_is_warned_of_and_computed_right(base_folder: Path, tmp_path: Path) -> None:
    model = only_the_middle_of_an_mlp(base_folder, 1.0)
    _, told = prepared(model, base_folder, tmp_path / "plain")
    assert "warning" not in told
    assert "range     largest activation" in told
    at_one = ranges(model).found[Place("adapter", f"model.{MIDDLE}", "input")]
    near = only_the_middle_of_an_mlp(base_folder, 0.2 * LARGEST / at_one)
    info = save_tiny_checkpoint(near, base_folder, tmp_path / "checkpoint")
    lines: list[str] = []
    target = tmp_path / "artifact"
    manifest = export_model(near, load_tokenizer(str(base_folder)), info, target, FP16, report=lines.append)
    assert any(line.startswith("warning   the largest activation") for line in lines)
    assert NEAR * LARGEST < manifest["activation_range"]["largest"] < LARGEST / HEADROOM
    assert manifest["activation_range"]["by_layer"].keys() > {"model.layers.0", "model.layers.1"}
    worst = max(max(found.values()) for found in manifest["parity"]["max_abs_difference"].values())
    assert worst < 0.1


@pytest.mark.parametrize(("share", "refused", "warned"), [(0.1, False, False), (0.5, False, True), (0.9, True, True)])
def test_the_limits_leave_room_for_other_texts(share: float, refused: bool, warned: bool) -> None:
    found = ActivationRange((), 1, {Place("base", "m", "output"): share * LARGEST})
    assert bool(warn_of_activations(found)) is warned
    if refused:
        with pytest.raises(UnsupportedError, match="output of m, base stream"):
            check_activations(found, FP16)
    else:
        check_activations(found, FP16)


def test_a_value_that_is_no_number_is_the_largest() -> None:
    found = ActivationRange(())
    for value in (1.0, float("nan"), 2.0):
        found.note(Place("base", "m", "output"), torch.tensor([value]))
    found.note(Place("base", "n", "output"), torch.tensor([5.0]))
    assert found.largest[0].module == "m"
    with pytest.raises(UnsupportedError, match="nan"):
        check_activations(found, FP16)


def test_the_adapter_stream_alone_is_found(base_folder: Path, tmp_path: Path) -> None:
    model = scale(make_siamese(base_folder), {"layers.1.mlp.down_proj.lora_B": 3e4})
    found = ranges(model)
    base = max(value for place, value in found.found.items() if place.stream == "base")
    assert base < NEAR * LARGEST < LARGEST < found.largest[1]
    assert found.largest[0].stream == "adapter"
    with pytest.raises(UnsupportedError, match="adapter stream"):
        prepared(model, base_folder, tmp_path / "both")
    alone, _ = prepared(model, base_folder, tmp_path / "base", ExportSettings(precision="fp16", base_only=True))
    assert alone.activations is not None
    assert {place.stream for place in alone.activations.found} == {"base"}


def test_an_adapters_inner_result_is_found(base_folder: Path) -> None:
    model = scale(make_siamese(base_folder), {"layers.0.mlp.up_proj.lora_A": 1e6, "layers.0.mlp.up_proj.lora_B": 1e-6})
    place, value = ranges(model).largest
    assert place == Place("adapter", "model.layers.0.mlp.up_proj.lora_A.default", "output")
    assert value > LARGEST


def test_what_an_adapter_adds_is_found_with_its_scale(plain: SiameseModel) -> None:
    name = "model.layers.0.mlp.up_proj"
    found = ranges(plain)
    layer = plain.causal_lm.get_submodule(name)
    scaling = layer.scaling["default"]  # type: ignore[index]
    inner = largest_of(found, f"{name}.lora_B.default", "adapter", "output")
    assert scaling == 2
    assert largest_of(found, name, "adapter", "change") == pytest.approx(scaling * inner, rel=1e-4)
    assert largest_of(found, name, "base", "change") == 0


def test_the_heads_output_is_found_before_it_is_scaled(tmp_path: Path) -> None:
    base = make_zoo_base(tmp_path / "base", "cohere")  # logits times a scale below 1
    found = ranges(make_siamese_with(base, "lora"))
    model_scale = make_siamese_with(base, "lora").causal_lm.config.logit_scale
    head = largest_of(found, "lm_head", "base", "output")
    assert largest_of(found, "logits", "base", "output") == pytest.approx(head * model_scale, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "factors", "module"),
    [
        ("mixtral", {"layers.1.mlp.experts.gate_up_proj": 1e4}, "layers.1.mlp.experts"),
        ("gpt2", {"h.1.mlp.c_fc.base_layer.weight": 1e5, "h.1.mlp.c_proj.base_layer.weight": 1e-6}, "h.1.mlp.c_fc"),
        ("opt", {"layers.1.fc1.base_layer.weight": 1e5, "layers.1.fc2.base_layer.weight": 1e-6}, "layers.1.fc1"),
    ],
)
def test_experts_and_other_kinds_of_layers_are_seen(
    tmp_path: Path, name: str, factors: dict[str, float], module: str
) -> None:
    base = make_zoo_base(tmp_path / "base", name)
    adapter = "lora_layers" if name == "mixtral" else "lora"
    found = ranges(make_siamese_with(base, adapter))
    assert found.largest[1] < NEAR * LARGEST
    found = ranges(scale(make_siamese_with(base, adapter), factors))
    beyond = {place.module for place, value in found.found.items() if value > LARGEST}
    assert any(name.endswith(module) for name in beyond)


def test_rotated_queries_and_keys_are_seen(plain: SiameseModel) -> None:
    found = ranges(plain)
    what = {place.what for place in found.found if place.module == "model.layers.0.self_attn"}
    assert what >= {"query", "key", "value", "attention"}


@pytest.mark.parametrize("adapter", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_prompt_methods_are_watched_at_the_texts_positions(base_folder: Path, tmp_path: Path, adapter: str) -> None:
    model = make_siamese_with(base_folder, adapter)
    kept, told = prepared(model, base_folder, tmp_path)
    assert kept.activations is not None
    assert kept.virtual_tokens == VIRTUAL_TOKENS
    assert "warning" not in told
    stored = [place.what for place in kept.activations.found if place.module == "virtual tokens"]
    assert set(stored) == set(kept.virtual)
    assert {place.stream for place in kept.activations.found} == {"base", "adapter", "blend"}


def test_a_virtual_token_that_float16_cannot_hold_is_refused(base_folder: Path, tmp_path: Path) -> None:
    model = scale(make_siamese_with(base_folder, "prefix_tuning"), {"prompt_encoder": 1e6})
    found = ranges(model, {"0.key": np.full((2, 3, 8), 1e6, np.float32)})
    assert largest_of(found, "virtual tokens", "adapter", "0.key") == 1e6
    with pytest.raises(UnsupportedError, match="adapter stream"):
        prepared(model, base_folder, tmp_path)


def test_virtual_tokens_own_activations_are_not_the_graphs(base_folder: Path) -> None:
    model = make_siamese_with(base_folder, "prompt_tuning")
    before = ranges(model).found
    scale(model, {"prompt_encoder": 1e7})  # norms take it away before anything reaches the text
    found = ranges(model)
    assert (
        largest_of(found, "model.layers.0", "adapter", "output")
        < 10 * before[Place("adapter", "model.layers.0", "output")]
    )
    assert found.largest[1] < LARGEST


def test_texts_of_one_length_run_together_and_change_nothing(plain: SiameseModel) -> None:
    texts = [[0, 5, 9], [7, 80, 3], [0, 80, 104, 77]]
    together = find_range(plain, texts, LAYERS, {}, False)
    alone = [find_range(plain, [text], LAYERS, {}, False).found for text in texts]
    for place, value in together.found.items():
        assert value == pytest.approx(max(found[place] for found in alone), rel=1e-4)


def test_the_model_is_as_before(plain: SiameseModel) -> None:
    before = [state.clone() for state in plain.stream_states(torch.tensor(TEXTS[:1]))]
    ranges(plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.causal_lm.modules())
    for one, other in zip(before, plain.stream_states(torch.tensor(TEXTS[:1])), strict=True):
        assert torch.equal(one, other)


def test_the_users_texts_are_run_too(base_folder: Path, tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "z" * 50}])
    model = make_siamese(base_folder)
    without, _ = prepared(model, base_folder, tmp_path / "one")
    settings = ExportSettings(precision="fp16", eval_data=texts)
    with_them, _ = prepared(model, base_folder, tmp_path / "two", settings)
    assert without.activations is not None
    assert with_them.activations is not None
    assert with_them.activations.tokens == without.activations.tokens + 51


def weights(change: Callable[[Tensor], Tensor]) -> list[tuple[str, Tensor]]:
    noise = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    return [("first", noise), ("second", change(noise))]


def test_weights_that_float16_cannot_hold_are_refused_by_name() -> None:
    assert check_weights(weights(lambda noise: noise), FP16) == []
    assert check_weights(weights(lambda noise: 0 * noise), FP16) == []
    with pytest.raises(UnsupportedError, match=r"second holds .*: it would overflow; take precision bf16 or int8"):
        check_weights(weights(lambda noise: 1e5 * noise), FP16)


def test_weights_that_float16_rounds_away_are_warned_of() -> None:
    (line,) = check_weights(weights(lambda noise: 1e-7 * noise), FP16)
    assert "1 weights are so small" in line
    assert "second" in line
    few = check_weights(weights(lambda noise: torch.where(noise > 0, noise, 1e-9 * noise)), FP16)
    assert few == []  # the small ones do not matter beside the others


def test_an_adapters_weights_are_checked_as_the_graph_holds_them(base_folder: Path, tmp_path: Path) -> None:
    model = scale(make_siamese(base_folder), {"layers.0.mlp.up_proj.lora_B": 1e-7})
    _, told = prepared(model, base_folder, tmp_path)
    assert "warning   1 weights are so small" in told
    assert "model.layers.0.mlp.up_proj.adapter_b" in told


def test_only_float16_artifacts_have_a_range(tiny: Exported) -> None:
    assert tiny.manifest["activation_range"] is None


def test_the_range_is_shown_by_inspect(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, head_dim=16, settings=FP16)
    text = format_summary(summarize(exported.artifact))
    place = exported.manifest["activation_range"]
    assert f"range        largest activation {place['largest']:.3g} in {place['module']}; float16 holds 65504" in text


@pytest.mark.parametrize("adapter", ["hra", "miss"])
def test_layers_that_call_by_keywords_are_seen(base_folder: Path, adapter: str) -> None:
    model = make_siamese_with(base_folder, adapter)
    found = find_range(model, TEXTS, LAYERS, {}, False)
    assert {place.what for place in found.found} >= {"input", "output", "query", "key", "attention"}


def test_a_tokenizer_may_have_more_tokens_than_the_model(tmp_path: Path) -> None:
    for settings in (ExportSettings("fp16"), ExportSettings("int8", kv_cache="int8")):
        assert export_tiny(tmp_path / settings.precision, "qwen2", head_dim=16, settings=settings).manifest["files"]
