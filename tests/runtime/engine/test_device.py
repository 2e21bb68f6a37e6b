"""What runs on a provider's device beside the artifact's graph, on the CPU provider, whose device is the host: the same
graphs, bindings and copies."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from runtime import Session, SettingsError
from runtime.engine import cache
from runtime.engine.cache import KVCache
from runtime.engine.device import Device
from runtime.engine.execution import Execution
from runtime.engine.place import Host, HostLogits
from runtime.engine.providers import ON_DEVICE, open_session
from runtime.engine.step import DeviceDecodeBinding
from runtime.manifest import LayerCache
from tests.exported import PROMPT, Exported

LAYERS = {0: LayerCache(kv_heads=2, head_size=8, groups=("both",)), 3: LayerCache(1, 16, ("both",))}
DTYPES = ("float32", "float16", "bfloat16", "int8")


@pytest.fixture
def device() -> Device:
    return Device("cpu", lambda graph: open_session(graph, Execution(threads=1)))


@pytest.fixture
def on_device(tiny: Exported, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setitem(ON_DEVICE, "cpu", "cpu")
    session = Session(tiny.artifact)
    assert isinstance(session.place, Device)
    return session


def filled(place: Host | Device, dtype: str, batch: int, seed: int) -> KVCache:
    """Random words in the first five tokens of every row."""
    made = KVCache(LAYERS, batch, 2, dtype, place)
    made.reserve(6)
    generator = np.random.default_rng(seed)
    for value in made._buffers.values():
        words = value.numpy()
        words[:, :, :5] = generator.integers(-(2**62), 2**62, words[:, :, :5].shape)
    return made


def words(made: KVCache) -> dict[str, Any]:
    return {name: value.numpy().copy() for name, value in made._buffers.items()}


CHANGES: dict[str, Callable[[KVCache, KVCache], KVCache]] = {
    "grow": lambda one, other: (one.reserve(9), one)[1],
    "take": lambda one, other: one.take([2, 0, 2], 5),
    "take fewer tokens": lambda one, other: one.take([1], 3),
    "take into more room": lambda one, other: one.take([0, 1], 9),
    "join": lambda one, other: one.join(other, 5),
    "join a new one": lambda one, other: one.join(KVCache(LAYERS, 2, 2, one.dtype, one.place), 5),
    "replace": lambda one, other: (one.replace(2, other.take([1], 5), 5), one.take([0, 1, 2], 5))[1],
    "join into an empty one": lambda one, other: one.take([], 5).join(other, 5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
def test_caches_are_copied_on_the_device_as_on_the_host(
    change: str, dtype: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BLOCK", 4)
    here, there = (
        CHANGES[change](filled(place, dtype, 3, seed=1), filled(place, dtype, 2, seed=2)) for place in (Host(), device)
    )
    assert (here.capacity, here.rows) == (there.capacity, there.rows)
    expected, found = words(here), words(there)
    assert any(array.any() for array in expected.values())
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_virtual_tokens_of_bfloat16_are_rounded_to_the_nearest() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    made = KVCache({4: LAYERS[0]}, 1, 2, "bfloat16", virtual={"4.key": values, "4.value": values})
    made.reserve(1)
    bits = made._buffers["4.key"].numpy().view(np.int16)[1, :, :3]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    np.testing.assert_array_equal(bits, expected)


def test_the_likeliest_tokens_are_chosen_on_the_device_as_on_the_host(device: Device) -> None:
    table = np.random.default_rng(0).normal(size=(3, 1, 40)).astype(np.float32)
    here = HostLogits(table[:, 0])
    there = device.logits(onnxruntime.OrtValue.ortvalue_from_numpy(table), 40)
    np.testing.assert_array_equal(there.whole(), here.whole())
    for k in (1, 2, 7, 40):
        for found, expected in zip(there.likeliest(k), here.likeliest(k), strict=True):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(there.log_normalizer(), here.log_normalizer(), rtol=1e-6)
    np.testing.assert_array_equal(there.of_tokens(np.array([3, 0, 39])), here.of_tokens(np.array([3, 0, 39])))


def test_equally_likely_tokens_come_in_the_order_of_their_ids() -> None:
    ids, values, sound = HostLogits(np.array([[1, 5, 2, 5, 5, 0]], np.float32)).likeliest(4)
    assert ids.tolist() == [[1, 3, 4, 2]]
    assert values.tolist() == [[5, 5, 5, 2]]
    assert sound.tolist() == [True]


@pytest.mark.parametrize("k", [1, 5])
def test_likeliest_outputs_are_those_of_whole_logits(tiny: Exported, on_device: Session, k: int) -> None:
    plain = Session(tiny.artifact, threads=1)
    plain.place = Host()
    prompts = [PROMPT, PROMPT[:3]]
    states = [used.new_state(2, memory_bias=[0.0, 1.0]) for used in (plain, plain, on_device)]
    whole = plain.prefill(states[0], prompts, chunk=4)  # the second text ends in the first chunk
    for step in range(4):
        outputs = [
            used.prefill_likeliest(state, prompts, k, chunk=4, probabilities=True)
            if step == 0
            else used.decode_likeliest(state, [step, 9], k, probabilities=True)
            for used, state in zip((plain, on_device), states[1:], strict=True)
        ]
        for output in outputs:
            expected_ids = np.argsort(-whole.logits, -1, kind="stable")[:, :k]
            np.testing.assert_array_equal(output.ids, expected_ids)
            np.testing.assert_allclose(
                output.logits, np.take_along_axis(whole.logits, expected_ids, -1), atol=1e-5, rtol=1e-5
            )
            assert output.log_normalizer is not None
            np.testing.assert_allclose(output.log_normalizer, np.log(np.exp(whole.logits).sum(-1)), rtol=1e-5)
            assert output.gate_mean is not None
            assert whole.gate_mean is not None
            np.testing.assert_allclose(output.gate_mean, whole.gate_mean, atol=1e-6)
        whole = plain.decode_step(states[0], [step + 1, 9])
    assert plain.decode_likeliest(states[0], [1, 1]).log_normalizer is None


@pytest.mark.parametrize("k", [0, -1, 10**9, 2.5, True])
def test_a_number_of_likeliest_tokens_outside_the_vocabulary_is_refused(on_device: Session, k: Any) -> None:
    state = on_device.new_state()
    with pytest.raises(SettingsError, match=f"k is {k}; it must be (1 to 259|a whole number)"):
        on_device.prefill_likeliest(state, [PROMPT], k)
    assert state.lengths.tolist() == [0]


def test_a_text_is_scored_on_the_device_as_on_the_host(tiny: Exported, on_device: Session) -> None:
    plain = Session(tiny.artifact, threads=1)
    plain.place = Host()
    rest = list(range(20, 52))
    for chunk_rows in (256, 8):
        on_device.prefill_rows = plain.prefill_rows = chunk_rows
        np.testing.assert_allclose(on_device.score(PROMPT, rest), plain.score(PROMPT, rest), atol=1e-5)
    assert on_device.score(PROMPT, []).shape == plain.score(PROMPT, []).shape == (0,)


def test_no_step_brings_the_vocabulary_to_the_host(on_device: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    state = on_device.new_state(2)
    on_device.prefill_likeliest(state, [PROMPT, PROMPT])
    sizes: list[int] = []
    binding = on_device.binding_of(state)
    numpy = onnxruntime.OrtValue.numpy

    def counted(value: Any) -> Any:
        found = numpy(value)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", counted)
    on_device.decode_likeliest(state, [1, 2])
    assert isinstance(binding, DeviceDecodeBinding)
    (size,) = sizes  # in one copy: id, logit, its logarithm, gate and two hidden states of each row
    assert size == 2 * (8 + 4 + 4 + 4 + 2 * 4 * on_device.manifest.hidden_size)
    sizes.clear()
    on_device.decode_step(state, [1, 2])
    assert sorted(sizes) == sorted([size, 2 * 4 * on_device.manifest.vocab_size])


def test_a_cuda_graph_gets_a_new_place_for_every_move_of_the_caches_and_few_of_them(
    tiny: Exported, on_device: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BLOCK", 16)
    on_device.cuda_graph = True  # the CPU provider captures nothing, and binds the same
    plain = Session(tiny.artifact, threads=1)
    plain.place = Host()
    states = [used.new_state(2, memory_bias=[0.0, 0.5]) for used in (plain, on_device)]
    for used, state in zip((plain, on_device), states, strict=True):
        used.prefill(state, [PROMPT, PROMPT[:3]])
    places = {}
    for step in range(80):
        if step == 10:  # a second turn changes the query's state
            for used, state in zip((plain, on_device), states, strict=True):
                used.prefill(state, [PROMPT[2:6], PROMPT[:2]])
        tokens = [5 + step % 7, 9]
        expected, found = (
            used.decode_step(state, tokens) for used, state in zip((plain, on_device), states, strict=True)
        )
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
        assert found.gate_mean is not None
        assert expected.gate_mean is not None
        np.testing.assert_allclose(found.gate_mean, expected.gate_mean, atol=1e-6)
        binding = on_device.binding_of(states[1])
        assert binding.options is not None
        places[binding.options.get_run_config_entry("gpu_graph_id")] = states[1].caches["both"].capacity
    assert list(places.values()) == [16, 32, 64, 128]  # and not every 16
    np.testing.assert_array_equal(states[0].reply_sum, states[1].reply_sum)


def test_the_graph_of_a_state_that_nobody_refers_to_is_freed(
    on_device: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device.cuda_graph = True
    freed: list[int] = []
    monkeypatch.setattr(on_device.onnx, "release_captured_graph", freed.append, raising=False)
    state = on_device.new_state()
    on_device.prefill_likeliest(state, [PROMPT])
    on_device.decode_likeliest(state, [3])
    options = on_device.binding_of(state).options
    assert options is not None
    assert freed == []
    gc.disable()
    try:
        del state
        assert freed == [int(options.get_run_config_entry("gpu_graph_id"))]
    finally:
        gc.enable()


def test_the_graphs_are_what_their_script_writes() -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, str(root / "scripts" / "write_device_graphs.py"), "--check"]
    assert subprocess.run(command, check=False, capture_output=True, text=True).stderr == ""
