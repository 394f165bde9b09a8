"""``python -m benchmarks``: fastbn's batch norm against the alternatives.

kernels: passes over many shapes. overhead: what a call costs the host. model: a training step of
ResNet-50 and of EfficientNet-B0. memory: what is saved for backward, and the peak. claims: what is
said of batch normalization, put to the test. Without a name all but the claims are measured; all is
all of them.

Also: compare BEFORE.json AFTER.json, for regressions; architectures, which fuses networks of
torchvision and timm and compares them with stock's; readme, which writes the measured parts of
README.md.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fastbn

from . import report
from .cases import DTYPES, EPILOGUES, BenchmarkCase, layouts
from .kernels import measure_cases
from .machine import best_device, environment, name_of
from .memory import measure_memory
from .model import measure_model
from .overhead import measure_overhead
from .providers import PROVIDERS, available
from .rows import Results, is_ours
from .shapes import RESNET50_STAGES, Shape, shape_sets
from .timing import Disturbance, keep_memory_warm

if TYPE_CHECKING:
    from .rows import Row

BENCHMARKS = ("kernels", "overhead", "model", "memory")
# By device: images a batch (without and with --quick), dtypes, and seconds for a pass on a case
# (likewise).
_DEFAULTS = {
    "cpu": ((32, 8), ["float32", "bfloat16"], (0.5, 0.2)),
    "cuda": ((256, 64), ["bfloat16", "float16", "float32"], (0.2, 0.05)),
}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", nargs="?", choices=[*BENCHMARKS, "claims", "all"])
    parser.add_argument(
        "--device", choices=_DEFAULTS, default=best_device(), help="(default: the GPU, if any)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer and smaller shapes, nothing compiled"
    )
    parser.add_argument(
        "--threads", type=int, help="for all sides (default: as many as torch takes)"
    )
    batches = ", ".join(f"{full} on {device}" for device, ((full, _), *_) in _DEFAULTS.items())
    parser.add_argument("--batch", type=int, help=f"images in ResNet-50 (default: {batches})")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="of kernels and memory")
    parser.add_argument("--shapes", nargs="+", choices=shape_sets(1), help="of kernels")
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, help="besides fastbn and stock"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="for a pass on a case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows there as a table")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures there")
    options = parser.parse_args(arguments)
    sizes, dtypes, budgets = _DEFAULTS[options.device]
    options.batch = options.batch or sizes[options.quick]
    options.dtypes = options.dtypes or dtypes
    options.budget = options.seconds or budgets[options.quick]
    options.threads = options.threads or torch.get_num_threads()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu measures the processor")
    if options.device == "cuda" and fastbn.build_info()["cuda"] is None:
        parser.error("this fastbn has no CUDA kernels; build it with FASTBN_CUDA=1")
    if options.benchmark == "claims" and (options.json or options.csv):
        parser.error("claims have no rows for --json or --csv; --plot writes claims.json")
    for file in (options.json, options.csv):
        if file:  # now, and not when everything has been measured
            file.parent.mkdir(parents=True, exist_ok=True)
    return options


class Suite:
    """The benchmarks of one call, with its options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.sets = shape_sets(options.batch)
        names = options.providers or [
            name for name, one in PROVIDERS.items() if not (options.quick and one.slow_to_build)
        ]
        self._providers = available(dict.fromkeys(("fastbn", "stock", *names)))
        self.wrong: list[str] = []

    @property
    def _compiled(self) -> bool:
        return "compiled" in self._providers

    def kernels(self) -> tuple[list[Row], list[str]]:
        """Passes over the sets of shapes that were asked for, or all."""
        options = self._options
        cases = [
            BenchmarkCase(name, shape, DTYPES[dtype], layout, epilogue, options.device)
            for name in options.shapes or self.sets
            if options.device != "cpu" or not self.sets[name].needs_gpu
            for dtype in options.dtypes
            for shape in (self.sets[name].quick if options.quick else self.sets[name].shapes)
            for layout in layouts(shape)
            for epilogue in EPILOGUES
        ]
        return measure_cases(cases, self._providers, options.budget)

    def overhead(self) -> tuple[list[Row], list[str]]:
        """Calls with next to nothing to compute."""
        options = self._options
        return measure_overhead(self._providers, 4 * options.budget, options.device)

    def rows(self, name: str) -> list[Row]:
        """The rows of one benchmark, by name; none if it fails, which costs the others nothing."""
        try:
            rows, wrong = getattr(self, name)()
        except (ArithmeticError, RuntimeError, ValueError) as error:
            self.wrong.append(f"{name}: {error}")
            return []
        self.wrong += wrong
        return list(rows)

    def model(self) -> tuple[list[Row], list[str]]:
        """Steps of networks, where transformers is installed."""
        options = self._options
        if find_spec("transformers") is None:
            print("model: left out; it needs the package transformers")
            return [], []
        return measure_model(
            options.device,
            quick=options.quick,
            compiled=self._compiled,
            budget=40 * options.budget,
        )

    def memory(self) -> tuple[list[Row], list[str]]:
        """Memory on a layer of ResNet-50."""
        options = self._options
        shape = Shape.of(RESNET50_STAGES[1], options.batch)
        cases = [
            BenchmarkCase("resnet50", shape, DTYPES[dtype], layout, epilogue, options.device)
            for dtype in options.dtypes
            for layout in layouts(shape)
            for epilogue in EPILOGUES
        ]
        return measure_memory(cases, self._providers)


def _write(results: Results, options: argparse.Namespace) -> None:
    written = []
    if options.json:
        results.write_json(options.json)
        written.append(options.json)
    if options.csv:
        results.write_csv(options.csv)
        written.append(options.csv)
    if options.plot:
        from .plots import plot_kernels

        options.plot.mkdir(parents=True, exist_ok=True)
        machine = name_of(results.environment)
        written += plot_kernels(results.select("kernels"), machine, options.plot)
    if written:
        print("wrote " + ", ".join(map(str, written)))


def _measure(options: argparse.Namespace, names: tuple[str, ...]) -> int:
    torch.set_num_threads(options.threads)
    where = environment(options.device)
    if options.device == "cpu":
        where["memory"] = keep_memory_warm()
    suite = Suite(options)
    watch = Disturbance()
    rows = [row for name in names for row in suite.rows(name)]
    interruptions = watch.per_second()
    results = Results({**where, "interruptions a second": round(interruptions)}, rows)
    _write(results, options)  # first: whatever comes after costs no row
    for sentence in suite.wrong:
        print(f"not timed: {sentence}")
    print(f"\n{report.tables(results, suite.sets)}\n")
    if options.device == "cpu":
        print(report.disturbance(interruptions))
    theirs = tuple(f"{name}, " for name in (*PROVIDERS, "stock compiled") if not is_ours(name))
    return int(not all(sentence.startswith(theirs) for sentence in suite.wrong))


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and returns 1 if fastbn was wrong or something failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        from . import compare

        return compare.main(arguments[1:])
    if arguments[:1] == ["architectures"]:
        from . import architectures

        return architectures.main(arguments[1:])
    if arguments[:1] == ["readme"]:
        from . import readme

        return readme.main(arguments[1:])
    options = _parse(arguments)
    failed = 0
    if options.benchmark != "claims":
        chosen = options.benchmark in BENCHMARKS
        failed = _measure(options, (options.benchmark,) if chosen else BENCHMARKS)
    if options.benchmark in ("claims", "all"):
        from .claims import study

        study.run(options.plot, quick=options.quick)
    return failed


if __name__ == "__main__":
    sys.exit(main())
