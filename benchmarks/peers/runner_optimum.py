"""optimum-onnx's ORTModelForCausalLM in float32 with caches. Mode: `one`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from protocol import Begin, Step, main


def imports() -> Mapping[str, str]:
    from importlib.metadata import version

    import optimum.onnxruntime  # noqa: F401  # its import belongs to this time

    return {name: version(name) for name in ("optimum-onnx", "onnxruntime", "transformers", "torch")}


def load(args: argparse.Namespace) -> tuple[Mapping[str, Begin], int]:
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    model = ORTModelForCausalLM.from_pretrained(
        args.folder, session_options=options, provider="CPUExecutionProvider", use_io_binding=True
    )

    def begin(prompt: list[int]) -> Step:
        token, length, cache = torch.tensor([prompt]), 0, None

        def step() -> int:
            nonlocal token, length, cache
            new = token.shape[1]
            inputs: dict[str, Any] = {
                "attention_mask": torch.ones(1, length + new, dtype=torch.int64),
                "position_ids": torch.arange(length, length + new)[None],
            }
            output = model(token, past_key_values=cache, use_cache=True, **inputs)
            token, length, cache = output.logits[:, -1:].argmax(-1), length + new, output.past_key_values
            return int(token)

        step()
        return step

    return {"one": begin}, int(model.config.vocab_size)


if __name__ == "__main__":
    main(imports, load)
