"""Memory that runs out inside a kernel is an exception, and the session goes on."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.engine import own_kernels

from .fuzz import session_of
from .random_nodes import Array, Node

if own_kernels.library() is None:
    pytest.skip(own_kernels.describe(), allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
K, N, RANK, ROWS = 1024, 1024, 512, 1024
HEADS, SIZE, TOKENS, LENGTH = 8, 64, 512, 2048
RAN, REFUSED, SILENT, BROKEN = 0, 1, 2, 3  # exit codes of a child
STEPS = 24  # limits of memory, from nothing more to enough


def floats(*shape: int) -> Array:
    return np.full(shape, 0.01, np.float32)


def product() -> Node:
    inputs: dict[str, Array | None] = {"x": floats(ROWS, K)}
    for name in ("gate_", "up_"):
        inputs |= {f"{name}weights": np.full((N, K // 32, 16), 7, np.uint8), f"{name}scales": floats(N, K // 32)}
        inputs |= {f"{name}zeros": None, f"{name}bias": None}
    inputs["rows"] = np.ones(ROWS, np.float32)
    for name in ("gate_", "up_"):
        inputs |= {f"{name}a": floats(K, RANK), f"{name}b": floats(RANK, N)}
    return Node("QuantizedSwiGLULowRank", inputs, {"K": K, "N": N, "bits": 4, "block_size": 32})


def attention(tokens: int) -> Node:
    past = LENGTH - tokens
    inputs: dict[str, Array | None] = {
        "query": floats(1, tokens, 3 * HEADS * SIZE),
        "key": None,
        "value": None,
        "past_key": floats(1, HEADS, past, SIZE),
        "past_value": floats(1, HEADS, past, SIZE),
        "seqlens_k": np.array([LENGTH - 1], np.int32),
        "total": np.array(LENGTH, np.int32),
        "cos": floats(LENGTH, SIZE // 2),
        "sin": floats(LENGTH, SIZE // 2),
        "query_seqlens": np.array([tokens], np.int32),
    }
    attributes = {"num_heads": HEADS, "kv_num_heads": HEADS, "scale": 0.1, "do_rotary": 1}
    return Node("GroupQueryAttention", inputs, attributes, 3)


NODES: dict[str, Callable[[], Node]] = {
    "product": product,
    "attention": lambda: attention(TOKENS),
    "attention in parts": lambda: attention(1),
}


def try_with(session: Any, feed: dict[str, Array], more: int) -> int:
    """Runs with `more` bytes than are mapped, then without a limit."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, resource.RLIM_INFINITY))
    found = RAN
    try:
        session.run(None, feed)
    except Exception as error:
        found = REFUSED if "memory" in str(error) or "alloc" in str(error) else BROKEN
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    outputs: list[Array] = session.run(None, feed)
    return found if all(np.isfinite(values).all() for values in outputs) else SILENT


def main(kind: str) -> None:
    """Tries it in a child for every limit, and prints how often children ended in which way."""
    node = NODES[kind]()
    session = session_of(node, str(own_kernels.library()), threads=1)
    feed = {name: values for name, values in node.inputs.items() if values is not None}
    enough = sum(values.nbytes for values in feed.values()) + 4 * ROWS * N
    ended = Counter[int]()
    for step in range(STEPS):
        child = os.fork()
        if child == 0:
            os._exit(try_with(session, feed, enough * step // (STEPS - 1)))
        ended[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
    print(json.dumps(ended))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", NODES)
def test_an_exception_and_the_session_goes_on(kind: str) -> None:
    command = [sys.executable, "-m", "tests.runtime.kernels.test_out_of_memory", kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {str(RAN), str(REFUSED)}, done.stdout + done.stderr


if __name__ == "__main__":
    main(sys.argv[1])
