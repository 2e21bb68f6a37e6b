"""How the backbone's weights are rounded: with which texts, in which widths, and as the settings ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from imsm_core.data.dataset import Example
from imsm_core.siamese import SiameseModel

from .choices import AUTO, MAX_KL, MEAN_BITS
from .passes.quantization import Quantization
from .passes.quantized_matmul import has_operator
from .quantization.divergence import Divergence, Reference
from .quantization.layers import by_every_name, check_finite
from .quantization.mixed import Candidates, Form, nearest_backbone, round_backbone
from .quantization.weight_format import WIDTHS, QuantizedWeight
from .report import Report
from .self_text import own_texts
from .settings import ExportSettings
from .streams import StreamLayout
from .texts import SENTENCES, Texts

STOCK_WIDTHS = (4, 8)
"""What onnxruntime's own operators have, and so every execution provider's."""
TRIED = (4.0, 4.25, 4.5, 4.75, 5.0, 5.25, 5.5, 5.75, 6.0, 6.5, 7.0, 8.0)
"""Mean bits that are tried to keep a KL."""
JUDGED_ROWS, JUDGED_QUERY = 16, 8
"""Texts of the model's own that judge what is tried, and how many of their first tokens are the gate's query."""


def plan_rounding(
    model: SiameseModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    layout: StreamLayout,
    settings: ExportSettings,
    longest: int,
    report: Report,
) -> tuple[ExportSettings, Quantization | None]:
    """The quantizer's settings, None where weights stay in floating point; and the export's settings, in which the
    precision "auto" has become the one that was found. longest: tokens of a text. Raises DataError or ExportError."""
    if settings.bits is None:
        return settings, None
    own = not layout.portable and settings.dtype_name == "float32" and has_operator(settings.bits, settings.block_size)
    plain = Quantization(
        settings.bits,
        settings.block_size,
        settings.symmetric,
        experts=not layout.portable,
        half_scales=own,
        rounding="nearest" if settings.rounds_to_nearest else "best",
    )
    widths = (8,) if settings.bits == 8 else WIDTHS if own else STOCK_WIDTHS
    form = Form(widths, settings.block_size, settings.symmetric)
    if settings.rounds_to_nearest:
        mean = settings.mean_bits
        if mean is not None:
            chosen = nearest_backbone(model, form, mean).choose(mean)
            plain = replace(plain, calibrated=by_every_name(model, chosen))
        return settings, plain
    check_finite(model)
    own_text = own_texts(model, tokenizer, SENTENCES, longest, report)
    mean = None if settings.precision == AUTO else 8.0 if settings.bits == 8 else settings.mean_bits or MEAN_BITS
    found = round_backbone(model, [*texts.calibration, *own_text], form, mean, report)
    if mean is None:
        judged = texts.evaluation or _judged(
            own_texts(model, tokenizer, SENTENCES[1:], longest, report, JUDGED_ROWS, seed=1)
        )
        reference = Reference(model, judged, settings.base_only)
        return _smallest(found, reference, settings, plain, report)
    return settings, replace(plain, calibrated=by_every_name(model, found.choose(mean)))


def _smallest(
    found: Candidates,
    reference: Reference,
    settings: ExportSettings,
    plain: Quantization,
    report: Report,
) -> tuple[ExportSettings, Quantization | None]:
    """The fewest bits whose KL is at most the limit, found by halving: more bits are taken to be no worse."""
    low, high = 0, len(TRIED)
    kept: dict[str, QuantizedWeight] = {}
    while low < high:
        middle = (low + high) // 2
        weights = found.choose(TRIED[middle])
        bits = 8 if TRIED[middle] == TRIED[-1] else plain.bits
        experts = (bits, plain.block_size, plain.symmetric) if plain.experts else None
        divergence = reference.divergence(weights, settings.dtype_name == "float32", experts)
        fits = divergence.worst <= settings.max_kl
        report(_tried(TRIED[middle], divergence, settings, fits))
        if fits:
            high, kept = middle, weights
        else:
            low = middle + 1
    if high == len(TRIED):
        precision = settings.activations or "fp32"
        report(f"auto      no rounded weights keep a KL of {settings.max_kl:g}: {precision}")
        return _in_floats(settings, precision), None
    mean, precision = TRIED[high], "int8" if TRIED[high] == TRIED[-1] else "int4"
    report(f"auto      {precision} with {mean:g} bits a weight is the smallest that does")
    share = None if precision == "int8" else mean
    chosen = replace(settings, precision=precision, mean_bits=share, rounding="best", max_kl=MAX_KL)
    return chosen, replace(plain, bits=chosen.bits or 0, calibrated=by_every_name(reference.model, kept))


def _in_floats(settings: ExportSettings, precision: str) -> ExportSettings:
    """Without what is only of rounded weights: those settings contradict floats."""
    calibrate = settings.calibrate if settings.kv_cache == "int8" else None
    if calibrate is None and settings.eval_data is None:  # nothing is read any more
        settings = replace(settings, calibrate=None, prompt_field=None, answer_field=None, skip_bad_rows=False)
    return replace(settings, precision=precision, activations=None, rounding=None, max_kl=MAX_KL, calibrate=calibrate)


def _tried(mean: float, divergence: Divergence, settings: ExportSettings, fits: bool) -> str:
    blend = "" if settings.base_only else f", blend {divergence.blend:.3g}"
    return (
        f"auto      {mean:g} bits a weight: KL of the base stream {divergence.base:.3g}{blend} nats; "
        f"{'keeps' if fits else 'exceeds'} {settings.max_kl:g}"
    )


def _judged(texts: Sequence[Sequence[int]]) -> list[Example]:
    cut = [min(JUDGED_QUERY, len(text) // 2) for text in texts]
    return [Example(list(text[:at]), list(text[at:])) for text, at in zip(texts, cut, strict=True) if at]
