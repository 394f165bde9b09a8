"""A fastbn that does not fit says so in one sentence, before anything worse happens."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import fastbn
from fastbn._backend import REBUILD, mismatch

if TYPE_CHECKING:
    from collections.abc import Callable

    RunPython = Callable[..., subprocess.CompletedProcess[str]]

CPU_BUILD = {"fastbn": "1.2", "torch": "2.13.0+cpu", "cuda": None}
CUDA_BUILD = {"fastbn": "1.2", "torch": "2.13.0+cu130", "cuda": "13.0"}


@pytest.mark.parametrize(
    ("record", "version", "cuda"),
    [
        (CPU_BUILD, "2.13.0+cpu", None),
        (CPU_BUILD, "2.13.1", None),
        # A CPU build runs beside any torch of its minor version.
        (CPU_BUILD, "2.13.0+cu130", "13.0"),
        (CUDA_BUILD, "2.13.0+cu130", "13.0"),
        # A CUDA runtime serves what a lower minor version of it was used to build.
        (CUDA_BUILD, "2.13.2+cu132", "13.2"),
    ],
)
def test_fitting_build_is_accepted(
    record: dict[str, str | None], version: str, cuda: str | None
) -> None:
    assert mismatch(record, version, cuda) is None


@pytest.mark.parametrize(
    ("record", "version", "cuda", "sentence"),
    [
        (CPU_BUILD, "2.14.0", None, "built for torch 2.13.0+cpu, but this is torch 2.14.0;"),
        (CPU_BUILD, "2.1.0", None, "built for torch 2.13.0+cpu, but this is torch 2.1.0;"),
        (CPU_BUILD, "3.13.0", None, "built for torch 2.13.0+cpu, but this is torch 3.13.0;"),
        (
            CUDA_BUILD,
            "2.13.0+cpu",
            None,
            "built for torch 2.13.0+cu130 with CUDA 13.0, but this is torch 2.13.0+cpu;",
        ),
        (
            CUDA_BUILD,
            "2.13.0+cu126",
            "12.6",
            "with CUDA 13.0, but this is torch 2.13.0+cu126 with CUDA 12.6;",
        ),
    ],
)
def test_unfitting_build_is_named(
    record: dict[str, str | None], version: str, cuda: str | None, sentence: str
) -> None:
    said = mismatch(record, version, cuda)
    assert said is not None
    assert said.startswith("fastbn 1.2 was ")
    assert sentence in said
    assert said.endswith(REBUILD)


def test_import_under_another_torch_says_what_to_do(run_python: RunPython) -> None:
    """The record is compared before the compiled module is loaded, which is not even tried."""
    done = run_python(
        "-c",
        "import sys, torch\n"
        "torch.__version__ = '2.99.1+cpu'\n"
        "try:\n"
        "    import fastbn\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "print('fastbn._C' in sys.modules, hasattr(torch.ops.fastbn, 'batch_norm_training'))\n",
    )
    expected = mismatch(fastbn.build_info(), "2.99.1+cpu", torch.version.cuda)
    assert done.stdout.splitlines() == [expected, "False False"], done.stderr


@pytest.mark.parametrize("missing", ["_build_info", "_C"])
def test_import_of_half_a_build_says_what_to_do(missing: str, run_python: RunPython) -> None:
    done = run_python(
        "-c",
        f"import sys; sys.modules['fastbn.{missing}'] = None\n"
        "try:\n"
        "    import fastbn\n"
        "except ImportError as error:\n"
        "    print(error)\n",
    )
    expected = {
        "_build_info": f"fastbn is not compiled in {Path(fastbn.__file__).parent}; if that",
        "_C": "does not load here",
    }[missing]
    assert expected in done.stdout, done.stderr
    assert "pip install" in done.stdout


def test_build_info_is_a_record_of_this_build() -> None:
    info = fastbn.build_info()
    assert set(info) == {"fastbn", "torch", "cuda", "architectures", "compiler", "commit"}
    assert info["fastbn"] == fastbn.__version__
    assert str(info["torch"]).split(".")[:2] == torch.__version__.split(".")[:2]
    info["torch"] = "changed"
    assert fastbn.build_info()["torch"] != "changed"


@pytest.mark.skipif(fastbn.build_info()["cuda"] is not None, reason="built with CUDA")
def test_build_without_cuda_says_so_to_a_gpu_tensor() -> None:
    """By the dispatcher's key, as there may be no GPU to put a tensor on."""
    operator = torch.ops.fastbn.batch_norm_training.default
    with pytest.raises(NotImplementedError, match=r"built without CUDA kernels.*FASTBN_CUDA=1"):
        operator._op_dk(
            torch.DispatchKey.CUDA, torch.randn(2, 3), None, None, None, None, None, 0.1, 1e-5
        )
