"""optimum-onnx's export of the shared backbone, in float32 with caches. Runs in optimum-onnx's environment."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.exporters.onnx import main_export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", type=Path, required=True)
    args = parser.parse_args()
    main_export(str(args.backbone / "base"), output=args.out, task="text-generation-with-past", do_validation=False)


if __name__ == "__main__":
    main()
