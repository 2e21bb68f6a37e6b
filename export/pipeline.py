"""checkpoint -> prepare -> write -> verify -> describe -> ARTIFACT folder, whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedTokenizerBase

from imsm_core.adapter_tokenizer import FoundTokenizer, find_tokenizer
from imsm_core.checkpoint import CheckpointInfo, load_checkpoint
from imsm_core.claims import claimed
from imsm_core.disk import check_room
from imsm_core.errors import SettingsError
from imsm_core.files import publish_folder
from imsm_core.foreign import assemble, find_adapter
from imsm_core.siamese import SiameseModel

from .artifact import GRAPH, MANIFEST, end_tokens, write_graph, write_manifest, write_tokenizer
from .cuda_kernels import CudaKernels, cuda_kernels
from .generation_defaults import generation_defaults
from .passes import finish_quantized, run_passes
from .passes.quantization import Quantized
from .passes.rewrite import Outcome
from .prepare import Prepared, prepare
from .report import (
    Report,
    phase,
    report_added_rows,
    report_cuda_kernels,
    report_other_backbone,
    report_parity,
    report_passes,
    report_quality,
    report_quantized,
    report_tokenizer,
    report_trace,
)
from .settings import TOLERANCES, ExportSettings
from .texts import trained_raw
from .trace import TracedGraph, trace
from .two_stream import TwoStreamStep
from .verification.encoders import compare_encoders
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
    OutputError, CheckpointError, BaseModelError, AdapterError, SettingsError, DataError, UnsupportedError or
    VerificationError, in each case without writing anything at `target`.
    """
    checkpoint, target = Path(checkpoint), Path(target)
    settings = settings or ExportSettings()
    with claimed(target, MANIFEST, force, (checkpoint, base_model, settings.calibrate, settings.eval_data)):
        report(f"load      {checkpoint}")
        with phase("load", report):
            model, info = load_checkpoint(checkpoint, base_model)
            base_model = base_model or info.base_model
            found = find_tokenizer([checkpoint], base_model, info.base_revision)
        settings = for_quantized_backbone(info, settings, report)
        with claimed(target, MANIFEST, force, (base_model,)):
            return _export_with(found, model, info, target, settings, force, report)


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

    gate: its kind; mean_logits needs no weights. gate_from, adapter_name: as `imsm_core.foreign.assemble`. A tokenizer
    or chat template in the folder is used instead of the base model's, and the model gets the rows of its added tokens.
    Raises as `export_checkpoint`.
    """
    adapter, target = Path(adapter), Path(target)
    settings = settings or ExportSettings()
    with claimed(target, MANIFEST, force, (adapter, base_model, gate_from, settings.calibrate, settings.eval_data)):
        report(f"load      {adapter}")
        source = None if gate_from is None else Path(gate_from)
        with phase("load", report):
            found = find_tokenizer([find_adapter(adapter, adapter_name), adapter], base_model)
            model, info = assemble(adapter, base_model, gate, source, adapter_name, found)
        report_added_rows(info.training["added_rows"], report)
        return _export_with(found, model, info, target, settings, force, report)


def _export_with(
    found: FoundTokenizer,
    model: SiameseModel,
    info: CheckpointInfo,
    target: Path,
    settings: ExportSettings,
    force: bool,
    report: Report,
) -> dict[str, Any]:
    """`export_model` with a tokenizer that may be the adapter's own, whose end tokens the artifact gets too."""
    embeddings: Any = model.causal_lm.get_input_embeddings()
    report_tokenizer(found, len(embeddings.weight), report)
    config: Any = model.causal_lm.generation_config
    if found.end_tokens:
        config.eos_token_id = end_tokens(config.eos_token_id, list(found.end_tokens))
    return export_model(model, found.tokenizer, info, target, settings, force, report)


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
    size = smallest_size(model, settings)
    with claimed(target, MANIFEST, force) as place:
        check_room(place.home, size)
        with phase("prepare", report):
            prepared = prepare(model, tokenizer, info, settings, report)
    with publish_folder(target, MANIFEST, force, size) as draft:
        encoder = write_encoder(prepared, draft, report)
        with phase("trace", report):
            written = write(prepared, draft, report)
        with phase("verify", report):
            verified = verify(prepared, written, draft, report)
        manifest = describe(prepared, encoder, written, verified, draft)
    report(f"written   {target}")
    return manifest


def smallest_size(model: SiameseModel, settings: ExportSettings) -> int:
    """Bytes that the backbone's weights take in the artifact at least: no scales, and every matrix quantized."""
    bits = settings.bits or (32 if settings.dtype_name == "float32" else 16)
    adapter = f".{model.peft_model.active_adapter}."  # a part of the name of whatever PEFT adds
    weights = (weight for name, weight in model.causal_lm.named_parameters() if adapter not in f"{name}.")
    return sum(weight.numel() for weight in weights) * bits // 8


def for_quantized_backbone(info: CheckpointInfo, settings: ExportSettings, report: Report) -> ExportSettings:
    """An adapter that was trained against a quantized backbone needs the same one, which is rounded to nearest: the
    settings with that, unless they say otherwise. Raises SettingsError where calibration would change it; warns where
    other settings do."""
    trained = info.quantized_backbone
    if not trained:
        return settings
    if settings.calibrate is not None and settings.bits is not None and settings.kv_cache != "int8":
        rule = "the adapter was trained against the rounded backbone; leave it out"
        raise SettingsError("calibrate", settings.calibrate, rule)
    found = {"precision": settings.precision, "block_size": settings.block_size}
    if found == trained and settings.rounding is None and settings.mean_bits is None:
        settings = replace(settings, rounding="nearest")
    plain = settings.rounds_to_nearest and settings.mean_bits is None
    if found != trained or not settings.symmetric or not plain:
        report_other_backbone(trained, report)
    return settings


@dataclass(frozen=True)
class Encoder:
    """Sections of the manifest: the tokenizer's tokens, how prompts are encoded, and how the model generates by
    default."""

    tokens: dict[str, Any]
    prompts: dict[str, Any]
    generation: dict[str, Any]


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


def write_encoder(prepared: Prepared, folder: Path, report: Report) -> Encoder:
    """Write the tokenizer, and compare what the runtime makes of it with what it was trained with. Raises
    UnsupportedError or VerificationError."""
    raw = trained_raw(prepared.settings, prepared.info)
    tokens = write_tokenizer(prepared.tokenizer, prepared.model.causal_lm, folder, raw)
    compared = compare_encoders(folder, prepared.tokenizer, tokens["special_tokens"])
    report(f"encode    {compared['compared']} texts and conversations get the token ids of training")
    generation = generation_defaults(prepared.model.causal_lm.generation_config, report)
    return Encoder(tokens, {"raw": raw, **compared}, generation)


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
            written.quantized.count_bytes(written.graph.model)
            finished = compare(rounded=True) if settings.verifiable else parity
            if finished is not parity:
                parity.add(finished, ", finished")
    report_passes(passes, report)
    if written.quantized is not None:
        report_quantized(written.quantized, settings, report)
    report_parity(parity, report)
    quality = None
    if prepared.texts.evaluation:
        streams, texts = written.graph.streams, prepared.texts.evaluation
        with phase("quality", report):
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


def describe(
    prepared: Prepared, encoder: Encoder, written: Written, verified: Verified, folder: Path
) -> dict[str, Any]:
    """Write the manifest, which names every other file of `folder`; returns it."""
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
        "prompts": encoder.prompts,
        "generation": encoder.generation,
        "passes": {name: outcome.as_dict() for name, outcome in verified.passes.items()},
        "activation_range": None if prepared.activations is None else prepared.activations.as_dict(),
        "parity": verified.parity.as_dict(),
        "quality": None if quality is None else quality.as_dict(settings.eval_data),
        "cuda_kernels": None if verified.cuda_kernels is None else verified.cuda_kernels.as_dict(),
        "tokens": encoder.tokens,
    }
    return write_manifest(
        folder, written.graph.model, prepared.facts, prepared.plan, prepared.layout, streams, sections
    )
