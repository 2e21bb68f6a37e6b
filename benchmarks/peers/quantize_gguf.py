"""A rounded GGUF file by llama.cpp's own quantizer. Runs in llama.cpp's environment."""

from __future__ import annotations

import argparse
import ctypes
import shutil
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

IMPORTANCE = llama_cpp.llama_cpp.llama_model_imatrix_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--source", type=Path, required=True, help="folder with base.gguf in F16 and lora.gguf")
    parser.add_argument("--type", required=True, help="as llama.cpp names file types: Q4_0, Q4_K_M, ...")
    parser.add_argument("--importance", type=Path, help=".npz: mean squares of every matrix' inputs by its GGUF name")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{args.type}")
    if args.importance is not None:
        entries = importance(args.importance)
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(IMPORTANCE))
    source, target = args.source / "base.gguf", args.out / "base.gguf"
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize failed with {code}")
    shutil.copy2(args.source / "lora.gguf", args.out / "lora.gguf")


def importance(file: Path) -> Any:
    """llama.cpp's array of one entry a tensor, which ends with an empty one."""
    entries = []
    for name, array in np.load(file).items():
        values = (ctypes.c_float * array.size)(*array.tolist())
        entries.append(IMPORTANCE(name.encode(), ctypes.cast(values, ctypes.POINTER(ctypes.c_float)), array.size))
    return (IMPORTANCE * (len(entries) + 1))(*entries)


if __name__ == "__main__":
    main()
