"""The one random model that every peer is built from: base/ (transformers) and checkpoint/ (PEFT adapter and gate)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.shapes import GATE, GATE_RANK, SHAPES, random_base, random_siamese, small_tokenizer
from imsm_core.backbone import fingerprint
from imsm_core.checkpoint import CheckpointInfo, save_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--rank", type=int, required=True)
    args = parser.parse_args()
    base = random_base(SHAPES[args.shape])
    base.save_pretrained(args.out / "base")
    small_tokenizer().save_pretrained(args.out / "base")
    info = CheckpointInfo(str(args.out / "base"), None, fingerprint(base), GATE, GATE_RANK, "LORA")
    save_checkpoint(random_siamese(base, args.rank), info, args.out / "checkpoint")


if __name__ == "__main__":
    main()
