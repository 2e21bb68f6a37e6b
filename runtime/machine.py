"""The machine: cores that this process may use, memory, and the process's peak. Linux first; other systems get the
answers that Python has."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any


def usable_cores() -> int:
    """Physical cores within the affinity mask and the cgroup's CPU quota: what onnxruntime should use as threads.

    onnxruntime itself would size its pool from the whole machine.
    """
    allowed = _affinity()
    cores = {_core_of(cpu) for cpu in allowed}
    quota = _cgroup_quota()
    count = len(cores) if quota is None else min(len(cores), max(1, int(quota)))
    return max(1, count)


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far, in MiB."""
    try:  # getrusage would also count what the parent held when it started this process
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def memory_mb() -> dict[str, float]:
    """total and available memory in MiB; empty where the system does not tell in /proc."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"total": kilobytes["MemTotal"] / 1024, "available": kilobytes["MemAvailable"] / 1024}


def describe_machine() -> dict[str, Any]:
    """For a benchmark's record: processor, cores, memory, system, Python."""
    return {
        "processor": _processor_name(),
        "usable_cores": usable_cores(),
        "memory_mb": round(memory_mb().get("total", 0)),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _core_of(cpu: int) -> tuple[str, str]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package = (topology / "physical_package_id").read_text(encoding="ascii").strip()
        return package, (topology / "core_id").read_text(encoding="ascii").strip()
    except OSError:
        return "?", str(cpu)


def _cgroup_quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
