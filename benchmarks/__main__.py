"""``python -m benchmarks``: fastbn's batch norm against stock's on the layers of ResNet-50.

``python -m benchmarks claims`` puts what is said of batch normalization to the test instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import report
from .layers import (
    BACKWARD,
    EVALUATION,
    FORWARD,
    LAYOUTS,
    PROVIDERS,
    TOLERANCES,
    Case,
    measure_cases,
)
from .machine import environment
from .overhead import measure_overhead
from .shapes import RESNET50, RESNET50_STAGES
from .timing import Disturbance, keep_memory_warm

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
# What is measured where nothing else is asked for: images a batch, dtypes, and seconds for a pass
# on a case, --quick or not.
_DEFAULTS = {
    "cpu": (32, ["float32", "bfloat16"], (0.25, 1.2)),
    "cuda": (256, ["bfloat16"], (0.1, 0.3)),
}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=_DEFAULTS, default="cpu", help="(default: cpu)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time for each")
    parser.add_argument("--threads", type=int, default=2, help="for all sides (default: 2)")
    batches = ", ".join(f"{batch} on {device}" for device, (batch, *_) in _DEFAULTS.items())
    parser.add_argument("--batch", type=int, help=f"images a batch (default: {batches})")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES)
    compiled = "stock's as torch.compile makes it, too; takes minutes to compile"
    parser.add_argument("--compiled", action="store_true", help=compiled)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(arguments)
    batch, dtypes, budgets = _DEFAULTS[options.device]
    options.batch = options.batch or batch
    options.dtypes = options.dtypes or dtypes
    options.budget = budgets[not options.quick]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and returns 1 if a result was wrong; a missed target is only reported."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["claims"]:
        from .claims import study

        return study.main(arguments[1:])
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    on_gpu = options.device != "cpu"
    where = environment(options.device)
    shown = {**where, "batch": options.batch}
    if not on_gpu:
        shown["memory"] = keep_memory_warm()
    print(report.environment_table(shown), flush=True)

    cases = [
        Case(layer, options.batch, _DTYPES[dtype], layout, options.device)
        for dtype in options.dtypes
        for layout in LAYOUTS
        for layer in (RESNET50_STAGES if options.quick else RESNET50)
    ]
    providers = dict(PROVIDERS)
    if options.compiled:
        from .compiled import CompiledBatchNorm2d

        providers["compiled"] = CompiledBatchNorm2d
    passes = (FORWARD, BACKWARD, EVALUATION)
    watch = Disturbance()
    rows, wrong = measure_cases(cases, passes, options.budget, providers)
    overhead = measure_overhead(4 * options.budget, options.device)
    interruptions = watch.per_second()

    by_pass = [row for measured in passes for row in rows if row.measured is measured]
    for sentence in wrong:
        print(f"not timed, the result is wrong: {sentence}")
    if rows:
        network = report.network_table(by_pass)
        print(f"\n{report.layer_table(by_pass)}\n\n{report.LEGEND}")
        print(f"\nAll layers above, each as often as ResNet-50 has it:\n\n{network}")
        if on_gpu:
            print(f"\n{report.GPU_LEGEND}\n{report.overhead(overhead)}")
        else:
            print(f"\n{report.target_table(rows, overhead)}")
            print(f"\n{report.disturbance(interruptions)}")
    if options.json:
        report.write_json(options.json, where, by_pass, overhead, interruptions)
        print(f"\nwrote {options.json}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
