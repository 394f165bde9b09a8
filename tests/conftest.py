"""Says which fastbn is tested, and gives every test the same start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import fastbn
from fastbn._backend import cpu_capability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CUDA_BUILT = fastbn.build_info()["cuda"] is not None
CUDA_REQUIRED = os.environ.get("FASTBN_REQUIRE_CUDA") == "1"
DEVICES = ["cpu"]
if CUDA_REQUIRED or (CUDA_BUILT and torch.cuda.is_available()):
    DEVICES.append("cuda")


def pytest_report_header() -> str:
    return (
        f"fastbn {fastbn.__version__} of {Path(fastbn.__file__).parent}, "
        f"CPU loops for {cpu_capability()}, "
        f"{'CUDA ' + str(fastbn.build_info()['cuda']) if CUDA_BUILT else 'no CUDA kernels'}; "
        f"torch {torch.__version__}; devices {', '.join(DEVICES)}"
    )


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that this fastbn computes on."""
    if request.param == "cuda" and not (CUDA_BUILT and torch.cuda.is_available()):
        pytest.fail("FASTBN_REQUIRE_CUDA=1, but fastbn was built without CUDA or there is no GPU")
    return str(request.param)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """A fixed seed before each test and the number of threads as it was after it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a process of its own, outside any source tree that would shadow fastbn."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
