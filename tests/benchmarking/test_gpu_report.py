"""``benchmarks/gpu_report.sh`` with stand-ins for the GPU's tools: order, fall-back, files."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.pairs import EXHAUSTIVE

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_report.sh"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the sources are not there")

# Answers for Python; one case of the first call may hang, and another be wrong.
PYTHON = """\
#!/usr/bin/env bash
case "$*" in
  "-m tests.support.smoke {hangs}"*) echo $$ >>"$PIDS"; exec sleep 60 ;;
  "-m tests.support.smoke {wrong}"*)
    echo "max error 0.5"
    echo "AssertionError: y: 3 of 9 elements are off"
    exit 1
    ;;
  "-m tests.support.smoke"*) {smoke} ;;
  "-c import "*) exit 1 ;;
  "-c "*) echo ;;
  -)
    case "$(cat)" in *build_info*) exec {right_module} ;; esac
    echo "torch 2.11.0 CUDA 13.0"
    ;;
  "-m fastbn"*) echo "self-check ok" ;;
  *) echo "ran $* with ${{FASTBN_CUDA_ALGORITHM:-auto}}" ;;
esac
"""
TOOLS = ("nvidia-smi", "nvcc", "compute-sanitizer", "ncu")


def stand_ins(
    folder: Path,
    hangs: str = "-",
    wrong: str = "-",
    smoke: str = 'echo "max error 0"',
    right_module: str = "true",
) -> dict[str, str]:
    """Makes them, and gives the environment of a call that takes them."""
    inherited = {name: v for name, v in os.environ.items() if name != "FASTBN_CUDA_ALGORITHM"}
    tools = folder / "tools"
    tools.mkdir()
    python = tools / "python"
    python.write_text(
        PYTHON.format(hangs=hangs, wrong=wrong, smoke=smoke, right_module=right_module)
    )
    for name in TOOLS:
        (tools / name).write_text(f'#!/bin/sh\necho {name} ran "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {
        **inherited,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": str(python),
        "FASTBN_COMMIT": "0123abc",
        "CUDA_HOME": str(folder),
        "PIDS": str(folder / "pids"),
        "CASE_SECONDS": "1" if hangs != "-" else "60",
    }


def script_in(folder: Path) -> Path:
    """A copy, as it would put modules among the sources."""
    tree = folder / "tree"
    for name in ("benchmarks", "fastbn", "tests"):
        (tree / name).mkdir(parents=True)
    return Path(shutil.copy(SCRIPT, tree / "benchmarks"))


def left_by(call: str, folder: Path) -> tuple[str, dict[str, str]]:
    """The summary, and the files of the archive: there is nothing else."""
    assert {path.name for path in folder.iterdir()} == {f"{call}.txt", f"{call}.tar.gz"}
    with tarfile.open(folder / f"{call}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    texts = {path.name: path.read_text() for path in (folder / call).iterdir()}
    return (folder / f"{call}.txt").read_text(), texts


def report(
    call: str, folder: Path, forced: dict[str, str] | None = None, **stranger: str
) -> tuple[subprocess.CompletedProcess[str], str, dict[str, str]]:
    """What came of a call: its summary, and the files of its archive."""
    done = subprocess.run(
        [script_in(folder), call, folder / "out"],
        env={**stand_ins(folder, **stranger), **(forced or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    summary, files = left_by(call, folder / "out")
    assert done.stdout == summary, done.stderr
    return done, summary, files


LAYOUTS = ("contiguous", "channels_last")
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


def test_each_dtype_is_measured_by_itself(tmp_path: Path) -> None:
    _, _, files = report("measure", tmp_path)
    written = re.findall(r"rows-(\w+)\.json --dtypes (\w+)", files["kernels.txt"])
    assert written == [(dtype, dtype) for dtype in ("bfloat16", "float16", "float32")]


@pytest.mark.parametrize("is_right", [True, False])
def test_a_module_is_built_unless_the_right_one_is_there(is_right: bool, tmp_path: Path) -> None:
    _, summary, files = report("verify", tmp_path, right_module=str(is_right).lower())
    assert ("ran setup.py build_ext --inplace" in files["build.txt"]) == (not is_right)
    assert ("module is there: ok" in summary) == is_right
    # Only the assembler can tell.
    assert "spill" not in summary


def test_a_carried_module_is_put_among_the_sources(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "carry").mkdir(parents=True)
    (tree / "carry" / "_C.so").write_text("of another machine")
    report("verify", tmp_path)
    assert (tree / "fastbn" / "_C.so").read_text() == "of another machine"


def test_a_kernel_that_hangs_is_named_and_done_without(tmp_path: Path) -> None:
    hangs = "persistent_grid backward contiguous"
    done, summary, files = report("smoke", tmp_path, hangs=hangs)
    assert done.returncode == 1
    assert f"{hangs}: HANGS" in summary
    assert files["smoke.txt"].count("max error 0") == 19
    assert "FASTBN_CUDA_ALGORITHM=two_pass" in summary
    assert "algorithms.txt" not in files
    assert "with two_pass" in files["kernels.txt"]
    assert set(re.findall("smoke ([a-z_]+)", files["counters.txt"])) == {"two_pass"}


@pytest.mark.parametrize("call", ["verify", "measure"])
def test_later_calls_do_without_it_too(call: str, tmp_path: Path) -> None:
    forced = {"FASTBN_CUDA_ALGORITHM": "two_pass"}
    done, summary, files = report(call, tmp_path, forced)
    assert done.returncode == 0, summary
    ended = [line.split()[0] for line in summary.splitlines() if " s  ok" in line]
    assert ended == [step for step in STEPS[call] if step != "algorithms"]
    if call == "verify":
        assert "-k not persistent with two_pass" in files["tests_gpu.txt"]
        assert "-k" not in files["tests.txt"]


def test_a_wrong_number_is_named(tmp_path: Path) -> None:
    wrong = "one_block forward channels_last"
    done, summary, files = report("smoke", tmp_path, wrong=wrong)
    assert done.returncode == 1
    said = "max error 0.5 AssertionError: y: 3 of 9 elements are off"
    assert f"{wrong}: WRONG, {said}" in summary
    # Nothing is the matter with persistent kernels.
    assert "with auto" in files["kernels.txt"]


def test_what_does_not_fit_is_no_failure(tmp_path: Path) -> None:
    done, summary, files = report("smoke", tmp_path, smoke='echo "does not fit this GPU"')
    assert done.returncode == 0
    assert summary.count("does not fit this GPU") == 20
    assert "with auto" in files["kernels.txt"]


def test_persistent_kernels_that_were_not_tried_are_done_without(tmp_path: Path) -> None:
    """The step is killed, as when it takes too long, while the last ones run."""
    smoke = 'case "$*" in *persistent_grid*) kill -KILL 0 ;; *) echo "max error 0" ;; esac'
    done, summary, files = report("smoke", tmp_path, smoke=smoke)
    assert done.returncode == 1
    assert files["smoke.txt"].count("max error 0") == 16
    assert "FASTBN_CUDA_ALGORITHM=two_pass" in summary
    assert "with two_pass" in files["kernels.txt"]


def test_what_the_profiler_fails_at_costs_no_other_kernel(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path)
    ncu = tmp_path / "tools" / "ncu"
    ncu.write_text(f'{ncu.read_text()}case "$*" in *persistent_cluster*) exit 1 ;; esac\n')
    done = subprocess.run(
        [script_in(tmp_path), "smoke", tmp_path / "out"], env=environment, timeout=300
    )
    assert done.returncode == 1
    _, files = left_by("smoke", tmp_path / "out")
    profiled = re.findall("smoke ([a-z_]+) forward ([a-z_]+)", files["counters.txt"])
    algorithms = ("two_pass", "persistent_cluster", "persistent_grid")
    assert profiled == [(a, layout) for layout in LAYOUTS for a in algorithms]


def test_a_machine_without_a_profiler_is_measured_all_the_same(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path)
    (tmp_path / "tools" / "ncu").unlink()
    environment["PATH"] = f"{tmp_path / 'tools'}:/usr/bin:/bin"
    done = subprocess.run(
        [script_in(tmp_path), "smoke", tmp_path / "out"], env=environment, timeout=300
    )
    assert done.returncode == 0
    summary, files = left_by("smoke", tmp_path / "out")
    assert "counters     left out, as there is no ncu" in summary
    assert "counters.txt" not in files


def test_a_call_that_is_stopped_leaves_what_it_has(tmp_path: Path) -> None:
    """And no process, which would keep the GPU busy."""
    environment = stand_ins(tmp_path, hangs="two_pass")
    environment["CASE_SECONDS"] = "300"
    pids = Path(environment["PIDS"])
    call = subprocess.Popen([script_in(tmp_path), "smoke", tmp_path / "out"], env=environment)
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 4)
    call.terminate()
    assert call.wait(20) == 128 + signal.SIGTERM
    summary, files = left_by("smoke", tmp_path / "out")
    assert [line.split()[0] for line in summary.splitlines() if " s  ok" in line] == [
        "environment",
        "build",
    ]
    assert {"environment.txt", "build.txt", "smoke.txt"} == set(files)
    hanging = [Path("/proc", number) for number in pids.read_text().split()]
    wait_until(lambda: not any(process.exists() for process in hanging))


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("call", STEPS)
def test_a_call_takes_nine_minutes_at_most(call: str) -> None:
    (limits,) = re.findall(rf"^  {call}\) steps=\((.*)\) ;;$", SCRIPT.read_text(), re.MULTILINE)
    steps = dict(limit.split("=") for limit in limits.split())
    assert list(steps) == STEPS[call]
    assert sum(map(int, steps.values())) <= 9 * 60


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
