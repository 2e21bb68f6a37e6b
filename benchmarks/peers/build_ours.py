"""An artifact of this project from the shared backbone, through the export that users call."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from export.choices import MEAN_BITS
from export.pipeline import export_checkpoint
from export.settings import ExportSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--base-only", action="store_true")
    parser.add_argument("--four-bits", action="store_true", help="of int4: every weight, not the default's mean")
    args = parser.parse_args()
    rounding: dict[str, Any] = {}
    if args.precision == "int4":  # random weights: as many bits as by default, but nothing to measure their worth by
        rounding = {"block_size": args.block_size, "rounding": "nearest"}
        rounding["mean_bits"] = None if args.four_bits else MEAN_BITS
    settings = ExportSettings(precision=args.precision, base_only=args.base_only, **rounding)
    export_checkpoint(args.backbone / "checkpoint", args.out, settings, base_model=str(args.backbone / "base"))


if __name__ == "__main__":
    main()
