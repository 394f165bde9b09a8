"""Which CUDA toolkit and architectures are compiled for, with toolkits that only say they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import setup_cuda

ROOT = Path(__file__).parents[2]
TORCH, CUDA = "2.14.1+cu130", "13.0"
# What nvcc answers, as far as anybody asks; TOP and the like are those of CUDA 13.
NVCC = """#!/bin/sh
case "$1" in
--version)
  echo 'nvcc: NVIDIA (R) Cuda compiler driver'
  echo 'Cuda compilation tools, release {release}, V{release}.88' ;;
--dryrun)
  cat >&2 <<'END'
#$ _SPACE_=
#$ _HERE_={home}/bin
#$ TOP={home}/bin/..
#$ INCLUDES="-I{home}/bin/../targets/x86_64-linux/include"
#$ LIBRARIES=  "-L{home}/targets/x86_64-linux/lib/stubs" "-L{home}/targets/x86_64-linux/lib"
END
  ;;
*) exit 1 ;;
esac
"""
HEADERS = ("cuda_runtime.h", "cuda_fp16.h")


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def toolkit(
    home: Path,
    release: str = CUDA,
    include: str | None = "include",
    library: str | None = "lib64/libcudart.so",
) -> Path:
    """Makes what answers like a toolkit, and has files in these places."""
    write(home / "bin" / "nvcc", NVCC.format(release=release, home=home))
    if include:
        for header in HEADERS:
            write(home / include / header)
    if library:
        write(home / library)
    return home


def wrap(folder: Path, home: Path) -> Path:
    """Makes a script that calls the nvcc of a toolkit."""
    write(folder / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    return folder


@pytest.fixture(autouse=True)
def _no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine has is not found."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(sys, "path", [])


def test_wrapper_on_the_path_leads_to_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = toolkit(tmp_path / "toolkit")
    folder = wrap(tmp_path / "usr" / "bin", home)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    assert setup_cuda.find(TORCH, CUDA) == setup_cuda.Toolkit(home, CUDA)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_user_has_the_first_say(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, other = (toolkit(tmp_path / name, "13.1") for name in ("chosen", "other"))
    monkeypatch.setenv("PATH", f"{other}/bin:/usr/bin:/bin")
    monkeypatch.setenv(variable, str(chosen))
    assert setup_cuda.find(TORCH, CUDA) == setup_cuda.Toolkit(chosen, "13.1")


def test_what_does_not_do_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old toolkit on the path, and the right one where installers put it."""
    old, right = toolkit(tmp_path / "old", "11.8"), toolkit(tmp_path / "right")
    monkeypatch.setenv("PATH", f"{old}/bin:/usr/bin:/bin")
    monkeypatch.setattr(setup_cuda, "USUAL", right)
    assert setup_cuda.find(TORCH, CUDA) == setup_cuda.Toolkit(right, CUDA)


def test_user_may_name_the_folder_of_a_wrapper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = toolkit(tmp_path / "toolkit")
    wrap(tmp_path / "usr" / "bin", home)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "usr"))
    assert setup_cuda.find(TORCH, CUDA).home == home


def test_parts_may_lie_where_nvcc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Path("targets/x86_64-linux")
    library = target / "lib" / "libcudart.so"
    home = toolkit(tmp_path / "toolkit", include=f"{target}/include", library=str(library))
    monkeypatch.setenv("CUDA_HOME", str(home))
    found = setup_cuda.find(TORCH, CUDA)
    assert [folder.resolve() for folder in found.include_dirs] == [home / target / "include"]
    assert found.library == home / library


def test_packages_of_torch_bring_what_nvcc_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = toolkit(tmp_path / "toolkit", include=None, library=None)
    packages = tmp_path / "site-packages" / "nvidia" / "cu13"
    for name in HEADERS:
        write(packages / "include" / name)
    write(packages / "lib" / "libcudart.so.13")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "site-packages")])
    found = setup_cuda.find(TORCH, CUDA)
    assert found.home == home
    assert found.include_dirs == (packages / "include",)
    assert found.library == packages / "lib" / "libcudart.so.13"


def test_packages_may_bring_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "site-packages" / "nvidia" / "cu13"
    toolkit(home, library="lib/libcudart.so.13")
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    monkeypatch.setattr(setup_cuda, "USUAL", tmp_path / "nowhere")
    found = setup_cuda.find(TORCH, CUDA)
    assert (found.home, found.include_dirs) == (home, ())
    assert found.library == home / "lib" / "libcudart.so.13"


# What the user has, and what he is told; {} is his CUDA_HOME.
REASONS = {
    "no-toolkit": (
        None,
        "there is no nvcc that answers at {}/bin/nvcc, and torch 2.14.1+cu130 is built with CUDA "
        "13.0: install a CUDA toolkit 13.x and name its folder by CUDA_HOME",
    ),
    "another-cuda": (
        {"release": "12.8"},
        "the nvcc in {} is of CUDA 12.8, and torch of CUDA 13.0: install a CUDA toolkit 13.x and "
        "name its folder by CUDA_HOME",
    ),
    "no-headers": (
        {"include": None},
        "the nvcc in {} comes without cuda_runtime.h: install the whole CUDA toolkit 13.0 and name "
        "its folder by CUDA_HOME, or install the parts that are missing by pip install "
        "'cuda-toolkit[cudart]==13.0.*'",
    ),
    "no-library": ({"library": None}, "the nvcc in {} comes without libcudart.so: install the "),
}


def user_home(case: str, folder: Path) -> Path:
    home = folder / "toolkit"
    options = REASONS[case][0]
    return home if options is None else toolkit(home, **options)


@pytest.mark.parametrize("case", REASONS)
def test_reason_is_one_sentence(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = user_home(case, tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(setup_cuda.NoToolkitError) as raised:
        setup_cuda.find(TORCH, CUDA)
    assert str(raised.value).startswith(REASONS[case][1].format(home))
    assert "\n" not in str(raised.value)


def test_torch_without_cuda_is_a_reason() -> None:
    with pytest.raises(setup_cuda.NoToolkitError, match=r"^torch 2\.14\.1 is built without CUDA: "):
        setup_cuda.find("2.14.1", None)


# Setup.py with a torch that says it is one for CUDA; then where torch's extensions see the toolkit.
SETUP = """
import runpy, sys, torch
torch.__version__, torch.version.cuda = "2.14.1+cu130", "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
from torch.utils import cpp_extension
print(cpp_extension.CUDA_HOME)
"""
in_source_tree = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the source tree is not there"
)


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if "CUDA" not in name}
    return subprocess.run(
        [sys.executable, "-c", SETUP],
        cwd=ROOT,
        env={**kept, "PATH": f"{folder}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@in_source_tree
def test_toolkit_is_given_to_torch_which_would_guess_it(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "toolkit")
    done = run_setup(wrap(tmp_path / "usr" / "bin", home), FASTBN_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(home)


# What a torch for CUDA brings along may make up for the other reasons.
@in_source_tree
@pytest.mark.parametrize("case", ["no-toolkit", "another-cuda"])
@pytest.mark.parametrize("wish", ["auto", "1"])
def test_build_without_toolkit_says_why(case: str, wish: str, tmp_path: Path) -> None:
    """Before anything is compiled; and one that may goes on for the CPU."""
    home = user_home(case, tmp_path)
    done = run_setup(tmp_path, FASTBN_CUDA=wish, CUDA_HOME=str(home))
    reason = REASONS[case][1].format(home)
    (line,) = [line for line in done.stderr.splitlines() if reason in line]
    if wish == "1":
        assert done.returncode == 1
        assert line.startswith("FASTBN_CUDA=1, but ")
        assert line.endswith(", or set FASTBN_CUDA=0.")
    else:
        assert done.returncode == 0
        assert line.startswith("fastbn is built without CUDA kernels, as ")


# --- Architectures --------------------------------------------------------------------------------

# Of GPUs that are sold, from Turing on.
CAPABILITIES = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")


def has_code(capability: str, architectures: str) -> bool:
    """Machine code of the same major version and no higher minor one, or PTX of no higher one."""
    major, minor = setup_cuda.numbers(capability)
    for name in architectures.split(";"):
        other = setup_cuda.numbers(name.removesuffix("+PTX"))
        if other <= (major, minor) and (other[0] == major or name.endswith("+PTX")):
            return True
    return False


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("cuda", ["12.6", "12.8", "13.0"])
def test_every_gpu_has_code(capability: str, cuda: str) -> None:
    assert has_code(capability, setup_cuda.architectures(cuda))


def test_architectures_of_a_wheel() -> None:
    assert setup_cuda.architectures("13.0") == "7.5;8.0;8.6;8.9;9.0;10.0+PTX;12.0"
    assert setup_cuda.architectures("12.6") == "7.5;8.0;8.6;8.9;9.0+PTX"
