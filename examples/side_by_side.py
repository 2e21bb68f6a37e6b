"""The same prompts through the base memory, the adapter's memory and the blend of both, from one artifact.

    python examples/side_by_side.py ARTIFACT PROMPT [PROMPT ...]

Runs without PyTorch: NumPy, onnxruntime and tokenizers only.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runtime

BIASES = {"base memory": 1e4, "adapter": -1e4, "blended": 0.0}


def main() -> int:
    """Print one block per prompt."""
    artifact, *prompts = sys.argv[1:]
    model = runtime.load(artifact)
    for prompt in prompts:
        print(f"\n{prompt}")
        for name, bias in BIASES.items():
            result = runtime.generate(model, prompt, max_new_tokens=24, memory_bias=bias)
            means = result.gate_means or []
            print(f"  {name:<12} {result.text.strip():<32} gate {sum(means) / len(means):.2f}")
    heavy = [name for name in ("torch", "transformers", "onnx") if name in sys.modules]
    print(f"\nin this process: NumPy and onnxruntime; PyTorch {'is loaded' if heavy else 'is not loaded'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
