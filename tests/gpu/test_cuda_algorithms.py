"""Each algorithm of the CUDA kernels, forced in a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import fastbn
from tests.support.devices import GPU, MISSING, REQUIRED

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    RunPython = Callable[..., subprocess.CompletedProcess[str]]

if MISSING is not None and not REQUIRED:
    reason = f"{MISSING}; FASTBN_REQUIRE_CUDA=1 takes that for a failure"
    pytest.skip(reason, allow_module_level=True)
pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

# In a process of its own, as the choice is made once. New memory is full of NaNs there, so no
# element can be left as it was before.
CHECK = """
import torch
from tests.support.case_checks import check
from tests.support.devices import kernels, only_fastbn
from tests.support.tables import Case, hard_cases, make, small_cases
from tests.support.tolerances import CONDITION
import fastbn
torch.use_deterministic_algorithms(True)
def fits(x):
    plans = [fastbn.plan(x, op=op, algorithm="auto") for op in ("forward", "backward")]
    return all({algorithm!r} in dict(plan.considered) for plan in plans)
count = 0
for case in small_cases((torch.float32, torch.bfloat16)) + hard_cases():
    torch.manual_seed(0)
    tensors = make(case, {gpu!r})
    if fits(tensors.x):
        check(tensors, True, CONDITION.get((case.data, case.dtype), 1.0))
        count += 1
x = make(Case("any", (16, 8, 40, 40), "contiguous", torch.float32), {gpu!r}).x
print(count, *only_fastbn(kernels(lambda: fastbn.batch_norm(x, None, None, training=True))))
"""
# By how many of the cases they fit at least.
ALGORITHMS = {
    "two_pass": 300,
    "one_block": 300,
    "persistent_block": 40,
    "persistent_cluster": 40,
    "persistent_grid": 40,
}
# What each launches in a forward.
PERSISTENT = ("persistent_forward",)
KERNELS = {
    "two_pass": ("two_pass_forward_reduce", "two_pass_forward_apply"),
    "one_block": ("one_block_forward",),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_computes_all_cases(algorithm: str, run_python: RunPython) -> None:
    if algorithm not in dict(fastbn.plan((16, 8, 40, 40), device=GPU).considered):
        pytest.skip(f"this GPU has no {algorithm}")
    script = CHECK.format(gpu=GPU, algorithm=algorithm)
    done = run_python("-c", script, FASTBN_CUDA_ALGORITHM=algorithm)
    assert done.returncode == 0, done.stderr[-2000:]
    count, *kernels = done.stdout.split()
    assert int(count) > ALGORITHMS[algorithm]
    assert kernels == [f"fastbn::{kernel}" for kernel in KERNELS.get(algorithm, PERSISTENT)]


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("fastest", "FASTBN_CUDA_ALGORITHM: there is no algorithm 'fastest'"),
        ("one_block", "FASTBN_CUDA_ALGORITHM: algorithm 'one_block' does not fit: momentum=None"),
    ],
    ids=["unknown", "unfitting"],
)
def test_algorithm_that_does_not_fit_is_refused(
    algorithm: str, words: str, run_python: RunPython
) -> None:
    done = run_python(
        "-c",
        "import torch, fastbn\n"
        f"module = fastbn.BatchNorm1d(3, momentum=None, device={GPU!r})\n"
        "try:\n"
        f"    module(torch.randn(4, 3, device={GPU!r}))\n"
        "except ValueError as error:\n"
        "    print(error)\n",
        FASTBN_CUDA_ALGORITHM=algorithm,
    )
    assert words in done.stdout, done.stderr[-2000:]
