"""All logits of whole texts by llama.cpp, for `benchmarks.peers.client.Process`. Modes: `one`, and `one-lora` with the
adapter applied at run time.

    {"cmd": "logits", "mode": M, "ids": [...], "first": 4, "file": F} -> {"positions": N}

writes the (N, vocab) float32 logits that predict the tokens from `first` on to F, as NumPy's .npy. Runs in llama.cpp's
environment.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.protocol import arguments, claim_stdout
from benchmarks.peers.runner_llama import imports, load_contexts


def main() -> None:
    args: argparse.Namespace = arguments()
    answers = claim_stdout()
    modes, _ = load_contexts(args)
    print(json.dumps({"versions": imports()}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        [context] = modes[asked["mode"]].free
        found = context.logits(asked["ids"])[asked["first"] - 1 : -1]
        np.save(asked["file"], found)
        print(json.dumps({"positions": len(found)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
