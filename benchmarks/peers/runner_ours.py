"""This project's runtime, through its public interface. Modes: `one`, and `twice`: two states, one after the other, as
an application would that runs base and adapter as two models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.protocol import Begin, Step, main


def imports() -> Mapping[str, str]:
    import numpy
    import onnxruntime

    import runtime  # noqa: F401  # its import belongs to this time

    return {"onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__}


def load(args: argparse.Namespace) -> tuple[Mapping[str, Begin], int]:
    import runtime

    session = runtime.Session(args.folder, threads=args.threads)

    def begin(prompt: list[int], states: int = 1) -> Step:
        texts = [session.new_state() for _ in range(states)]
        tokens = [session.prefill(text, [prompt]).logits.argmax(-1) for text in texts]

        def step() -> int:
            for index, text in enumerate(texts):
                tokens[index] = session.decode_step(text, tokens[index]).logits.argmax(-1)
            return int(tokens[0][0])

        return step

    return {"one": begin, "twice": lambda prompt: begin(prompt, 2)}, session.manifest.vocab_size


if __name__ == "__main__":
    main(imports, load)
