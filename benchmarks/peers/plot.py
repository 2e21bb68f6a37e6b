"""The measured document as a picture: python plot.py DOCUMENT.json PICTURE.png. Runs in the environment `plot`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS, REFERENCE = "#2f6f9f", "#b9bec4", "#d1692f"


def main(document: Path, picture: Path) -> None:
    """A row per shape and precision, a panel per quantity, a bar per peer; quantities are the document's `summary`."""
    results = json.loads(document.read_text(encoding="utf-8"))
    columns = list(dict.fromkeys(column for result in results for column in result["columns"]))
    heights = [1.2 + 0.32 * len(result["rows"]) for result in results]
    figure, grid = plt.subplots(
        len(results),
        len(columns),
        figsize=(2.6 + 3.1 * len(columns), sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for result, axes in zip(results, grid, strict=True):
        rows = result["rows"][::-1]
        for axis, column in zip(axes, columns, strict=True):
            if column not in result["columns"]:  # it was not measured there
                axis.set_axis_off()
                continue
            values = [row["values"].get(column) for row in rows]
            colours = [REFERENCE if row["reference"] else OURS if row["ours"] else THEIRS for row in rows]
            axis.barh(range(len(rows)), [value or 0 for value in values], color=colours)
            known = [value for value in values if value]
            # One peer that is an order slower must not flatten the others.
            limit = min(max(known), 4 * sorted(known)[len(known) // 2]) * 1.25 if known else 1
            for place, value in enumerate(values):
                if value:
                    text = f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
                    inside = value < limit
                    axis.text(
                        min(value, limit) + limit * (0.015 if inside else -0.015),
                        place,
                        text if inside else f"{text} →",
                        va="center",
                        ha="left" if inside else "right",
                        fontsize=8,
                    )
            axis.set_xlim(0, limit)
            axis.set_title(column, fontsize=9)
            axis.set_yticks(range(len(rows)), [row["label"] for row in rows] if axis is axes[0] else [""] * len(rows))
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(result["title"], fontsize=10, fontweight="bold")
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
