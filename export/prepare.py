"""The first phase of an export: what the graph will be. What can be refused is refused here, before the long work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from imsm_core.adapters import virtual_tokens as prompts
from imsm_core.adapters.biases import original_biases
from imsm_core.backbone import embedded_tokens
from imsm_core.checkpoint import CheckpointInfo
from imsm_core.siamese import SiameseModel

from .activation_range import ActivationRange, find_range
from .adapters import base_layers, replaced_layers, two_stream_layers
from .adapters.describe import check_delta_size, describe_adapter
from .attention.kv_scales import KVScales, find_scales
from .attention.plan import AttentionPlan, plan_attention
from .errors import UnsupportedError
from .float16_range import check_activations, check_weights
from .model_facts import ModelFacts, model_facts
from .passes.quantization import Quantization, Quantized
from .providers import check_provider
from .quantization.precision import compute_dtype, computing_in, rounded_experts, rounded_to, rounded_weights
from .report import Report, report_adapter, report_float16
from .rounding import plan_rounding
from .settings import ExportSettings
from .streams import StreamLayout
from .texts import LONGEST, Texts, read_texts
from .trunk import trunk_length
from .virtual_tokens import VirtualCache, virtual_cache


@dataclass(frozen=True)
class Prepared:
    """All that is known before the trace. settings: as given, and with the precision that "auto" found. layers: what
    the adapter's layers are replaced by while the model is traced, by name in the causal LM. virtual: the caches of the
    virtual tokens. adapter: the manifest's section; None without one. activations: the largest ones, where the graph
    computes in float16. kv_scales: of int8 caches. quantization: None where weights stay in floating point."""

    model: SiameseModel
    tokenizer: PreTrainedTokenizerBase
    info: CheckpointInfo
    settings: ExportSettings
    facts: ModelFacts
    plan: AttentionPlan
    layout: StreamLayout
    layers: dict[str, nn.Module]
    virtual_tokens: int
    virtual: VirtualCache
    adapter: dict[str, Any] | None
    texts: Texts
    activations: ActivationRange | None
    kv_scales: KVScales | None
    quantization: Quantization | None

    @contextmanager
    def as_traced(self) -> Iterator[None]:
        """Inside the block the causal LM has its two-stream forms and computes in the artifact's type. Weights are
        written there too: a traced graph only refers to them."""
        with (
            original_biases(self.model.peft_model),
            replaced_layers(self.model.causal_lm, self.layers),
            computing_in(self.model.causal_lm, compute_dtype(self.settings)),
        ):
            yield

    @contextmanager
    def with_weights_of(self, quantized: Quantized) -> Iterator[None]:
        """Inside the block the model computes in float32 with the weights that the file has."""
        causal_lm, settings = self.model.causal_lm, self.settings
        format_ = (settings.bits or 0, settings.block_size, settings.symmetric)
        with (
            rounded_to(causal_lm, compute_dtype(settings)),
            rounded_weights(causal_lm, quantized.weights),
            rounded_experts(causal_lm, quantized.expert_weights, *format_),
        ):
            yield


def prepare(
    model: SiameseModel,
    tokenizer: PreTrainedTokenizerBase,
    info: CheckpointInfo,
    settings: ExportSettings,
    report: Report,
) -> Prepared:
    """Plan the graph, then compute what needs texts: the scales of int8 caches and rounded weights.

    What can be refused is refused first, before anything that takes long. Writes nothing and leaves the model as it is.
    Raises AdapterError, DataError, ExportError, SettingsError or UnsupportedError.
    """
    check_provider(settings.verify_on)
    causal_lm = model.causal_lm
    virtual_tokens = 0 if settings.base_only else prompts.virtual_tokens(model.peft_model)
    facts = model_facts(causal_lm, settings.context_length, virtual_tokens)
    if virtual_tokens and (settings.dtype_name == "bfloat16" or settings.kv_cache == "int8"):
        raise UnsupportedError("caches that begin with virtual tokens are float32 or float16, not bf16 or int8")
    texts = read_texts(settings, tokenizer, info, facts.context_length, embedded_tokens(causal_lm), report)
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
    activations = None
    if settings.dtype_name == "float16":
        activations = _check_float16(model, facts.layers, layers, virtual, texts, settings, report)
    trunk = 0 if settings.base_only or virtual_tokens else trunk_length(causal_lm, facts.layers, layers)
    layout = StreamLayout(1 if settings.base_only else 2, trunk, settings.one_node_per_stream)
    scales = find_scales(model, plan, texts.scales) if settings.kv_cache == "int8" else None
    longest = min(LONGEST, facts.context_length)
    settings, quantization = plan_rounding(model, tokenizer, texts, layout, settings, longest, report)
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        info=info,
        settings=settings,
        facts=facts,
        plan=plan,
        layout=layout,
        layers=layers,
        virtual_tokens=virtual_tokens,
        virtual=virtual,
        adapter=adapter,
        texts=texts,
        activations=activations,
        kv_scales=scales,
        quantization=quantization,
    )


def _check_float16(
    model: SiameseModel,
    layer_count: int,
    layers: dict[str, nn.Module],
    virtual: VirtualCache,
    texts: Texts,
    settings: ExportSettings,
    report: Report,
) -> ActivationRange:
    """The largest activations. Raises UnsupportedError if float16 holds not all of them, or not all weights."""
    with original_biases(model.peft_model), replaced_layers(model.causal_lm, layers):
        warnings = check_weights(model.causal_lm.named_parameters(), settings)
    found = find_range(model, texts.activations, layer_count, virtual, settings.base_only)
    check_activations(found, settings)
    report_float16(found, warnings, report)
    return found
