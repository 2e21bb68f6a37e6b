"""llama.cpp through llama-cpp-python's low-level interface. Modes: `one` sequence, `two` sequences in one step, and
`one-lora`, `two-lora`: the same with the adapter applied at run time."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.protocol import Begin, Step, main

WITHOUT_AMX = "BENCHMARK_WITHOUT_AMX"
"""An environment variable: if it is set, llama.cpp runs without its AMX kernels. Those of llama-cpp-python 0.3.36 end
the process on some virtual machines that report AMX."""
SMALLEST_STACK = 2048


def imports() -> Mapping[str, str]:
    import llama_cpp
    import numpy

    return {"llama-cpp-python": llama_cpp.__version__, "numpy": numpy.__version__}


def load(args: argparse.Namespace) -> tuple[Mapping[str, Begin], int]:
    modes, vocabulary = load_contexts(args)
    return {mode: contexts.begin for mode, contexts in modes.items()}, vocabulary


def load_contexts(args: argparse.Namespace) -> tuple[dict[str, Contexts], int]:
    """What each mode runs in, and the vocabulary's size."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    load_contexts.silent = silent  # type: ignore[attr-defined]  # the library keeps only its address
    llama_cpp.llama_backend_init()
    with amx_refused() if os.environ.get(WITHOUT_AMX) else contextlib.nullcontext():
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
    modes: dict[str, Contexts] = {}
    for mode in args.modes:
        rows = 2 if mode.startswith("two") else 1
        wanted = adapter if mode.endswith("-lora") else None
        modes[mode] = Contexts(model, wanted, rows, args.context, args.threads, vocabulary)
    return modes, vocabulary


class Stack(ctypes.Structure):
    """C's stack_t."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def amx_refused() -> Iterator[None]:
    """The kernel refuses a process AMX whose stack for signals is too small for AMX's registers; llama.cpp, which asks
    when it loads the first model, then uses the processor's other kernels."""
    libc = ctypes.CDLL(None, use_errno=True)
    memory = ctypes.create_string_buffer(SMALLEST_STACK)
    small, before = Stack(ctypes.cast(memory, ctypes.c_void_p).value, 0, SMALLEST_STACK), Stack()
    if libc.sigaltstack(ctypes.byref(small), ctypes.byref(before)):
        raise OSError(ctypes.get_errno(), "sigaltstack")
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


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

        last = self._decode(rows, position, every=False)
        found = [self.library.llama_get_logits_ith(self.pointer, index) for index in last]
        return [int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax()) for logits in found]

    def logits(self, tokens: list[int]) -> Any:
        """(N, vocab) float32 after every token of a new text; the memory is the context's own until its next step."""
        import numpy as np

        self.clear()
        self._decode([tokens], 0, every=True)
        return np.ctypeslib.as_array(self.library.llama_get_logits(self.pointer), (len(tokens), self.vocabulary))

    def _decode(self, rows: list[list[int]], position: int, every: bool) -> list[int]:
        """Run one batch, with logits at each sequence's last token or at `every` one; returns the last ones' places."""
        batch, place, last = self.batch, 0, []
        for row, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                batch.token[place] = token
                batch.pos[place] = position + offset
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = row
                batch.logits[place] = every or offset == len(tokens) - 1
                place += 1
            last.append(place - 1)
        batch.n_tokens = place
        if code := self.library.llama_decode(self.pointer, batch):
            raise SystemExit(f"llama_decode failed with {code}")
        return last


if __name__ == "__main__":
    main(imports, load)
