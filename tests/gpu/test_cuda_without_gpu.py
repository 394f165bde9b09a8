"""A fastbn with CUDA kernels works where there is no GPU, and says clearly what is missing."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, NoReturn

import pytest
import torch

import fastbn

if TYPE_CHECKING:
    from collections.abc import Callable

BUILD = fastbn.build_info()
# Architectures that the kernels under test must be compiled for.
EXPECTED = os.environ.get("FASTBN_EXPECT_CUDA")
HERE = BUILD["cuda"] is not None and not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    EXPECTED is None and not HERE,
    reason="needs a build with CUDA kernels and a machine without a GPU",
)


def test_build_is_the_expected_one() -> None:
    assert BUILD["cuda"] == torch.version.cuda
    assert not torch.cuda.is_available()
    assert EXPECTED is None or BUILD["architectures"] == EXPECTED


def test_report_names_the_kernels(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_python("-m", "fastbn", "info")
    assert done.returncode == 0, done.stderr
    for name, value in {
        "CUDA kernels": f"CUDA {torch.version.cuda}",
        "architectures": BUILD["architectures"],
        "GPU": "none",
    }.items():
        assert f"\n{name:16} {value}\n" in done.stdout
    assert "self-check on cuda" not in done.stdout


# Torch's own words, and those of the CUDA runtime: without a driver, and with one.
NO_GPU = (
    "Found no NVIDIA driver|No CUDA GPUs are available"
    "|driver version is insufficient|no CUDA-capable device is detected"
)


@pytest.mark.parametrize(
    "move",
    [
        lambda: fastbn.BatchNorm2d(3).cuda(),
        lambda: fastbn.BatchNorm2d(3, device="cuda"),
        lambda: fastbn.batch_norm(torch.ones(2, 3).cuda(), None, None, training=True),
    ],
    ids=["module", "new-module", "tensor"],
)
def test_moving_to_a_gpu_says_what_is_missing(move: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=NO_GPU):
        move()


class TensorWithoutMemory(torch.Tensor):
    """Says that it is on a GPU, which takes none; operators get it as it is."""

    @classmethod
    def __torch_dispatch__(cls, operator: object, *_: object) -> NoReturn:
        raise NotImplementedError(operator)


def test_operators_say_what_is_missing() -> None:
    """Whatever way a tensor on a GPU comes to the CUDA backend, it answers and does not crash."""
    gpu = torch.device("cuda")
    x = torch.Tensor._make_wrapper_subclass(TensorWithoutMemory, (2, 3, 4, 4), device=gpu)
    vector = torch.Tensor._make_wrapper_subclass(TensorWithoutMemory, (3,), device=gpu)
    operators = torch.ops.fastbn
    with torch._C._DisableTorchDispatch():
        with pytest.raises(RuntimeError, match=NO_GPU):
            operators.batch_norm_training(x, None, None, None, None, None, 0.1, 1e-5)
        with pytest.raises(RuntimeError, match=NO_GPU):
            operators.batch_norm_eval(x, None, None, vector, vector, 1e-5, False)
        with pytest.raises(RuntimeError, match=NO_GPU):
            operators.batch_norm_backward(x, x, None, vector, vector, True, True, True, True)
