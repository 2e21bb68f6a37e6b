"""Fixtures for every test: one thread, no network, and the tiny base models that tests only read."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import pytest
import torch

from export.trace import trace
from tests.builders import CHAT_TEMPLATE, make_base_folder
from tests.exported import Exported, export_tiny
from tests.traced import kept

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background starts us with Ctrl-C ignored

ROOT = Path(__file__).resolve().parent
SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL_MODELS = Path.home() / ".cache" / "imsm-models"  # where examples/real_model.py makes SmolLM2


LONGEST = [
    "benchmarks/test_coverage.py",
    "parity/test_rows.py",
    "export/test_quantized_export.py",
    "export/test_added_tokens.py",
    "contract/test_mutations.py",
    "export/test_cuda_kernels.py",
    "imsm_core/test_text_part.py",
    "parity/test_chunks_of_batches.py",
    "parity/test_half_precision.py",
    "parity/test_architectures.py",
    "export/passes/test_quantize_experts.py",
    "runtime/kernels/test_fuzz.py",
    "parity/test_gate_kinds.py",
    "runtime/engine/test_interrupted.py",
    "parity/test_real_model.py",
    "test_wheel.py",
]
"""The files that take longest, the longest first. Workers take whole files: one that starts last keeps the others
waiting."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real", action="store_true", help="run the tests on real models too, where those are made")


def pytest_collection_finish() -> None:
    gc.freeze()  # every collection would walk through all of PyTorch's and transformers' objects


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if not config.getoption("--real"):
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason="runs on a real model; scripts/test --real runs it"))


@pytest.fixture(scope="session", autouse=True)
def traces(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """Exports of this session, in whichever process, trace the same module once."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "traces"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.pipeline.trace", kept(trace, folder))
        yield


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with head size 8, untied, without a chat template. Read only."""
    return make_base_folder(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of model with a chat template. Read only."""
    return make_base_folder(tmp_path_factory.mktemp("bases") / "chat", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, whose config has dropout, with head size 12. Read only."""
    return make_base_folder(tmp_path_factory.mktemp("bases") / "gpt2", "gpt2", head_dim=12)


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with head size 16 and tied embeddings. Read only."""
    return make_base_folder(tmp_path_factory.mktemp("bases") / "qwen2", "qwen2", head_dim=16, tied=True)


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """A real trained model of 260 k parameters."""
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"needs the real model in {folder}, which is not there")
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, a real trained model: Llama with tied embeddings and a chat template. Read only."""
    folder = REAL_MODELS / "smollm2"
    if not (folder / "config.json").is_file():
        pytest.skip(f"needs the real model in {folder}; scripts/demo --real makes it")
    return folder


@pytest.fixture(scope="session")
def gemma3_folder() -> Path:
    """Gemma 3 270M, a real trained model: windows in most layers, 262,144 tokens, no chat template. Read only."""
    folder = REAL_MODELS / "gemma3"
    if not (folder / "config.json").is_file():
        pytest.skip(f"needs Gemma 3 270M as a Hugging Face folder in {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}, which is not there")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny Llama with a query-aware gate, exported. Read only: tests that damage it use `tests.exported.copied`."""
    return export_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a folder that is a file system of its own, of so many kilobytes."""
    folder = tmp_path / "mounted"

    def mount(kilobytes: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the permission to mount a file system")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)
