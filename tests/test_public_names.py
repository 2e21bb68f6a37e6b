"""What the three packages offer: exactly what they say, and one version."""

from __future__ import annotations

import ast
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import export
import imsm_core
import runtime
from runtime import errors

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [imsm_core, export, runtime]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_no_other(package: ModuleType) -> None:
    names: Any = package.__all__
    homes: Any = package._MODULES
    assert set(names) == {*homes, "__version__"}
    for name in names:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute"):
        package.no_such_name  # noqa: B018
    assert package.__version__ == version("imsm-runtime")


def test_what_type_checkers_see_of_the_runtime_is_what_it_offers() -> None:
    tree = ast.parse((ROOT / "runtime" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: (node.module or "")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == runtime._MODULES


def test_every_error_of_the_runtime_is_public() -> None:
    found = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert found <= set(runtime.__all__)
