"""The growth benchmark's line, plot and document."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import growth
from tests.exported import Exported


def test_the_line_is_exact_on_a_line_and_names_the_point_that_is_off() -> None:
    line = growth.fit_line([100, 200, 400], [2.0, 3.0, 5.0])
    assert line.start == pytest.approx(1.0)
    assert line.slope == pytest.approx(0.01)
    assert line.percent == pytest.approx([0, 0, 0], abs=1e-9)
    bent = growth.fit_line([0, 1, 2, 3], [1.0, 1.0, 1.0, 2.0])
    assert bent.percent[-1] == pytest.approx(100 * (2 / 1.7 - 1))


def test_the_plot_marks_the_line_on_every_bar() -> None:
    line = growth.fit_line([128, 4096], [10.0, 20.0])
    rows = growth.text_plot([128, 4096], [10.0, 20.0], line).splitlines()
    assert [row.count("#") for row in rows] == [30, 60]
    assert all("|" in row for row in rows)


def test_it_measures_an_artifact_and_ends_with_json(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--contexts 8,16,500,600 --batches 1,4 --batch-context 8 --rounds 2 --steps 3 --threads 1 \
        --picture {tmp_path / 'growth.png'}"
    monkeypatch.setattr(sys, "argv", ["growth.py", str(tiny.artifact), *options.split()])
    assert growth.main() == 0
    out, err = capsys.readouterr()
    document = json.loads(out.splitlines()[-1])
    # The artifact has room for 128 tokens: what is longer ends there.
    assert [point["context"] for point in document["contexts"]] == [8 + 3, 16 + 3, 128 - 3]
    assert [row["batch"] for row in document["batches"]] == [1, 4]
    assert document["batch_4_factor"] > 0
    assert (tmp_path / "growth.png").is_file() or "matplotlib is not installed" in err
