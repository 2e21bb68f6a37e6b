"""The folder that a demo writes: what an earlier run left there is replaced, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from output_folder import fresh_folder


def test_an_earlier_run_is_replaced_and_another_demos_folder_inside_it_stays(tmp_path: Path) -> None:
    fresh_folder(tmp_path / "out")
    fresh_folder(tmp_path / "out" / "real")
    (tmp_path / "out" / "results.json").touch()
    (tmp_path / "out" / "base").mkdir()
    (tmp_path / "out" / "real" / "kept").touch()
    fresh_folder(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".imsm-demo", "real"]
    assert (tmp_path / "out" / "real" / "kept").is_file()


def test_the_inner_demo_may_come_first(tmp_path: Path) -> None:
    fresh_folder(tmp_path / "out" / "real")
    fresh_folder(tmp_path / "out")
    assert (tmp_path / "out" / "real" / ".imsm-demo").is_file()


def test_a_folder_with_anything_else_in_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit) as error:
        fresh_folder(tmp_path)
    assert error.value.code == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
