"""Tables of measured rows, and what to read them with."""

from __future__ import annotations

from statistics import geometric_mean
from typing import TYPE_CHECKING

from tabulate import tabulate

from .cases import EPILOGUES, PASSES
from .providers import ABOUT
from .rows import COPY, coldest, warm_twins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .rows import Environment, Group, Results, Subject
    from .shapes import ShapeSet

# Interruptions per second. Two idle cores gave 35, one busy process more 270.
_QUIET = 50

LEGEND = """\
Times are medians; p20 and p80 are percentiles of fastbn's. Epilogue: what follows the batch norm,
PyTorch's own, in place. GB/s: of fastbn, on the bytes that have to move (forward and eval read x
and write y, backward reads x and dy and writes dx; an add moves one more). Of copy: the time of a
copy of as many bytes over fastbn's. Vs best: the time of the fastest alternative over fastbn's."""

GPU_LEGEND = """\
Times are those of the GPU, replayed as CUDA graphs, without the host and without counting batches.
Cache: whether the inputs were in its L2; the smallest cannot be kept out of it, nor the largest in.
Warm: fastbn's time where they were in it. Stock's: the kernels that stock takes. Plan: what fastbn
does."""


def environment_table(environment: Environment) -> str:
    """A line for each entry."""
    text: str = tabulate(environment.items(), tablefmt="plain")
    return text


def disturbance(per_second: float) -> str:
    """A sentence on whether the machine was quiet enough, from interruptions per second."""
    if per_second < _QUIET:
        return f"The machine was quiet ({per_second:.0f} interruptions a second)."
    return (
        f"WARNING: other processes took the processors ({per_second:.0f} interruptions a second, "
        f"below {_QUIET} is quiet). Measure again on an idle machine."
    )


def providers_legend(groups: Sequence[Group]) -> str:
    """What each provider is, and whose kernels stock took."""
    names = dict.fromkeys(name for group in groups for name in group.rows if name != COPY)
    lines = [f"{name}: {ABOUT[name]}{_kernels_of(name, groups)}" for name in names]
    return "\n".join(lines)


def _kernels_of(name: str, groups: Sequence[Group]) -> str:
    if not name.startswith("stock"):
        return ""
    taken = {group.rows[name].detail for group in groups if name in group.rows}
    return f"; PyTorch took its {' or '.join(sorted(taken))} kernels"


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]], words: int) -> str:
    """Aligned, the first columns as words and the others as numbers."""
    align = ["left"] * words + ["right"] * (len(headers) - words)
    text: str = tabulate(lines, headers, colalign=align, disable_numparse=True)
    return text


def _others(groups: Iterable[Group]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group.others))


def _milliseconds(seconds: float) -> str:
    """With four significant digits."""
    return f"{seconds * 1e3:#.4g}".rstrip(".")


def kernel_table(groups: Iterable[Group]) -> str:
    """A line for each group that fastbn is in, of those in a cold cache where there are any."""
    groups = [group for group in groups if "fastbn" in group.rows]
    warm = warm_twins(groups)
    others = _others(groups)
    headers = ["pass", "epilogue", "shape", "dtype", "layout"]
    headers += ["fastbn ms", "p20", "p80", "GB/s", "of copy"]
    headers += [*(f"{name} ms" for name in others), "vs best", "best"]
    lined = coldest(groups)
    on_gpu = any(group.rows["fastbn"].detail for group in lined)
    headers += ["warm", "stock's", "cache", "plan"] if on_gpu else []
    lines = []
    for group in lined:
        subject, fast = group.subject, group.rows["fastbn"]
        line = [subject.measured, subject.epilogue, subject.shape, subject.dtype, subject.layout]
        line += map(_milliseconds, (fast.value.median, fast.value.p20, fast.value.p80))
        line += [f"{fast.gb_per_second:.1f}", f"{group.share('fastbn'):.0%}"]
        line += [_median(group, name) for name in others]
        if group.others:
            line += [f"{group.ratio(group.best_other):.2f}x", group.best_other]
        else:
            line += ["", ""]
        if on_gpu:
            twin = warm.get(subject)
            line.append(_median(twin, "fastbn") if twin else "")
            line += [_detail(group, "stock"), subject.cache, fast.detail]
        lines.append(line)
    return _table(headers, lines, words=5)


def _median(group: Group, name: str) -> str:
    return _milliseconds(group.rows[name].value.median) if name in group.rows else ""


def _detail(group: Group, name: str) -> str:
    return group.rows[name].detail if name in group.rows else ""


class NetworkTotal:
    """The batch norms of a whole network in one pass, dtype and layout.

    Attributes:
        groups: its layers, fastbn among their providers.
        seconds: by provider, of those that were right on all layers.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.seconds = {
            name: sum(group.subject.count * group.rows[name].value.median for group in groups)
            for name in ("fastbn", *_others(groups))
            if all(name in group.rows for group in groups)
        }

    @property
    def subject(self) -> Subject:
        """The subject of the first layer."""
        return self.groups[0].subject

    @property
    def count(self) -> int:
        """How many batch norms the network has."""
        return sum(group.subject.count for group in self.groups)

    def ratio(self, name: str) -> float:
        """A provider's time over fastbn's."""
        return self.seconds[name] / self.seconds["fastbn"]

    @property
    def best_other(self) -> str:
        """The provider other than fastbn that takes the least time."""
        return min(self.seconds.keys() - {"fastbn"}, key=self.seconds.__getitem__)

    def mean(self, name: str) -> float:
        """Geometric mean over the layers of a provider's time over fastbn's."""
        return geometric_mean(group.ratio(name) for group in self.groups)

    def slowest(self, name: str) -> float:
        """A provider's time over fastbn's on the layer where that is least."""
        return min(group.ratio(name) for group in self.groups)


def network_totals(groups: Iterable[Group]) -> list[NetworkTotal]:
    """Totals of ResNet-50 for each pass, epilogue, dtype, layout and state of the cache.

    A total has all layers that were measured; there is none where no other provider did all.
    """
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        subject = group.subject
        if subject.shapes == "resnet50" and "fastbn" in group.rows and group.others:
            key = (subject.measured, subject.epilogue, subject.dtype, subject.layout, subject.cache)
            found.setdefault(key, []).append(group)
    order = {name: i for i, name in enumerate([m.name for m in PASSES] + list(EPILOGUES))}
    keys = sorted(found, key=lambda key: (order[key[0]], order[key[1]]))
    totals = [NetworkTotal(found[key]) for key in keys]
    return [total for total in totals if len(total.seconds) > 1]


def network_table(groups: Iterable[Group]) -> str:
    """A line for each of :func:`network_totals`."""
    totals = network_totals(groups)
    others = list(dict.fromkeys(name for t in totals for name in t.seconds if name != "fastbn"))
    headers = ["pass", "epilogue", "dtype", "layout", "cache", "norms", "fastbn ms"]
    headers += [*(f"{name} ms" for name in others), "vs best", "best"]
    headers += ["mean layer", "slowest layer"]
    lines = []
    for total in totals:
        subject = total.subject
        line = [subject.measured, subject.epilogue, subject.dtype, subject.layout, subject.cache]
        line += [str(total.count), _milliseconds(total.seconds["fastbn"])]
        line += [_milliseconds(total.seconds[n]) if n in total.seconds else "" for n in others]
        line += [f"{total.ratio(total.best_other):.2f}x", total.best_other]
        line += (
            [f"{total.mean('stock'):.2f}x", f"{total.slowest('stock'):.2f}x"]
            if "stock" in total.seconds
            else ["", ""]
        )
        lines.append(line)
    return _table(headers, lines, words=5)


def mean_table(groups: Iterable[Group]) -> str:
    """Geometric means over all rows of a set of shapes and a pass, by provider and of the best."""
    groups = [g for g in coldest(groups) if "fastbn" in g.rows and g.others]
    others = _others(groups)
    headers = [
        "shapes",
        "pass",
        "rows",
        *(f"vs {name}" for name in others),
        "vs best",
        "slowest row",
    ]
    lines = []
    for shapes, measured in dict.fromkeys((g.subject.shapes, g.subject.measured) for g in groups):
        rows = [g for g in groups if (g.subject.shapes, g.subject.measured) == (shapes, measured)]
        best = [group.ratio(group.best_other) for group in rows]
        line = [shapes, measured, str(len(rows))]
        for name in others:
            ratios = [group.ratio(name) for group in rows if name in group.rows]
            line.append(f"{geometric_mean(ratios):.2f}x" if ratios else "")
        lines.append([*line, f"{geometric_mean(best):.2f}x", f"{min(best):.2f}x"])
    return _table(headers, lines, words=2)


def kernels(results: Results, sets: Mapping[str, ShapeSet]) -> str:
    """All tables of the benchmark, with their legends."""
    groups = results.select("kernels")
    parts = []
    for name in dict.fromkeys(group.subject.shapes for group in groups):
        rows = [group for group in groups if group.subject.shapes == name]
        parts.append(f"{name}: {sets[name].about}\n\n{kernel_table(rows)}")
    legend = f"{LEGEND}\n{GPU_LEGEND}" if "gpu" in results.environment else LEGEND
    parts += [providers_legend(groups), legend]
    if network_totals(groups):
        parts.append(
            "All layers of ResNet-50 that are above, each as often as the network has it; mean\n"
            "and slowest layer: of stock's time over fastbn's in single layers:\n\n"
            f"{network_table(groups)}"
        )
    parts.append(f"Geometric means of times over fastbn's:\n\n{mean_table(groups)}")
    return "\n\n".join(parts)


def overhead(results: Results) -> str:
    """A line for each call, in microseconds."""
    groups = results.select("overhead")
    others = _others(groups)
    lines = [
        [
            group.subject.measured,
            group.subject.shape,
            *(f"{group.rows[name].value.median * 1e6:.1f}" for name in ("fastbn", *others)),
            f"{group.ratio('stock'):.2f}x",
        ]
        for group in groups
    ]
    headers = ["call", "shape", "fastbn us", *(f"{name} us" for name in others), "vs stock"]
    return (
        "What a call costs the host where there is next to nothing to compute; vs stock: stock's\n"
        f"time over fastbn's\n\n{_table(headers, lines, words=2)}"
    )


def model(results: Results) -> str:
    """A line for each way to train a network."""
    figures: dict[tuple[str, str, str, str], dict[str, Group]] = {}
    for group in results.select("model"):
        subject = group.subject
        key = (subject.shapes, subject.shape, subject.dtype, subject.layout)
        figures.setdefault(key, {})[subject.measured] = group
    lines = []
    for key, by_name in figures.items():
        step = by_name["step"]
        for name, row in step.rows.items():
            seconds = row.value.median
            line = [
                *key,
                name,
                _milliseconds(seconds),
                f"{int(key[1].split('x')[0]) / seconds:.1f}",
            ]
            line.append(f"{step.rows['stock'].value.median / seconds:.3f}x")
            for measured, show in (("batch norm", "{:.0%}".format), ("peak", _mebibytes)):
                others = by_name[measured].rows if measured in by_name else {}
                line.append(show(others[name].value.median) if name in others else "")
            lines.append(line)
    headers = ["network", "images", "dtype", "layout", "batch norm of"]
    headers += ["step ms", "images/s", "vs stock", "of which BN", "peak MiB"]
    return (
        "A training step of a network (forward, backward, SGD); vs stock: stock's time over it"
        f"\n\n{_table(headers, lines, words=5)}"
    )


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f}"


def memory(results: Results) -> str:
    """A line for each case and provider."""
    lines = []
    by_case: dict[tuple[str, ...], dict[str, Group]] = {}
    for group in results.select("memory"):
        subject = group.subject
        key = (subject.shape, subject.dtype, subject.layout, subject.epilogue)
        by_case.setdefault(key, {})[subject.measured] = group
    for case, by_name in by_case.items():
        saved, peak = by_name["saved"], by_name["peak"]
        tensor = saved.subject.bytes
        for name in saved.rows:
            line = [*case, name]
            for group in (saved, peak):
                size = group.rows[name].value.median
                line += [_mebibytes(size), f"{size / tensor:.2f}"]
            lines.append(line)
    headers = [
        "shape",
        "dtype",
        "layout",
        "epilogue",
        "batch norm of",
        "saved MiB",
        "in x",
        "peak MiB",
        "in x",
    ]
    return (
        "Memory of a forward and backward: what is saved for backward, and the peak on top of the\n"
        "inputs; in x: as a multiple of the input's size"
        f"\n\n{_table(headers, lines, words=5)}"
    )


def tables(results: Results, sets: Mapping[str, ShapeSet]) -> str:
    """Where it was measured, and all tables of all benchmarks that were."""
    show: dict[str, Callable[[Results], str]] = {
        "kernels": lambda results: kernels(results, sets),
        "overhead": overhead,
        "model": model,
        "memory": memory,
    }
    parts = [table(results) for name, table in show.items() if results.select(name)]
    return "\n\n".join([environment_table(results.environment), *parts])
