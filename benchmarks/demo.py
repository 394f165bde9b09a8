"""``python -m benchmarks.demo``: the same training with stock's batch norm and with fastbn's.

Then the throughput of both on layers of ResNet-50.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tabulate import tabulate

import fastbn

from . import plots, report
from .cases import BACKWARD, FORWARD, BenchmarkCase, layouts
from .kernels import measure_cases
from .machine import best_device, environment, name_of
from .providers import available
from .rows import coldest, groups
from .shapes import RESNET50_STAGES, Shape
from .timing import Disturbance, keep_memory_warm
from .training import Curves, load, network, train

if TYPE_CHECKING:
    from torch import nn

_EPOCHS = 10
# By device: batch, dtype and seconds for a pass on a layer.
_THROUGHPUT = {"cpu": (32, torch.float32, 0.6), "cuda": (256, torch.bfloat16, 0.3)}
_STATISTICS = ("running_mean", "running_var")


def _curves_table(stock: Curves, fast: Curves) -> str:
    lines = [
        [epoch, f"{s_loss:.5f}", f"{f_loss:.5f}", f"{s_accuracy:.2%}", f"{f_accuracy:.2%}"]
        for epoch, (s_loss, f_loss, s_accuracy, f_accuracy) in enumerate(
            zip(stock.loss, fast.loss, stock.accuracy, fast.accuracy, strict=True), start=1
        )
    ]
    headers = ["epoch", "loss stock", "loss fastbn", "accuracy stock", "accuracy fastbn"]
    text: str = tabulate(lines, headers, colalign=("right",) * 5, disable_numparse=True)
    return text


def _difference(stock: nn.Module, other: nn.Module, statistic: str) -> float:
    """Largest difference of a running statistic, relative to its largest value in the layer."""
    others = dict(other.named_buffers())
    return max(
        float((others[name] - value).abs().max() / value.abs().max())
        for name, value in stock.named_buffers()
        if name.endswith(statistic)
    )


@torch.no_grad()
def _nudge(model: nn.Module) -> nn.Module:
    """Makes every parameter the next larger number."""
    for parameter in model.parameters():
        parameter.copy_(torch.nextafter(parameter, parameter.new_tensor(torch.inf)))
    return model


def _compare_training(device: str, picture: Path) -> None:
    torch.manual_seed(0)
    stock = network().to(device)
    fast = fastbn.convert(copy.deepcopy(stock))
    # Training amplifies rounding: a second run of stock, started one rounding off, tells how much.
    nudged = _nudge(copy.deepcopy(stock))
    parameters = sum(parameter.numel() for parameter in stock.parameters())
    print(f"\nTraining on handwritten digits: 4 batch norms, {parameters} parameters", flush=True)
    digits = load(device)
    # So small a network gains little from threads, and loses all where they wait for a processor.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stock_curves = train(stock, digits, _EPOCHS, "stock")
    fast_curves = train(fast, digits, _EPOCHS, "fastbn")
    train(nudged, digits, _EPOCHS, "stock, nudged")
    torch.set_num_threads(threads)
    print(f"\n{_curves_table(stock_curves, fast_curves)}\n")
    differences = [
        [name, *(_difference(stock, other, statistic) for statistic in _STATISTICS)]
        for name, other in (
            ("fastbn", fast),
            ("stock again, its first weights changed in the last bit", nudged),
        )
    ]
    print("Final running statistics, largest difference from stock's relative to their size:\n")
    print(tabulate(differences, ["", *_STATISTICS], floatfmt=".1e"))
    plots.plot_curves(stock_curves, fast_curves, picture)


def _compare_throughput(device: str, picture: Path) -> list[str]:
    """Prints and draws; returns a sentence for each wrong result."""
    batch, dtype, seconds = _THROUGHPUT[device]
    legend = report.GPU_LEGEND if device != "cpu" else f"Memory: {keep_memory_warm()}."
    cases = [
        BenchmarkCase("resnet50", shape, dtype, layout, device=device)
        for shape in (Shape.of(layer, batch) for layer in RESNET50_STAGES)
        for layout in layouts(shape)
    ]
    print(f"\nThroughput on layers of ResNet-50, batches of {batch}", flush=True)
    watch = Disturbance()
    rows, wrong = measure_cases(cases, available(("fastbn", "stock")), seconds, (FORWARD, BACKWARD))
    quiet = report.disturbance(watch.per_second())
    if not wrong:
        found = coldest(groups(rows))
        found.sort(
            key=lambda group: (
                group.subject.measured != FORWARD.name,
                group.subject.layout != "contiguous",
            )
        )
        print(f"\n{report.kernel_table(found)}\n\n{report.LEGEND}\n{legend}\n{quiet}")
        title = f"Batches of {batch} in {cases[0].dtype_name} on {name_of(environment(device))}"
        plots.plot_layers(found, title, picture)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Runs both comparisons; returns 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the pictures")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    device = best_device()
    print(report.environment_table(environment(device)))
    curves, throughput = out / "curves.png", out / "throughput.png"
    _compare_training(device, curves)
    wrong = _compare_throughput(device, throughput)
    for sentence in wrong:
        print(f"not timed, the result is wrong: {sentence}")
    if wrong:
        return 1
    print(f"\nwrote {curves} and {throughput}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
