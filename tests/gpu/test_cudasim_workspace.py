"""Calls hold no memory: what they pass on between blocks is theirs, and counters the module's.

PyTorch's allocator has rules that only a GPU would show: what a graph's pool, or one that the
program swaps, has given must come back before the call is over. A stand-in for it has them here.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests import cudasim
from tests.cudasim import build
from tests.cudasim.verify import verify_backward, verify_forward
from tests.support import tables

if TYPE_CHECKING:
    from tests.cudasim import Report

COUNTERS_BYTES = 16640
# Those that count blocks.
ALGORITHMS = ("two_pass", "persistent_grid")


def make_calls(
    folder: Path, fault: tuple[str, str, str] | None = None, *flags: str
) -> subprocess.CompletedProcess[str]:
    """Compiles the calls of tests/cudasim/rules/ in an empty folder, and makes them.

    Args:
        folder: for copies of the sources, and the program.
        fault: a file below ``csrc/cuda``, what it says once, and what its copy says instead.
        flags: of the compiler.
    """
    shutil.copytree(build.ROOT / "csrc", folder / "csrc")
    here = folder / "tests" / "cudasim"
    shutil.copytree(build.ROOT / "tests" / "cudasim", here)
    if fault:
        file, right, wrong = fault
        path = folder / "csrc" / "cuda" / file
        text = path.read_text()
        assert text.count(right) == 1
        path.write_text(text.replace(right, wrong))
    sources = [here / "rules" / "workspace.cpp", *(here / "cudasim").glob("*.cpp")]
    command = ["g++", "-std=c++17", "-O1", "-pthread", *flags, f"-I{here}"]
    program = folder / "rules"
    subprocess.run([*command, *map(str, sources), "-ldl", "-o", str(program)], check=True)
    return subprocess.run([program], capture_output=True, text=True, timeout=300)


def test_calls_keep_the_rules(tmp_path: Path) -> None:
    done = make_calls(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# For each planted fault the file, the text it replaces, what replaces it, and what is said of it.
FAULTS = {
    "memory-that-is-kept": (
        "workspace.h",
        "  Memory memory_;",
        "  Memory& memory_ = *new Memory();",
        "a block of 4096 bytes outlives its call",
    ),
    "captured-with-the-counters-of-the-stream": (
        "workspace.h",
        "if (plan.needs_counters && !source.is_capturing())",
        "if (plan.needs_counters)",
        "replays of a captured call would count on counters of the stream",
    ),
    "counters-that-are-not-cleared": (
        "workspace.h",
        "      source.clear(workspace_.counters, counters_bytes);\n",
        "",
        "counters are zero",
    ),
    "results-on-top-of-counters": (
        "workspace.h",
        "static_cast<char*>(memory_.get()) + counters_bytes;",
        "static_cast<char*>(memory_.get());",
        "results do not lie on counters",
    ),
    "a-slot-for-all-streams": (
        "counters.h",
        "first() + streams.size();",
        "first();",
        "streams share no counters",
    ),
    "a-slot-for-a-stream-of-any-device": (
        "counters.h",
        "devices_[device];",
        "devices_[0];",
        "counters are those of the device",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_rules_are_noticed(fault: str, tmp_path: Path) -> None:
    file, right, wrong, said = FAULTS[fault]
    done = make_calls(tmp_path, (file, right, wrong))
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stdout


def test_host_threads_do_not_race(tmp_path: Path) -> None:
    """By the thread sanitizer, which needs no luck to see a missing lock."""
    lock = "    const std::lock_guard<std::mutex> lock(mutex_);\n"
    right = make_calls(tmp_path / "right", None, "-fsanitize=thread")
    assert right.returncode == 0, right.stdout + right.stderr
    wrong = make_calls(tmp_path / "wrong", ("counters.h", lock, ""), "-fsanitize=thread")
    assert wrong.returncode != 0
    assert "data race" in wrong.stderr


def assert_steps_right(algorithm: str) -> list[Report]:
    """Of a tensor whose channels several blocks share."""
    tensors = tables.make(tables.Case("shared", (8, 2, 32, 64), "contiguous", torch.float32))
    reports = []
    for verify in (verify_forward, verify_backward):
        verdict = verify(tensors, algorithm=algorithm)
        assert verdict.wrong == []
        assert verdict.schedules_differ == 0
        reports.append(verdict.report)
    return reports


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_calls_need_not_clear_anything(algorithm: str) -> None:
    for report in assert_steps_right(algorithm):
        assert report.cleared_bytes == 0
        assert len(report.allocations) == 1
        assert report.workspace["atomics"] > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_captured_calls_have_counters_of_their_own(algorithm: str) -> None:
    """Beside calls of the same stream, before and after."""
    plain = assert_steps_right(algorithm)
    with cudasim.on_stream(0, capturing=True):
        captured = assert_steps_right(algorithm)
    assert_steps_right(algorithm)
    for ours, theirs in zip(captured, plain, strict=True):
        assert ours.cleared_bytes == COUNTERS_BYTES
        assert ours.allocations == [COUNTERS_BYTES + theirs.allocations[0]]


@pytest.mark.parametrize("capturing", [False, True])
def test_one_block_needs_no_memory(capturing: bool) -> None:
    with cudasim.on_stream(0, capturing=capturing):
        for report in assert_steps_right("one_block"):
            assert report.allocations == []
            assert report.cleared_bytes == 0


def test_more_streams_than_counters() -> None:
    """Those that come last clear counters of their own at each call; all are right."""
    cleared = []
    for _ in range(2):
        for index in range(40):
            with cudasim.on_stream(index):
                (forward, backward) = assert_steps_right("two_pass")
            assert forward.cleared_bytes == backward.cleared_bytes
            cleared.append(forward.cleared_bytes)
    assert cleared[:40] == cleared[40:]
    assert sorted(cleared[:40]) == [0] * 32 + [COUNTERS_BYTES] * 8
