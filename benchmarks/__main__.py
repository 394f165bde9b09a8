"""``python -m benchmarks``: fastbn's batch norm against stock's on the layers of ResNet-50."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import report
from .layers import BACKWARD, EVALUATION, FORWARD, LAYOUTS, TOLERANCES, Case, measure_cases
from .machine import environment
from .overhead import measure_overhead
from .shapes import RESNET50, RESNET50_STAGES
from .timing import Disturbance, keep_memory_warm

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time for each")
    parser.add_argument("--threads", type=int, default=2, help="for all sides (default: 2)")
    parser.add_argument("--batch", type=int, default=32, help="images a batch (default: 32)")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and returns 1 if a result was wrong; a missed target is only reported."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    memory = keep_memory_warm()
    where = environment()
    print(report.environment_table({**where, "batch": options.batch, "memory": memory}), flush=True)

    layers, budget = (RESNET50_STAGES, 0.25) if options.quick else (RESNET50, 1.2)
    cases = [
        Case(layer, options.batch, _DTYPES[dtype], layout)
        for dtype in options.dtypes
        for layout in LAYOUTS
        for layer in layers
    ]
    passes = (FORWARD, BACKWARD, EVALUATION)
    watch = Disturbance()
    rows, wrong = measure_cases(cases, passes, budget)
    overhead = measure_overhead(4 * budget)
    interruptions = watch.per_second()

    by_pass = [row for measured in passes for row in rows if row.measured is measured]
    for sentence in wrong:
        print(f"not timed, the result is wrong: {sentence}")
    if rows:
        network = report.network_table(by_pass)
        print(f"\n{report.layer_table(by_pass)}\n\n{report.LEGEND}")
        print(f"\nAll layers above, each as often as ResNet-50 has it:\n\n{network}")
        print(f"\n{report.target_table(rows, overhead)}\n\n{report.disturbance(interruptions)}")
    if options.json:
        report.write_json(options.json, where, by_pass, overhead, interruptions)
        print(f"\nwrote {options.json}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
