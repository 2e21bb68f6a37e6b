"""PyTorch: transformers and PEFT in float32. Modes: `one` stream of the base model; `two` streams with caches and the
gate, one module for both; `released`: as the method's authors released it, two whole copies of the model and no cache,
so that each token reads the whole text again in both."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.protocol import Begin, Step, main


def imports() -> Mapping[str, str]:
    import peft
    import torch
    import transformers

    import imsm_core.gates  # noqa: F401  # its import belongs to this time

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def load(args: argparse.Namespace) -> tuple[Mapping[str, Begin], int]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    # The libraries alone: this project's own loading also checks, and holds copies while it does.
    def base_model() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            args.folder / "base", dtype=torch.float32, trust_remote_code=False
        ).eval()

    def with_adapter(model: Any) -> Any:
        return PeftModel.from_pretrained(model, args.folder / "checkpoint" / "adapter").eval()

    base = base_model()
    vocabulary = int(base.config.vocab_size)
    modes: dict[str, Begin] = {}
    if "released" in args.modes:
        modes["released"] = released(base, with_adapter(base_model()), args.folder)
    if "one" in args.modes and "two" not in args.modes:
        modes["one"] = one_stream(base, None)
    if "two" in args.modes:
        peft_model = with_adapter(base)
        modes["two"] = two_streams(base, peft_model, args.folder)
        modes["one"] = one_stream(base, peft_model)
    return modes, vocabulary


def one_stream(model: Any, peft_model: Any) -> Begin:
    """The base model with its cache. peft_model: whose adapter is to be switched off, if it is in the model."""
    from contextlib import nullcontext

    import torch

    def begin(prompt: list[int]) -> Step:
        cache, token = None, torch.tensor([prompt])

        def step() -> int:
            nonlocal cache, token
            with peft_model.disable_adapter() if peft_model is not None else nullcontext():
                output = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
            return int(token)

        step()
        return step

    return begin


def two_streams(model: Any, peft_model: Any, folder: Path) -> Begin:
    """Base and adapter stream one after the other on one copy of the weights, each with its cache; gate; lm_head."""
    import torch

    gate = load_gate(folder)
    backbone, head = model.base_model, model.get_output_embeddings()

    def begin(prompt: list[int]) -> Step:
        token = torch.tensor([prompt])
        caches: list[Any] = [None, None]
        query: tuple[Any, ...] = ()

        def step() -> int:
            nonlocal token, query
            with peft_model.disable_adapter():
                base = backbone(token, past_key_values=caches[0], use_cache=True)
            adapter = backbone(token, past_key_values=caches[1], use_cache=True)
            caches[:] = [base.past_key_values, adapter.past_key_values]
            states = [output.last_hidden_state for output in (base, adapter)]
            query = query or tuple(state.mean(1) for state in states)
            token = head(fused(gate, states, query)).argmax(-1)
            return int(token)

        step()
        return step

    return begin


def released(fixed: Any, tuned: Any, folder: Path) -> Begin:
    """The released loop: full forwards of both models over all tokens, then the gate at the last position."""
    import torch

    gate, head = load_gate(folder), fixed.get_output_embeddings()

    def begin(prompt: list[int]) -> Step:
        tokens = torch.tensor([prompt])
        query: tuple[Any, ...] = ()

        def step() -> int:
            nonlocal tokens, query
            outputs = [model(tokens, output_hidden_states=True, use_cache=False) for model in (fixed, tuned)]
            states = [output.hidden_states[-1] for output in outputs]
            query = query or tuple(state.mean(1) for state in states)
            token = head(fused(gate, states, query)).argmax(-1)
            tokens = torch.cat([tokens, token], dim=1)
            return int(token)

        step()
        return step

    return begin


def fused(gate: Any, states: list[Any], query: tuple[Any, ...]) -> Any:
    """(1, 1, d): the gate's blend of both streams' last positions."""
    from imsm_core.gates import Memories

    memories = Memories(states[0][:, -1], states[1][:, -1], *query)
    return gate(memories, None).fused[None]


def load_gate(folder: Path) -> Any:
    from safetensors.torch import load_file

    from benchmarks.shapes import GATE, GATE_RANK
    from imsm_core.gates import make_gate

    tensors = load_file(folder / "checkpoint" / "gate.safetensors")
    gate = make_gate(GATE, tensors["gate_up.weight"].shape[0], GATE_RANK)
    gate.load_state_dict(tensors)
    return gate.eval()


if __name__ == "__main__":
    main(imports, load)
