"""One stage as a process of its own: python -m benchmarks.cuda.stage NAME OPTIONS."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from benchmarks.cuda.document import Document, Plan

STAGES = ("versions", "parity", "speed", "genai", "large", "tuning")


def main() -> int:
    """Run it; 1 if it failed, which its JSON says as well."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    deadline = time.monotonic() + args.seconds
    plan = Plan(args.out, args.work, args.provider, args.size, args.rehearse, deadline, tuple(args.only))
    document = Document(plan, args.name)
    try:
        importlib.import_module(f"benchmarks.cuda.stage_{args.name}").run(plan, document)
    except Exception as error:
        traceback.print_exc()
        document.finish(" ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    document.finish(plan.unknown)
    return 0 if plan.unknown is None else 1


if __name__ == "__main__":
    sys.exit(main())
