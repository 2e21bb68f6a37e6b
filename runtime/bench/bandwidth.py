"""How fast this machine reads memory: the bound of decoding, which reads every weight once a step."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..machine import memory_mb

MEBIBYTES, PASSES = 512, 6


def read_gb_per_s(threads: int, mebibytes: int = MEBIBYTES) -> float:
    """The best of several passes over an array far larger than a cache, in 10^9 bytes per second.

    Each thread takes the maximum of its own slice: NumPy does that without the interpreter's lock, with vector
    instructions, and without the threads that its matrix products start. The array takes at most a quarter of the free
    memory.
    """
    available = memory_mb().get("available", 4.0 * mebibytes)
    data = np.ones(max(1, min(mebibytes, int(available / 4))) << 18, np.float32)
    slices = np.array_split(data, threads)
    taken = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            start = time.perf_counter()
            list(pool.map(np.max, slices))
            taken.append(time.perf_counter() - start)
    return data.nbytes / min(taken) / 1e9
