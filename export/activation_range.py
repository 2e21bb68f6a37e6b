"""The largest values that a model computes, found in float32 before the model is exported in float16.

float16 ends at 65,504; what is larger becomes infinite. Products, norms and attention keep their sums in float32, so
that what has to fit is what one operation passes on to the next: what layers, products and attention read and write,
and the residual stream. The gate, the blend and the logits after the head are float32 anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from imsm_core.adapters.attach import known_warnings_ignored
from imsm_core.adapters.biases import original_biases
from imsm_core.adapters.virtual_tokens import adapter_hidden_state, virtual_token_cache
from imsm_core.backbone import apply_head, last_hidden_state
from imsm_core.siamese import SiameseModel, StreamStates

from .replaced import replaced
from .trunk import decoder_layers
from .virtual_tokens import VirtualCache


@dataclass(frozen=True)
class Place:
    """Which value it was: of a stream (base, adapter, or their blend) and a module of the causal LM."""

    stream: str
    module: str
    what: str

    def __str__(self) -> str:
        return f"{self.what} of {self.module}, {self.stream} stream"


@dataclass
class ActivationRange:
    """The largest absolute values over `tokens` tokens of text, by place. layers: the names of the decoder layers."""

    layers: tuple[str, ...]
    tokens: int = 0
    found: dict[Place, float] = field(default_factory=dict)

    def note(self, place: Place, value: Any) -> None:
        """Take a tensor of floating-point numbers into account, and nothing else."""
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            largest = float(torch.linalg.vector_norm(value, torch.inf))
            self.found[place] = max(self.found.get(place, 0.0), largest, key=_rank)

    @property
    def largest(self) -> tuple[Place, float]:
        """The largest of all, and where it was."""
        return max(self.found.items(), key=lambda item: _rank(item[1]))

    def by_layer(self) -> dict[str, float]:
        """The largest of every decoder layer, and of every module outside of them."""
        largest: dict[str, float] = {}
        for place, value in self.found.items():
            name = next((name for name in self.layers if f"{place.module}.".startswith(f"{name}.")), place.module)
            largest[name] = max(largest.get(name, 0.0), value, key=_rank)
        return largest

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        place, value = self.largest
        where = {"stream": place.stream, "module": place.module, "what": place.what}
        return {"tokens": self.tokens, "largest": value, **where, "by_layer": self.by_layer()}


def _rank(value: float) -> float:
    """What is not a number comes after every number."""
    return value if value == value else float("inf")


@torch.no_grad()
def find_range(
    model: SiameseModel, texts: Iterable[Sequence[int]], layer_count: int, virtual: VirtualCache, base_only: bool
) -> ActivationRange:
    """Run `texts` (token ids) through both streams, or the base stream alone, and their blend through the head.

    model: in float32 and eval mode. virtual: what the adapter stream's caches begin with.
    """
    causal_lm, peft_model = model.causal_lm, model.peft_model
    prefix, layers = decoder_layers(causal_lm, layer_count) or ("", nn.ModuleList())
    found = ActivationRange(tuple(f"{prefix}.{index}" for index in range(len(layers))))
    for name, array in virtual.items():
        found.note(Place("adapter", "virtual tokens", name), torch.from_numpy(array))
    with replaced(causal_lm.config, "_experts_implementation", "eager"), _Watch(causal_lm, found) as watch:
        for _, group in itertools.groupby(sorted(texts, key=len), len):
            input_ids = torch.tensor([list(text) for text in group])
            found.tokens += input_ids.numel()
            watch.stream = "base"
            with known_warnings_ignored(), peft_model.disable_adapter(), original_biases(peft_model):
                base = last_hidden_state(causal_lm, input_ids=input_ids)
            watch.head(base)
            if base_only:
                continue
            watch.stream = ""  # the virtual tokens' own activations are computed here, in float32, and not in the graph
            cache = virtual_token_cache(peft_model, len(input_ids))
            watch.stream = "adapter"
            adapter = adapter_hidden_state(peft_model, input_ids, cache=cache)
            watch.head(adapter)
            watch.stream = "blend"
            ones = torch.ones_like(input_ids)
            rows, positions = torch.nonzero(ones, as_tuple=True)
            model.fused_logits(StreamStates(base, adapter), ones, rows, positions)
    return found


class _Watch(TorchFunctionMode):
    """Inside the block everything that the modules of `model`, and the products and attention in them, read and write
    is noted as `stream`'s; with stream "" nothing is."""

    def __init__(self, model: Any, found: ActivationRange) -> None:
        super().__init__()
        self.stream = ""
        self._model = model
        self._found = found
        self._running: list[str] = []
        self._frozen: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> _Watch:
        for name, module in self._model.named_modules():
            if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False)):
                continue  # rotary tables are not made of activations
            for hook in (
                module.register_forward_pre_hook(self._before(name, leaf=not list(module.children()))),
                module.register_forward_hook(self._after(name, isinstance(module, BaseTunerLayer))),
            ):
                self._hooks.callback(hook.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._running:
            module = self._running[-1]
            if func is functional.linear:  # of layers without a module of their own, such as experts
                self._note(module, "input", _argument(args, kwargs, 0, "input"))
                self._note(module, "output", result)
            elif func is functional.scaled_dot_product_attention:
                for place, what in enumerate(("query", "key", "value")):  # rotated
                    self._note(module, what, _argument(args, kwargs, place, what))
                self._note(module, "attention", result)
        return result

    def head(self, hidden: Tensor) -> None:
        """Compute the logits of `hidden`, (B, S, d): in the graph they are scaled before they become float32."""
        self._note("logits", "output", apply_head(self._model, hidden))

    def _note(self, module: str, what: str, value: Any) -> None:
        if self.stream:
            self._found.note(Place(self.stream, module.replace(".base_layer", ""), what), value)

    def _before(self, name: str, leaf: bool) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, args: Any) -> None:
            self._running.append(name)
            for value in args if leaf else ():  # others may be handed masks
                self._note(name, "input", value)

        return note

    def _after(self, name: str, tuner: bool) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()
            first = output[0] if isinstance(output, tuple) else output
            self._note(name, "output", first)
            if name.endswith(".base_layer"):
                self._frozen[name] = first
            frozen = self._frozen.pop(f"{name}.base_layer", None)
            if tuner and isinstance(frozen, Tensor) and frozen.shape == first.shape:
                self._note(name, "change", first - frozen)  # which the graph adds to the frozen layer's output

        return note


def _argument(args: Sequence[Any], named: Mapping[str, Any] | None, place: int, name: str) -> Any:
    """An argument, however it was given."""
    return args[place] if place < len(args) else (named or {}).get(name)
