"""What `import imsm_core` offers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import imsm_core
from imsm_core import errors

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(imsm_core._MODULES))
def test_public_name_resolves_to_what_its_home_defines(name: str) -> None:
    value = getattr(imsm_core, name)
    home = f"imsm_core.{imsm_core._MODULES[name]}"
    assert value is getattr(sys.modules[home], name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == home


def test_all_is_exact() -> None:
    public = [
        name
        for name, value in vars(imsm_core).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    assert set(public) <= set(imsm_core.__all__)
    assert dir(imsm_core) == imsm_core.__all__ == sorted(set(imsm_core.__all__))
    tree = {n for n, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.IMSMError)}
    assert tree <= set(imsm_core.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'imsm_core' has no attribute 'garden'"):
        imsm_core.garden  # noqa: B018


def test_importing_the_package_and_its_errors_imports_no_pytorch() -> None:
    code = "import sys, imsm_core; imsm_core.SettingsError, imsm_core.TuneSettings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0
