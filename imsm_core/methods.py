"""The PEFT methods that training offers, with the paper's defaults. One line here adds one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peft import LoraConfig, PeftConfig

from .errors import AdapterError


def _lora(rank: int, alpha: int, dropout: float, target_modules: str | list[str]) -> PeftConfig:
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )


PEFT_METHODS: dict[str, Callable[[int, int, float, str | list[str]], PeftConfig]] = {"lora": _lora}


def peft_config(
    method: str, rank: int = 16, alpha: int = 16, dropout: float = 0.1, target_modules: Sequence[str] | None = None
) -> PeftConfig:
    """The PEFT config of `method` on `target_modules` (None: every linear layer but the lm_head).

    Defaults are the authors' released ones. Raises AdapterError for a method that training does not offer.
    """
    if method not in PEFT_METHODS:
        raise AdapterError(f"unsupported PEFT method {method!r}; choose one of {', '.join(PEFT_METHODS)}")
    if rank < 1:
        raise AdapterError(f"adapter rank is {rank}; it must be at least 1")
    if not alpha > 0:
        raise AdapterError(f"adapter alpha is {alpha}; it must be above 0")
    if not 0 <= dropout < 1:
        raise AdapterError(f"adapter dropout is {dropout}; it must be in [0, 1)")
    return PEFT_METHODS[method](rank, alpha, dropout, list(target_modules) if target_modules else "all-linear")
