"""What an export reports: a line for each thing, beginning with the name of its step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from imsm_core.adapter_tokenizer import FoundTokenizer

from .activation_range import ActivationRange
from .attention.plan import AttentionPlan
from .cuda_kernels import CudaKernels
from .float16_range import LARGEST, warn_of_activations
from .model_facts import ModelFacts
from .passes.quantization import Quantized
from .passes.rewrite import Outcome
from .settings import ExportSettings
from .streams import StreamLayout
from .verification.parity import LIMIT_OF_ROUNDING, ParityReport
from .verification.quality import QualityReport, quality_warnings

Report = Callable[[str], None]


@contextmanager
def phase(name: str, report: Report) -> Iterator[None]:
    """How long the block took, in seconds, on a line of its own; nothing if it fails."""
    start = time.perf_counter()
    yield
    report(f"{name:<10}done in {time.perf_counter() - start:.1f} s")


def report_tokenizer(found: FoundTokenizer, rows: int, report: Report) -> None:
    """One line, and one more where an adapter's tokenizer has tokens that the model, of `rows` embeddings, has not."""
    report(f"tokenizer {found}")
    without = len(found.tokenizer) - rows
    if found.folder is not None and without > 0:
        token = found.tokenizer.convert_ids_to_tokens(rows)
        report(
            f"warning   {without} of its tokens have no embedding, such as {token!r}, and cannot be in a prompt: the "
            "adapter was trained without them"
        )


def report_added_rows(rows: Mapping[str, int], report: Report) -> None:
    """One line where the backbone got the rows of added tokens, and a warning where no file has them."""
    if rows["taken"]:
        report(f"backbone  the rows of {rows['taken']} added tokens come with the adapter; {rows['total']} rows in all")
    if rows["averaged"]:
        report(
            f"warning   neither the adapter nor the base model has the rows of {rows['averaged']} added tokens, which "
            "are set to the mean of the others, as when a model is resized; if they were trained, save that resized "
            f"base model and give it by --base"
        )


def report_adapter(adapter: Mapping[str, Any], model: nn.Module, report: Report) -> None:
    """One line, and one more where a change is stored as whole matrices: reported before the long work."""
    forms = ", ".join(f"{count} {form}" for form, count in adapter["forms"].items()) or "virtual tokens"
    report(f"adapter   {adapter['peft_type']}: {forms}; adds {adapter['bytes'] / 1e6:.2f} MB")
    if adapter["dense_delta_bytes"]:
        backbone = sum(4 * parameter.numel() for name, parameter in model.named_parameters() if "base_layer" in name)
        report(
            f"adapter   {adapter['dense_delta_bytes'] / 1e6:.2f} MB of that are changes stored as whole matrices, for "
            f"which there is no smaller form here (the layers themselves: {backbone / 1e6:.2f} MB)"
        )


def report_other_backbone(trained: Mapping[str, Any], report: Report) -> None:
    """The backbone that the adapter was trained against is not the one of this export."""
    report(
        f"warning   the adapter was trained against a backbone of {trained['precision']} in blocks of "
        f"{trained['block_size']}, symmetric; this export has a different one"
    )


def report_float16(found: ActivationRange, warnings: list[str], report: Report) -> None:
    """The largest activation, and one line for each warning, of the weights (`warnings`) and of it."""
    place, value = found.largest
    report(
        f"range     largest activation {value:,.6g} ({place}) over {found.tokens} tokens of text; float16 holds "
        f"{LARGEST / value:,.3g} times as much"
    )
    for warning in [*warnings, *warn_of_activations(found)]:
        report(f"warning   {warning}")


def report_trace(facts: ModelFacts, plan: AttentionPlan, layout: StreamLayout, report: Report) -> None:
    """What is traced."""
    shared = f", the first {layout.trunk} shared by both streams" if layout.trunk else ""
    report(f"trace     {facts.architecture}, {facts.layers} layers{shared}, rotary: {plan.rotary.mode}")


def report_passes(outcomes: Mapping[str, Outcome], report: Report) -> None:
    """One line per graph pass, and one per reason why it left something as it is."""
    for name, outcome in outcomes.items():
        for line in outcome.lines(name):
            report(line)


def report_quantized(done: Quantized, settings: ExportSettings, report: Report) -> None:
    """One line, and one more where large matrices of the backbone stayed in floating point."""
    embeddings = " and the embeddings" if done.embeddings else ""
    experts = f" and the experts of {done.experts} layers" if done.experts else ""
    how = f", {done.calibrated} of them calibrated" if done.calibrated else ""
    mean = f" ({done.mean_bits:.2f} bits a weight)" if len(done.widths) > 1 else ""
    report(
        f"quantize  {done.matrices} matrices{embeddings}{experts} to {settings.precision}{mean}, "
        f"blocks of {settings.block_size}{how}: {done.bytes_before / 1e6:.1f} -> {done.bytes_after / 1e6:.1f} MB"
    )
    if done.kept:
        size = sum(done.kept.values()) / 1e6
        report(f"quantize  {len(done.kept)} weights stay as they are ({size:.1f} MB), such as {next(iter(done.kept))}")


def report_parity(parity: ParityReport, report: Report) -> None:
    """One line per way of computing. Of graphs that round as they compute, what is judged: the middle one of all
    positions, for single positions may be far off."""
    if not parity.differences:
        report(
            "verify    not verified: onnxruntime's CPU provider has no bfloat16; where another provider starts, run "
            "`verify` with --checkpoint and --provider, or export with --verify-on"
        )
        return
    for way, differences in parity.differences.items():
        if way in parity.changes:
            continue
        worst = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        report(f"verify    {way}: largest difference from PyTorch: {worst}")
    for way, changes in parity.changes.items():
        middle = ", ".join(f"{name} {value:.1%}" for name, value in changes.items())
        report(f"verify    {way}: rounding changes the middle position by {middle} (limit {LIMIT_OF_ROUNDING:.0%})")
    report(f"verify    greedy tokens equal: {parity.greedy_tokens_equal} of {parity.decode_steps}")


def report_quality(quality: QualityReport, settings: ExportSettings, report: Report) -> None:
    """One line for the blend and for each memory alone, and one for each warning."""
    for name, found in quality.measured.items():
        report(
            f"quality   {name + ':':<9}perplexity {found.perplexity_reference:.4g} -> {found.perplexity:.4g} "
            f"({found.perplexity_change:+.2%}), argmax agreement {found.argmax_agreement:.2%}, "
            f"mean KL {found.mean_kl:.2g} nats"
        )
    for warning in quality_warnings(quality, settings.max_perplexity_change):
        report(f"warning   {warning}")


def report_cuda_kernels(kernels: CudaKernels, report: Report) -> None:
    """One line: a warning where nodes have no kernel."""
    verb = "computes" if kernels.shape_nodes == 1 else "compute"
    sizes = f" ({kernels.shape_nodes} of them {verb} sizes, on the CPU)" if kernels.shape_nodes else ""
    if not kernels.missing:
        report(f"cuda      {kernels.nodes} nodes, all with kernels in onnxruntime-gpu {kernels.onnxruntime}{sizes}")
        return
    missing = ", ".join(f"{count} {operator}" for operator, count in kernels.missing.items())
    report(
        f"warning   onnxruntime-gpu {kernels.onnxruntime} has no CUDA kernel for {sum(kernels.missing.values())} of "
        f"{kernels.nodes} nodes: {missing}; what the CPU has a kernel for runs there, with copies, and no CUDA graph "
        "can be captured"
    )
