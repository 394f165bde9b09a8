"""Turns measured rows into tables, verdicts and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from .layers import BACKWARD, EVALUATION, FORWARD
from .overhead import SHAPE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .layers import Row

# Smallest geometric mean of a pass's ratios, smallest ratio of all, and largest overhead relative
# to stock's that fastbn sets out to reach.
_MEAN_TARGETS = {FORWARD.name: 2.0, BACKWARD.name: 1.4, EVALUATION.name: 1.0}
_ROW_TARGET = 0.9
_OVERHEAD_TARGET = 0.8

# After the point, of milliseconds; by whether they are those of a GPU.
_DIGITS = {False: 3, True: 4}

# Interruptions per second. Two idle cores gave 35, one busy process more 270.
_QUIET = 50

LEGEND = """\
Medians. Layouts: ncs is contiguous, nsc channels last. Ratio: stock's time over fastbn's.
GB/s: fastbn, on the bytes a pass has to move (forward and evaluation read x and write y; backward
reads x and dy and writes dx). Copy: that throughput as a share of a copy's of the same tensor."""


GPU_LEGEND = """\
Medians of the time on the GPU, replayed as CUDA graphs on tensors that are not in its L2 cache.
What the host does is left out, and so is counting batches. Whose: the kernels that stock takes.
Plan: what fastbn does."""


def environment_table(environment: Mapping[str, str | int]) -> str:
    """A line for each entry."""
    return tabulate(environment.items(), tablefmt="plain")


def disturbance(per_second: float) -> str:
    """A sentence on whether the machine was quiet enough, from interruptions per second."""
    if per_second < _QUIET:
        return f"The machine was quiet ({per_second:.0f} interruptions a second)."
    return (
        f"WARNING: other processes took the processors ({per_second:.0f} interruptions a second, "
        f"below {_QUIET} is quiet). Measure again on an idle machine."
    )


def overhead(microseconds: Mapping[str, float]) -> str:
    """A sentence on the cost of a call on the host."""
    stock, fast = microseconds["stock"], microseconds["fastbn"]
    return f"A training forward of {SHAPE} takes the host {fast:.1f} us; stock's, {stock:.1f} us."


def layer_table(rows: Sequence[Row]) -> str:
    """A line for each row."""
    timed = [name for name in rows[0].timings if name != "copy"]
    times = [f"{name} ms" for name in timed]
    headers = ["pass", "layer", "dtype", "layout", *times, "ratio", "GB/s", "copy"]
    lines = [
        [
            row.measured.name,
            row.case.layer,
            row.case.dtype_name,
            row.case.layout,
            *(f"{row.timings[name].median * 1e3:.{_DIGITS[row.case.on_gpu]}f}" for name in timed),
            f"{row.ratio:.2f}x",
            f"{row.gb_per_second('fastbn'):.1f}",
            f"{row.share:.0%}",
            *_gpu_cells(row),
        ]
        for row in rows
    ]
    align = ["left"] * 4 + ["right"] * (len(timed) + 3)
    if rows[0].case.on_gpu:
        headers += ["whose", "plan"]
        align += ["left"] * 2
    return tabulate(lines, headers, colalign=align, disable_numparse=True)


def _gpu_cells(row: Row) -> list[str]:
    if row.plan is None or row.stock_backend is None:
        return []
    plan = row.plan
    return [row.stock_backend, f"{plan.algorithm} {plan.mapping} {plan.grid}x{plan.block}"]


def network_table(rows: Sequence[Row]) -> str:
    """A line for each pass, dtype and layout: the time of all layers, each by its count."""
    totals: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        key = (row.measured.name, row.case.dtype_name, row.case.layout)
        total = totals.setdefault(key, [0.0, 0.0])
        for i, name in enumerate(("stock", "fastbn")):
            total[i] += row.case.layer.count * row.timings[name].median * 1e3
    digits = _DIGITS[rows[0].case.on_gpu] - 2
    lines = [
        [*key, f"{stock:.{digits}f}", f"{fast:.{digits}f}", f"{stock / fast:.2f}x"]
        for key, (stock, fast) in totals.items()
    ]
    headers = ["pass", "dtype", "layout", "stock ms", "fastbn ms", "ratio"]
    align = ("left",) * 3 + ("right",) * 3
    return tabulate(lines, headers, colalign=align, disable_numparse=True)


def target_table(rows: Sequence[Row], overhead: Mapping[str, float]) -> str:
    """A line for each target: what was measured, and whether that meets it.

    Args:
        rows: with at least one row of each pass.
        overhead: microseconds per call of ``stock`` and ``fastbn``.
    """
    lines = []
    for name, target in _MEAN_TARGETS.items():
        mean = geometric_mean(row.ratio for row in rows if row.measured.name == name)
        lines.append([f"{name}, geometric mean", f"{mean:.3f}x", f">= {target}x", mean >= target])
    worst = min(rows, key=lambda row: row.ratio)
    where = f"smallest ratio ({worst.measured.name} {worst.case})"
    lines.append([where, f"{worst.ratio:.3f}x", f">= {_ROW_TARGET}x", worst.ratio >= _ROW_TARGET])
    stock, fast = overhead["stock"], overhead["fastbn"]
    cost = fast / stock
    where = f"overhead on {SHAPE} ({fast:.1f} us, stock {stock:.1f} us)"
    lines.append([where, f"{cost:.3f}x", f"<= {_OVERHEAD_TARGET}x", cost <= _OVERHEAD_TARGET])
    for line in lines:
        line[-1] = "met" if line[-1] else "not met"
    headers = ["figure", "measured", "target", ""]
    return tabulate(lines, headers, colalign=("left", "right", "right", "left"))


def _gpu_record(row: Row) -> dict[str, Any]:
    if row.plan is None:
        return {}
    return {
        "stock_backend": row.stock_backend,
        "plan": {**asdict(row.plan), "dtype": row.case.dtype_name},
    }


def write_json(
    path: Path,
    environment: Mapping[str, str | int],
    rows: Sequence[Row],
    overhead: Mapping[str, float],
    interruptions: float,
) -> None:
    """Writes all that was measured: times in seconds, overhead in microseconds."""
    content = {
        "environment": environment,
        "interruptions_per_second": interruptions,
        "overhead_us": overhead,
        "rows": [
            {
                "pass": row.measured.name,
                **asdict(row.case.layer),
                "batch": row.case.batch,
                "dtype": row.case.dtype_name,
                "layout": row.case.layout,
                "bytes": row.measured.traffic * row.tensor_bytes,
                "seconds": {name: asdict(timing) for name, timing in row.timings.items()},
                "ratio": row.ratio,
                "gb_per_second": row.gb_per_second("fastbn"),
                "share_of_copy": row.share,
                **_gpu_record(row),
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
