"""The CUDA toolkit and the GPU architectures that setup.py compiles for; tests use them, too.

nvcc itself is asked where its toolkit is: what lies on the path may be a wrapper of it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HEADERS = ("cuda_runtime.h", "cuda_fp16.h")
# Where installers put a toolkit.
USUAL = Path("/usr/local/cuda")

# Compute capabilities, and since which CUDA they can be compiled for.
ARCHITECTURES = {"7.5": "10.0", "8.0": "11.0", "8.6": "11.1", "8.9": "11.8", "9.0": "11.8"}
ARCHITECTURES |= {"10.0": "12.8", "12.0": "12.8"}
# The last one whose PTX is kept: from it drivers make code for those that have none here, such as
# 11.0, which 12.0 would leave out.
PORTABLE = "10.0"


@dataclass(frozen=True)
class Toolkit:
    """What compiles CUDA kernels.

    Attributes:
        home: the folder whose ``bin`` has nvcc, as CUDA_HOME wants it.
        version: that nvcc says it has, such as 13.0.
        include_dirs: where headers are, unless that is ``home / "include"``.
        library: the runtime to link, unless it is where linkers look that are told the home.
    """

    home: Path
    version: str
    include_dirs: tuple[Path, ...] = ()
    library: Path | None = None


class NoToolkitError(Exception):
    """There is none that does; the sentence says why, and what to do."""


def numbers(version: str) -> tuple[int, ...]:
    """A version to compare: (12, 8) of 12.8."""
    return tuple(map(int, version.split(".")))


def architectures(cuda: str) -> str:
    """Those that a wheel should have, in the words of TORCH_CUDA_ARCH_LIST.

    Args:
        cuda: the version of CUDA that compiles them.
    """
    possible = [name for name, since in ARCHITECTURES.items() if numbers(since) <= numbers(cuda)]
    portable = max((name for name in possible if numbers(name) <= numbers(PORTABLE)), key=numbers)
    return ";".join(f"{name}+PTX" if name == portable else name for name in possible)


def packages(cuda: str) -> Iterator[Path]:
    """Folders in which Python packages of a CUDA torch put their parts of a toolkit."""
    for folder in dict.fromkeys(filter(None, sys.path)):
        home = Path(folder) / "nvidia" / f"cu{cuda.partition('.')[0]}"
        if home.is_dir():
            yield home


def candidates(cuda: str) -> Iterator[Path]:
    """Where nvcc may be: where the user says or, otherwise, in order of preference."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
            return
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    yield USUAL / "bin" / "nvcc"
    for home in packages(cuda):
        yield home / "bin" / "nvcc"


def first_with(folders: Iterable[Path], *names: str) -> Path | None:
    """The first folder that has all these files."""
    return next((f for f in folders if all((f / name).is_file() for name in names)), None)


def ask(nvcc: Path, cuda: str) -> Toolkit | None:
    """The toolkit of an nvcc; None if this is none that answers.

    Raises:
        NoToolkitError: it is not complete, and not of this version of CUDA.
    """
    dry_run: list[str | Path] = [nvcc, "--dryrun", "-c", "any.cu"]
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        answer = subprocess.run(dry_run, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    variables = dict(re.findall(r"^#\$ (\w+)= *(.*?) *$", answer.stderr, re.MULTILINE))
    version = re.search(r"release (\d+\.\d+)", said.stdout)
    if "_HERE_" not in variables or version is None:
        return None
    home = Path(variables["_HERE_"]).resolve().parent
    major = cuda.partition(".")[0]
    if version[1].partition(".")[0] != major:
        raise NoToolkitError(
            f"the nvcc in {home} is of CUDA {version[1]}, and torch of CUDA {cuda}: install a CUDA "
            f"toolkit {major}.x and name its folder by CUDA_HOME"
        )

    def named(variable: str, option: str) -> list[Path]:
        words = shlex.split(variables.get(variable, ""))
        return [Path(word[2:]) for word in words if word.startswith(option)]

    # Where compilers and linkers look that are told the home, and where they have to be told.
    own = (home / "include", Path("/usr/include"))
    headers = first_with(
        [*own, *named("INCLUDES", "-I"), *(package / "include" for package in packages(cuda))],
        *HEADERS,
    )
    own_libraries = [home / folder / "libcudart.so" for folder in ("lib64", "lib")]
    libraries = [
        *own_libraries,
        *(folder / "libcudart.so" for folder in named("LIBRARIES", "-L")),
        # Packages leave out the name that linkers look for.
        *(package / "lib" / f"libcudart.so.{major}" for package in packages(cuda)),
    ]
    library = next((path for path in libraries if path.is_file()), None)
    if headers is None or library is None:
        lacks = "cuda_runtime.h" if headers is None else "libcudart.so"
        raise NoToolkitError(
            f"the nvcc in {home} comes without {lacks}: install the whole CUDA toolkit {cuda} and "
            "name its folder by CUDA_HOME, or install the parts that are missing by pip install "
            f"'cuda-toolkit[cudart]=={cuda}.*'"
        )
    return Toolkit(
        home,
        version[1],
        include_dirs=() if headers in own else (headers,),
        library=None if library in own_libraries else library,
    )


def find(torch: str, cuda: str | None) -> Toolkit:
    """The toolkit to compile with.

    Args:
        torch: the version of torch that the kernels are to run with.
        cuda: that of CUDA which this torch was built with; None if it was built without.

    Raises:
        NoToolkitError: there is none.
    """
    if cuda is None:
        raise NoToolkitError(
            f"torch {torch} is built without CUDA: install a torch built with CUDA, and a CUDA "
            "toolkit of the same major version"
        )
    places = list(candidates(cuda))
    unfit = None
    for nvcc in places:
        try:
            toolkit = ask(nvcc, cuda)
        except NoToolkitError as reason:
            unfit = unfit or reason  # another one may do
            continue
        if toolkit:
            return toolkit
    if unfit:
        raise unfit
    major = cuda.partition(".")[0]
    raise NoToolkitError(
        f"there is no nvcc that answers at {' or '.join(map(str, places))}, and torch {torch} is "
        f"built with CUDA {cuda}: install a CUDA toolkit {major}.x and name its folder by CUDA_HOME"
    )
