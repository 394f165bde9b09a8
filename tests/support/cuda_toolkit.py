"""Finds a CUDA toolkit that compiles the kernels: the machine's, or one of the Python index.

``python -m tests.support.cuda_toolkit`` makes sure that there is one, and tells where.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import setup_cuda

# The one that the CUDA torch of this project's checks is built with. A toolkit of another minor
# version does as well; another major one does not fit torch.
MAJOR = "13"
VERSION = "13.0.2"
# The extras are spelled out because they pin what nvcc itself asks for in any version: a front end
# of 13.5 writes what an assembler of 13.0 cannot read.
REQUIREMENT = f"cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]=={VERSION}"


def required() -> bool:
    """Whether a missing tool is a failure, as it is in continuous integration."""
    return bool(os.environ.get("CI"))


def missing(reason: str) -> NoReturn:
    """Ends a test that lacks a tool: skips it, or fails where the tool is required."""
    import pytest  # absent where this file only installs

    if required():
        pytest.fail(reason)
    pytest.skip(reason)


def cache_folder() -> Path:
    """What takes long to fetch is kept here, for all checkouts of this user."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastbn"


def downloaded() -> Path:
    """Where ``install`` puts its toolkit."""
    return cache_folder() / f"cuda-{VERSION}"


def find() -> Path | None:
    """The folder of a usable toolkit, as CUDA_HOME wants it; None if there is none."""
    cuda = ".".join(VERSION.split(".")[:2])
    places = [*setup_cuda.candidates(cuda), downloaded() / "nvidia" / f"cu{MAJOR}" / "bin" / "nvcc"]
    for nvcc in places:
        try:
            toolkit = setup_cuda.ask(nvcc, cuda)
        except setup_cuda.NoToolkitError:
            continue
        if toolkit:
            return toolkit.home
    return None


def install() -> Path:
    """Downloads a toolkit into the user's cache (110 MB, 270 MB unpacked)."""
    partial = cache_folder() / f"cuda-{VERSION}.partial-{os.getpid()}"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    try:
        subprocess.run([*pip, "--target", partial, REQUIREMENT], check=True)
        # Names that linkers look for and the wheels leave out.
        home = partial / "nvidia" / f"cu{MAJOR}"
        (home / "lib64").symlink_to("lib")
        (home / "lib" / "libcudart.so").symlink_to(f"libcudart.so.{MAJOR}")
        shutil.rmtree(downloaded(), ignore_errors=True)
        partial.rename(downloaded())
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return downloaded() / "nvidia" / f"cu{MAJOR}"


def program(name: str) -> Path | None:
    """Nvdisasm or cuobjdump, which come with the extra [test]; None if it is missing."""
    try:
        files = metadata.files(f"nvidia-cuda-{name}") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    home = find()
    places = [shutil.which(name), home and home / "bin" / name]
    return next((Path(place) for place in places if place and Path(place).exists()), None)


def main() -> int:
    """Finds or installs; fails only where a toolkit is required."""
    home = find()
    if home is None and (platform.system() != "Linux" or not shutil.which("g++")):
        print("no CUDA toolkit, and none to download for this system")
        return int(required())
    try:
        print(f"CUDA toolkit in {home or install()}")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no CUDA toolkit, and downloading one failed: {error}")
        return int(required())
    return 0


if __name__ == "__main__":
    sys.exit(main())
