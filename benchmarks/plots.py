"""Pictures of training curves and of throughput, sized for a README."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .layers import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from .layers import Row
    from .training import Curves

mpl.use("Agg")  # files only; no display is needed
_STYLE: dict[str, Any] = {
    "font.size": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
}
_STOCK, _FASTBN, _COPY = "#9ecae1", "#08519c", "#d94801"
_LAYOUT_NAMES = {"ncs": "contiguous", "nsc": "channels last"}


def plot_curves(stock: Curves, fast: Curves, path: Path) -> None:
    """Draws training loss and test accuracy over epochs, both modules in each."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axes, name in ((left, "loss"), (right, "accuracy")):
            values = getattr(stock, name)
            epochs = range(1, len(values) + 1)
            # The curves lie on each other: a wide light one shows on both sides of the other.
            axes.plot(epochs, values, color=_STOCK, linewidth=7, label="nn.BatchNorm2d")
            axes.plot(epochs, getattr(fast, name), "--", color=_FASTBN, linewidth=2, label="fastbn")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("epoch")
            axes.legend()
        left.set(yscale="log", ylabel="training loss (cross-entropy, nats)")
        right.set_ylabel("test accuracy")
        right.yaxis.set_major_formatter(PercentFormatter(1))
        figure.suptitle(
            "Handwritten digits: the same network with stock batch norm and with fastbn"
        )
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    width = 0.38
    left = [i - width / 2 for i in range(len(rows))]
    right = [i + width / 2 for i in range(len(rows))]
    speeds = {
        name: [row.gb_per_second(name) for row in rows] for name in ("stock", "fastbn", "copy")
    }
    axes.bar(left, speeds["stock"], width, color=_STOCK, label="nn.BatchNorm2d")
    axes.bar(right, speeds["fastbn"], width, color=_FASTBN, label="fastbn; speed-up below")
    axes.hlines(
        speeds["copy"],
        [at - width / 2 for at in left],
        [at + width / 2 for at in right],
        color=_COPY,
        linewidth=2.5,
        label="memory copy",
    )
    axes.set_xticks(range(len(rows)), [f"{row.case.layer}\n{row.ratio:.1f}x" for row in rows])


def plot_throughput(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws GB/s per layer: a panel for each pass and layout.

    Args:
        rows: of one dtype and batch, every layer in every layout and pass.
        title: what they were measured on.
        path: where the PNG goes.
    """
    passes = list(dict.fromkeys(row.measured for row in rows))
    with plt.rc_context({**_STYLE, "font.size": 11}):
        figure, grid = plt.subplots(
            len(passes), len(LAYOUTS), figsize=(12, 7.5), sharey=True, layout="constrained"
        )
        for line, measured in zip(grid, passes, strict=True):
            line[0].set_ylabel("GB/s")
            for axes, layout in zip(line, LAYOUTS, strict=True):
                _bars(axes, [r for r in rows if (r.measured, r.case.layout) == (measured, layout)])
                axes.set_title(f"training {measured.name}, {_LAYOUT_NAMES[layout]}")
        for axes in grid[-1]:
            axes.set_xlabel("layer of ResNet-50 (channels x height x width)")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(title)
        figure.savefig(path, dpi=110)
        plt.close(figure)
