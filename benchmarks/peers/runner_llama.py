"""llama.cpp through llama-cpp-python's low-level interface. Modes: `one` sequence, `two` sequences in one step, and
`one-lora`, `two-lora`: the same with the adapter applied at run time."""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Mapping
from typing import Any

from protocol import Begin, Step, main


def imports() -> Mapping[str, str]:
    import llama_cpp
    import numpy

    return {"llama-cpp-python": llama_cpp.__version__, "numpy": numpy.__version__}


def load(args: argparse.Namespace) -> tuple[Mapping[str, Begin], int]:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    load.silent = silent  # type: ignore[attr-defined]  # the library keeps only its address
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(args.folder / "base.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"llama.cpp cannot load {args.folder / 'base.gguf'}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    adapter = None
    if any(mode.endswith("-lora") for mode in args.modes):
        adapter = llama_cpp.llama_adapter_lora_init(model, str(args.folder / "lora.gguf").encode())
        if not adapter:
            raise SystemExit(f"llama.cpp cannot load {args.folder / 'lora.gguf'}")
    modes: dict[str, Begin] = {}
    for mode in args.modes:
        rows = 2 if mode.startswith("two") else 1
        wanted = adapter if mode.endswith("-lora") else None
        modes[mode] = Contexts(model, wanted, rows, args.context, args.threads, vocabulary).begin
    return modes, vocabulary


class Contexts:
    """llama.cpp contexts of one kind, each for one text at a time: made when none is free, and kept."""

    def __init__(self, *settings: Any) -> None:
        self.settings = settings
        self.free = [Context(*settings)]

    def begin(self, prompt: list[int]) -> Step:
        return Text(self.free, self.free.pop() if self.free else Context(*self.settings), prompt)


class Text:
    """A step of decoding; gives its context back when it is dropped."""

    def __init__(self, free: list[Context], context: Context, prompt: list[int]) -> None:
        self.free, self.context, self.length = free, context, len(prompt)
        context.clear()
        self.tokens = context.feed([prompt] * context.rows, 0)

    def __call__(self) -> int:
        self.tokens = self.context.feed([[token] for token in self.tokens], self.length)
        self.length += 1
        return self.tokens[0]

    def __del__(self) -> None:
        self.free.append(self.context)


class Context:
    """One llama.cpp context of `rows` sequences that run in the same steps."""

    def __init__(self, model: Any, adapter: Any, rows: int, length: int, threads: int, vocabulary: int) -> None:
        import llama_cpp

        self.library, self.rows, self.vocabulary = llama_cpp, rows, vocabulary
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = rows * length
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = threads
        self.pointer = llama_cpp.llama_init_from_model(model, params)
        if not self.pointer:
            raise SystemExit("llama.cpp cannot make a context")
        if adapter is not None:
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
            if llama_cpp.llama_set_adapters_lora(self.pointer, adapters, 1, (ctypes.c_float * 1)(1.0)):
                raise SystemExit("llama.cpp refuses the adapter")
        self.batch = llama_cpp.llama_batch_init(rows * length, 0, 1)

    def clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.pointer), True)

    def feed(self, rows: list[list[int]], position: int) -> list[int]:
        """Feed each sequence its new tokens from `position` on; returns the greedy token of each."""
        import numpy as np

        batch, place, last = self.batch, 0, []
        for row, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                batch.token[place] = token
                batch.pos[place] = position + offset
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = row
                batch.logits[place] = offset == len(tokens) - 1
                place += 1
            last.append(place - 1)
        batch.n_tokens = place
        if code := self.library.llama_decode(self.pointer, batch):
            raise SystemExit(f"llama_decode failed with {code}")
        found = [self.library.llama_get_logits_ith(self.pointer, index) for index in last]
        return [int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax()) for logits in found]


if __name__ == "__main__":
    main(imports, load)
