"""The machine: cores that this process may use, memory, and the process's peak. Linux first; other systems get what
Python knows."""

from __future__ import annotations

import math
import os
import platform
import sys
from pathlib import Path
from typing import Any


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores within the affinity mask and the cgroup's CPU quota: what onnxruntime should use as threads.

    onnxruntime itself would size its pool from the whole machine. root: where /sys and /proc are.
    """
    cores = {_core_of(cpu, root) for cpu in _affinity()}
    quota = cgroup_quota(root)
    count = len(cores) if quota is None else min(len(cores), int(quota))
    return max(1, count)


def usable_processors(root: Path = Path("/")) -> int:
    """Processors, several to a core, within the affinity mask and the cgroup's CPU quota: more threads only wait for
    each other. root: where /sys and /proc are."""
    quota = cgroup_quota(root)
    count = len(_affinity())
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that this process may use, by cgroup version 2 or 1; None without a limit. The tightest
    limit of the process's own group and of those above it that are visible from here."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0" and not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in (controllers, "cpu")]
        else:
            continue
        own = Path(group.lstrip("/"))
        limits += [_limit(mount / part) for mount in mounts for part in (own, *own.parents)]
    return min((limit for limit in limits if limit is not None), default=None)


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
    """total and available memory in MiB; empty where /proc does not say."""
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


def _core_of(cpu: int, root: Path) -> str:
    """The processors that share a core with this one: the same text for each of them."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the old name
        siblings = _read(topology / name).strip()
        if siblings:
            return siblings
    return str(cpu)


def _limit(group: Path) -> float | None:
    """quota / period of one cgroup folder of either version; None without a limit there."""
    words = _read(group / "cpu.max").split() or [
        _read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    try:
        quota, period = map(int, words)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
