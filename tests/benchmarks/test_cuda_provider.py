"""The list of CUDA kernels from onnxruntime's registry, and graphs on its CUDA provider where that is installed.

The second needs no GPU: the rehearsal's libraries stand in for CUDA. IMSM_ONNXRUNTIME_GPU names a Python that has
onnxruntime-gpu; without it, this one must have it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cuda.list_kernels import kernel_list, merged
from benchmarks.cuda.rehearsal.build import build, onnxruntime_folder
from benchmarks.cuda.zoo import graphs_of
from export.artifact import GRAPH
from export.cuda_kernels import cuda_kernels
from export.settings import ExportSettings
from tests.adapters import make_siamese_with
from tests.exported import export_tiny
from tests.zoo import make_zoo_base

ROOT = Path(__file__).resolve().parents[2]
OPEN = 2**31 - 1


@dataclass(frozen=True)
class Kernel:
    op_name: str
    version_range: tuple[int, int]
    type_constraints: dict[str, list[str]]
    domain: str = ""
    provider: str = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Option:
    name: str


@dataclass(frozen=True)
class Parameter:
    name: str
    typeStr: str
    option: Option = Option("Single")


@dataclass(frozen=True)
class Schema:
    name: str
    since_version: int
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    domain: str = ""


def test_kernels_that_differ_in_one_type_are_one_entry_and_others_are_not() -> None:
    half, full = frozenset({"float16"}), frozenset({"float"})
    every = [{"T": t, "U": u} for t in (half, full) for u in (half, full)]
    assert merged(every) == [{"T": half | full, "U": half | full}]
    diagonal = merged([{"T": half, "U": half}, {"T": full, "U": full}])
    assert len(diagonal) == 2
    assert merged(every[:3] + every[:1]) in (
        [{"T": half, "U": half | full}, {"T": full, "U": half}],
        [{"T": half | full, "U": half}, {"T": half, "U": full}],
    )


def test_a_kernel_serves_the_versions_that_onnxruntime_gives_it() -> None:
    x, y, ids = Parameter("x", "T"), Parameter("y", "T"), Parameter("ids", "tensor(int64)")
    schemas = [Schema("Op", since, (x, ids), (y,)) for since in (1, 13, 17, 21, 24)]
    kernels = [
        Kernel("Op", (13, 20), {"T": ["tensor(float)"], "ids": ["tensor(int64)"]}),
        Kernel("Op", (21, OPEN), {"T": ["tensor(float)"]}),
        Kernel("Op", (21, OPEN), {"T": ["tensor(float16)"]}),
        Kernel("Op", (1, OPEN), {"T": ["tensor(double)"]}, provider="CPUExecutionProvider"),
    ]
    found = kernel_list(kernels, schemas)[""]["Op"]
    assert list(found) == ["17", "21", "24"]
    assert found["17"] == {"inputs": "T int64", "outputs": "T", "kernels": [{"T": "float", "int64": "int64"}]}
    assert found["21"]["kernels"] == [{"T": "float float16"}]
    assert found["24"]["kernels"] == []  # an open kernel is for the version that it was written for


@pytest.fixture(scope="module")
def python() -> str:
    """A Python with onnxruntime-gpu."""
    found = os.environ.get("IMSM_ONNXRUNTIME_GPU", sys.executable)
    if not (onnxruntime_folder(found) / "libonnxruntime_providers_cuda.so").is_file():
        pytest.skip(f"{found} has no onnxruntime-gpu; IMSM_ONNXRUNTIME_GPU may name a Python that has it")
    return found


@pytest.fixture(scope="module")
def libraries(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rehearsal's libraries."""
    folder = tmp_path_factory.mktemp("rehearsal")
    assert {path.name.split(".")[0] for path in build(onnxruntime_folder(python), folder)} >= {"libcudart", "libcublas"}
    return folder


def rehearse(python: str, libraries: Path, *arguments: str) -> list[dict[str, Any]]:
    """What `python -m benchmarks.cuda...` prints, a JSON object a line, and last what the device counted."""
    counts = libraries / "counts"
    counts.unlink(missing_ok=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries), "IMSM_REHEARSAL_COUNTS": str(counts)}
    command = [python, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (done.stdout + counts.read_text()).splitlines()]


def test_onnxruntime_puts_on_cuda_what_the_list_says(python: str, libraries: Path, tmp_path: Path) -> None:
    base = make_zoo_base(tmp_path / "base", "llama, 1 layer, multi-query")
    settings = ExportSettings(precision="bf16")
    ((_, graph),) = graphs_of(make_siamese_with(base, "lora"), base, settings, tmp_path, ["float"])
    expected = cuda_kernels(graph)
    placed, counts = rehearse(python, libraries, "benchmarks.cuda.placement", "--plain", str(tmp_path / GRAPH))
    assert placed["refused"] is None
    assert sum(placed["cpu"].values()) == expected.shape_nodes
    assert sum(placed["cuda"].values()) == expected.nodes - expected.shape_nodes
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    assert counts["bytes_to_device"] > weights  # opened twice
    assert counts["bytes_to_host"] == 0


def test_a_graph_without_kernels_is_refused_capture(python: str, libraries: Path, tmp_path: Path) -> None:
    base = make_zoo_base(tmp_path / "base", "llama, 1 layer, multi-query")
    settings = ExportSettings(portable=True)  # float32, which CUDA's attention lacks
    ((_, graph),) = graphs_of(make_siamese_with(base, "lora"), base, settings, tmp_path, ["float"])
    (missing,) = cuda_kernels(graph).missing
    assert missing.startswith("GroupQueryAttention of")
    placed, _ = rehearse(python, libraries, "benchmarks.cuda.placement", "--plain", str(tmp_path / GRAPH))
    assert placed["cpu"]["GroupQueryAttention"] == 2
    assert "graph capture" in placed["refused"]


STEP = """
import ctypes, json, sys
from runtime.engine.session import Session

session = Session(sys.argv[1], provider="cuda", cuda_graph=True)
state = session.new_state(2)
session.prefill_likeliest(state, [[5, 6, 7], [8]])
rows = state.take([1, 0, 1])
rows.join(state)
session.decode_likeliest(rows, [1, 2, 3, 4, 5])  # is captured
session.decode_likeliest(rows, [1, 2, 3, 4, 5])
libcudart, text = ctypes.CDLL("libcudart.so.13"), ctypes.create_string_buffer(4096)
libcudart.rehearsal_reset()
session.decode_likeliest(rows, [1, 2, 3, 4, 5])
libcudart.rehearsal_counts(text, ctypes.c_size_t(len(text)))
print(text.value.decode())
"""


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_captured_step_is_one_launch_and_one_copy_each_way(
    python: str, libraries: Path, tmp_path: Path, precision: str
) -> None:
    exported = export_tiny(tmp_path, head_dim=16, settings=ExportSettings(precision=precision))
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(ROOT)}
    command = [python, "-c", STEP, str(exported.artifact)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["graph_launches"], counts["copies_to_device"], counts["copies_to_host"]) == (1, 1, 1)
    assert counts["bytes_to_device"] == 5 * 8 + 24  # tokens, and lengths of 4 bytes in words of 8
    width = exported.manifest["model"]["hidden_size"]
    assert counts["bytes_to_host"] == 5 * (8 + 2 * 4 * width) + 3 * 24  # ids, hidden states; logits, logarithms, gates
    assert counts["device_allocations"] == counts["host_allocations"] == 0


def test_the_list_is_that_of_the_installed_onnxruntime(python: str, libraries: Path, tmp_path: Path) -> None:
    environment = os.environ | {"LD_LIBRARY_PATH": f"{libraries}:{libraries / 'tensorrt'}"}
    command = [python, "-m", "benchmarks.cuda.list_kernels", str(tmp_path / "list.json")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "list.json").read_text())
    ours = json.loads((ROOT / "export" / "cuda_kernels.json").read_text())
    if found["onnxruntime-gpu"] != ours["onnxruntime-gpu"]:
        pytest.skip(f"the list is of onnxruntime-gpu {ours['onnxruntime-gpu']}, not {found['onnxruntime-gpu']}")
    assert found == ours
