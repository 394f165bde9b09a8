"""Builds the wheel with CUDA kernels on a machine without a GPU, and runs the tests through it.

Needs a torch for CUDA, of 5 GB, in an environment of its own, which is kept in the user's cache.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from . import cuda_toolkit

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
TORCH = os.environ.get("FASTBN_CARRY_TORCH", "2.11.0")
ARCHITECTURES = "9.0"
# For the environment while it is made; it keeps half of that.
FREE_GIGABYTES = 10

BUILD = ROOT / "build" / "cuda"
PACKED = (
    "csrc",
    "fastbn",
    "setup.py",
    "setup_cuda.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
# These look at the sources, and `make test` runs them.
NOT_OF_THE_WHEEL = ("gpu/test_nvcc.py", "gpu/test_launch.py", "gpu/test_cudasim*.py")


def variables(**more: str) -> dict[str, str]:
    """The environment of subprocesses: without a GPU, and with torch for CUDA on offer."""
    kept = {
        name: value
        for name, value in os.environ.items()
        # An index of builds for the CPU would win over the one with CUDA.
        if name not in {"FASTBN_REQUIRE_CUDA", "PYTHONPATH"} and "/whl/cpu" not in value
    }
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **more}


def run(*command: str | Path, cwd: Path = ROOT, **more: str) -> None:
    subprocess.run(command, cwd=cwd, env=variables(**more), check=True)


def environment_folder() -> Path:
    """Of this interpreter's minor version."""
    return cuda_toolkit.cache_folder() / f"torch-{TORCH}-python{sysconfig.get_python_version()}"


@contextmanager
def alone() -> Iterator[None]:
    """Waits for others who install into the same environment."""
    folder = environment_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another of these to finish", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def works(python: Path) -> bool:
    """Whether an environment is there and its torch is the wanted one, for CUDA."""
    right = f"torch.__version__.split('+')[0] == '{TORCH}' and torch.version.cuda"
    code = f"import torch; assert {right}"
    try:
        subprocess.run([python, "-c", code], env=variables(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def environment() -> Path | None:
    """Python of the environment, made if it is not there; None if there is no room for it."""
    folder = environment_folder()
    python = folder / "bin" / "python"
    finished = folder / "finished"
    if finished.exists() and works(python):
        print(f"reusing {folder}", flush=True)
        return python
    # What an interrupted call has left is not trusted.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < FREE_GIGABYTES:
        folder.rmdir()
        did_not_run(f"{folder}: {free:.1f} GB are free, and making it takes {FREE_GIGABYTES} GB")
        return None
    print(f"making {folder}: torch {TORCH} for CUDA, 5 GB", flush=True)
    run(sys.executable, "-m", "venv", folder)
    tools = ("setuptools>=77", "wheel", "ninja", "pybind11", "numpy")
    run(python, *PIP, "install", f"torch=={TORCH}", *tools)
    if not works(python):
        sys.exit(f"the index gave another torch than {TORCH} for CUDA; see {folder}")
    finished.touch()
    return python


def commit() -> str:
    """Of the sources, as the build record and ``gpu_report.sh`` have it."""
    git = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def did_not_run(reason: str) -> None:
    """Says so where nobody overlooks it."""
    lines = ["THE CUDA BUILD WAS NOT TESTED", reason]
    border = "!" * (max(map(len, lines)) + 6)
    print("\n".join([border, *(f"!! {line}" for line in lines), border]), file=sys.stderr)


def copy_sources() -> Path:
    """A tree to build in, so that the one here stays as it is; keeps objects of the last build."""
    tree = BUILD / "tree"
    for name in (*PACKED, "build/lib*"):
        for path in tree.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tree.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, tree / name)
    return tree


def wrap(home: Path) -> Path:
    """A folder for the path, whose nvcc is a script that calls the toolkit's."""
    folder = BUILD / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    return folder


def build(python: Path, home: Path) -> Path:
    """The wheel, compiled by the toolkit in a folder, which the build has to find out."""
    wheels = BUILD / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    run(
        python,
        *(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir"),
        *("--wheel-dir", wheels, copy_sources()),
        FASTBN_CUDA="1",
        TORCH_CUDA_ARCH_LIST=ARCHITECTURES,
        CUDA_HOME="",
        CUDA_PATH="",
        PATH=f"{wrap(home)}:{python.parent}:{os.environ['PATH']}",
    )
    (wheel,) = wheels.glob("fastbn-*.whl")
    return wheel


def build_and_test() -> int:
    """Builds, installs, tests; arguments go to pytest."""
    python = environment()
    if python is None:
        return 0
    run(python, "-m", "tests.support.cuda_toolkit", CI="1")
    home = cuda_toolkit.find()
    if home is None:
        sys.exit("no CUDA toolkit")
    wheel = build(python, home)
    run(python, *PIP, "install", "--force-reinstall", "--no-deps", wheel)
    run(python, *PIP, "install", f"{wheel}[test]")
    # From the folder of the tests, where the installed fastbn is found and not the source tree.
    ignored = [f"--ignore-glob={pattern}" for pattern in NOT_OF_THE_WHEEL]
    tests = ROOT / "tests"
    run(
        python,
        *("-m", "pytest", "-n", "2", "--dist", "loadfile", *ignored, *sys.argv[1:]),
        cwd=tests,
        FASTBN_EXPECT_CUDA=ARCHITECTURES,
        OMP_WAIT_POLICY="passive",
    )
    return 0


def main() -> int:
    """Does it where it can be done."""
    if sys.platform != "linux":
        did_not_run("torch for CUDA is made for Linux")
        return 0
    try:
        with alone():
            return build_and_test()
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
