"""Launching kernels when the CUDA runtime fails, by a runtime that fails as it is told."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support import cuda_toolkit


def test_failures_are_not_remembered(tmp_path: Path) -> None:
    """A kernel that could not be loaded is tried again, and what could not be asked is not no."""
    home = cuda_toolkit.find()
    if home is None:
        cuda_toolkit.missing("no nvcc; python -m tests.support.cuda_toolkit installs one")
    here = Path(__file__).parent / "runtime"
    program = tmp_path / "runtime"
    command = [f"{home}/bin/nvcc", "-std=c++17", "-cudart", "none", "-o", str(program)]
    sources = [str(here / name) for name in ("main.cu", "runtime.cpp")]
    subprocess.run([*command, *sources], check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
