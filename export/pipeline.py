"""checkpoint -> prepare -> write -> verify -> describe -> ARTIFACT folder, whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedTokenizerBase

from imsm_core.backbone import load_tokenizer
from imsm_core.checkpoint import CheckpointInfo, load_checkpoint
from imsm_core.errors import SettingsError
from imsm_core.files import publish_folder, refuse_existing
from imsm_core.foreign import assemble
from imsm_core.siamese import SiameseModel

from .artifact import GRAPH, MANIFEST, write_graph, write_manifest, write_tokenizer
from .cuda_kernels import CudaKernels, cuda_kernels
from .passes import finish_quantized, run_passes
from .passes.quantization import Quantized
from .passes.rewrite import Outcome
from .prepare import Prepared, prepare
from .report import (
    Report,
    report_cuda_kernels,
    report_other_backbone,
    report_parity,
    report_passes,
    report_quality,
    report_quantized,
    report_trace,
)
from .settings import TOLERANCES, ExportSettings
from .texts import trained_raw
from .trace import TracedGraph, trace
from .two_stream import TwoStreamStep
from .verification.measure import evaluate
from .verification.parity import ParityReport, verify_graph
from .verification.quality import QualityReport
from .virtual_tokens import save_virtual_cache


def export_checkpoint(
    checkpoint: Path | str,
    target: Path | str,
    settings: ExportSettings | None = None,
    base_model: str | None = None,
    force: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Export a CHECKPOINT folder; returns the manifest.

    base_model: where the base model is now, if not where the checkpoint says. Raises OutputExistsError,
    CheckpointError, BaseModelError, AdapterError, SettingsError, DataError, UnsupportedError or VerificationError, in
    each case without writing anything at `target`.
    """
    checkpoint, target = Path(checkpoint), Path(target)
    refuse_existing(target, MANIFEST, force)
    report(f"load      {checkpoint}")
    model, info = load_checkpoint(checkpoint, base_model)
    tokenizer = load_tokenizer(base_model or info.base_model, info.base_revision)
    settings = settings or ExportSettings()
    check_quantized_backbone(info, settings, report)
    return export_model(model, tokenizer, info, target, settings, force, report)


def export_adapter(
    adapter: Path | str,
    base_model: str,
    target: Path | str,
    gate: str = "mean_logits",
    gate_from: Path | str | None = None,
    adapter_name: str | None = None,
    settings: ExportSettings | None = None,
    force: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Export a PEFT adapter folder that was trained anywhere, and a gate; returns the manifest.

    gate: its kind; mean_logits needs no weights. gate_from, adapter_name: as `imsm_core.foreign.assemble`. Raises as
    `export_checkpoint`.
    """
    adapter, target = Path(adapter), Path(target)
    refuse_existing(target, MANIFEST, force)
    report(f"load      {adapter}")
    tokenizer = load_tokenizer(base_model)
    source = None if gate_from is None else Path(gate_from)
    model, info = assemble(adapter, base_model, gate, source, adapter_name)
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
    prepared = prepare(model, tokenizer, info, settings, report)
    with publish_folder(target, MANIFEST, force) as draft:
        written = write(prepared, draft, report)
        verified = verify(prepared, written, draft, report)
        manifest = describe(prepared, written, verified, draft)
    report(f"written   {target}")
    return manifest


def check_quantized_backbone(info: CheckpointInfo, settings: ExportSettings, report: Report) -> None:
    """An adapter that was trained against a quantized backbone needs the same one. Raises SettingsError where
    calibration would change it; warns where other settings do."""
    trained = info.quantized_backbone
    if not trained:
        return
    if settings.calibrate is not None and settings.bits is not None:
        rule = "the adapter was trained against the rounded backbone; leave it out"
        raise SettingsError("calibrate", settings.calibrate, rule)
    found = {"precision": settings.precision, "block_size": settings.block_size}
    if found != trained or not settings.symmetric:
        report_other_backbone(trained, report)


@dataclass(frozen=True)
class Written:
    """The graph whose file is in the folder, what each pass did, and what was quantized (None: nothing)."""

    graph: TracedGraph
    passes: dict[str, Outcome]
    quantized: Quantized | None


@dataclass(frozen=True)
class Verified:
    """passes: of the published graph. quality: None without texts to measure it on. cuda_kernels: None for graphs that
    compute in float32, which are not for GPUs."""

    passes: dict[str, Outcome]
    parity: ParityReport
    quality: QualityReport | None
    cuda_kernels: CudaKernels | None


def write(prepared: Prepared, folder: Path, report: Report) -> Written:
    """Trace, rewrite, and write the graph and its weights into `folder`. What is written computes what PyTorch computes
    with the same weights, up to the order of sums: products of a quantized graph do not round their activations yet."""
    report_trace(prepared.facts, prepared.plan, prepared.layout, report)
    model = prepared.model
    with prepared.as_traced():
        step = TwoStreamStep(
            model.causal_lm,
            None if prepared.settings.base_only else model.gate,
            prepared.plan,
            prepared.layout,
            prepared.virtual_tokens,
            prepared.kv_scales,
        )
        graph = trace(step.eval())
        passes, quantized = run_passes(graph.model, prepared.quantization)
        write_graph(graph.model, folder)
    save_virtual_cache(prepared.virtual, folder)
    return Written(graph, passes, quantized)


def verify(prepared: Prepared, written: Written, folder: Path, report: Report) -> Verified:
    """Compare the graph in `folder` with PyTorch, which gets the file's weights for it. A quantized graph then gets
    its fast and small form, which rounds activations, and is compared again; what is left in `folder` is what is
    published. Measures the quality against the original weights. Raises VerificationError."""
    settings, passes = prepared.settings, dict(written.passes)
    compare = partial(
        verify_graph,
        folder,
        prepared.model,
        written.graph.streams,
        prepared.facts.context_length,
        settings.tolerance,
        provider=settings.verify_on,
    )
    parity = ParityReport(TOLERANCES["bfloat16"])
    with prepared.with_weights_of(written.quantized or Quantized()):
        if settings.verifiable:
            parity = compare(rounded=settings.kv_cache == "int8")
        if written.quantized is not None:
            passes |= finish(prepared, written, folder)
            finished = compare(rounded=True) if settings.verifiable else parity
            parity.differences |= {f"{way}, finished": found for way, found in finished.differences.items()}
    report_passes(passes, report)
    if written.quantized is not None:
        report_quantized(written.quantized, settings, report)
    report_parity(parity, report)
    quality = None
    if prepared.texts.evaluation:
        streams, texts = written.graph.streams, prepared.texts.evaluation
        quality = evaluate(folder, prepared.model, streams, texts, settings.verify_on, report)
        report_quality(quality, settings, report)
    kernels = None
    if settings.dtype_name != "float32":
        kernels = cuda_kernels(ir.load(folder / GRAPH))
        report_cuda_kernels(kernels, report)
    return Verified(passes, parity, quality, kernels)


def finish(prepared: Prepared, written: Written, folder: Path) -> dict[str, Outcome]:
    """Give a quantized graph its fast and small form, which rounds activations, and write it again; returns what each
    pass did."""
    passes = finish_quantized(written.graph.model, own_operators=not prepared.layout.portable)
    with prepared.as_traced():
        write_graph(written.graph.model, folder)
    return passes


def describe(prepared: Prepared, written: Written, verified: Verified, folder: Path) -> dict[str, Any]:
    """Write the tokenizer, and last of all the manifest, which names every other file of `folder`; returns it."""
    info, settings, quantization = prepared.info, prepared.settings, prepared.quantization
    quantized, quality, streams = written.quantized, verified.quality, written.graph.streams
    sections = {
        "precision": settings.precision,
        "activations": settings.dtype_name,
        "quantization": None if quantized is None or quantization is None else quantized.as_dict(quantization),
        "kv_cache": settings.kv_cache,
        "gate": None if settings.base_only else {"kind": info.gate_kind, "rank": info.gate_rank},
        "adapter": prepared.adapter,
        "virtual_tokens": dict(zip(streams, (0, prepared.virtual_tokens), strict=False)),
        "base_model": {
            "name": info.base_model,
            "revision": info.base_revision,
            "fingerprint": info.base_fingerprint,
        },
        "training": info.training,
        "prompts": {"raw": trained_raw(settings, info)},
        "passes": {name: outcome.as_dict() for name, outcome in verified.passes.items()},
        "activation_range": None if prepared.activations is None else prepared.activations.as_dict(),
        "parity": verified.parity.as_dict(),
        "quality": None if quality is None else quality.as_dict(),
        "cuda_kernels": None if verified.cuda_kernels is None else verified.cuda_kernels.as_dict(),
        "tokens": write_tokenizer(prepared.tokenizer, prepared.model.causal_lm, folder),
    }
    return write_manifest(
        folder, written.graph.model, prepared.facts, prepared.plan, prepared.layout, streams, sections
    )
