"""How fast memory is copied whose lines are read and written in pieces, by the size of a piece.

``python -m benchmarks.pieces`` on a GPU. A matrix is copied some columns at a time, as kernels take
channels-last tensors whose channel tiles are narrower than they are. Elements of 16 bytes, by
PyTorch's own copy: its addressing has a share in what pieces cost; figures are lower bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tabulate import tabulate

ELEMENT_BYTES = 16
PIECES = (64, 128, 256, 512)
STRIDES = (512, 1024, 2048, 4096)
MATRIX_BYTES = 1 << 30
REPEATS = 5


def seconds_of(matrix: torch.Tensor, target: torch.Tensor, piece: int) -> float:
    """Of a copy of all columns, pieces of some bytes at a time; the median."""
    columns = piece // ELEMENT_BYTES
    times: list[float] = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for first in range(0, matrix.shape[1], columns):
            tile = slice(first, first + columns)
            target[:, tile].copy_(matrix[:, tile])
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[REPEATS // 2]


def measure(matrix_bytes: int, device: str) -> list[dict[str, float]]:
    """Bytes read and written per second, for each piece and stride."""
    rows = []
    for stride in STRIDES:
        shape = (matrix_bytes // stride, stride // ELEMENT_BYTES)
        matrix = torch.randn(shape, dtype=torch.complex128, device=device)
        target = torch.empty_like(matrix)
        for piece in PIECES:
            seconds = seconds_of(matrix, target, piece)
            rate = 2 * matrix.numel() * ELEMENT_BYTES / seconds
            rows.append({"stride": stride, "piece": piece, "bytes_per_second": rate})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints a table, and writes the figures where wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="where to write the figures, too")
    chosen = parser.parse_args(arguments)
    rows = measure(MATRIX_BYTES, "cuda")
    table = [[r["stride"], r["piece"], f"{r['bytes_per_second'] / 1e9:.0f}"] for r in rows]
    print(tabulate(table, ["bytes from row to row", "bytes of a piece", "GB/s"]))
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
