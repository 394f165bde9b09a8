"""One operation by one algorithm, on the GPU or on the simulator, and its error against float64.

``python -m tests.support.smoke persistent_grid backward contiguous`` in a process of its own, which
whoever calls it may stop: a kernel that hangs is known by name, and takes nothing else with it.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import torch

import fastbn

from . import oracle
from .case_checks import EPS, MOMENTUM, statistics_of
from .devices import GPU
from .sanitizer_selection import placed
from .tables import Case, Tensors, make
from .tolerances import assert_near

if TYPE_CHECKING:
    from fastbn.planning import Layout, Op

ALGORITHMS = ("two_pass", "one_block", "persistent_block", "persistent_cluster", "persistent_grid")
PASSES = ("forward", "backward")
# What a block takes of these is more than its shared memory holds, on a GPU of Hopper's generation:
# persistent kernels use their stages more than once.
SHAPES = {"contiguous": (128, 64, 56, 56), "channels_last": (512, 256, 14, 14)}
# One block alone would be slow with those, or keep too little of them.
OF_ONE_BLOCK = {
    "one_block": {"contiguous": (16, 64, 28, 28), "channels_last": (16, 256, 14, 14)},
    "persistent_block": {"contiguous": (128, 64, 56, 56), "channels_last": (128, 2048, 7, 7)},
}
# What a simulated GPU of few multiprocessors does in a few seconds.
SIMULATED = {"contiguous": (16, 16, 16, 16), "channels_last": (16, 64, 8, 8)}


def shape_of(algorithm: str, layout: str) -> tuple[int, ...]:
    """Of the activation that an algorithm is tried on."""
    return OF_ONE_BLOCK.get(algorithm, SHAPES)[layout]


def fits(algorithm: str, op: Op, layout: Layout, device: str) -> bool:
    """Whether a GPU can run it: clusters, say, are not for all."""
    shape = shape_of(algorithm, layout)
    plan = fastbn.plan(
        shape, op=op, dtype="bfloat16", layout=layout, device=device, algorithm="auto"
    )
    return algorithm in dict(plan.considered)


def result_of(tensors: Tensors, op: str, algorithm: str, simulated: bool) -> torch.Tensor:
    """Y of forward, or dx of backward."""
    statistics = statistics_of(tensors, True)
    saved = [s.to(tensors.weight.dtype) for s in (statistics.mean, statistics.invstd)]
    if simulated:
        from tests import cudasim

        scale = cudasim.Scale(multiprocessors=8)
        if op == "forward":
            vectors = (tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var)
            (y, _, _), _ = cudasim.forward(tensors.x, *vectors, scale=scale, algorithm=algorithm)
            return y
        (dx, _, _), _ = cudasim.backward(
            tensors.dy, tensors.x, tensors.weight, *saved, scale=scale, algorithm=algorithm
        )
        return dx

    from fastbn import _C
    from fastbn.ops import batch_norm_backward, batch_norm_training

    _C.force_algorithm(algorithm)
    there = placed(tensors, GPU)
    if op == "forward":
        vectors = (there.weight, there.bias, there.running_mean, there.running_var)
        return batch_norm_training(there.x, *vectors, None, MOMENTUM, EPS)[0]
    mean, invstd = (statistic.to(GPU) for statistic in saved)
    wanted = (True, True, True)
    arguments = (there.dy, there.x, there.weight, mean, invstd, True, *wanted)
    return batch_norm_backward(*arguments)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("algorithm", choices=ALGORITHMS)
    parser.add_argument("op", choices=PASSES)
    parser.add_argument("layout", choices=SHAPES)
    parser.add_argument("--simulated", action="store_true", help="without a GPU")
    chosen = parser.parse_args()
    case = (chosen.algorithm, chosen.op, chosen.layout)
    if not (chosen.simulated or fits(*case, GPU)):
        print("does not fit this GPU")  # noqa: T201
        return 0
    sizes = shape_of(chosen.algorithm, chosen.layout)
    shape = SIMULATED[chosen.layout] if chosen.simulated else sizes
    torch.manual_seed(0)
    tensors = make(Case("smoke", shape, chosen.layout, torch.bfloat16))
    statistics = statistics_of(tensors, True)
    if chosen.op == "forward":
        expected = oracle.output(tensors.x, tensors.weight, tensors.bias, statistics)
    else:
        gradients = oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, True)
        expected = gradients["dx"]
    result = result_of(tensors, chosen.op, chosen.algorithm, chosen.simulated).cpu()
    print(f"max error {float((result.double() - expected.value).abs().max()):.3g}")  # noqa: T201
    assert_near(result, expected, "y" if chosen.op == "forward" else "dx")
    return 0


if __name__ == "__main__":
    sys.exit(main())
