"""The picture of a confusion matrix."""

import io
from collections.abc import Sequence

import matplotlib.figure
import matplotlib.font_manager
import numpy as np

_MAX_NUMBERS = 25  # labels up to which cells show their numbers
_CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "SimHei",
    "PingFang SC",
)


def confusion_png(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> bytes:
    """A PNG: a row for each true label, coloured by the share of its texts."""
    counts = np.array(matrix)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    size = min(24.0, 3.0 + 0.45 * len(labels))
    # without pyplot, which looks for a display
    figure = matplotlib.figure.Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    shown, font = _shown(labels)
    ticks = range(len(labels))
    axes.set_xticks(ticks, shown, rotation=45, ha="right", family=font)
    axes.set_yticks(ticks, shown, family=font)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= _MAX_NUMBERS:
        for i, j in np.ndindex(counts.shape):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true label")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def _shown(labels: Sequence[str]) -> tuple[list[str], str | None]:
    """Labels as they can be drawn, and the font: matplotlib's own has no Chinese; without another one they are numbered."""
    if all(label.isascii() for label in labels):
        return list(labels), None
    known = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    for name in _CHINESE_FONTS:
        if name in known:
            return list(labels), name
    return [f"label {i}" for i in range(1, len(labels) + 1)], None
