"""The source distribution is complete, and the wheel is what it should be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import files, metadata, requires
from pathlib import Path

import pytest
import torch

import fastbn
from tests.support import cuda_toolkit

ROOT = Path(__file__).parents[2]
in_source_tree = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the source tree is not there"
)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy that holds what git would."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.so", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    (folder / "tree" / "fastbn" / "_build_info.py").unlink(missing_ok=True)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)],
        cwd=folder / "tree",
        check=True,
        capture_output=True,
        timeout=300,
    )
    (archive,) = folder.glob("fastbn-*.tar.gz")
    return archive


@in_source_tree
def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder, patterns in {
            "csrc": ("*.h", "*.cpp", "*.cu", "*.cuh"),
            "fastbn": ("*.py", "*.pyi", "py.typed"),
        }.items()
        for pattern in patterns
        for path in (ROOT / folder).rglob(pattern)
    } - {"fastbn/_build_info.py"}
    assert any(name.endswith(".h") for name in wanted)
    wanted |= {"setup.py", "setup_cuda.py", "pyproject.toml", "README.md", "LICENSE"}
    assert wanted <= packed
    assert "fastbn/_build_info.py" not in packed


@in_source_tree
def test_sdist_is_packed_without_torch(tmp_path: Path) -> None:
    """Packing needs no compiler and no torch; compiling without torch says what to do."""
    hide_torch = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', {!r}]; "
    run = "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    shutil.copytree(
        ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".git", ".venv*", "build", "dist")
    )

    def without_torch(command: str) -> subprocess.CompletedProcess[str]:
        code = hide_torch.format(command) + "__file__ = 'setup.py'; " + run
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path / "tree",
            capture_output=True,
            text=True,
            timeout=300,
        )

    packed = without_torch("sdist")
    assert packed.returncode == 0, packed.stderr
    assert len(list((tmp_path / "tree" / "dist").glob("fastbn-*.tar.gz"))) == 1
    compiled = without_torch("build_ext")
    assert compiled.returncode != 0
    assert "install torch first" in compiled.stderr


@in_source_tree
@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        pytest.param(
            *("1", "is built without CUDA: install a torch built with CUDA"),
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="it is possible here"),
        ),
        ("maybe", "it may be auto, 0 or 1"),
    ],
)
def test_impossible_wish_for_cuda_is_refused(wish: str, sentence: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "FASTBN_CUDA": wish},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert sentence in done.stderr


def installed_files() -> list[Path]:
    """What the wheel put into the package's folder."""
    return [path for path in Path(fastbn.__file__).parent.iterdir() if path.is_file()]


def cuda_architectures() -> set[str]:
    """Those of the build record, such as 90."""
    recorded = re.findall(r"(\d+)\.(\d)", str(fastbn.build_info()["architectures"]))
    return {major + minor for major, minor in recorded}


def test_package_is_small_and_complete() -> None:
    found = {path.name for path in installed_files()}
    assert {"_build_info.py", "_C.pyi", "py.typed", "__main__.py"} <= found
    mebibytes = 5 + 15 * len(cuda_architectures())
    assert sum(path.stat().st_size for path in installed_files()) < mebibytes << 20
    assert files("fastbn") is not None


def compiled_module() -> Path:
    (module,) = [path for path in installed_files() if re.fullmatch(r"_C\..*so", path.name)]
    return module


def test_compiled_module_needs_torch_and_nothing_unusual() -> None:
    """A wheel that links a runtime of its own brings a second one into the process."""
    done = subprocess.run(
        ["readelf", "-d", compiled_module()], capture_output=True, text=True, check=True
    )
    needed = {
        line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "NEEDED" in line
    }
    torch_libraries = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so"}
    if fastbn.build_info()["cuda"]:
        torch_libraries |= {"libc10_cuda.so", "libtorch_cuda.so", "libcudart.so.13"}
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0"}
    assert (
        {"libc10.so", "libtorch_cpu.so"}
        <= needed
        <= torch_libraries
        | system
        | {
            "ld-linux-x86-64.so.2",
            "ld-linux-aarch64.so.1",
        }
    )


@pytest.mark.skipif(fastbn.build_info()["cuda"] is None, reason="a build without CUDA kernels")
def test_compiled_module_has_the_architectures_of_its_record() -> None:
    cuobjdump = cuda_toolkit.program("cuobjdump")
    if cuobjdump is None:
        cuda_toolkit.missing("no cuobjdump; pip install nvidia-cuda-cuobjdump")
    done = subprocess.run(
        [cuobjdump, "--list-elf", compiled_module()], capture_output=True, text=True, check=True
    )
    assert set(re.findall(r"\.sm_(\d+)[af]?\.cubin", done.stdout)) == cuda_architectures()


def test_metadata_names_what_users_need() -> None:
    assert metadata("fastbn")["License-Expression"] == "BSD-3-Clause"
    assert metadata("fastbn")["Requires-Python"] == ">=3.10"
    plain = {line for line in requires("fastbn") or [] if "extra ==" not in line}
    assert {line.split(">")[0].split("=")[0] for line in plain} == {"torch", "numpy"}
