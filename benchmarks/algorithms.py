"""``python -m benchmarks.algorithms``: fastbn's algorithms side by side on the layers of ResNet-50.

Every algorithm that fits a layer is timed on the GPU at hand, beside what the planner predicts for
it: where the planner did not choose the fastest, and how far its model is off.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fastbn
from fastbn import _C

from .cases import BACKWARD, DTYPES, FORWARD, BenchmarkCase, layouts
from .correctness import Truth
from .gpu_timing import input_sets, measure_on_gpu
from .kernels import copy_of
from .machine import environment
from .providers import PROVIDERS, norm_of
from .rows import COPY
from .shapes import RESNET50, RESNET50_STAGES, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fastbn.planning import Algorithm, Plan

    from .cases import Pass
    from .rows import Environment
    from .timing import Timing

PASSES = (FORWARD, BACKWARD)


@dataclass(frozen=True)
class AlgorithmComparison:
    """All algorithms on one pass over one layer.

    Attributes:
        case: the layer.
        measured: the pass.
        plans: by algorithm.
        timings: by algorithm, and of a ``copy`` of the input.
        chosen: the algorithm that the planner takes.
    """

    case: BenchmarkCase
    measured: Pass
    plans: dict[str, Plan]
    timings: dict[str, Timing]
    chosen: str

    @property
    def fastest(self) -> str:
        """The algorithm that took the least time."""
        return min(self.plans, key=lambda name: self.timings[name].median)

    @property
    def loss(self) -> float:
        """How much longer the planner's choice took than the fastest: 0 for the right one."""
        return self.timings[self.chosen].median / self.timings[self.fastest].median - 1

    def error(self, name: str) -> float:
        """Predicted over measured time, less one."""
        return self.plans[name].microseconds / 1e6 / self.timings[name].median - 1

    def share(self, name: str) -> float:
        """Throughput on the bytes that the algorithm moves, as a share of a copy's."""
        per_second = self.plans[name].bytes_moved / self.timings[name].median
        return per_second / (2 * self.case.tensor_bytes / self.timings[COPY].median)

    def records(self) -> list[dict[str, Any]]:
        """A row for each algorithm, for JSON: times in seconds."""
        return [
            {
                "pass": self.measured.name,
                "shape": str(self.case.shape),
                "count": self.case.shape.count,
                "dtype": self.case.dtype_name,
                "layout": self.case.layout,
                "algorithm": name,
                "chosen": name == self.chosen,
                "fastest": name == self.fastest,
                "seconds": asdict(self.timings[name]),
                "copy_seconds": asdict(self.timings[COPY]),
                "predicted_seconds": plan.microseconds / 1e6,
                "error": self.error(name),
                "share_of_copy": self.share(name),
                "plan": {**asdict(plan), "dtype": self.case.dtype_name},
            }
            for name, plan in self.plans.items()
        ]


def _restoring(call: Callable[[], object]) -> object:
    """Calls what may leave an algorithm forced."""
    try:
        return call()
    finally:
        _C.force_algorithm("auto")


def _forced(algorithm: str, call: Callable[[], object]) -> object:
    _C.force_algorithm(algorithm)
    return _restoring(call)


class _WithOnePassForced(nn.Module):
    """A module with an algorithm forced in one of its passes."""

    def __init__(self, module: nn.Module, algorithm: str, measured: Pass) -> None:
        super().__init__()
        self.norm = norm_of(module)
        self._module = module
        self._algorithm = algorithm
        self._measured = measured
        self._backward = algorithm if measured is BACKWARD else "auto"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps x and a residual as the module does."""
        module = self._module.train(self.training)
        in_forward = self.training and self._measured is FORWARD
        _C.force_algorithm(self._algorithm if in_forward else "auto")
        y: Tensor = module(x, residual)
        if self.training:
            # The hook is called when backward comes to the batch norm.
            y.register_hook(lambda _: _C.force_algorithm(self._backward))
        return y


def compare(case: BenchmarkCase, measured: Pass, budget: float) -> AlgorithmComparison:
    """Times all algorithms that fit.

    Args:
        case: the input, on a GPU.
        measured: forward or backward.
        budget: seconds.

    Raises:
        WrongResultError: an algorithm's result is off.
        RuntimeError: one cannot be timed.
    """
    with torch.cuda.stream(torch.cuda.Stream()):
        cache = torch.cuda.get_device_properties(case.device).L2_cache_size
        inputs = [case.inputs() for _ in range(input_sets(case.tensor_bytes, cache))]
        x = inputs[0].x
        chosen = fastbn.plan(x, op=measured.op, algorithm="auto")
        plans = {
            name: fastbn.plan(x, op=measured.op, algorithm=cast("Algorithm", name))
            for name, _ in chosen.considered
        }
        module = PROVIDERS["fastbn"].build(case).to(case.device, case.parameter_dtype)
        norm = norm_of(module)
        norm.num_batches_tracked = None
        truth = Truth(case, inputs[0])
        for name in plans:
            truth.load(norm)
            # Only the pass that is measured is forced: the others may not fit the algorithm.
            check = partial(
                truth.check, name, _WithOnePassForced(module, name, measured), case.layout
            )
            _restoring(partial(check, in_place=False))
        del truth
        prepared = [measured.prepare(module, one) for one in inputs]
        calls: dict[str, list[Callable[[], object]]] = {
            name: [partial(_forced, name, call) for call in prepared] for name in plans
        }
        calls[COPY] = [copy_of(one, 2) for one in inputs]
        timings, failed = measure_on_gpu(calls, budget)
    if failed:
        raise RuntimeError(f"{measured.name} {case}: {failed}")
    torch.cuda.empty_cache()
    return AlgorithmComparison(case, measured, plans, timings, chosen.algorithm)


def table(comparisons: Sequence[AlgorithmComparison]) -> str:
    """A line for each algorithm on each layer."""
    lines = []
    for comparison in comparisons:
        for name in sorted(comparison.plans, key=lambda key: comparison.timings[key].median):
            lines.append(
                [
                    comparison.measured.name,
                    comparison.case.shape,
                    comparison.case.dtype_name,
                    comparison.case.layout,
                    name + (" <" if name == comparison.chosen else ""),
                    f"{comparison.timings[name].median * 1e6:.1f}",
                    f"{comparison.plans[name].microseconds:.1f}",
                    f"{comparison.error(name):+.0%}",
                    f"{comparison.share(name):.0%}",
                ]
            )
    headers = ["pass", "shape", "dtype", "layout", "algorithm", "us", "predicted", "off", "of copy"]
    align = ("left",) * 5 + ("right",) * 4
    text: str = tabulate(lines, headers, colalign=align, disable_numparse=True)
    return text


def verdict(comparisons: Iterable[AlgorithmComparison]) -> str:
    """How good the planner's choices and predictions were."""
    comparisons = list(comparisons)
    worst = max(comparisons, key=lambda comparison: comparison.loss)
    errors = [abs(c.error(name)) for c in comparisons for name in c.plans]
    right = sum(comparison.loss == 0 for comparison in comparisons)
    return (
        f"The planner chose the fastest in {right} of {len(comparisons)} cases and lost most, "
        f"{worst.loss:.1%}, on {worst.measured.name} {worst.case}: {worst.chosen} instead of "
        f"{worst.fastest}. Predictions were off by {median(errors):.0%} in the median."
    )


def write_json(path: Path, where: Environment, comparisons: Iterable[AlgorithmComparison]) -> None:
    """Writes every number."""
    rows = [row for comparison in comparisons for row in comparison.records()]
    path.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=__doc__)
    parser.add_argument("--batch", type=int, default=256, help="images a batch (default: 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time for each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; python -m fastbn plan tells what one would do")
    where = environment("cuda")
    layers = RESNET50_STAGES if options.quick else RESNET50
    cases = [
        BenchmarkCase("resnet50", shape, DTYPES[options.dtype], layout, device="cuda")
        for shape in (Shape.of(layer, options.batch) for layer in layers)
        for layout in layouts(shape)
    ]
    comparisons, failed = [], []
    for case in tqdm(cases, desc="layers", unit="case"):
        for measured in PASSES:
            try:
                comparisons.append(compare(case, measured, 0.1 if options.quick else 0.3))
            except (ArithmeticError, RuntimeError, ValueError) as error:
                failed.append(str(error))  # the other cases may do
        if options.json:
            write_json(options.json, where, comparisons)  # the next case may be one too many
    for sentence in failed:
        print(f"not timed: {sentence}")
    if not comparisons:
        return 1
    print(f"{table(comparisons)}\n\n{verdict(comparisons)}")
    print("us: median on the GPU. <: the planner's choice. Off: predicted over measured, less one.")
    print("Of copy: throughput on the bytes that the algorithm moves, as a share of a copy's.")
    if options.json:
        print(f"\nwrote {options.json}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
