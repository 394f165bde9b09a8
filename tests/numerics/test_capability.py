"""The loops of lesser processors, and the general path, compute the right numbers on this one.

Those that this processor uses by itself are what all other tests run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastbn._backend import cpu_capability
from tests.support import pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    RunPython = Callable[..., subprocess.CompletedProcess[str]]

# From the one that is written without vectors, by way of the one that every processor has, to the
# widest; a processor has a first part of these.
CAPABILITIES = ["scalar", "default", "avx2", "avx512"]
LESSER = CAPABILITIES[: CAPABILITIES.index(cpu_capability())]

# In a process of its own, as the choice is made once: the table of numerical cases.
CHECK = """
import torch
from tests.support import pairs
from tests.support.case_checks import check
from fastbn._backend import cpu_capability
from tests.support.tables import hard_cases, make, small_cases, streamed_cases
from tests.support.tolerances import CONDITION
pairs.use_full_products({full})
torch.set_num_threads(2)
cases = pairs.unmarked(small_cases() + hard_cases())
# Eval applies by the loops that training applies by, so a few cases are enough of it.
for number, case in enumerate(cases):
    torch.manual_seed(0)
    for training in (True, False) if {full} or number % 5 == 0 else (True,):
        check(make(case), training, CONDITION.get((case.data, case.dtype), 1.0))
# Large enough to be written past the cache, which takes code of its own; tests/cpuloops tries that
# code in every instruction set, too.
for case in streamed_cases() if {full} else []:
    check(make(case), True)
print(cpu_capability(), len(cases))
"""


def assert_right(run_python: RunPython, capability: str, **environment: str) -> None:
    script = CHECK.format(full=pairs.full_products())
    done = run_python("-c", script, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    used, count = done.stdout.split()
    assert used == capability
    assert int(count) > (500 if pairs.full_products() else 120)


@pytest.mark.parametrize("capability", LESSER)
def test_capability_computes_the_right_numbers(capability: str, run_python: RunPython) -> None:
    assert_right(run_python, capability, FASTBN_CPU_CAPABILITY=capability)


def test_general_path_computes_the_right_numbers(run_python: RunPython) -> None:
    """By strides alone, whatever the layout."""
    assert_right(run_python, cpu_capability(), FASTBN_CPU_LAYOUT="generic")


# Which path was taken is seen by its speed alone; that the variable is read, by this.
@pytest.mark.parametrize(
    "environment",
    [{"FASTBN_CPU_CAPABILITY": "scalar"}, {"FASTBN_CPU_LAYOUT": "generic"}],
    ids=lambda environment: "-".join(*environment.items()),
)
def test_choices_change_the_order_of_sums(
    environment: dict[str, str], run_python: RunPython
) -> None:
    """And so the last bits: the variables are obeyed."""
    script = (
        "import torch, fastbn\n"
        "torch.manual_seed(0)\n"
        "x = torch.randn(8, 64, 31, 33)\n"
        "mean = torch.zeros(64)\n"
        "fastbn.batch_norm(x, mean, torch.ones(64), training=True)\n"
        "print(*(value.hex() for value in mean.tolist()))\n"
    )
    usual, other = (run_python("-c", script, **chosen) for chosen in ({}, environment))
    assert usual.returncode == other.returncode == 0, other.stderr[-2000:]
    assert usual.stdout != other.stdout
    for one, another in zip(usual.stdout.split(), other.stdout.split(), strict=True):
        assert float.fromhex(one) == pytest.approx(float.fromhex(another), abs=1e-7)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_widest_capability_is_the_default() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = "default"
    if {"avx2", "fma", "f16c"} <= flags:
        expected = "avx2"
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected = "avx512"
    assert cpu_capability() == expected
