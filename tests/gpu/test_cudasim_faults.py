"""What the simulator catches: its own tests, and mistakes planted in the very kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests import cudasim
from tests.cudasim import build
from tests.support.pairs import EXHAUSTIVE

if TYPE_CHECKING:
    from collections.abc import Iterator


def compile_selftest(sanitize: bool, folder: Path) -> list[str]:
    """The command that compiles the simulator's test of itself."""
    here = build.ROOT / "tests" / "cudasim"
    flags = ["-std=c++20", *build.SANITIZERS] if sanitize else ["-std=c++17"]
    sources = [*(here / "cudasim").glob("*.cpp"), *(here / "selftest").glob("*.cpp")]
    output = ["-ldl", "-o", str(folder / "selftest")]
    return ["g++", "-O1", "-rdynamic", f"-I{here}", *flags, *map(str, sources), *output]


@pytest.mark.parametrize("sanitize", [False, pytest.param(True, marks=EXHAUSTIVE)])
def test_simulator_tests_itself(sanitize: bool, tmp_path: Path) -> None:
    subprocess.run(compile_selftest(sanitize, tmp_path), check=True)
    done = subprocess.run([tmp_path / "selftest"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# A call that moves tiles as boxes: some have a row more, and some columns beyond the matrix.
BOXES = ["--shape", "6,200,9,9", "--layout", "channels_last", "--algorithm", "persistent_grid"]
BOXES += ["--multiprocessors", "8"]

# For each planted fault the file, the text it replaces and what replaces it, a call that meets it,
# and what is said of it; None where nothing is wrong but that schedules differ.
FAULTS = {
    "removed-barrier": (
        "primitives/block_reduce.cuh",
        "  gpu::sync_block();\n  return reduce_lists<Lane>",
        "  return reduce_lists<Lane>",
        ["--shape", "4,64,16,16", "--layout", "channels_last"],
        None,
    ),
    "removed-barrier-in-a-loop": (
        "primitives/block_reduce.cuh",
        "scratch[(row - 1) * columns + column] = value;\n    gpu::sync_block();",
        "scratch[(row - 1) * columns + column] = value;",
        ["--shape", "4,8,16,16", "--algorithm", "one_block"],
        "instead of",
    ),
    "out-of-bounds-read": (
        "primitives/thread_tile.cuh",
        "if (Base::places.offset(from, v) + kWidth <= elements)",
        "if (Base::places.offset(from, v) < elements)",
        ["--shape", "2,3,7,9", "--algorithm", "two_pass"],
        "is out of bounds",
    ),
    "misaligned-vector": (
        "primitives/thread_tile.cuh",
        "return int64_t{numbers[vector]} * kWidth;",
        "return int64_t{numbers[vector]} * kWidth + 1;",
        ["--shape", "2,3,7,9"],
        "is not at a multiple of 16",
    ),
    "neighbors-overwritten": (
        "primitives/thread_tile.cuh",
        "if (masks[v] == kAll)",
        "if (masks[v] != 0)",
        ["--shape", "2,4,7,9", "--algorithm", "two_pass"],
        "elements are off",
    ),
    "deadlock": (
        "steps/block.cuh",
        "mapping.first_channel() + thread));\n  }\n  gpu::sync_block();",
        "mapping.first_channel() + thread));\n    gpu::sync_block();\n  }",
        ["--op", "backward", "--shape", "4,8,16,16", "--algorithm", "two_pass"],
        "sync_block()",
    ),
    "missing-fence": (
        "primitives/block_reduce.cuh",
        "  gpu::fence_device();\n  gpu::sync_block();",
        "  gpu::sync_block();",
        ["--shape", "64,8,56,56", "--layout", "channels_last", "--algorithm", "two_pass"],
        "no fence_device()",
    ),
    "split-that-is-not-waited-for": (
        "primitives/block_reduce.cuh",
        "const bool is_last = *arrived_before == last;",
        "const bool is_last = *arrived_before + 1 == last;",
        ["--shape", "64,8,56,56", "--layout", "channels_last", "--algorithm", "two_pass"],
        "instead of",
    ),
    "peers-not-waited-for": (
        "primitives/group_reduce.cuh",
        "  gpu::sync_cluster();\n",
        "  gpu::sync_block();\n",
        ["--shape", "8,16,32,32", "--algorithm", "persistent_cluster"],
        "which thread 0 has initialized with no barrier since",
    ),
    "exchange-that-expects-too-little": (
        "primitives/group_reduce.cuh",
        "gpu::expect_bytes(barrier, splits *",
        "gpu::expect_bytes(barrier, (splits - 1) *",
        ["--shape", "8,16,32,32", "--algorithm", "persistent_cluster"],
        "bytes more than phase",
    ),
    "exchange-in-one-place": (
        "primitives/group_reduce.cuh",
        "return Partials(places, geometry.tile_channels, phase * splits + split);",
        "return Partials(places, geometry.tile_channels, split);",
        [*["--shape", "8,16,32,32", "--algorithm", "persistent_cluster"], "--multiprocessors", "4"],
        "which an asynchronous copy may still be writing",
    ),
    "tile-waited-for-too-late": (
        "algorithms/persistent.cuh",
        "    pipeline.consumer_wait(tile);\n"
        "    step_in_smem<false>(mapping, pipeline, tile, step);",
        "    step_in_smem<false>(mapping, pipeline, tile, step);\n"
        "    pipeline.consumer_wait(tile);",
        ["--shape", "64,16,32,32", "--algorithm", "persistent_block"],
        "has read, with no barrier since",
    ),
    "stage-released-too-early": (
        "primitives/pipeline.cuh",
        "    gpu::fence_async_proxy();\n    gpu::sync_warp();\n",
        "    gpu::fence_async_proxy();\n",
        ["--shape", "16,64,32,32", "--algorithm", "persistent_block", "--multiprocessors", "4"],
        "wrote, with no barrier since",
    ),
    "results-hidden-from-the-copy-engine": (
        "primitives/pipeline.cuh",
        "    gpu::fence_async_proxy();\n",
        "",
        ["--shape", "16,64,32,32", "--algorithm", "persistent_block", "--multiprocessors", "4"],
        "with no fence_async_proxy() and barrier after it since",
    ),
    "results-stored-before-they-are-there": (
        "primitives/pipeline.cuh",
        "      gpu::wait_barrier(empty(stage_of(tile)), parity_of(tile));\n",
        "",
        ["--shape", "16,64,32,32", "--algorithm", "persistent_block", "--multiprocessors", "4"],
        "wrote, with no barrier since",
    ),
    "stage-filled-while-it-is-stored": (
        "primitives/pipeline.cuh",
        "        gpu::wait_bulk_stores_read<1>();\n",
        "",
        ["--shape", "16,64,32,32", "--algorithm", "persistent_block", "--multiprocessors", "4"],
        "which a bulk store may still be reading",
    ),
    "box-that-reaches-beyond-its-tile": (
        "launcher.cuh",
        "shape.box_rows = g.persistence.box_rows;",
        "shape.box_rows = g.persistence.tile_extent;",
        BOXES,
        "which an asynchronous copy may still be writing",
    ),
    "box-that-the-driver-refuses": (
        "launcher.cuh",
        "shape.box_rows = g.persistence.box_rows;",
        "shape.box_rows = 0;",
        BOXES,
        "fastbn: encoding a tensor map for N=6, C=200, S=81 float16 channels_last (plan: ",
    ),
    "row-beyond-the-box-forgotten": (
        "primitives/pipeline.cuh",
        "return {tile.begin + box_rows, tile.end};",
        "return {tile.begin + box_rows, tile.begin + box_rows};",
        BOXES,
        "elements are off",
    ),
    "box-expected-without-what-is-outside-the-matrix": (
        "primitives/pipeline.cuh",
        "gpu::expect_bytes(landed, kTensors * (box + mapping.bulk_bytes(spans)));",
        "gpu::expect_bytes(landed, kTensors * mapping.bulk_bytes(range));",
        BOXES,
        "which misses 0 of 1 arrivals and -",
    ),
    "barrier-with-one-block-too-few": (
        "primitives/group_reduce.cuh",
        "return (before_ & ~kGo) == blocks_ - 1;",
        "return (before_ & ~kGo) == blocks_ - 2;",
        ["--shape", "8,16,32,32", "--algorithm", "persistent_grid"],
        "which another thread wrote, with no fence_device() or barrier since",
    ),
    "barrier-that-does-not-acquire": (
        "primitives/group_reduce.cuh",
        "    gpu::load_acquire(word_);",
        "",
        ["--shape", "8,16,32,32", "--algorithm", "persistent_grid"],
        "which this kernel has written, after load_relaxed() with no load_acquire() since",
    ),
    "statistics-updated-by-every-block": (
        "algorithms/two_pass.cuh",
        "return combine_forward<acc_t>(op, channel, mapping.split() == 0);",
        "return combine_forward<acc_t>(op, channel, true);",
        ["--op", "steps", "--shape", "64,8,56,56"],
        "of buffer 'running_mean' of 32 bytes, which another thread wrote",
    ),
    "kernel-that-does-not-wait": (
        "algorithms/two_pass.cuh",
        "  gpu::wait_for_previous_kernel();\n"
        "  const int block = gpu::grid_blocks() - 1 - gpu::block_index();\n"
        "  if (block == 0) count_batch",
        "  const int block = gpu::grid_blocks() - 1 - gpu::block_index();\n"
        "  if (block == 0) count_batch",
        ["--shape", "4,8,16,16", "--algorithm", "two_pass"],
        "wait_for_previous_kernel",
    ),
}


def meet(fault: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compiles faulty kernels and calls them, in a process of their own."""
    file, right, wrong, options, _ = FAULTS[fault]
    source = "backward.cu" if "backward" in options else "forward.cu"
    library = build.plant(file, right, wrong, folder, source)
    script = (
        "import sys, torch\n"
        "from tests import cudasim\n"
        f"cudasim.build.load = lambda: torch.ops.load_library({str(library)!r})\n"
        "from tests.cudasim.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *options, "--dtype", "float16", "--json"],
        cwd=build.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def met(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """What came of each fault that is going to be asked for; two at a time."""
    cudasim.forward(torch.randn(4, 4))  # the right kernels are compiled
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = dict.fromkeys(
        call.params["fault"] for call in calls if call and "fault" in call.params
    )
    with ThreadPoolExecutor(2) as pool:
        yield {
            fault: pool.submit(meet, fault, tmp_path_factory.mktemp(fault) / "tree")
            for fault in wanted
        }


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(
    fault: str, met: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    """Mistakes in the very kernels, made on purpose."""
    done, said = met[fault].result(), FAULTS[fault][-1]
    assert done.returncode == 1, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    if said is None:
        assert outcome["schedules_differ"] > 0
    else:
        assert said in outcome["failures"][0]


@EXHAUSTIVE
def test_sanitizers() -> None:
    """Kernels of every mapping under the address and undefined-behavior sanitizers."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    chosen = "(matrix-65-channels or line-49 or image-small or image-wide-vectors) and "
    chosen += "(contiguous or channels_last or stepped) and (float32 or bfloat16)"
    persistent = "persistent and (torch.float32 or torch.bfloat16)"
    here = Path(__file__)
    files = [here.with_name(f"test_cudasim{rest}.py") for rest in ("", "_persistent")]
    tests = [f"{file}::test_results" for file in files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests, "-k", f"({chosen}) or ({persistent})"],
        cwd=here.parent,
        env={
            **os.environ,
            "FASTBN_CUDASIM_SANITIZE": "1",
            "LD_PRELOAD": " ".join(runtime.stdout.strip() for runtime in runtimes),
            # Python and torch leak on purpose; symbols that two libraries have are theirs.
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        },
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
