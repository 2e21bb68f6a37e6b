"""Every program as a function from a memory and a text to logits, and how many bytes a format's files have."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from benchmarks.peers.client import Process
from benchmarks.quality.catalogue import Format
from export.passes.weights import is_backbone
from imsm_core.data.dataset import Example
from runtime import Session

Array = NDArray[Any]
Found = Callable[[str, Example], Array]
"""A memory (base, adapter, fused) and a text -> logits (N, vocab) float32 of its judged tokens."""
HERE = Path(__file__).parent
SURE = 1e4  # added before the gate's sigmoid, it takes one memory alone
BIAS = {"base": SURE, "adapter": -SURE, "fused": 0.0}
CHUNK = 128  # tokens read at once, as the runtime does on a CPU


@contextmanager
def opened(format: Format, folder: Path, threads: int, longest: int, python: Path) -> Iterator[Found]:
    """The program of `format` with the files in `folder`. longest: tokens of a text. python: of llama.cpp's
    environment. Raises RunnerError, or what the runtime raises."""
    if format.program == "ours":
        yield _ours(folder, threads)
    elif format.program == "onnxruntime-genai":
        yield _graph(folder, threads)
    else:
        with Process(python, str(HERE / "logits_llama.py"), folder, list(MODES.values()), threads, longest) as process:
            yield _llama(process)


def _ours(folder: Path, threads: int) -> Found:
    """The runtime with its kernels; prompts and judged tokens are read as it reads prompts."""
    session = Session(folder, threads=threads)

    def found(memory: str, text: Example) -> Array:
        state = session.new_state(1, BIAS[memory])
        parts = [session.prefill(state, [text.prompt_ids]).logits]
        rest = text.answer_ids[:-1]
        for start in range(0, len(rest), CHUNK):
            ids = np.array([rest[start : start + CHUNK]])
            outputs = session.run_tokens(state, ids, np.zeros(ids.shape, np.float32), row=None, every=True)
            parts.append(outputs.logits.whole())
            state.lengths[0] += ids.shape[1]
        return np.concatenate(parts)

    return found


MODES = {"base": "one", "adapter": "one-lora"}


def _llama(process: Process) -> Found:
    def found(memory: str, text: Example) -> Array:
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            place = {"ids": text.token_ids, "first": len(text.prompt_ids), "file": file.name}
            process.ask("logits", MODES[memory], **place)
            logits: Array = np.load(file.name)
        return logits

    return found


def _graph(folder: Path, threads: int) -> Found:
    """onnxruntime-genai's graph, run by onnxruntime as it would run it for a prompt."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    # Caches of windows are rings with room for a window; the others grow.
    rooms = {"past_sliding_length": decoder.get("sliding_window", {}).get("window_size", 0)}

    def found(memory: str, text: Example) -> Array:
        ids = np.array([text.token_ids])
        feed: dict[str, Array] = {
            name: np.zeros([1, value.shape[1], rooms.get(value.shape[2], 0), decoder["head_size"]], np.float32)
            for name, value in inputs.items()
            if name.startswith("past_key_values.")
        }
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
        feed |= {name: array for name, array in known.items() if name in inputs}
        [logits] = session.run(["logits"], feed)
        chosen: Array = logits[0, len(text.prompt_ids) - 1 : -1]
        return chosen

    return found


@dataclass(frozen=True)
class Bytes:
    """base: what is stored of the base model's weights. adapter: of adapter and gate. other: tables of rotations, which
    llama.cpp computes when it runs; they depend on the context alone."""

    base: int
    adapter: int = 0
    other: int = 0


def stored(format: Format, folder: Path) -> Bytes:
    """The bytes of a format's files, without the tokenizer's."""
    if format.program == "llama.cpp":
        return Bytes((folder / "base.gguf").stat().st_size, (folder / "lora.gguf").stat().st_size)
    files = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    adapter = tables = 0
    places: set[tuple[int, int]] = set()
    for value in ir.load(folder / "model.onnx").graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or (place := (tensor.offset or 0, tensor.nbytes)) in places:
            continue
        places.add(place)
        name = str(value.name)
        if name.startswith(ROTATIONS):
            tables += tensor.nbytes
        elif not is_backbone(value):
            adapter += tensor.nbytes
    return Bytes(files - adapter - tables, adapter, tables)


ROTATIONS = ("rotary_", "cos_cache", "sin_cache")
