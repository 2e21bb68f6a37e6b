"""Runs random nodes for some time.

`python -m tests.runtime.kernels.fuzz LIBRARY valid|contradicting SEED SECONDS THREADS`

Every input, and every output of a valid node, ends right before a page that cannot be touched, so that reading or
writing beyond it ends the process; `test_fuzz.py` loads a LIBRARY that was built with sanitizers. A node's seed is
printed before it runs, so that the last line names the node that a process died of: SECONDS 0 runs that one alone.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from collections import Counter

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from .random_nodes import Array, Node, Nodes

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_UNTOUCHABLE, _USUAL = 0, mmap.PROT_READ | mmap.PROT_WRITE


class Guarded:
    """A copy of an array that ends right before a page that cannot be touched."""

    def __init__(self, values: Array) -> None:
        pages = -(-values.nbytes // mmap.PAGESIZE)
        self._memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._end = self._start + pages * mmap.PAGESIZE
        self.address = self._end - values.nbytes
        offset = self.address - self._start
        copy: Array = np.ndarray(values.shape, values.dtype, buffer=self._memory, offset=offset)
        copy[...] = values
        self._protect(_UNTOUCHABLE)

    def _protect(self, how: int) -> None:
        assert _libc.mprotect(self._end, mmap.PAGESIZE, how) == 0, "mprotect failed"

    def release(self) -> None:
        """Make the page usual again: it goes back to the system with the others."""
        self._protect(_USUAL)


def session_of(node: Node, library: str, threads: int) -> onnxruntime.InferenceSession:
    given = {name: values for name, values in node.inputs.items() if values is not None}
    operands = [name if name in given else "" for name in node.inputs]
    while operands and operands[-1] == "":
        operands.pop()
    outputs = [f"y{index}" for index in range(node.outputs)]
    graph = helper.make_graph(
        [helper.make_node(node.operator, operands, outputs, domain="imsm", **node.attributes)],
        "g",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values.dtype), [None] * values.ndim)
            for name, values in given.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("imsm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # each tensor is a piece of memory of its own
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(node: Node, library: str, threads: int, guard_outputs: bool) -> None:
    """Raises what onnxruntime raises."""
    guarded: list[Guarded] = []

    def place(values: Array) -> int:
        guarded.append(Guarded(values))
        return guarded[-1].address

    try:
        session = session_of(node, library, threads)
        binding = session.io_binding()
        for name, values in node.inputs.items():
            if values is not None and values.nbytes:
                kind = values.dtype.type
                binding.bind_input(name, "cpu", 0, kind, list(values.shape), place(values))
            elif values is not None:
                binding.bind_cpu_input(name, np.ascontiguousarray(values))
        for index in range(node.outputs):
            shape = node.shapes[index]
            if guard_outputs and all(shape):
                address = place(np.full(shape, np.nan, np.float32))
                binding.bind_output(f"y{index}", "cpu", 0, np.float32, list(shape), address)
            else:
                binding.bind_output(f"y{index}", "cpu")
        session.run_with_iobinding(binding)
    finally:
        for memory in guarded:
            memory.release()


def main(library: str, kind: str, seed: str, seconds: str, threads: str) -> None:
    valid, start, ran = kind == "valid", time.monotonic(), Counter[str]()
    number = int(seed)
    while True:
        nodes = Nodes(number, small=not valid)
        node = nodes.valid() if valid else nodes.contradicting()
        print(f"seed {number} {node.operator} {node.attributes}", flush=True)
        try:
            run(node, library, int(threads), guard_outputs=valid)
            ran[f"{node.operator} ran"] += 1
        except Exception as error:
            if valid:
                raise
            ran[f"{node.operator} refused"] += 1
            if seconds == "0":
                print(error)
        number += 1
        if time.monotonic() - start >= float(seconds):
            break
    print("done", *(f"{what}: {count}" for what, count in sorted(ran.items())), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
