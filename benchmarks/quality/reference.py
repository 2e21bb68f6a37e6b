"""What everything is compared with: PyTorch's float32, in three memories, kept on disk a text at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.texts import Texts, examples
from imsm_core.backbone import apply_head
from imsm_core.checkpoint import load_checkpoint
from imsm_core.data.dataset import Example
from imsm_core.evaluate import Stream, states_by_stream

Array = NDArray[Any]
MEMORIES: tuple[Stream, ...] = get_args(Stream)
"""base stream alone, adapter stream alone, and the gate's blend of both."""


def path_of(folder: Path, memory: str, kind: str, number: int) -> Path:
    """Where the log-probabilities of one text are."""
    return folder / memory / f"{kind}-{number}.npy"


@torch.no_grad()
def write_reference(checkpoint: Path, base: Path, texts: Texts, memories: tuple[Stream, ...], folder: Path) -> None:
    """Log-probabilities (N, vocab), float16, of every text's judged tokens in each memory; what exists is kept.

    float16 keeps log-probabilities to 2^-11 of their size: a KL moves by less than 3e-6 nats, which is the whole
    distance of llama.cpp's F16 files of SmolLM2 and Gemma 3 from them.
    """
    missing: list[tuple[Example, dict[Stream, Path]]] = []
    for kind, of_kind in texts.items():
        for number, text in enumerate(examples(of_kind)):
            paths = {memory: path_of(folder, memory, kind, number) for memory in memories}
            if wanted := {memory: path for memory, path in paths.items() if not path.is_file()}:
                missing.append((text, wanted))
    if not missing:
        return
    print(f"reference of {len(missing)} texts into {folder}", file=sys.stderr)
    model, _ = load_checkpoint(checkpoint, str(base))
    for text, wanted in missing:
        states, _, _ = states_by_stream(model, [text], list(wanted), pad_token_id=0)
        for memory, path in wanted.items():
            found = apply_head(model.causal_lm, states[memory][None])[0].log_softmax(-1)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}")
            with draft.open("wb") as file:
                np.save(file, found.numpy().astype(np.float16))
            draft.rename(path)


class Stored:
    """The reference of one kind and memory as `measure_quality` asks for it."""

    def __init__(self, folder: Path, memory: str, kind: str, texts: list[Example]) -> None:
        self.paths = {id(text): path_of(folder, memory, kind, number) for number, text in enumerate(texts)}

    def __call__(self, text: Example) -> Array:
        """(N, vocab) float32."""
        logits: Array = np.load(self.paths[id(text)]).astype(np.float32)
        return logits
