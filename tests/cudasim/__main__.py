"""``python -m tests.cudasim``: one operation on the simulated GPU, under several schedules.

Exits with 1 where a result errs by more than the tests allow or depends on the schedule, and where
a kernel does what the machine does not define.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

import torch

from tests.support import tables

from . import Scale, verify


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cudasim", description=__doc__)
    parser.add_argument("--op", choices=("forward", "backward", "eval", "steps"), default="forward")
    parser.add_argument("--shape", type=_shape, required=True, metavar="N,C,...")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="bfloat16"
    )
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous")
    parser.add_argument(
        "--activation", choices=sorted(verify.FUNCTIONS), help="a function that follows batch norm"
    )
    parser.add_argument(
        "--residual", action="store_true", help="a tensor is added before the activation"
    )
    parser.add_argument(
        "--mask", action="store_true", help="forward writes a mask and backward reads it"
    )
    parser.add_argument("--device", default="h200", help="a GPU that the planner knows")
    parser.add_argument(
        "--multiprocessors", type=int, default=0, help="of the device, if not all that it has"
    )
    parser.add_argument(
        "--shared-bytes", type=int, default=0, help="of a block at most, if not all it can have"
    )
    parser.add_argument("--algorithm", default="auto", help="auto, or one to force")
    parser.add_argument("--seeds", type=int, default=4, help="number of schedules")
    parser.add_argument("--seed", type=int, default=0, help="the first schedule")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _histogram(parts: list[dict[str, Any]], key: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for size, count in part[key].items():
            total[size] = total.get(size, 0) + count
    return total


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The operation on random tensors, as the object that is printed."""
    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.dtype)
    layout = options.layout if len(options.shape) > 2 else "contiguous"
    tensors = tables.make(tables.Case("given", options.shape, layout, dtype))
    where: dict[str, Any] = {
        "device": options.device,
        "scale": Scale(options.multiprocessors, options.shared_bytes),
        "seeds": range(options.seed, options.seed + options.seeds),
    }
    if options.op == "steps":
        verdict = verify.verify_steps(tensors, **where)
    else:
        where.update(training=options.op != "eval", algorithm=options.algorithm)
        epilogue = None
        if options.activation is not None or options.residual:
            activation = options.activation or "identity"
            epilogue = verify.epilogue_for(tensors.x, activation, options.residual)
        if options.op != "backward":
            verdict = verify.verify_forward(tensors, epilogue=epilogue, mask=options.mask, **where)
        elif epilogue is None:
            verdict = verify.verify_backward(tensors, **where)
        else:
            verdict = verify.verify_act_backward(tensors, epilogue, mask=options.mask, **where)
    report = verdict.report
    elements = math.prod(options.shape)
    parts = [report.activations, report.vectors, report.workspace]
    return {
        "op": options.op,
        "shape": options.shape,
        "dtype": options.dtype,
        "layout": options.layout,
        "device": options.device,
        "algorithm": report.algorithm,
        "mapping": report.mapping,
        "launches": len(report.launches),
        "grid": [launch["blocks"] for launch in report.launches],
        "block": [launch["threads"] for launch in report.launches],
        "read_bytes_per_element": report.read_bytes / elements,
        "write_bytes_per_element": report.written_bytes / elements,
        "activation_read_bytes_per_element": report.activations["read_bytes"] / elements,
        "activation_write_bytes_per_element": report.activations["written_bytes"] / elements,
        "max_error": verdict.max_error,
        "max_error_in_resolutions": verdict.max_error_in_resolutions,
        "schedules": options.seeds,
        "schedules_differ": verdict.schedules_differ,
        "access_sizes": {key: _histogram(parts, key) for key in ("loads", "stores")},
        **{
            f"{part}_{moves}": report.activations[f"{part}_{moves}"]
            for part in ("bulk", "box")
            for moves in ("copies", "stores")
        },
        "cluster": [launch["cluster"] for launch in report.launches],
        "barriers": [launch["barriers"] for launch in report.launches],
        "cluster_barriers": [launch["cluster_barriers"] for launch in report.launches],
        "shared_bytes_per_block": max(launch["shared_bytes"] for launch in report.launches),
        "failures": verdict.wrong,
    }


def outcome_of(arguments: list[str] | None = None) -> dict[str, Any]:
    """What is printed for arguments of the command line; `failures` are those of kernels, too."""
    try:
        return run(_parser().parse_args(arguments))
    except (RuntimeError, ValueError, AssertionError) as error:
        return {"failures": [str(error)], "schedules_differ": 0}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    outcome = outcome_of(arguments)
    if options.json:
        print(json.dumps(outcome))
    else:
        for name, value in outcome.items():
            print(f"{name:34} {value}")
    return int(bool(outcome["failures"]) or outcome["schedules_differ"] > 0)


if __name__ == "__main__":
    sys.exit(main())
