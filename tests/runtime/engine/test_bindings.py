"""What a session binds for a GPU, checked without one: every input and output of the graph by name, type, shape and
place. onnxruntime is replaced by a recorder, since the CPU's has neither bfloat16 nor a device."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export.settings import ExportSettings
from runtime import Session
from runtime.engine import loaded_graph
from runtime.engine.device import Device
from runtime.engine.signature import _NUMPY_NAMES, SECTIONS, section_hash
from runtime.engine.step import DeviceDecodeBinding
from runtime.manifest import Manifest, TensorSignature, read_manifest
from tests.exported import PROMPT, Exported, export_tiny

SETTINGS = {
    "fp16": ExportSettings("fp16"),
    "bf16": ExportSettings("bf16"),
    "int4, fp16": ExportSettings("int4", activations="fp16", rounding="nearest"),
    "int8, bf16": ExportSettings("int8", activations="bf16"),
    "fp16, int8 caches": ExportSettings("fp16", kv_cache="int8"),
    "fp16, base alone": ExportSettings("fp16", base_only=True),
}
ON_GPU: dict[int, onnxruntime.OrtValue] = {}
"""What counts as being on the GPU, by address; kept, so that no address comes again."""
SPELT = {name: type_ for type_, name in _NUMPY_NAMES.items()}
ELEMENT_TYPES = {16: "bfloat16"} | {
    type_: type_.__name__ for type_ in (np.float16, np.int8, np.float32, np.int64, np.int32)
}


class GPU(Device):
    """A device's name, and the host's memory."""

    def __init__(self) -> None:
        super().__init__("cuda", lambda graph: Recorder(None))

    def put(self, words: Any) -> onnxruntime.OrtValue:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(words)
        ON_GPU[value.data_ptr()] = value
        return value

    def empty(self, shape: Any, dtype: Any) -> onnxruntime.OrtValue:
        return self.put(np.zeros(shape, dtype))


class Binding:
    """Records (place, type, shape) by name; the last binding of a name counts."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        self.outputs: dict[str, tuple[str, str, tuple[int, ...]]] = {}

    def bind_input(self, name: str, place: str, number: int, type_: Any, shape: Any, address: int) -> None:
        self.inputs[name] = (place, ELEMENT_TYPES[type_], tuple(shape))

    def bind_output(
        self, name: str, place: str = "cpu", number: int = 0, type_: Any = None, shape: Any = (), address: int = 0
    ) -> None:
        self.outputs[name] = (place, ELEMENT_TYPES.get(type_, "any"), tuple(shape))

    def bind_cpu_input(self, name: str, array: Any) -> None:
        self.inputs[name] = ("cpu", array.dtype.name, array.shape)

    def bind_ortvalue_input(self, name: str, value: onnxruntime.OrtValue) -> None:
        self.inputs[name] = described(value)

    def bind_ortvalue_output(self, name: str, value: onnxruntime.OrtValue) -> None:
        self.outputs[name] = described(value)


def described(value: onnxruntime.OrtValue) -> tuple[str, str, tuple[int, ...]]:
    place = "cuda" if value.data_ptr() in ON_GPU else "cpu"
    return place, _NUMPY_NAMES[value.data_type()], tuple(value.shape())


class Recorder:
    """An onnxruntime session with a manifest's inputs and outputs; None: one of the device's own graphs."""

    def __init__(self, manifest: Manifest | None) -> None:
        self.manifest = manifest

    def get_inputs(self) -> list[Any]:
        return [self._value(signature) for signature in self._manifest().inputs]

    def get_outputs(self) -> list[Any]:
        return [self._value(signature) for signature in self._manifest().outputs]

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_modelmeta(self) -> Any:
        sections = self._manifest().raw.items()
        hashes = {name: section_hash(name, section) for name, section in sections}
        return SimpleNamespace(custom_metadata_map={SECTIONS: json.dumps(hashes)})

    def io_binding(self) -> Binding:
        return Binding()

    def _manifest(self) -> Manifest:
        assert self.manifest is not None
        return self.manifest

    def _value(self, signature: TensorSignature) -> Any:
        return SimpleNamespace(name=signature.name, type=SPELT[signature.dtype], shape=list(signature.shape))


@pytest.fixture(scope="module", params=SETTINGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("gpu"), head_dim=16, settings=SETTINGS[request.param])


@pytest.fixture
def session(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> Session:
    manifest = read_manifest(exported.artifact)
    monkeypatch.setattr(loaded_graph, "open_session", lambda *arguments: Recorder(manifest))
    monkeypatch.setattr(loaded_graph, "_place", lambda execution: GPU())
    return Session(exported.artifact, provider="cuda", cuda_graph=True)


def sizes(signature: TensorSignature, found: tuple[int, ...]) -> bool:
    """Whether a shape is the manifest's wherever that has a number."""
    pairs = zip(signature.shape, found, strict=True)
    return all(isinstance(wanted, str) or wanted == size for wanted, size in pairs)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_step_binds_everything_on_the_device_in_the_graphs_types(session: Session, batch: int) -> None:
    state = session.new_state(batch)
    session.reserve(state, 12)
    binding = session.binding_of(state)
    assert isinstance(binding, DeviceDecodeBinding)
    recorded: Any = binding.binding
    assert set(recorded.inputs) == {signature.name for signature in session.manifest.inputs}
    for signature in session.manifest.inputs:
        place, dtype, shape = recorded.inputs[signature.name]
        assert dtype == signature.dtype, signature.name
        assert sizes(signature, shape), signature.name
        assert place == ("cpu" if signature.name == "total_sequence_length" else "cuda"), signature.name
    outputs = {signature.name: signature for signature in session.manifest.outputs}
    for name, (place, dtype, shape) in recorded.outputs.items():
        assert (place, dtype) == ("cuda", outputs[name].dtype), name
        assert sizes(outputs[name], shape), name
    unbound = set(outputs) - set(recorded.outputs)
    assert unbound <= {"gate", "hidden_base", "hidden_fused", "present_query_sum", "present_query_count"}
    for name, given in recorded.inputs.items():  # one buffer for past and present
        if name.startswith("past_key_values."):
            assert recorded.outputs[name.replace("past_key_values", "present")] == given
    assert binding.options is not None
    assert int(binding.options.get_run_config_entry("gpu_graph_id")) > 0


def test_a_prefill_leaves_its_logits_on_the_device_and_is_not_captured(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def run(binding: Any, options: onnxruntime.RunOptions) -> None:
        seen.append(binding)
        assert options.get_run_config_entry("gpu_graph_id") == "-1"
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run", run)
    state = session.new_state(1)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(state, [PROMPT])
    (binding,) = seen
    assert set(binding.inputs) == {signature.name for signature in session.manifest.inputs}
    for signature in session.manifest.inputs:
        place, dtype, shape = binding.inputs[signature.name]
        assert dtype == signature.dtype, signature.name
        assert sizes(signature, shape), signature.name
        assert place == ("cuda" if signature.name.startswith("past_key_values.") else "cpu"), signature.name
    assert binding.outputs["logits"][0] == "cuda"
    assert state.lengths.tolist() == [0]
