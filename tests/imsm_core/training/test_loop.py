"""Training: its loss, its optimizer steps, and that an interrupted run ends exactly where a whole one does."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imsm_core.backbone import load_base_model
from imsm_core.errors import Diverged, Interrupted, SettingsError
from imsm_core.gates import GATES
from imsm_core.siamese import SiameseModel
from imsm_core.training.loop import answer_loss
from imsm_core.training.snapshots import newest_snapshot
from tests.builders import PAD, make_siamese
from tests.imsm_core.training.runs import EXAMPLES, SETTINGS, interrupt_after, run, spy_on_steps, trained

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
    down, up = (model.gate.get_parameter(f"gate_{name}.weight") for name in ("down", "up"))
    g = torch.sigmoid(up @ (down @ z))
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
    monkeypatch.setattr("imsm_core.training.schedule.epoch_order", lambda count, seed, epoch: list(range(count)))
    settings = replace(SETTINGS, steps=1, batch_size=batch_size, gradient_accumulation=accumulation, max_grad_norm=1e9)
    run(make_siamese(base_folder), settings)
    model = make_siamese(base_folder)
    seen = (EXAMPLES * 2)[: batch_size * accumulation]
    losses = [answer_loss(model, [example], PAD) for example in seen]
    mean = torch.stack([loss for loss, _ in losses]).sum() / sum(tokens for _, tokens in losses)
    by_name = model.trainable_parameters()
    ordered = sorted(by_name, key=lambda name: name.startswith("gate."))  # the adapter's group comes first
    expected = torch.autograd.grad(mean, [by_name[name] for name in ordered])
    torch.testing.assert_close(found, list(expected), atol=1e-5, rtol=1e-3)


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
        model.gate.get_parameter("gate_up.weight")[0, 0] = torch.nan
    with pytest.raises(Diverged, match="the loss is nan at step 1"):
        run(model, partial=tmp_path / "partial")
    assert newest_snapshot(tmp_path / "partial") is None


def test_values_that_are_not_finite_after_the_last_step_are_not_a_result(base_folder: Path) -> None:
    with pytest.raises(Diverged, match="after step 1 the adapter or the gate holds values that are not finite"):
        run(make_siamese(base_folder), replace(SETTINGS, steps=1, weight_decay=1e300))


@pytest.mark.parametrize("kind", ["host", "device", "python"])
def test_memory_that_runs_out_in_a_step_names_the_batch(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def greedy(*arguments: object) -> Tensor:
        if kind == "host":
            return torch.empty(2**58)
        raise torch.OutOfMemoryError("CUDA out of memory") if kind == "device" else MemoryError

    monkeypatch.setattr("imsm_core.training.loop.answer_loss", greedy)
    with pytest.raises(SettingsError, match=r"^batch_size is 2; a step takes more memory than there is"):
        run(make_siamese(base_folder))


def test_another_fault_in_a_step_is_told_as_it_is(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imsm_core.training.loop.answer_loss", lambda *_: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):
        run(make_siamese(base_folder))


# Interruption


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
        with pytest.raises(Interrupted, match=f"interrupted after step {steps} of 6; resume continues from there"):
            run(resumed, partial=tmp_path / "partial")
    assert [path.name for path in (tmp_path / "partial").iterdir()] == [f"snapshot-{steps:08d}"]
    fresh = make_siamese(base_folder, kind, dropout=0.3, seed=99)  # its values must all be replaced
    resumed_metrics = run(fresh, partial=tmp_path / "partial", resume=True)
    assert {k: v for k, v in resumed_metrics.items() if k != "seconds"} == {
        k: v for k, v in metrics.items() if k != "seconds"
    }
    expected, found = trained(whole), trained(fresh)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


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
