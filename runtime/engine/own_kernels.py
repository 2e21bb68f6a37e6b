"""This project's kernels for onnxruntime: where the library is, and whether it has any for this processor.

An artifact's own operators are functions of its graph, which any onnxruntime runs; the kernels only do it faster.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NAME = "_kernels"


@cache
def library() -> Path | None:
    """The library, if it was built and has kernels for this processor: what `register_custom_ops_library` takes."""
    found = _built()
    try:
        return found if found is not None and _supported(found) else None
    except OSError:  # `describe` says so
        return None


def describe() -> str:
    """One line on whether they are in use, and why not."""
    found = _built()
    if found is None:
        return "none: they were not built (that needs GCC or Clang at installation); onnxruntime's slower ones run"
    try:
        if _supported(found):
            return "for products with int4 and int8 weights, and attention (AVX-512 VNNI)"
    except OSError as error:
        return f"none: {found} cannot be loaded: {error}"
    return "none for this processor: they need x86-64 with AVX-512 VNNI; onnxruntime's slower ones run"


def _built() -> Path | None:
    folder = Path(__file__).parents[1]
    paths = (folder / f"{NAME}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _supported(path: Path) -> bool:
    return bool(ctypes.CDLL(str(path)).imsm_kernels_supported())
