"""optimum-onnx's export of the shared backbone, in float32 with caches. Runs in optimum-onnx's environment."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.exporters.onnx import main_export

LARGEST_PROTOBUF = 1 << 31
"""Bytes. optimum-onnx cannot merge the lm_head with the tied embedding in a larger model: it counts the bytes of one
protobuf with all weights in it, which fails. The head then stays a second copy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", type=Path, required=True)
    args = parser.parse_args()
    base = args.backbone / "base"
    main_export(
        str(base),
        output=args.out,
        task="text-generation-with-past",
        do_validation=False,
        no_post_process=sum(file.stat().st_size for file in base.glob("*.safetensors")) >= LARGEST_PROTOBUF,
    )


if __name__ == "__main__":
    main()
