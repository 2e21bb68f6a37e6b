"""How fast this machine reads memory: a dot product of an array far larger than any cache, one slice a thread.

python -m benchmarks.peers.bandwidth 2
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

REPEATS, BYTES = 10, 1 << 30


def read_gb_per_s(threads: int) -> float:
    """The best of several passes, in 10^9 bytes per second."""
    import numpy as np

    data = np.ones(BYTES // 4, np.float32)
    slices = np.array_split(data, threads)

    def read(part: np.ndarray) -> None:
        np.dot(part, part)  # without the interpreter's lock; both operands are one stream of memory

    taken = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(pool.map(read, slices))
            taken.append(time.perf_counter() - start)
    return data.nbytes / min(taken) / 1e9


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the slices are the threads
    print(read_gb_per_s(int(sys.argv[1])))
