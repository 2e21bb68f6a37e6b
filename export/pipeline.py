"""checkpoint -> trace -> passes -> files -> verification -> ARTIFACT folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from imsm_core.adapters import virtual_tokens as prompts
from imsm_core.adapters.biases import original_biases
from imsm_core.backbone import load_tokenizer
from imsm_core.checkpoint import CheckpointInfo, load_checkpoint
from imsm_core.files import publish_folder, refuse_existing
from imsm_core.foreign import assemble
from imsm_core.siamese import SiameseModel

from .adapters import base_layers, replaced_layers, two_stream_layers
from .adapters.report import check_delta_size, describe_adapter, report_adapter
from .artifact import MANIFEST, dtype_name, write_graph, write_manifest, write_tokenizer
from .attention.kv_scales import find_scales
from .attention.plan import plan_attention
from .errors import UnsupportedError
from .model_facts import model_facts
from .passes import finish_quantized, run_passes
from .passes.quantization import Quantization, Quantized
from .passes.quantized_matmul import has_operator
from .quantization.gptq import calibrated_weights
from .quantization.precision import (
    FLOATS,
    PRECISIONS,
    WEIGHT_BITS,
    computing_in,
    rounded_experts,
    rounded_to,
    rounded_weights,
)
from .quantization.weight_format import check_format
from .streams import StreamLayout
from .trace import trace
from .trunk import trunk_length
from .two_stream import TwoStreamStep
from .verification.measure import evaluate
from .verification.parity import ParityReport, verify_graph
from .verification.quality import THRESHOLD, QualityReport, quality_warnings, read_eval_texts
from .virtual_tokens import save_virtual_cache, virtual_cache

Report = Callable[[str], None]
KV_CACHES = ("float", "int8")
CALIBRATION_TEXTS = 64
RANDOM_TEXTS, RANDOM_TOKENS = 8, 64
HALF_TOLERANCE = 0.05


@dataclass(frozen=True)
class ExportSettings:
    """precision: fp32, fp16 or bf16, or int8 or int4 weights of the backbone, whose activations are `activations`
    (fp32, fp16 or bf16). block_size, symmetric: of int8 and int4. calibrate: texts (JSONL) to quantize with GPTQ on,
    None rounds to nearest. kv_cache: float, or int8 for a quarter of the caches' memory. eval_data: held-out texts
    (JSONL) to measure the quality on, `eval_texts` of them; a perplexity that rises by more than
    `max_perplexity_change` is warned of. portable: one attention node per stream, for execution providers other than
    the CPU's; None: where activations are not fp32. context_length: None is the model's own. base_only: one stream
    without adapter and gate, for comparing. max_delta_mb: the most that changes stored as whole matrices may take, in
    10^6 bytes; None is any size."""

    precision: str = "fp32"
    activations: str | None = None
    block_size: int = 32
    symmetric: bool = True
    calibrate: Path | None = None
    kv_cache: str = "float"
    eval_data: Path | None = None
    eval_texts: int = 64
    max_perplexity_change: float = THRESHOLD
    portable: bool | None = None
    context_length: int | None = None
    base_only: bool = False
    max_delta_mb: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UnsupportedError(f"unknown precision {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.activations is not None and self.precision in FLOATS:
            raise UnsupportedError(f"activations go with int8 and int4 weights; {self.precision} has its own")
        if self.activations is not None and self.activations not in FLOATS:
            raise UnsupportedError(f"unknown activations {self.activations!r}; choose one of {', '.join(FLOATS)}")
        if self.bits is not None:
            check_format(self.bits, self.block_size)
        if self.calibrate is not None and self.bits is None and self.kv_cache != "int8":
            raise UnsupportedError("calibration goes with int8 and int4 weights, and with int8 caches")
        if self.eval_data is not None and not self.runs_here:
            raise UnsupportedError("the quality of bf16 cannot be measured: onnxruntime's CPU provider has no bfloat16")
        if self.kv_cache not in KV_CACHES:
            raise UnsupportedError(f"unknown cache {self.kv_cache!r}; choose one of {', '.join(KV_CACHES)}")
        if self.max_delta_mb is not None and not self.max_delta_mb >= 0:
            raise UnsupportedError(f"--max-delta-mb is {self.max_delta_mb:g}; it must be a number from 0 on")

    @property
    def bits(self) -> int | None:
        """Bits of the backbone's weights, where they are quantized."""
        return WEIGHT_BITS.get(self.precision)

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone computes in."""
        return FLOATS[self.precision if self.bits is None else self.activations or "fp32"]

    @property
    def runs_here(self) -> bool:
        """Whether onnxruntime's CPU provider can run it, on which exports are verified: it has no bfloat16."""
        return self.dtype != torch.bfloat16

    @property
    def tolerance(self) -> float | None:
        """Of the comparison with PyTorch, absolute and relative to the largest value; None: float32's own."""
        return None if self.dtype == torch.float32 else HALF_TOLERANCE

    @property
    def one_node_per_stream(self) -> bool:
        """Whether the graph is in the portable form."""
        return self.dtype != torch.float32 if self.portable is None else self.portable


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    settings: ExportSettings | None = None,
    base_model: str | None = None,
    force: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Export a CHECKPOINT folder; returns the manifest.

    base_model: where the base model is now, if not where the checkpoint says. Raises OutputExistsError,
    CheckpointError, BaseModelError, AdapterError, UnsupportedError or VerificationError, in each case without writing
    anything at `target`.
    """
    refuse_existing(target, MANIFEST, force)
    report(f"load      {checkpoint}")
    model, info = load_checkpoint(checkpoint, base_model)
    tokenizer = load_tokenizer(base_model or info.base_model, info.base_revision)
    settings = settings or ExportSettings()
    check_quantized_backbone(info, settings, report)
    return export_model(model, tokenizer, info, target, settings, force, report)


def export_adapter(
    adapter: Path,
    base_model: str,
    target: Path,
    gate: str = "mean_logits",
    gate_from: Path | None = None,
    adapter_name: str | None = None,
    settings: ExportSettings | None = None,
    force: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Export a PEFT adapter folder that was trained anywhere, and a gate; returns the manifest.

    gate: its kind; mean_logits needs no weights. gate_from, adapter_name: as `imsm_core.foreign.assemble`. Raises as
    `export_checkpoint`.
    """
    refuse_existing(target, MANIFEST, force)
    report(f"load      {adapter}")
    tokenizer = load_tokenizer(base_model)
    model, info = assemble(adapter, base_model, gate, gate_from, adapter_name)
    return export_model(model, tokenizer, info, target, settings or ExportSettings(), force, report)


def export_model(
    model: SiameseModel,
    tokenizer: PreTrainedTokenizerBase,
    info: CheckpointInfo,
    target: Path,
    settings: ExportSettings,
    force: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Export a siamese model in memory (CPU, float32); returns the manifest. Raises as `export_checkpoint`."""
    model.eval()
    # 1. What can be refused is refused before the long work.
    causal_lm = model.causal_lm
    virtual_tokens = 0 if settings.base_only else prompts.virtual_tokens(model.peft_model)
    facts = model_facts(causal_lm, settings.context_length, virtual_tokens)
    if virtual_tokens and (settings.dtype == torch.bfloat16 or settings.kv_cache == "int8"):
        raise UnsupportedError("caches that begin with virtual tokens are float32 or float16, not bf16 or int8")
    texts = _read_texts(settings, tokenizer, facts.context_length)
    with replaced_layers(causal_lm, base_layers(model.peft_model)):
        plan = plan_attention(causal_lm, facts.layers, facts.context_length + virtual_tokens)
    model.check_forward()
    with original_biases(model.peft_model):
        layers = base_layers(model.peft_model) if settings.base_only else two_stream_layers(model.peft_model)
    virtual = virtual_cache(model, plan) if virtual_tokens else {}
    adapter = None if settings.base_only else describe_adapter(info.peft_type, layers, virtual)
    if adapter is not None:
        report_adapter(adapter, causal_lm, report)
        check_delta_size(adapter, settings.max_delta_mb)
    trunk = 0 if settings.base_only or virtual_tokens else trunk_length(causal_lm, facts.layers, layers)
    layout = StreamLayout(1 if settings.base_only else 2, trunk, settings.one_node_per_stream)
    # 2. What is found out on texts.
    scales = find_scales(model, plan, texts.scales) if settings.kv_cache == "int8" else None
    quantization = None
    if settings.bits is not None:
        format_ = (settings.bits, settings.block_size, settings.symmetric)
        calibrated = calibrated_weights(model, texts.calibration, *format_, report) if texts.calibration else {}
        own = not layout.portable and settings.dtype == torch.float32 and has_operator(*format_[:2])
        quantization = Quantization(*format_, calibrated, experts=not layout.portable, half_scales=own)
    with publish_folder(target, MANIFEST, force) as draft:
        # 3. Trace, rewrite, write.
        shared = f", the first {trunk} shared by both streams" if trunk else ""
        report(f"trace     {facts.architecture}, {facts.layers} layers{shared}, rotary: {plan.rotary.mode}")
        with _as_traced(model, layers, settings.dtype):
            gate = None if settings.base_only else model.gate
            step = TwoStreamStep(causal_lm, gate, plan, layout, virtual_tokens, scales)
            traced = trace(step.eval())
            outcomes, quantized = run_passes(traced.model, quantization)
            write_graph(traced.model, draft)
        save_virtual_cache(virtual, draft)
        # 4. Verify what was written, against the weights that it has.
        rounded = quantized or Quantized()
        with (
            rounded_to(causal_lm, settings.dtype),
            rounded_weights(causal_lm, rounded.weights),
            rounded_experts(
                causal_lm, rounded.expert_weights, settings.bits or 0, settings.block_size, settings.symmetric
            ),
        ):
            compare = partial(verify_graph, draft, model, traced.streams, facts.context_length)
            int8_cache = settings.kv_cache == "int8"
            parity = compare(settings.tolerance, int8_cache) if settings.runs_here else ParityReport(HALF_TOLERANCE)
            if quantized is not None:  # and then its fast and small form, which is not PyTorch's to 1e-4 any more
                outcomes |= finish_quantized(traced.model, own_operators=not layout.portable)
                with _as_traced(model, layers, settings.dtype):
                    write_graph(traced.model, draft)
                finished = compare(settings.tolerance, rounded=True) if settings.runs_here else parity
                parity.differences |= {f"{way}, finished": found for way, found in finished.differences.items()}
        for name, outcome in outcomes.items():
            for line in outcome.lines(name):
                report(line)
        if quantized is not None:
            report_quantized(quantized, settings, report)
        report_parity(parity, report)
        quality = None
        if texts.evaluation:
            quality = evaluate(draft, model, traced.streams, texts.evaluation)
            report_quality(quality, settings, report)
        # 5. Describe it.
        sections = {
            "precision": settings.precision,
            "activations": dtype_name(settings.dtype),
            "quantization": None if quantized is None or quantization is None else quantized.as_dict(quantization),
            "kv_cache": settings.kv_cache,
            "gate": None if settings.base_only else {"kind": info.gate_kind, "rank": info.gate_rank},
            "adapter": adapter,
            "virtual_tokens": dict(zip(traced.streams, (0, virtual_tokens), strict=False)),
            "base_model": {
                "name": info.base_model,
                "revision": info.base_revision,
                "fingerprint": info.base_fingerprint,
            },
            "training": info.training,
            "passes": {name: outcome.as_dict() for name, outcome in outcomes.items()},
            "parity": parity.as_dict(),
            "quality": None if quality is None else quality.as_dict(),
            "tokens": write_tokenizer(tokenizer, causal_lm, draft),
        }
        manifest = write_manifest(draft, traced.model, facts, plan, layout, traced.streams, sections)
    report(f"written   {target}")
    return manifest


def check_quantized_backbone(info: CheckpointInfo, settings: ExportSettings, report: Report) -> None:
    """An adapter that was trained against a quantized backbone wants the same one. Raises UnsupportedError where
    calibration would make another one of it; a warning says where the settings do."""
    trained = info.quantized_backbone
    if not trained:
        return
    if settings.calibrate is not None and settings.bits is not None:
        raise UnsupportedError("the adapter was trained against the rounded backbone; leave --calibrate out")
    found = {"precision": settings.precision, "block_size": settings.block_size}
    if found != trained or not settings.symmetric:
        report(
            f"warning   the adapter was trained against a backbone of {trained['precision']} in blocks of "
            f"{trained['block_size']}, symmetric; this export has another one"
        )


@dataclass(frozen=True)
class _Texts:
    """Token ids: to calibrate weights on, to find the scales of int8 caches on, and to measure the quality on."""

    calibration: list[list[int]]
    scales: list[list[int]]
    evaluation: list[list[int]]


def _read_texts(settings: ExportSettings, tokenizer: PreTrainedTokenizerBase, context_length: int) -> _Texts:
    def read(path: Path | None, limit: int) -> list[list[int]]:
        return [] if path is None else read_eval_texts(path, tokenizer, context_length, limit)

    given = read(settings.calibrate, CALIBRATION_TEXTS)
    # The scales of int8 caches fit random tokens too: what is past a scale is cut off, and anything may be asked.
    generator = np.random.default_rng(0)
    length = min(context_length, RANDOM_TOKENS)
    wild = [generator.integers(0, len(tokenizer), length).tolist() for _ in range(RANDOM_TEXTS)]
    calibration = given if settings.bits is not None else []
    return _Texts(calibration, given + wild, read(settings.eval_data, settings.eval_texts))


@contextmanager
def _as_traced(model: SiameseModel, layers: dict[str, nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Inside the block the causal LM has its two-stream forms and computes in `dtype`. The weights are written there
    too: a traced graph only refers to them."""
    with (
        original_biases(model.peft_model),
        replaced_layers(model.causal_lm, layers),
        computing_in(model.causal_lm, dtype),
    ):
        yield


def report_quantized(done: Quantized, settings: ExportSettings, report: Report) -> None:
    """One line, and one more where large matrices of the backbone stayed in floating point."""
    embeddings = " and the embeddings" if done.embeddings else ""
    experts = f" and the experts of {done.experts} layers" if done.experts else ""
    how = f", {done.calibrated} of them calibrated" if done.calibrated else ""
    report(
        f"quantize  {done.matrices} matrices{embeddings}{experts} to {settings.precision}, "
        f"blocks of {settings.block_size}{how}: {done.bytes_before / 1e6:.1f} -> {done.bytes_after / 1e6:.1f} MB"
    )
    if done.kept:
        size = sum(done.kept.values()) / 1e6
        report(f"quantize  {len(done.kept)} weights stay as they are ({size:.1f} MB), such as {next(iter(done.kept))}")


def report_quality(quality: QualityReport, settings: ExportSettings, report: Report) -> None:
    """One line, and one for each warning."""
    report(
        f"quality   {quality.tokens} tokens: perplexity {quality.perplexity_reference:.4g} -> {quality.perplexity:.4g} "
        f"({quality.perplexity_change:+.2%}), argmax agreement {quality.argmax_agreement:.2%}, "
        f"mean KL {quality.mean_kl:.2g} nats"
    )
    for warning in quality_warnings(quality, settings.max_perplexity_change):
        report(f"warning   {warning}")


def report_parity(parity: ParityReport, report: Report) -> None:
    """One line per way of computing."""
    if not parity.differences:
        report("verify    not verified: onnxruntime's CPU provider has no bfloat16; run `verify` where there is one")
        return
    for way, differences in parity.differences.items():
        worst = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        report(f"verify    {way}: largest difference from PyTorch: {worst}")
    report(f"verify    greedy tokens equal: {parity.greedy_tokens_equal} of {parity.decode_steps}")
