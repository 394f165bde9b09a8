"""Pictures of training curves and of throughput, sized for a README."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .cases import LAYOUT_NAMES, PASS_NAMES, PASSES
from .report import network_totals
from .rows import COPY, coldest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from .report import NetworkTotal
    from .rows import Group
    from .training import Curves

mpl.use("Agg")  # files only; no display is needed
_STYLE: Any = {  # a dict; matplotlib types its keys as literals
    "font.size": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
}
_COLORS = {
    "fastbn": "#08519c",
    "stock": "#9ecae1",
    "stock channels_last": "#c994c7",
    "compiled": "#74c476",
    "cooperative": "#238b45",
    "apex": "#fdae6b",
    "inplace_abn": "#969696",
    COPY: "#d94801",
}
_LABELS = {
    "stock": "nn.BatchNorm",
    "stock channels_last": "nn.BatchNorm, channels last",
    "compiled": "torch.compile",
    "cooperative": "torch.compile, cooperative",
    COPY: "memory copy",
}
_MARKERS = dict(zip(_COLORS, "os^Dv*P", strict=False))


def plot_curves(stock: Curves, fast: Curves, path: Path) -> None:
    """Draws training loss and test accuracy over epochs, both modules in each."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axes, name in ((left, "loss"), (right, "accuracy")):
            values = getattr(stock, name)
            epochs = range(1, len(values) + 1)
            # The curves lie on each other: a wide light one shows on both sides of the other.
            axes.plot(epochs, values, color=_COLORS["stock"], linewidth=7, label="nn.BatchNorm2d")
            axes.plot(
                epochs,
                getattr(fast, name),
                "--",
                color=_COLORS["fastbn"],
                linewidth=2,
                label="fastbn",
            )
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


def _grid(
    groups: Sequence[Group],
    draw: Callable[[Axes, list[Group]], None],
    *,
    width: float,
    labels: tuple[str, str],
    title: str,
    path: Path,
) -> None:
    """A panel for each pass and layout, and a legend of all of them below."""
    measured = [p.name for p in PASSES if any(g.subject.measured == p.name for g in groups)]
    layouts = [name for name in LAYOUT_NAMES if any(g.subject.layout == name for g in groups)]
    with plt.rc_context({**_STYLE, "font.size": 11}):
        figure, grid = plt.subplots(
            len(measured),
            len(layouts),
            figsize=(width, 1 + 2.9 * len(measured)),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        legend: dict[str, Any] = {}
        for line, name in zip(grid, measured, strict=True):
            line[0].set_ylabel(labels[1])
            for axes, layout in zip(line, layouts, strict=True):
                chosen = [
                    g for g in groups if (g.subject.measured, g.subject.layout) == (name, layout)
                ]
                draw(axes, chosen)
                axes.set_title(f"{PASS_NAMES[name]}, {LAYOUT_NAMES[layout]}")
                handles, texts = axes.get_legend_handles_labels()
                legend.update(zip(texts, handles, strict=True))
        for axes in grid[-1]:
            axes.set_xlabel(labels[0])
        figure.legend(legend.values(), legend, loc="outside lower center", ncols=6)
        figure.suptitle(title)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def _bars(axes: Axes, groups: list[Group]) -> None:
    names = list(dict.fromkeys(name for group in groups for name in group.others))
    names.append("fastbn")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [x for x, group in enumerate(groups) if name in group.rows]
        axes.bar(
            [x - 0.4 + (i + 0.5) * width for x in at],
            [groups[x].rows[name].gb_per_second for x in at],
            width,
            color=_COLORS[name],
            label=_LABELS.get(name, name),
        )
    at = [x for x, group in enumerate(groups) if COPY in group.rows]
    axes.hlines(
        [groups[x].rows[COPY].gb_per_second for x in at],
        [x - 0.4 for x in at],
        [x + 0.4 for x in at],
        color=_COLORS[COPY],
        linewidth=2.5,
        label=_LABELS[COPY],
    )
    marks = [f"{_layer(group)}\n{group.ratio('stock'):.1f}x" for group in groups]
    small: dict[str, Any] = {"fontsize": 8} if len(groups) > 6 else {}
    axes.set_xticks(range(len(groups)), marks, **small)


def _layer(group: Group) -> str:
    """C, H and W as a label that is no wider than a bar."""
    channels, height, _ = group.subject.shape.split("x")[1:]
    return f"{channels}@{height}"


def plot_layers(groups: Sequence[Group], title: str, path: Path) -> None:
    """Draws GB/s per layer of ResNet-50: a panel for each pass and layout.

    Args:
        groups: of one dtype, epilogue and state of the cache; stock, fastbn and the copy in each.
        title: what they were measured on.
        path: where the PNG goes.
    """
    several = len({group.subject.shape for group in groups})
    _grid(
        groups,
        _bars,
        width=12 if several < 7 else 15,
        labels=("channels @ height and width; below, stock's time over fastbn's", "GB/s"),
        title=title,
        path=path,
    )


def _points(axes: Axes, groups: list[Group]) -> None:
    copies: dict[int, list[float]] = {}
    for group in (group for group in groups if COPY in group.rows):
        copies.setdefault(group.subject.bytes, []).append(group.rows[COPY].gb_per_second)
    sizes = sorted(copies)
    axes.plot(
        [size / 1e6 for size in sizes],
        [median(copies[size]) for size in sizes],
        color=_COLORS[COPY],
        linewidth=2,
        label=_LABELS[COPY],
    )
    for name in dict.fromkeys(name for group in groups for name in reversed(group.rows)):
        if name == COPY:
            continue
        having = [group for group in groups if name in group.rows]
        axes.plot(
            [group.subject.bytes / 1e6 for group in having],
            [group.rows[name].gb_per_second for group in having],
            _MARKERS[name],
            color=_COLORS[name],
            markersize=6,
            label=_LABELS.get(name, name),
        )
    axes.set_xscale("log")


def plot_roofline(groups: Sequence[Group], title: str, path: Path) -> None:
    """Draws GB/s over the bytes that have to move, with the copy as a line.

    Args:
        groups: as for :func:`plot_layers`, of any shapes.
        title: what they were measured on.
        path: where the PNG goes.
    """
    _grid(
        groups,
        _points,
        width=12,
        labels=("MB that have to move", "GB/s"),
        title=title,
        path=path,
    )


def _network_bars(axes: Axes, totals: Sequence[NetworkTotal]) -> None:
    names = list(dict.fromkeys(name for total in totals for name in total.seconds))
    names.append(names.pop(0))  # fastbn comes first, and is drawn last
    width = 0.8 / len(names)
    # Beyond this bars are cut off and say how long they are, so that the others can be told apart.
    top = 1.2e3 * max(total.seconds["stock"] for total in totals)
    axes.set_ylim(0, top)
    for i, name in enumerate(names):
        at = [x for x, total in enumerate(totals) if name in total.seconds]
        heights = [totals[x].seconds[name] * 1e3 for x in at]
        places = [x - 0.4 + (i + 0.5) * width for x in at]
        axes.bar(places, heights, width, color=_COLORS[name], label=_LABELS.get(name, name))
        for place, height in zip(places, heights, strict=True):
            if height > top:
                label = f"{height:.0f} ms"
                axes.text(place, 0.97 * top, label, ha="center", va="top", fontsize=8, rotation=90)
    marks = []
    for total in totals:
        followed = "" if total.subject.epilogue == "plain" else f"\n+ {total.subject.epilogue}"
        marks.append(f"{total.subject.measured}{followed}\n{total.ratio('stock'):.2f}x")
    axes.set_xticks(range(len(totals)), marks, fontsize=8)
    axes.set_title(LAYOUT_NAMES[totals[0].subject.layout])


def plot_network(groups: Iterable[Group], title: str, path: Path) -> None:
    """Draws the time of all batch norms of ResNet-50 by pass and by what follows.

    Args:
        groups: of one dtype and state of the cache.
        title: what they were measured on.
        path: where the PNG goes.
    """
    totals = [total for total in network_totals(groups) if "stock" in total.seconds]
    layouts = list(dict.fromkeys(total.subject.layout for total in totals))
    with plt.rc_context({**_STYLE, "font.size": 11}):
        figure, grid = plt.subplots(
            len(layouts),
            1,
            figsize=(12, 1 + 3.2 * len(layouts)),
            squeeze=False,
            layout="constrained",
        )
        for (axes,), layout in zip(grid, layouts, strict=True):
            _network_bars(axes, [total for total in totals if total.subject.layout == layout])
            axes.set_ylabel("ms for all layers")
        grid[-1][0].set_xlabel("pass, what follows it, and stock's time over fastbn's")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        figure.suptitle(title)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def plot_kernels(groups: Iterable[Group], machine: str, folder: Path) -> list[Path]:
    """Draws all pictures of the benchmark, for each dtype.

    Args:
        groups: whatever was measured; those in a cold cache, where there are any.
        machine: what on, for the titles.
        folder: where the PNGs go.

    Returns:
        Their paths.
    """
    drawn = [g for g in coldest(groups) if {"fastbn", "stock"} <= g.rows.keys()]
    written = []
    for dtype in dict.fromkeys(group.subject.dtype for group in drawn):
        of_dtype = [group for group in drawn if group.subject.dtype == dtype]
        plain = [group for group in of_dtype if group.subject.epilogue == "plain"]
        network = [group for group in plain if group.subject.shapes == "resnet50"]
        pictures: list[tuple[str, Callable[..., None], list[Group], str]] = [
            ("roofline", plot_roofline, plain, "Batch norm of all shapes"),
            ("layers", plot_layers, network, "Batch norm of ResNet-50's layers"),
            (
                "network",
                plot_network,
                [group for group in of_dtype if group.subject.shapes == "resnet50"],
                "All batch norms of ResNet-50",
            ),
        ]
        for name, plot, chosen, what in pictures:
            if chosen:
                path = folder / f"{name}-{dtype}.png"
                plot(chosen, f"{what}, {dtype}, on {machine}", path)
                written.append(path)
    return written
