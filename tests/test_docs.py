"""The pages: every option is on them as its own --help tells it, and every link and path that they name is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "third_party").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)]*))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown viewers make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tables_of_options_are_those_of_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "write_options.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def test_the_readme_is_short_enough_for_a_newcomer() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def drawn_files() -> set[str]:
    """The files and folders of the tree in docs/ARCHITECTURE.md."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tree = text.split("## The tree")[1].split("```")[1]
    found, folders = set(), [""]
    for line in tree.splitlines():
        match = re.match(r"( *)(\S+)", line)
        if match is None:
            continue
        depth = len(match[1]) // 2
        path = folders[depth] + match[2]
        found.add(path)
        folders[depth + 1 :] = [path]
    return found


def test_the_drawn_tree_is_there() -> None:
    drawn = drawn_files()
    assert len(drawn) > 100
    for name in drawn:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("package", ["imsm_core", "export", "runtime"])
def test_every_module_is_drawn_or_in_a_folder_of_its_kind(package: str) -> None:
    """Folders with a file per family, pass, operator or command are described as a whole."""
    drawn = drawn_files()
    alike = ("export/adapters/", "export/passes/", "export/attention/families/", "runtime/cli/", "runtime/kernels/")
    for path in (ROOT / package).rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if path.name != "__init__.py" and not name.startswith(alike):
            assert name in drawn, name
