"""Says which fastbn is tested, and gives every test the same start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

import fastbn
from fastbn._backend import cpu_capability
from tests.support.devices import DEVICES, GPU, MISSING
from tests.support.lookalikes import PACKAGES
from tests.support.pairs import use_full_products

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]

# Networks are compared whose convolutions must not be what differs.
torch.backends.cudnn.deterministic = True
torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        help="full products of parameters, not their pairs alone, and all that takes long; with "
        "-m exhaustive just what is left out without this option",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: computes on a GPU")
    config.addinivalue_line("markers", "exhaustive: runs with --all")
    config.addinivalue_line("markers", "xdist_group: by one worker of pytest-xdist")
    use_full_products(config.getoption("--all"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_report_header() -> str:
    cuda = fastbn.build_info()["cuda"]
    gpu = torch.cuda.get_device_name() if MISSING is None else MISSING
    return (
        f"fastbn {fastbn.__version__} of {Path(fastbn.__file__).parent}, "
        f"CPU loops for {cpu_capability()}, {f'CUDA {cuda}' if cuda else 'no CUDA kernels'}; "
        f"torch {torch.__version__}; devices {', '.join(DEVICES)} ({gpu})"
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Failures at once, to the file FASTBN_FAILURES_TO, for runs that may not come to an end."""
    file = os.environ.get("FASTBN_FAILURES_TO")
    if file and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(file).open("a") as failures:
            failures.write(f"FAILED {report.nodeid}\n{report.longreprtext}\n")


def _need_gpu() -> None:
    """Where none is required, nothing that needs one gets this far."""
    if MISSING is not None:
        pytest.fail(f"FASTBN_REQUIRE_CUDA=1, but {MISSING}", pytrace=False)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.cuda] * (name == GPU)) for name in DEVICES],
)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that this fastbn computes on."""
    if request.param == GPU:
        _need_gpu()
    return str(request.param)


@pytest.fixture(scope="module")
def gpu() -> str:
    """The GPU, for tests of nothing else."""
    _need_gpu()
    return GPU


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """A fixed seed before each test and the number of threads as it was after it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _errors_stay_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel's fault shows when somebody waits for it: here, before the next test begins."""
    yield
    if MISSING is not None or request.node.get_closest_marker("cuda") is None:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        # After a fault nothing works in this process any more. Let pytest-xdist start another.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture
def importable_lookalikes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Python find the stand-ins for other libraries' modules when it unpickles them."""
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, sys.modules.get(package, ModuleType(package)))


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a process of its own, outside any source tree that would shadow fastbn.

    A script of ``-c`` finds the tests, behind everything that is installed.
    """

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        if arguments[0] == "-c":
            found = f"import sys; sys.path.append({str(ROOT)!r})\n"
            arguments = ("-c", found + arguments[1], *arguments[2:])
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
