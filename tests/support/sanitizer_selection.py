"""A few small inputs for each way through the CUDA kernels, to be run under compute-sanitizer.

``compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.support.sanitizer_selection``
from the repository's folder, and the same with racecheck, synccheck and initcheck. Nothing but
fastbn's kernels runs on the GPU: inputs are made on the CPU and copied as they lie in memory, and
results are compared with the oracle there.

Each input goes the way that the planner chooses, and then each persistent way, unless the
environment forces one: ``FASTBN_CUDA_ALGORITHM=two_pass``, say, where persistent kernels hang.

Set ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``: otherwise tensors are pieces of large allocations, where
memcheck takes a neighbor for the tensor itself, and initcheck what an earlier one left for data.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import fastbn
from fastbn import _C
from fastbn.ops import batch_norm_backward, batch_norm_eval, batch_norm_training
from fastbn.planning import ALGORITHM_VARIABLE

from . import oracle
from .case_checks import EPS, MOMENTUM, statistics_of
from .devices import GPU
from .tables import LAYOUTS, Case, Tensors, as_it_lies, make
from .tolerances import assert_near

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


# Shape and layout: first as few elements as a block takes on its own, then as many channels or so
# many elements that blocks share them; see csrc/cuda/planner/candidates.cpp. The batch is that of
# bfloat16, and half of it is taken in float32. Persistent kernels take those in whole vectors.
INPUTS = {
    # Channels last, in whole vectors.
    "columns": ((4, 24, 5, 7), "channels_last"),
    "columns, shared": ((8, 24, 36, 41), "channels_last"),
    "columns, several channel tiles": ((84, 264, 5, 5), "channels_last"),
    # Channels last, several positions to a row of vectors.
    "folded columns": ((4, 5, 4, 6), "channels_last"),
    "folded columns, shared": ((8, 5, 80, 80), "channels_last"),
    # Channels last, one element at a time.
    "single columns": ((3, 7, 3, 5), "channels_last"),
    "single columns, shared": ((6, 7, 91, 83), "channels_last"),
    "single columns, not aligned": ((5, 40, 7, 7), "channels_last_offset"),
    "matrix, several channel tiles": ((9, 1037), "contiguous"),
    # Contiguous, several channels to a row of vectors.
    "small channels": ((4, 16, 7, 7), "contiguous"),
    "small channels, shared": ((340, 24, 7, 7), "contiguous"),
    # Contiguous, in whole vectors and in vectors that reach past the ends of a segment.
    "contiguous": ((3, 5, 8, 8), "contiguous"),
    "contiguous, shared": ((16, 3, 75, 80), "contiguous"),
    "odd segments": ((3, 5, 7, 9), "contiguous"),
    "odd segments, shared": ((16, 3, 75, 81), "contiguous"),
    # Any strides, and addresses that differ from those of the results.
    "generic": ((3, 5, 4, 6), "stepped"),
    "generic, shared": ((16, 3, 75, 78), "batch_minor"),
    "not aligned": ((3, 5, 7, 9), "offset"),
}
DTYPES = (torch.bfloat16, torch.float32)
PERSISTENT = ("persistent_block", "persistent_cluster", "persistent_grid")


def cases() -> Iterator[Case]:
    for name, ((batch, *rest), layout) in INPUTS.items():
        for dtype in DTYPES:
            yield Case(name, (2 * batch // dtype.itemsize, *rest), layout, dtype)


def inputs(case: Case) -> Tensors:
    """On the CPU; the gradient lies as x does, or it would be brought to that on the GPU."""
    tensors = make(case)
    return replace(tensors, dy=LAYOUTS[case.layout](tensors.dy))


def placed(tensors: Tensors, device: str) -> Tensors:
    """The same tensors on a device, copied byte by byte."""
    return Tensors(**{name: as_it_lies(t, device) for name, t in vars(tensors).items()})


# Training with either kind of momentum, and eval.
MODES = ((True, MOMENTUM), (True, None), (False, 0.0))
# Whether dx and the gradients of the vectors are wanted.
WANTED = ((True, True), (True, False), (False, True))


def check_forward(
    tensors: Tensors, device: str, modes: Iterable[tuple[bool, float | None]] = MODES
) -> None:
    for training, momentum in modes:
        there = placed(tensors, device)
        vectors = (there.weight, there.bias, there.running_mean, there.running_var)
        statistics = statistics_of(tensors, training)
        if training:
            counter = as_it_lies(torch.tensor([3]), device)
            y, mean, _ = batch_norm_training(there.x, *vectors, counter, momentum, EPS)
            assert counter.tolist() == [4]
            before = tensors.running_mean, tensors.running_var
            share = 1 / 4 if momentum is None else momentum
            updated = oracle.running_statistics(statistics, *before, share)
            for name, expected in updated.items():
                assert_near(getattr(there, name), expected, name)
        else:
            y, mean, _ = batch_norm_eval(there.x, *vectors, EPS, True)
        assert_near(mean, oracle.saved_statistics(statistics)["mean"], "mean")
        exact = oracle.output(tensors.x, tensors.weight, tensors.bias, statistics)
        assert_near(y, exact, "y")


def check_backward(
    tensors: Tensors,
    device: str,
    modes: Iterable[bool] = (True, False),
    wanted_gradients: Iterable[tuple[bool, bool]] = WANTED,
) -> None:
    there = placed(tensors, device)
    for training in modes:
        statistics = statistics_of(tensors, training)
        mean, invstd = (
            as_it_lies(statistic.to(tensors.weight.dtype), device)
            for statistic in (statistics.mean, statistics.invstd)
        )
        expected = oracle.gradients(tensors.dy, tensors.x, tensors.weight, statistics, training)
        for dx, vectors in wanted_gradients:
            wanted = (dx, vectors, vectors)
            results = batch_norm_backward(
                there.dy, there.x, there.weight, mean, invstd, training, *wanted
            )
            for name, wants, result in zip(expected, wanted, results, strict=True):
                if wants:
                    assert_near(result, expected[name], name)


def ways(tensors: Tensors, device: str) -> set[str]:
    """Persistent algorithms that fit both forward and backward on a GPU; none if one is forced."""
    if os.environ.get(ALGORITHM_VARIABLE):
        return set()
    fit = [
        {name for name, _ in fastbn.plan(tensors.x, op=op, device=device).considered}
        for op in ("forward", "backward")
    ]
    return set.intersection(*fit, set(PERSISTENT))


def check_training(tensors: Tensors, device: str) -> None:
    """One step, whose result, statistics and gradients are those of the oracle."""
    check_forward(tensors, device, [(True, MOMENTUM)])
    check_backward(tensors, device, [True], [(True, True)])


def main() -> int:
    count = 0
    for case in cases():
        torch.manual_seed(0)
        tensors = inputs(case)
        check_forward(tensors, GPU)
        check_backward(tensors, GPU)
        count += 1
        for algorithm in sorted(ways(tensors, GPU)):
            _C.force_algorithm(algorithm)
            check_training(tensors, GPU)
            _C.force_algorithm("auto")
            count += 1
    print(f"{count} inputs, all results right")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
