"""The loops of lesser processors compute the right numbers, tried on this one.

Those that this processor uses by itself are what all other tests run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastbn._backend import cpu_capability

if TYPE_CHECKING:
    from collections.abc import Callable

# From the one that every processor has to the widest; a processor has a first part of these.
CAPABILITIES = ["default", "avx2", "avx512"]
LESSER = CAPABILITIES[: CAPABILITIES.index(cpu_capability())]

# In a process of its own, as the choice is made once: the table of numerical cases at full length.
CHECK = """
import torch
from tests.support.case_checks import check
from fastbn._backend import cpu_capability
from tests.support.tables import hard_cases, make, small_cases, streamed_cases
from tests.support.tolerances import CONDITION
torch.set_num_threads(2)
cases = small_cases() + hard_cases() + streamed_cases()[::3]
for case in cases:
    torch.manual_seed(0)
    for training in (True, False):
        check(make(case), training, CONDITION.get((case.data, case.dtype), 1.0))
print(cpu_capability(), len(cases))
"""


@pytest.mark.parametrize("capability", LESSER)
def test_capability_computes_the_right_numbers(
    capability: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_python("-c", CHECK, FASTBN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr[-2000:]
    used, count = done.stdout.split()
    assert used == capability
    assert int(count) > 500


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_widest_capability_is_the_default() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = "default"
    if {"avx2", "fma", "f16c"} <= flags:
        expected = "avx2"
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected = "avx512"
    assert cpu_capability() == expected
