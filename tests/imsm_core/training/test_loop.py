"""Training: its loss, its optimizer, and that an interrupted run ends exactly where a whole one does."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imsm_core.backbone import load_base_model
from imsm_core.data.dataset import Dataset, Example
from imsm_core.errors import CheckpointError, SettingsError
from imsm_core.gates import GATES
from imsm_core.siamese import SiameseModel
from imsm_core.training import loop as train_module
from imsm_core.training.loop import Diverged, Interrupted, TrainSettings, answer_loss, train
from imsm_core.training.snapshots import newest_snapshot
from tests.builders import EOS, PAD, make_siamese

EXAMPLES = [
    Example([0, 70, 71, 72], [80, 81, EOS]),
    Example([0, 73], [82, EOS]),
    Example([0, 74, 75, 76, 77, 78], [83, 84, 85, 86, EOS]),
    Example([0, 79], [EOS]),
    Example([0, 80, 81], [87, 88, EOS]),
]
DATASET = Dataset(EXAMPLES, "rows.jsonl", "0" * 64, skipped=2)
SETTINGS = TrainSettings(steps=6, batch_size=2, save_every=2, learning_rate=1e-2, gate_learning_rate=3e-2, seed=5)


def run(model: SiameseModel, settings: TrainSettings = SETTINGS, **options: Any) -> dict[str, Any]:
    return train(model, DATASET, settings, PAD, progress=False, **options)


def trained(model: SiameseModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.trainable_parameters().items()}


def spy_on_steps(monkeypatch: pytest.MonkeyPatch, after: Callable[[int, torch.optim.Optimizer, float], None]) -> None:
    """Call after(number of steps so far, optimizer, loss) when an optimizer step ends."""
    step, done = train_module._step, [0]

    def spied(*arguments: Any) -> float:
        rates = [group["lr"] for group in arguments[2].param_groups]
        loss = step(*arguments)
        assert [group["lr"] for group in arguments[2].param_groups] == rates
        done[0] += 1
        after(done[0], arguments[2], loss)
        return loss

    monkeypatch.setattr(train_module, "_step", spied)


# The loss


@pytest.mark.parametrize("kind", GATES)
def test_loss_is_the_cross_entropy_of_the_answers_tokens_written_out(base_folder: Path, kind: str) -> None:
    """Token by token from two plain models: log p(answer token | everything before it)."""
    model = make_siamese(base_folder, kind)
    base, adapted = load_base_model(str(base_folder)), make_siamese(base_folder, kind).peft_model.merge_and_unload()
    expected, count = 0.0, 0
    with torch.no_grad():
        for example in EXAMPLES:
            for place, token in enumerate(example.answer_ids):
                text = torch.tensor([example.prompt_ids + example.answer_ids[:place]])
                states = [m(text, output_hidden_states=True).hidden_states[-1][0] for m in (base, adapted)]
                queries = [state[: len(example.prompt_ids)].mean(0) for state in states]
                logits = base.lm_head(blended(model, states[0][-1], states[1][-1], *queries))
                expected -= float(logits[token] - torch.logsumexp(logits, 0))
                count += 1
        loss, tokens = answer_loss(model, EXAMPLES, PAD)
    assert tokens == count == sum(len(example.answer_ids) for example in EXAMPLES)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def blended(model: SiameseModel, h_base: Tensor, h_adapter: Tensor, q_base: Tensor, q_adapter: Tensor) -> Tensor:
    kind = model.gate.kind
    if kind == "mean_logits":
        return (h_base + h_adapter) / 2
    if kind == "query_mixed":
        h_base, h_adapter = (h_base + q_base) / 2, (h_adapter + q_adapter) / 2
    z = torch.cat([q_base, h_base, h_adapter, q_adapter] if kind == "query_aware" else [h_base, h_adapter])
    g = torch.sigmoid(model.gate.gate_up.weight @ (model.gate.gate_down.weight @ z))
    h = g * h_base + (1 - g) * h_adapter
    return (h_base + h) / 2 if kind == "residual" else h


def test_loss_does_not_depend_on_the_padding_token_or_the_batch(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    with torch.no_grad():
        together = float(answer_loss(model, EXAMPLES, PAD)[0])
        alone = sum(float(answer_loss(model, [example], PAD)[0]) for example in EXAMPLES)
        assert together == pytest.approx(alone, rel=1e-5)
        assert together == pytest.approx(float(answer_loss(model, EXAMPLES, 99)[0]), rel=1e-6)


# The optimizer


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4), (3, 2)])
def test_gradient_accumulation_equals_one_big_batch(base_folder: Path, batch_size: int, accumulation: int) -> None:
    """By tokens, not by batches: the rows have answers of different lengths."""
    settings = replace(SETTINGS, steps=3, batch_size=batch_size * accumulation, max_grad_norm=0.5)
    whole, parts = make_siamese(base_folder), make_siamese(base_folder)
    before = trained(whole)
    whole_metrics = run(whole, settings)
    metrics = run(parts, replace(settings, batch_size=batch_size, gradient_accumulation=accumulation))
    assert metrics["first_loss"] == pytest.approx(whole_metrics["first_loss"], rel=1e-5)
    assert metrics["final_loss"] == pytest.approx(whole_metrics["final_loss"], rel=1e-3)
    one, other = trained(whole), trained(parts)
    difference = sum(float((one[name] - other[name]).abs().sum()) for name in one)
    assert difference < 1e-2 * sum(float((one[name] - before[name]).abs().sum()) for name in one)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(5, 1), (3, 2), (1, 5)])
def test_gradient_is_that_of_the_mean_loss_of_an_answer_token(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, accumulation: int
) -> None:
    """AdamW hardly sees the scale of a gradient, so it is looked at before AdamW."""
    found: list[Tensor] = []

    def spied(self: torch.optim.AdamW, *arguments: Any) -> None:
        found.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    monkeypatch.setattr(train_module, "epoch_order", lambda count, seed, epoch: list(range(count)))
    settings = replace(SETTINGS, steps=1, batch_size=batch_size, gradient_accumulation=accumulation, max_grad_norm=1e9)
    run(make_siamese(base_folder), settings)
    model = make_siamese(base_folder)
    seen = (EXAMPLES * 2)[: batch_size * accumulation]
    losses = [answer_loss(model, [example], PAD) for example in seen]
    mean = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    by_name = model.trainable_parameters()
    ordered = sorted(by_name, key=lambda name: name.startswith("gate."))  # the adapter's group comes first
    expected = torch.autograd.grad(mean, [by_name[name] for name in ordered])
    torch.testing.assert_close(found, list(expected), atol=1e-5, rtol=1e-3)


def test_adapter_and_gate_have_their_own_learning_rates_on_a_cosine_with_warm_up(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    sizes: list[int] = []
    model = make_siamese(base_folder)
    step = train_module._step

    def spied(*arguments: Any) -> float:
        rates.append([group["lr"] for group in arguments[2].param_groups])
        sizes[:] = [sum(parameter.numel() for parameter in group["params"]) for group in arguments[2].param_groups]
        assert {group["weight_decay"] for group in arguments[2].param_groups} == {0.01}
        return step(*arguments)

    monkeypatch.setattr(train_module, "_step", spied)
    run(model, replace(SETTINGS, steps=20))
    warm_up, total = 2, 20
    shape = [
        t / warm_up if t < warm_up else (1 + math.cos(math.pi * (t - warm_up) / (total - warm_up))) / 2
        for t in range(total)
    ]
    assert [adapter for adapter, _ in rates] == pytest.approx([1e-2 * share for share in shape])
    assert [gate for _, gate in rates] == pytest.approx([3e-2 * share for share in shape])
    gate_size = sum(parameter.numel() for parameter in model.gate.parameters())
    assert sizes == [sum(p.numel() for p in trained(model).values()) - gate_size, gate_size]


def test_training_lowers_the_loss_and_touches_nothing_but_adapter_and_gate(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in model.trainable_parameters()}
    before = trained(model)
    metrics = run(model, replace(SETTINGS, steps=30, batch_size=5))
    assert metrics["final_loss"] < metrics["first_loss"]
    with torch.no_grad():
        assert float(answer_loss(model, EXAMPLES, PAD)[0]) / 14 < 0.5 * metrics["first_loss"]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert all(not torch.equal(parameters[name], value) for name, value in before.items())
    assert not model.training
    assert metrics["trained_parameters"] == sum(value.numel() for value in before.values())
    assert (metrics["steps"], metrics["examples"], metrics["skipped_rows"]) == (30, 5, 2)


def test_gate_without_parameters_trains_the_adapter_alone(base_folder: Path, tmp_path: Path) -> None:
    model = make_siamese(base_folder, "mean_logits")
    before = trained(model)
    run(model, partial=tmp_path / "partial")
    assert all(not torch.equal(trained(model)[name], value) for name, value in before.items())


def test_gradients_are_clipped_to_their_norm_over_adapter_and_gate_together(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    optimizer_step = torch.optim.AdamW.step

    def spied(self: torch.optim.AdamW, *arguments: Any) -> Any:
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))
        return optimizer_step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    run(make_siamese(base_folder), replace(SETTINGS, steps=2, max_grad_norm=1e-3))
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_every_row_is_seen_once_an_epoch(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Example] = []
    loss = train_module.answer_loss

    def spied(model: SiameseModel, examples: list[Example], pad: int) -> tuple[Tensor, int]:
        seen.extend(examples)
        return loss(model, examples, pad)

    monkeypatch.setattr(train_module, "answer_loss", spied)
    run(make_siamese(base_folder), replace(SETTINGS, steps=5, batch_size=1, gradient_accumulation=2))
    first, second = seen[:5], seen[5:]
    assert all(example in first and example in second for example in EXAMPLES)
    assert first != second


def test_epochs_give_the_steps_unless_steps_are_given() -> None:
    assert TrainSettings(epochs=3, batch_size=16).total_steps(160) == 30
    assert TrainSettings(epochs=0.5, batch_size=4, gradient_accumulation=5).total_steps(200) == 5
    assert TrainSettings(epochs=1, batch_size=16).total_steps(1) == 1
    assert TrainSettings(epochs=3, steps=7).total_steps(1000) == 7


def test_same_seed_gives_the_same_model_and_another_seed_another(base_folder: Path) -> None:
    models = [make_siamese(base_folder, dropout=0.3) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(seed + 100 * id(model) % 97)  # the state that training finds must not matter
        run(model, replace(SETTINGS, seed=seed))
    one, same, other = (trained(model) for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_loss_that_is_not_finite_ends_the_run(base_folder: Path, tmp_path: Path) -> None:
    model = make_siamese(base_folder)
    with torch.no_grad():
        model.gate.gate_up.weight[0, 0] = torch.nan
    with pytest.raises(Diverged, match="the loss is nan at step 1"):
        run(model, partial=tmp_path / "partial")
    assert newest_snapshot(tmp_path / "partial") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"gradient_accumulation": 0},
        {"save_every": 0},
        {"steps": 0},
        {"epochs": 0},
        {"epochs": math.inf},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"gate_learning_rate": -1.0},
        {"max_grad_norm": 0.0},
        {"weight_decay": -0.1},
        {"warmup_ratio": 1.5},
        {"warmup_ratio": -0.1},
        {"gate_dropout": 1.0},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_setting_outside_its_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        TrainSettings(**wrong)


# Interruption


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    def after(done: int, optimizer: torch.optim.Optimizer, loss: float) -> None:
        if done == steps:
            signal.raise_signal(signal.SIGINT)

    spy_on_steps(monkeypatch, after)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["query_aware", "mean_logits"])
def test_resumed_run_equals_the_uninterrupted_one_exactly(
    base_folder: Path, tmp_path: Path, steps: int, kind: str
) -> None:
    """With dropout in adapter and gate, so that the random state has to come back too."""
    whole, resumed = make_siamese(base_folder, kind, dropout=0.3), make_siamese(base_folder, kind, dropout=0.3)
    metrics = run(whole)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(Interrupted, match=f"interrupted after step {steps} of 6; .* --resume goes on"):
            run(resumed, partial=tmp_path / "partial")
    assert [path.name for path in (tmp_path / "partial").iterdir()] == [f"snapshot-{steps:08d}"]
    fresh = make_siamese(base_folder, kind, dropout=0.3, seed=99)  # its values must all be replaced
    resumed_metrics = run(fresh, partial=tmp_path / "partial", resume=True)
    assert {k: v for k, v in resumed_metrics.items() if k != "seconds"} == {
        k: v for k, v in metrics.items() if k != "seconds"
    }
    expected, found = trained(whole), trained(fresh)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_resumed_learning_rates_are_those_of_the_uninterrupted_run(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    step = train_module._step

    def spied(*arguments: Any) -> float:
        rates.append([group["lr"] for group in arguments[2].param_groups])
        loss = step(*arguments)
        if len(rates) == 6 + 3:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(train_module, "_step", spied)
    run(make_siamese(base_folder))
    with pytest.raises(Interrupted):
        run(make_siamese(base_folder), partial=tmp_path / "partial")
    run(make_siamese(base_folder), partial=tmp_path / "partial", resume=True)
    assert rates[6:] == rates[:6]


def test_run_killed_after_its_last_snapshot_only_has_to_be_finished(base_folder: Path, tmp_path: Path) -> None:
    whole = make_siamese(base_folder)
    metrics = run(whole, partial=tmp_path / "partial")  # step 6 is a multiple of save_every
    again = make_siamese(base_folder, seed=99)
    assert run(again, partial=tmp_path / "partial", resume=True)["final_loss"] == metrics["final_loss"]
    assert all(torch.equal(trained(whole)[name], value) for name, value in trained(again).items())


def test_interruption_at_the_last_step_is_no_interruption(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 6)
    assert run(make_siamese(base_folder), partial=tmp_path / "partial")["steps"] == 6


def test_interruption_without_a_snapshot_folder_promises_no_resuming(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted) as caught:
        run(make_siamese(base_folder))
    assert str(caught.value) == "interrupted after step 2 of 6"


def test_ctrl_c_is_pythons_again_after_training(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        run(make_siamese(base_folder))
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_stops_at_once(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(done: int, optimizer: torch.optim.Optimizer, loss: float) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    spy_on_steps(monkeypatch, twice)
    with pytest.raises(KeyboardInterrupt):
        run(make_siamese(base_folder))


@pytest.fixture
def snapshot(base_folder: Path, tmp_path: Path) -> Path:
    """A snapshot after step 4 of 6."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted):
            run(make_siamese(base_folder), partial=tmp_path / "partial", origin={"adapter_alpha": 8})
    found = newest_snapshot(tmp_path / "partial")
    assert found is not None
    return found


def resume(base_folder: Path, snapshot: Path, settings: TrainSettings = SETTINGS, **options: Any) -> dict[str, Any]:
    options = {"origin": {"adapter_alpha": 8}, "partial": snapshot.parent, "resume": True} | options
    return run(make_siamese(base_folder), settings, **options)


def test_resuming_with_another_setting_or_origin_is_refused_by_name(base_folder: Path, snapshot: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot resume: learning_rate was 0\.01 and is now 0\.02"):
        resume(base_folder, snapshot, replace(SETTINGS, learning_rate=0.02))
    with pytest.raises(SettingsError, match="cannot resume: adapter_alpha was 8 and is now 16"):
        resume(base_folder, snapshot, origin={"adapter_alpha": 16})
    other = replace(DATASET, sha256="1" * 64)
    with pytest.raises(SettingsError, match="cannot resume: data was"):
        train(make_siamese(base_folder), other, SETTINGS, PAD, snapshot.parent, True, False, {"adapter_alpha": 8})
    smaller, options = make_siamese(base_folder, rank=2), {"partial": snapshot.parent, "origin": {"adapter_alpha": 8}}
    with pytest.raises(SettingsError, match="cannot resume: parameters was"):
        run(smaller, resume=True, **options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.safetensors", b""),
        ("state.safetensors", None),
        ("state.safetensors", b"half"),
        ("state.json", b""),
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b'{"started_with": null}'),
    ],
)
def test_damaged_snapshot_is_refused(base_folder: Path, snapshot: Path, name: str, content: bytes | None) -> None:
    file = snapshot / name
    match content:
        case None:
            file.unlink()
        case b"half":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case _:
            file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged .*start anew with --force"):
        resume(base_folder, snapshot)


def test_snapshot_whose_losses_do_not_fit_its_step_is_refused(base_folder: Path, snapshot: Path) -> None:
    state = json.loads((snapshot / "state.json").read_text())
    (snapshot / "state.json").write_text(json.dumps(state | {"losses": state["losses"][:-1]}))
    with pytest.raises(CheckpointError, match="3 losses at step 4"):
        resume(base_folder, snapshot)


def test_newer_looking_snapshot_of_an_older_run_is_removed(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "partial" / "snapshot-00000900").mkdir(parents=True)
    run(make_siamese(base_folder), partial=tmp_path / "partial")
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["snapshot-00000006"]


def test_parameter_that_no_gradient_has_reached_does_not_stop_a_snapshot(base_folder: Path, tmp_path: Path) -> None:
    """As the adapter of an expert that no token was routed to."""
    models = [make_siamese(base_folder) for _ in range(2)]
    for model in models:
        model.gate.unused = torch.nn.Parameter(torch.ones(3))
    run(models[0], partial=tmp_path / "partial")
    run(models[1], partial=tmp_path / "partial", resume=True)
    assert all(torch.equal(trained(models[0])[name], value) for name, value in trained(models[1]).items())
