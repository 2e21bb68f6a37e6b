"""A tiny model, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime import Model, load


@pytest.fixture(scope="session")
def model(talking: Path) -> Model:
    return load(talking)
