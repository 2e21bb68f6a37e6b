"""An artifact of this project from the shared backbone, through the export that users call."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from export.pipeline import export_checkpoint
from export.settings import ExportSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--base-only", action="store_true")
    args = parser.parse_args()
    blocks: dict[str, Any] = {"block_size": args.block_size} if args.precision == "int4" else {}
    settings = ExportSettings(precision=args.precision, base_only=args.base_only, **blocks)
    export_checkpoint(args.backbone / "checkpoint", args.out, settings, base_model=str(args.backbone / "base"))


if __name__ == "__main__":
    main()
