"""An artifact with a chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.exported import Exported, copied, edit_manifest

TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content }}\n{% endfor %}a"


@pytest.fixture(scope="session")
def talking(tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifact with one. Read only."""
    folder = copied(tiny.artifact, tmp_path_factory.mktemp("talking") / "artifact")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    facts = {"bytes": len(TEMPLATE), "sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest()}
    edit_manifest(folder, files=tiny.manifest["files"] | {"chat_template.jinja": facts})
    return folder
