"""Builds the compiled module for a GPU of another machine, to be carried there.

``python -m tests.support.carry`` leaves it in ``carry``, from where ``benchmarks/gpu_report.sh``
takes it instead of building. The interpreter that runs this has to be of the other machine's minor
version, and ``FASTBN_CARRY_TORCH`` its torch.
"""

from __future__ import annotations

import shutil
import sys

from . import cuda_build, cuda_toolkit

CARRIED = cuda_build.ROOT / "carry"


def build() -> int:
    """Compiles in a copy of the sources, with the CUDA environment of this interpreter."""
    python = cuda_build.environment()
    if python is None:
        return 1
    if cuda_toolkit.find() is None:
        sys.exit("no CUDA toolkit; python -m tests.support.cuda_toolkit fetches one")
    tree = cuda_build.copy_sources()
    cuda_build.run(
        python,
        *("setup.py", "--quiet", "build_ext", "--inplace", "--force"),
        cwd=tree,
        FASTBN_CUDA="1",
        FASTBN_COMMIT=cuda_build.commit(),
        TORCH_CUDA_ARCH_LIST=cuda_build.ARCHITECTURES,
    )
    shutil.rmtree(CARRIED, ignore_errors=True)
    CARRIED.mkdir()
    for built in [*(tree / "fastbn").glob("_C*.so"), tree / "fastbn" / "_build_info.py"]:
        shutil.copy2(built, CARRIED)
        sys.stdout.write(f"{CARRIED.name}/{built.name}\n")
    return 0


def main() -> int:
    with cuda_build.alone():
        return build()


if __name__ == "__main__":
    sys.exit(main())
