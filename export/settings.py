"""The settings of an export, which are also the options of `export`. Imports without PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from imsm_core.checks import check_fields
from imsm_core.choices import check_block_size, one_of
from imsm_core.errors import SettingsError

from .choices import (
    AUTO,
    FLOATS,
    KV_CACHES,
    LARGEST_PERPLEXITY_CHANGE,
    MAX_KL,
    MEAN_BITS,
    PRECISIONS,
    ROUNDINGS,
    WEIGHT_BITS,
)

TOLERANCES = {"float16": 0.05, "bfloat16": 0.25}
"""Of half precision. On tiny random models of Llama, Gemma 3, Qwen3 and GPT-2 PyTorch's own float16 is up to
0.011 from its float32 (over 1 + the largest value), and its bfloat16, which rounds 8 times as much, up to 0.077; a
wrong tensor changes values by about their size."""


@dataclass(frozen=True)
class ExportSettings:
    """precision: fp32, fp16 or bf16, or int8 or int4 weights of the backbone, whose activations are `activations`
    (fp32, fp16 or bf16); or "auto", the fewest bits a weight whose KL to float32 is at most `max_kl`. block_size,
    symmetric: of int8 and int4. rounding: "best", weights of 4, 5, 6 or 8 bits by what their rounding costs, or
    "nearest", to the nearest value and, without `mean_bits`, all of them in the precision's bits; None is best for int4
    and auto, and for int8 nearest unless there are texts. mean_bits: of the layers' weights of int4, on average; None
    is MEAN_BITS. calibrate: texts for "best" beside those that the model writes by itself. kv_cache: float, or int8 for
    a quarter of the caches' memory. eval_data: held-out texts to measure the quality on, `eval_texts` of them; it warns
    of a perplexity that rises by more than `max_perplexity_change`. prompt_field, answer_field: where their rows have
    prompts and answers, None as the adapter was trained; raw: whether prompts are plain text, here and in the artifact,
    None as the adapter was trained; skip_bad_rows: count rows that cannot be used instead of stopping at the first.
    portable: one attention node per stream, for execution providers other than the CPU's; None: where activations are
    not fp32. context_length: in tokens; None is the model's own. base_only: one stream without adapter and gate, for
    comparing. max_delta_mb: the most that changes stored as whole matrices may take, in 10^6 bytes; None is any size.
    verify_on: the execution provider that runs the graph to verify it and to measure its quality; the CPU's cannot run
    bf16, which is then not verified.

    Raises SettingsError for a value of another type or outside its range and for settings that contradict each other.
    """

    precision: str = field(
        default="fp32",
        metadata={
            "help": "fp32, fp16, bf16, or int8 or int4 weights of the backbone (adapter and gate stay in floating "
            "point), or auto: the smallest that keeps --max-kl",
            "metavar": "NAME",
        },
    )
    activations: str | None = field(
        default=None,
        metadata={
            "help": "what int8 and int4 models compute in: fp32 (the default), or fp16 or bf16 for a GPU",
            "metavar": "NAME",
        },
    )
    block_size: int = field(
        default=32, metadata={"help": "weights that share a scale in int8 and int4", "metavar": "N"}
    )
    symmetric: bool = field(
        default=True, metadata={"help": "a zero point for every block in int8 and int4", "option": "--asymmetric"}
    )
    rounding: str | None = field(
        default=None,
        metadata={
            "help": "best: weights of int4 have 4, 5, 6 or 8 bits by what their rounding costs; nearest: quick, all "
            "the same; without it best, and nearest for int8",
            "metavar": "NAME",
        },
    )
    mean_bits: float | None = field(
        default=None,
        metadata={
            "help": f"bits a weight of the layers of int4 has on average, from 4 to 8; without it {MEAN_BITS}",
            "metavar": "X",
        },
    )
    max_kl: float = field(
        default=MAX_KL,
        metadata={"help": "the KL to float32 that --precision auto keeps, in nats a token", "metavar": "X"},
    )
    calibrate: Path | None = field(
        default=None,
        metadata={"help": "texts to round with, beside those that the model writes by itself", "metavar": "FILE"},
    )
    kv_cache: str = field(
        default="float",
        metadata={
            "help": "float, or int8: caches of a quarter of the size; --calibrate gives the texts for its scales",
            "metavar": "NAME",
        },
    )
    eval_data: Path | None = field(
        default=None,
        metadata={"help": "measure the quality against fp32 on held-out texts", "metavar": "FILE"},
    )
    eval_texts: int = field(default=64, metadata={"help": "how many texts of --eval-data to use", "metavar": "N"})
    max_perplexity_change: float = field(
        default=LARGEST_PERPLEXITY_CHANGE,
        metadata={"help": "warn if the perplexity on --eval-data rises by more than this share", "metavar": "X"},
    )
    prompt_field: str | None = field(
        default=None,
        metadata={
            "help": "the field with the prompt in --eval-data and --calibrate; without it the checkpoint's, else the "
            "first row decides",
            "metavar": "NAME",
        },
    )
    answer_field: str | None = field(
        default=None, metadata={"help": "the field with the answer there; as for the prompt", "metavar": "NAME"}
    )
    raw: bool | None = field(
        default=None,
        metadata={"help": "prompts are plain text, without the chat template; without it as the adapter was trained"},
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "leave out and count rows that cannot be used, instead of stopping at the first"},
    )
    portable: bool | None = field(
        default=None,
        metadata={
            "help": "for onnxruntime 1.20 to 1.31 and providers other than cpu; fp16 and bf16 are always in this form"
        },
    )
    context_length: int | None = field(
        default=None, metadata={"help": "a shorter context than the model's, for smaller tables", "metavar": "N"}
    )
    base_only: bool = field(default=False, metadata={"help": "export the base stream alone, to compare with"})
    max_delta_mb: float | None = field(
        default=None,
        metadata={
            "help": "refuse an adapter whose changes, stored as whole matrices, would take more than this",
            "metavar": "MB",
        },
    )

    verify_on: str = field(
        default="cpu",
        metadata={
            "help": "execution provider that verifies the graph: cpu, cuda, ...; cpu cannot run bf16",
            "metavar": "NAME",
        },
    )

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("precision", self.precision, PRECISIONS)
        if self.activations is not None:
            if self.precision in FLOATS:
                rule = f"it needs int8 or int4 weights, and {{precision}} is {self.precision}"
                raise SettingsError("activations", self.activations, rule)
            one_of("activations", self.activations, tuple(FLOATS))
        if self.bits is not None:
            check_block_size(self.block_size)
        self._check_rounding()
        one_of("kv_cache", self.kv_cache, KV_CACHES)
        if self.calibrate is not None and self.bits is None and self.kv_cache != "int8":
            rule = "calibration needs int8 or int4 weights ({precision}) or int8 caches ({kv_cache})"
            raise SettingsError("calibrate", self.calibrate, rule)
        if self.eval_data is not None and not self.verifiable:
            rule = "the quality of bf16 cannot be measured on the CPU provider; name another one with {verify_on}"
            raise SettingsError("eval_data", self.eval_data, rule)
        if self.eval_data is None and self.calibrate is None:
            for name in ("prompt_field", "answer_field", "skip_bad_rows"):
                if getattr(self, name) not in (None, False):
                    raise SettingsError(name, getattr(self, name), "it needs {eval_data} or {calibrate}")
        if self.eval_texts < 1:
            raise SettingsError("eval_texts", self.eval_texts, "it must be at least 1")
        if math.isnan(self.max_perplexity_change):
            raise SettingsError("max_perplexity_change", self.max_perplexity_change, "it must be a number")
        if self.max_delta_mb is not None and not self.max_delta_mb >= 0:  # nor "not a number"
            raise SettingsError("max_delta_mb", self.max_delta_mb, "it must be a number, at least 0")

    def _check_rounding(self) -> None:
        if self.rounding is not None:
            one_of("rounding", self.rounding, ROUNDINGS)
            if self.bits is None:
                raise SettingsError("rounding", self.rounding, "it needs int8 or int4 weights ({precision})")
        if self.rounding == "nearest" and self.calibrate is not None and self.kv_cache != "int8":
            raise SettingsError("calibrate", self.calibrate, "rounding to nearest uses no texts ({rounding})")
        if self.mean_bits is not None:
            if self.precision != "int4":
                raise SettingsError("mean_bits", self.mean_bits, "it is of int4 ({precision})")
            if not 4 <= self.mean_bits <= 8:
                raise SettingsError("mean_bits", self.mean_bits, "it must be a number from 4 to 8")
        if self.precision == AUTO and self.rounds_to_nearest:
            raise SettingsError("rounding", self.rounding, "auto chooses among weights that are rounded best")
        if not self.max_kl > 0:
            raise SettingsError("max_kl", self.max_kl, "it must be a number above 0")
        if self.max_kl != MAX_KL and self.precision != AUTO:
            raise SettingsError("max_kl", self.max_kl, f"it is of {{precision}} {AUTO}")

    @property
    def rounds_to_nearest(self) -> bool:
        """Whether weights have their nearest values."""
        if self.rounding is None:
            return self.precision == "int8" and self.calibrate is None
        return self.rounding == "nearest"

    @property
    def bits(self) -> int | None:
        """The fewest bits of the backbone's weights, where they are quantized."""
        return WEIGHT_BITS.get(self.precision)

    @property
    def dtype_name(self) -> str:
        """What the backbone computes in: float32, float16 or bfloat16."""
        return FLOATS[self.precision if self.bits is None else self.activations or "fp32"]

    @property
    def verifiable(self) -> bool:
        """Whether `verify_on` can run it: onnxruntime's CPU provider has no bfloat16."""
        return self.dtype_name != "bfloat16" or self.verify_on != "cpu"

    @property
    def tolerance(self) -> float | None:
        """Of the comparison with PyTorch, absolute and relative to the largest value; None: float32's own."""
        return TOLERANCES.get(self.dtype_name)

    @property
    def one_node_per_stream(self) -> bool:
        """Whether the graph is in the portable form."""
        return self.dtype_name != "float32" if self.portable is None else self.portable
