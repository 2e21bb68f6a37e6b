"""The export's settings: importable without PyTorch, checked at once, and reported in the command line's words."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from export.settings import ExportSettings
from imsm_core.errors import SettingsError

ROOT = Path(__file__).resolve().parents[2]
BANNED = ("torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "optimum", "numpy")


def test_settings_and_the_command_import_without_pytorch_and_onnx() -> None:
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BANNED!r}:
            raise ImportError("blocked " + name)
sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError:
    import export.commands, export.settings
    print(export.settings.ExportSettings(precision="int4", activations="fp16").dtype_name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "float16\n", done.stderr


def test_every_setting_is_an_option_with_a_help_text() -> None:
    metadata = {entry.name: entry.metadata for entry in fields(ExportSettings)}
    assert all(entry["help"] for entry in metadata.values())
    assert metadata["symmetric"]["option"] == "--asymmetric"


@pytest.mark.parametrize(
    ("precision", "activations", "bits", "dtype_name", "portable", "tolerance"),
    [
        ("fp32", None, None, "float32", False, None),
        ("fp16", None, None, "float16", True, 0.05),
        ("bf16", None, None, "bfloat16", True, 0.25),
        ("int4", None, 4, "float32", False, None),
        ("int8", "bf16", 8, "bfloat16", True, 0.25),
    ],
)
def test_what_follows_from_a_precision(
    precision: str, activations: str | None, bits: int | None, dtype_name: str, portable: bool, tolerance: float | None
) -> None:
    settings = ExportSettings(precision=precision, activations=activations)
    assert (settings.bits, settings.dtype_name, settings.tolerance) == (bits, dtype_name, tolerance)
    assert settings.one_node_per_stream == portable
    assert settings.verifiable == (dtype_name != "bfloat16")


def test_an_error_names_settings_as_its_caller_spells_them() -> None:
    with pytest.raises(SettingsError) as caught:
        ExportSettings(activations="fp16")
    error = caught.value
    assert error.told(lambda name: f"--{name}") == (
        "--activations is fp16; it needs int8 or int4 weights, and --precision is fp32"
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
