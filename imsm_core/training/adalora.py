"""Training AdaLoRA: the rank budget shrinks step by step, and a regularization keeps the ranks comparable.

Source: AdaLoRA (arXiv 2303.10512), sections 3.2 and 3.3, with PEFT's rank allocator. PEFT adds the regularization to
the loss that its model computes; IMSM's loss comes after the gate, so it is added here.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..adapters.attach import peft_type
from ..errors import AdapterError, SettingsError

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankAllocation:
    """The rank budget of one training run. `state` and `restore` carry it across an interruption."""

    def __init__(self, peft_model: PeftModel, total_steps: int) -> None:
        """Raises SettingsError if the run is too short for its schedule, AdapterError if there is no rank to remove."""
        self._tuner: Any = peft_model.base_model
        self._name = peft_model.active_adapter
        config: Any = peft_model.peft_config[self._name]
        self._config = config
        if config.tinit == config.tfinal == 0:  # not given: a tenth to warm up, a fifth at the final ranks
            config.tinit, config.tfinal = total_steps // 10, total_steps // 5
        config.total_step = total_steps
        if total_steps - config.tfinal < max(2, config.tinit + 1):
            rule = f"that is too few for AdaLoRA with tinit {config.tinit} and tfinal {config.tfinal}"
            raise SettingsError("steps", total_steps, rule)
        if config.init_r <= config.target_r:
            raise AdapterError(f"AdaLoRA's init_r is {config.init_r}; it must be above target_r, {config.target_r}")

    def advance(self, step: int) -> None:
        """After optimizer step number `step` (from 1), before its gradients are cleared."""
        for parameter in self._parameters():
            if parameter.grad is None:  # a layer that no token reached in this step
                parameter.grad = torch.zeros_like(parameter)
        self._tuner.update_and_allocate(step)

    def regularization(self) -> Tensor:
        """orth_reg_weight times the mean of |A A^T - I| and |B^T B - I| over the layers (Frobenius norms)."""
        norms = []
        for name, parameter in self._tuner.named_parameters():
            if f".lora_A.{self._name}" in name:
                norms.append(_distance_to_identity(parameter @ parameter.T))
            elif f".lora_B.{self._name}" in name:
                norms.append(_distance_to_identity(parameter.T @ parameter))
        mean: Tensor = self._config.orth_reg_weight * torch.stack(norms).mean()
        return mean

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The importance scores as tensors, and the ranks kept so far as JSON values."""
        allocator = self._tuner.rankallocator
        tensors = {
            f"{score}/{name}": value.detach().cpu()
            for score in _SCORES
            for name, value in getattr(allocator, score).items()
        }
        return tensors, {"rank_pattern": self._config.rank_pattern}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        allocator, device = self._tuner.rankallocator, self._parameters()[0].device
        for score in _SCORES:
            found = {
                name.partition("/")[2]: t.to(device) for name, t in tensors.items() if name.startswith(f"{score}/")
            }
            setattr(allocator, score, found)
        self._config.rank_pattern = values["rank_pattern"]

    def _parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self._tuner.named_parameters() if ".lora_" in name and p.requires_grad]


def rank_allocation(peft_model: PeftModel, total_steps: int) -> RankAllocation | None:
    """The rank budget of a run that trains AdaLoRA, None for every other method."""
    if peft_type(peft_model.peft_config[peft_model.active_adapter]) != "ADALORA":
        return None
    return RankAllocation(peft_model, total_steps)


def _distance_to_identity(square: Tensor) -> Tensor:
    distance: Tensor = torch.linalg.matrix_norm(square - torch.eye(len(square), device=square.device))
    return distance
