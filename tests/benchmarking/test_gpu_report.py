"""``benchmarks/gpu_report.sh`` with stand-ins for the GPU's tools: order, fall-back, files."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.pairs import EXHAUSTIVE

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_report.sh"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the sources are not there")

# Answers for Python; one case of the first call may hang, and another be wrong.
PYTHON = """\
#!/usr/bin/env bash
case "$*" in
  "-m tests.support.smoke {hangs}"*) exec sleep 60 ;;
  "-m tests.support.smoke {wrong}"*) echo "AssertionError: y: 3 of 9 elements are off"; exit 1 ;;
  "-m tests.support.smoke"*) {smoke} ;;
  "-c import "*) exit 1 ;;
  "-c "*) echo ;;
  -) cat >/dev/null; echo "torch 2.11.0 CUDA 13.0" ;;
  "-m fastbn"*) echo "self-check ok" ;;
  *) echo "ran $* with ${{FASTBN_CUDA_ALGORITHM:-auto}}" ;;
esac
"""
TOOLS = ("nvidia-smi", "nvcc", "compute-sanitizer", "ncu")


def report(
    call: str, folder: Path, hangs: str = "-", wrong: str = "-", smoke: str = 'echo "max error 0"'
) -> tuple[subprocess.CompletedProcess[str], str, dict[str, str]]:
    """What came of a call: its summary, and the files of its archive."""
    tools = folder / "tools"
    tools.mkdir()
    python = tools / "python"
    python.write_text(PYTHON.format(hangs=hangs, wrong=wrong, smoke=smoke))
    for name in TOOLS:
        (tools / name).write_text(f"#!/bin/sh\necho {name} ran\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    given = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": str(python),
        "FASTBN_COMMIT": "0123abc",
        "CUDA_HOME": str(folder),
        "CASE_SECONDS": "1" if hangs != "-" else "60",
    }
    done = subprocess.run(
        [SCRIPT, call, folder / "out"],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=300,
    )
    left = sorted(path.name for path in (folder / "out").iterdir())
    assert left == ["report.tar.gz", "summary.txt"], done.stderr
    with tarfile.open(folder / "out" / "report.tar.gz") as archive:
        files = {
            Path(member.name).name: (archive.extractfile(member) or sys.stdin.buffer)
            .read()
            .decode()
            for member in archive.getmembers()
            if member.isfile()
        }
    summary = (folder / "out" / "summary.txt").read_text()
    assert files["summary.txt"] == summary
    return done, summary, files


STEPS = {
    "smoke": ["environment", "build", "smoke", "algorithms", "counters", "pieces", "kernels"],
    "verify": ["environment", "build", "tests_gpu", "tests", "sanitizer"],
    "measure": ["environment", "build", "algorithms", "kernels", "sanitizer"],
}


@pytest.mark.parametrize("call", STEPS)
def test_steps_come_one_after_another(call: str, tmp_path: Path) -> None:
    done, summary, files = report(call, tmp_path)
    assert done.returncode == 0, summary
    ended = [line.split()[0] for line in summary.splitlines() if " s  ok" in line]
    assert ended == STEPS[call]
    assert {f"{name}.txt" for name in STEPS[call]} <= set(files)
    assert "all steps ok" in summary


def test_a_kernel_that_hangs_is_named_and_done_without(tmp_path: Path) -> None:
    hangs = "persistent_grid backward contiguous"
    done, summary, files = report("smoke", tmp_path, hangs=hangs)
    assert done.returncode == 1
    assert f"{hangs}: HANGS" in summary
    assert files["smoke.txt"].count("max error 0") == 19
    assert "FASTBN_CUDA_ALGORITHM=two_pass" in summary
    assert "algorithms.txt" not in files
    assert "with two_pass" in files["kernels.txt"]


def test_a_wrong_number_is_named(tmp_path: Path) -> None:
    wrong = "one_block forward channels_last"
    done, summary, files = report("smoke", tmp_path, wrong=wrong)
    assert done.returncode == 1
    assert f"{wrong}: WRONG, AssertionError: y: 3 of 9 elements are off" in summary
    # Nothing is the matter with persistent kernels.
    assert "with auto" in files["kernels.txt"]


@pytest.mark.parametrize("arguments", [[], ["smoke"], ["all", "here"]])
def test_usage(arguments: list[str]) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "smoke|verify|measure OUT_DIR" in done.stderr


@EXHAUSTIVE
def test_all_cases_are_right_on_the_simulator(tmp_path: Path) -> None:
    root = SCRIPT.parents[1]
    run = f'cd {root}; exec {sys.executable} "$@" --simulated'
    _, summary, files = report("smoke", tmp_path, smoke=run)
    assert files["smoke.txt"].count(": max error 0.0") == 20, summary
