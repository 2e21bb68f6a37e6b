"""Cores, quotas and memory of a machine, on made-up /sys and /proc trees; providers and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from runtime import machine
from runtime.bench.bandwidth import read_gb_per_s
from runtime.doctor import examine, format_report
from runtime.engine import own_kernels
from runtime.engine.execution import Execution
from runtime.engine.providers import _PROBE, open_session, usable_providers
from runtime.errors import ArtifactError, IMSMWarning, ProviderError
from runtime.machine import cgroup_quota, describe_machine, peak_rss_mb, usable_cores, usable_processors

V1, V2 = "4:memory:/\n3:cpu,cpuacct:/box\n2:cpuset:/\n0::/\n", "0::/box/inner\n"


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.strip() + "\n")
    return root


def siblings(pairs: dict[int, str], name: str = "core_cpus_list") -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": text for cpu, text in pairs.items()}


@pytest.fixture
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_affinity", lambda: set(range(8)))


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = write_tree(tmp_path, siblings({cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}, name))
    for allowed, cores in ((set(range(8)), 4), ({0, 4}, 1), ({0, 1, 4}, 2), ({3}, 1)):
        monkeypatch.setattr(machine, "_affinity", lambda allowed=allowed: allowed)
        assert usable_cores(root) == cores


@pytest.mark.usefixtures("eight_processors")
def test_without_a_topology_every_processor_is_a_core(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8


@pytest.mark.usefixtures("eight_processors")
@pytest.mark.parametrize(
    ("files", "quota", "cores"),
    [
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "max 100000"}, None, 8),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/box/inner/cpu.max": "250000 100000"}, 2.5, 2),
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/box/inner/cpu.max": "max 100000",
                "sys/fs/cgroup/box/cpu.max": "300000 100000",
                "sys/fs/cgroup/cpu.max": "600000 100000",
            },
            3.0,
            3,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5, 1),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            4.0,
            4,
        ),
        (  # a container sees its own group where it is mounted, not under the path that it is given
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2.0,
            2,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
            8,
        ),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "damaged"}, None, 8),
    ],
)
def test_the_tightest_quota_of_either_version_bounds_the_threads(
    tmp_path: Path, files: dict[str, str], quota: float | None, cores: int
) -> None:
    root = write_tree(tmp_path, files)
    assert cgroup_quota(root) == quota
    assert usable_cores(root) == cores


def test_the_machine_is_described() -> None:
    assert usable_cores() >= 1
    assert peak_rss_mb() > 10
    assert describe_machine()["usable_cores"] == usable_cores()


def test_the_reading_speed_is_plausible() -> None:
    assert 0.1 < read_gb_per_s(2, mebibytes=16) < 10_000


def test_the_probe_graph_starts_the_cpu() -> None:
    assert usable_providers()["cpu"] == "usable"


def test_threads_and_spinning_reach_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.execution.usable_processors", lambda: 3)
    quiet = open_session(_PROBE, Execution(threads=3, spin=False)).get_session_options()
    assert quiet.intra_op_num_threads == 3
    assert quiet.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert open_session(_PROBE, Execution()).get_session_options().intra_op_num_threads == usable_cores()


def test_more_threads_than_processors_are_cut_to_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.execution.usable_processors", lambda: 2)
    text = "500 threads are more than the 2 processors that this process may use; 2 run"
    with pytest.warns(IMSMWarning, match=text) as found:
        assert Execution(threads=500).threads == 2
    assert found[0].filename == __file__
    with pytest.warns(IMSMWarning):
        assert Execution(threads=10**30).threads == 2
    assert Execution(threads=2).threads == 2


def test_processors_are_all_threads_of_the_cores_within_the_quota(tmp_path: Path, eight_processors: None) -> None:
    pairs = siblings({cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    assert usable_cores(write_tree(tmp_path, pairs)) == 4
    assert usable_processors(tmp_path) == 8
    write_tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"})
    assert usable_processors(tmp_path) == 2


def test_an_onnxruntime_that_computes_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    with pytest.raises(ProviderError, match=r"onnxruntime 1\.19\.2 computes attention wrongly; .* at least 1\.20"):
        open_session(_PROBE, Execution())
    facts = examine()
    assert facts["forms"] == []
    assert facts["problems"]


@pytest.mark.parametrize(("version", "forms"), [("1.24.1", ["portable"]), ("1.32.0", ["portable", "default"])])
def test_the_doctor_says_which_form_runs(monkeypatch: pytest.MonkeyPatch, version: str, forms: list[str]) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    facts = examine()
    assert facts["forms"] == forms
    assert ("default form needs onnxruntime 1.32" in format_report(facts)) == (len(forms) == 1)


@pytest.mark.skipif(own_kernels.library() is None, reason=own_kernels.describe())
def test_the_doctor_says_whether_there_are_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "AVX-512 VNNI" in examine()["kernels"]
    assert f"kernels      {examine()['kernels']}" in format_report(examine())
    damaged = tmp_path / "_kernels.so"
    damaged.write_bytes(b"no library")
    cases: list[tuple[str, Any, str]] = [
        ("_built", lambda: None, "not built"),
        ("_built", lambda: damaged, f"{damaged} cannot be loaded"),
        ("_supported", lambda path: False, "none for this processor"),
    ]
    for name, fake, message in cases:
        with monkeypatch.context() as patch:
            patch.setattr(own_kernels, name, fake)
            assert message in own_kernels.describe()
            own_kernels.library.cache_clear()
            assert own_kernels.library() is None
            open_session(_PROBE, Execution())  # runs without them
    own_kernels.library.cache_clear()


def record_sessions(monkeypatch: pytest.MonkeyPatch, available: list[str]) -> dict[str, Any]:
    """What sessions are opened with from here on, by an onnxruntime that has the providers `available`."""
    given: dict[str, Any] = {}

    class Recorded:
        def __init__(self, source: object, options: object, **settings: object) -> None:
            given.update(settings)

        def get_providers(self) -> list[str]:
            return available

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorded)
    return given


def test_cuda_keeps_float32_and_captures_a_graph_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = record_sessions(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    for wanted in (True, False):
        open_session(_PROBE, Execution("cuda", cuda_graph=wanted))
        own = {"use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"}
        graph = {"enable_cuda_graph": "1"} if wanted else {}
        assert given["provider_options"] == [own | graph, {}]


def test_a_provider_with_its_own_threads_gets_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    available = ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    given = record_sessions(monkeypatch, available)
    monkeypatch.setattr("runtime.engine.execution.usable_processors", lambda: 3)
    open_session(_PROBE, Execution("openvino", threads=3))
    assert given == {"providers": available, "provider_options": [{"num_of_threads": "3"}, {}]}


def test_a_graph_too_new_for_this_onnxruntime_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, *arguments: object, **settings: object) -> None:
            raise RuntimeError("INVALID_GRAPH: GroupQueryAttention:1 has input size 17 not in range [min=7, max=12].")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Refusing)
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.1")
    with pytest.raises(ArtifactError, match=r"it needs onnxruntime 1\.32 and this is 1\.24\.1: .*portable form"):
        open_session(_PROBE, Execution())
    monkeypatch.setattr(onnxruntime, "__version__", "1.32.0")
    with pytest.raises(ArtifactError, match=r"max=12\]\.$"):
        open_session(_PROBE, Execution())


def test_a_graph_that_cannot_be_captured_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, *arguments: object, **settings: object) -> None:
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

    record_sessions(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Refusing)
    with pytest.raises(ArtifactError, match=r"as requested by the user; run it without cuda_graph$"):
        open_session(_PROBE, Execution("cuda", cuda_graph=True))
