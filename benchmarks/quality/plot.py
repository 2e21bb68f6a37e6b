"""Size and decode time against quality: python plot.py PANELS.json PICTURE.png. Runs in the environment `plot`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"ours": "#d1692f", "llama.cpp": "#2f6f9f", "onnxruntime-genai": "#7a8a3c"}
MARKERS = {"ours": "o", "llama.cpp": "s", "onnxruntime-genai": "^"}


def main(document: Path, picture: Path) -> None:
    """A row per model; its panels are {"title", "x", "y", "points": [{"label", "program", "x", "y"}]}."""
    rows: list[list[dict[str, Any]]] = json.loads(document.read_text(encoding="utf-8"))
    columns = max(map(len, rows))
    figure, grid = plt.subplots(
        len(rows), columns, figsize=(7.5 * columns, 5 * len(rows)), squeeze=False, layout="constrained"
    )
    for panels, axes in zip(rows, grid, strict=True):
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for panel, axis in zip(panels, axes, strict=False):
            for program, colour in COLOURS.items():
                points = [point for point in panel["points"] if point["program"] == program]
                values = [[point[key] for point in points] for key in ("x", "y")]
                axis.scatter(*values, color=colour, marker=MARKERS[program], s=40, label=program)
                for point in points:
                    place = {"xytext": (6, 4), "textcoords": "offset points"}
                    axis.annotate(point["label"], (point["x"], point["y"]), fontsize=7, color=colour, **place)
            axis.set_yscale("log")
            axis.margins(x=0.15)
            axis.set_xlabel(panel["x"], fontsize=9)
            axis.set_ylabel(panel["y"], fontsize=9)
            axis.set_title(panel["title"], fontsize=10)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=8)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
