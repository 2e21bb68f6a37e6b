"""Write export/cuda_kernels.json: which operators the CUDA provider of the installed onnxruntime-gpu has kernels for.

    python -m benchmarks.cuda.list_kernels [FILE]

Runs with the Python that has onnxruntime-gpu, on a machine with a GPU or with the rehearsal's libraries (rehearsal/).
The list holds, for each operator of ONNX and of onnxruntime, each version of it since the one in operator set OLDEST:
the types that its inputs and outputs have (type variables, or a fixed type), and the kernels, each as the types that it
allows by type variable. Which kernel serves which version is onnxruntime's rule, applied here.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

TARGET = Path(__file__).parents[2] / "export" / "cuda_kernels.json"
DOMAINS = ("", "com.microsoft")
OLDEST = 18  # what export writes is newer
OPEN = 2**31 - 1  # a kernel without a last version

Types = dict[str, frozenset[str]]


def kernel_list(kernels: Sequence[Any], schemas: Sequence[Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """By domain and operator, by the version since which it is as it is: `inputs`, `outputs` and `kernels`.

    kernels, schemas: as onnxruntime gives them.
    """
    versions: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for schema in schemas:
        versions[schema.domain, schema.name][schema.since_version] = schema
    ours: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for kernel in kernels:
        if kernel.provider == "CUDAExecutionProvider" and kernel.domain in DOMAINS:
            ours[kernel.domain, kernel.op_name].append(kernel)
    found: dict[str, dict[str, dict[str, Any]]] = {domain: {} for domain in DOMAINS}
    for (domain, name), operator in sorted(ours.items()):
        known = versions[domain, name]
        first = max((since for since in known if since <= OLDEST), default=min(known))
        found[domain][name] = {
            str(since): _version(schema, operator) for since, schema in sorted(known.items()) if since >= first
        }
    return found


def _version(schema: Any, kernels: Iterable[Any]) -> dict[str, Any]:
    serving = [kernel for kernel in kernels if _serves(kernel.version_range, schema.since_version)]
    types = [_by_variable(kernel.type_constraints, schema) for kernel in serving]
    return {
        "inputs": " ".join(_formal(parameter) for parameter in schema.inputs),
        "outputs": " ".join(_formal(parameter) for parameter in schema.outputs),
        "kernels": [
            {key: " ".join(sorted(allowed)) for key, allowed in sorted(each.items())} for each in merged(types)
        ],
    }


def _serves(versions: tuple[int, int], since: int) -> bool:
    """onnxruntime's rule: a kernel without a last version serves no later version of the operator."""
    first, last = versions
    return first == since or (last != OPEN and first <= since <= last)


def _formal(parameter: Any) -> str:
    """The type variable of a parameter, or its type; with `...` if it repeats."""
    return _short(parameter.typeStr) + ("..." if parameter.option.name == "Variadic" else "")


def _by_variable(constraints: dict[str, list[str]], schema: Any) -> Types:
    """A kernel's types, by type variable where a kernel names a parameter instead."""
    names = {parameter.name: _short(parameter.typeStr) for parameter in [*schema.inputs, *schema.outputs]}
    return {names.get(key, key): frozenset(map(_short, types)) for key, types in constraints.items()}


def _short(type_: str) -> str:
    return type_.removeprefix("tensor(").removesuffix(")") if type_.startswith("tensor(") else type_


def merged(kernels: Iterable[Types]) -> list[Types]:
    """The same, with kernels that differ in one type variable alone as one; in a fixed order."""
    found = list({tuple(sorted(each.items())): dict(each) for each in kernels}.values())
    found.sort(key=lambda each: sorted((key, sorted(types)) for key, types in each.items()))
    joined = True
    while joined:
        joined = False
        for index, one in enumerate(found):
            for other in found[index + 1 :]:
                differ = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
                if len(differ) == 1 and one.keys() == other.keys():
                    one[differ[0]] |= other[differ[0]]
                    found.remove(other)
                    joined = True
    return found


def as_text(operators: dict[str, dict[str, dict[str, Any]]]) -> str:
    """JSON with a line for each version of an operator."""
    lines = []
    for domain, names in operators.items():
        versions = [
            f"   {json.dumps(name)}: {{\n"
            + ",\n".join(f"    {json.dumps(since)}: {json.dumps(version)}" for since, version in found.items())
            + "\n   }"
            for name, found in names.items()
        ]
        lines.append(f"  {json.dumps(domain)}: {{\n" + ",\n".join(versions) + "\n  }")
    head = f'{{\n "onnxruntime-gpu": {json.dumps(onnxruntime.__version__)},\n "operators": {{\n'
    return head + ",\n".join(lines) + "\n }\n}\n"


def main() -> None:
    """The command line."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    try:
        kernels = state.get_all_opkernel_def()
    except Exception as error:  # onnxruntime's own, of any kind, where a provider's libraries do not load
        raise SystemExit(f"onnxruntime cannot list its kernels ({str(error).splitlines()[0]})") from error
    operators = kernel_list(kernels, state.get_all_operator_schema())
    if not any(operators.values()):
        raise SystemExit(f"onnxruntime {onnxruntime.__version__} has no CUDA kernels: install onnxruntime-gpu")
    target.write_text(as_text(operators), encoding="utf-8")
    print(f"{target}: {sum(map(len, operators.values()))} operators of onnxruntime-gpu {onnxruntime.__version__}")


if __name__ == "__main__":
    main()
