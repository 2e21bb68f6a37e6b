"""What this machine can do with an artifact: Python, onnxruntime's build, providers that really start, the forms of
artifact that it runs, threads, memory."""

from __future__ import annotations

import sys
from typing import Any

import onnxruntime

from .engine import own_kernels
from .engine.providers import (
    DEFAULT_FORM_VERSION,
    OLDEST_VERSION,
    installed_builds,
    installed_version,
    spelt,
    usable_providers,
)
from .machine import cgroup_quota, describe_machine, memory_mb, usable_cores

_FORMS = (
    f"none: this onnxruntime is older than {spelt(OLDEST_VERSION)}",
    f"in the portable form; the default form needs onnxruntime {spelt(DEFAULT_FORM_VERSION)}",
    "in the default form and in the portable form",
)


def examine() -> dict[str, Any]:
    """The facts, and under `problems` one line for each thing to fix."""
    builds = installed_builds()
    providers = usable_providers()
    problems = []
    if len(builds) > 1:
        problems.append(
            f"{' and '.join(builds)} are both installed and overwrite each other; uninstall all of them, "
            "then install one"
        )
    problems += [f"{name}: {state}" for name, state in providers.items() if state != "usable"]
    return {
        "python": sys.version.split()[0],
        "onnxruntime": onnxruntime.__version__,
        "builds": builds,
        "providers": providers,
        "forms": _forms(),
        "kernels": own_kernels.describe(),
        "threads": usable_cores(),
        "cpu_quota": cgroup_quota(),
        "memory_mb": {name: round(size) for name, size in memory_mb().items()},
        "machine": describe_machine(),
        "problems": problems,
    }


def _forms() -> list[str]:
    """The forms of an artifact that this onnxruntime runs."""
    version = installed_version()
    oldest = {"portable": OLDEST_VERSION, "default": DEFAULT_FORM_VERSION}
    return [form for form, needed in oldest.items() if version >= needed]


def format_report(facts: dict[str, Any]) -> str:
    """The facts as lines."""
    builds = ", ".join(f"{name} {version}" for name, version in facts["builds"].items()) or "unknown build"
    lines = [
        f"python       {facts['python']}",
        f"onnxruntime  {facts['onnxruntime']} ({builds})",
        f"artifacts    {_FORMS[len(facts['forms'])]}",
        f"kernels      {facts['kernels']}",
        f"threads      {facts['threads']} (physical cores that this process may use"
        + (f"; its quota is {facts['cpu_quota']:g})" if facts["cpu_quota"] else ")"),
        "memory       " + ", ".join(f"{size} MiB {name}" for name, size in facts["memory_mb"].items()),
        f"processor    {facts['machine']['processor']}",
    ]
    lines += [f"provider     {name}: {state}" for name, state in facts["providers"].items()]
    lines += [f"problem      {problem}" for problem in facts["problems"]]
    return "\n".join(lines)
