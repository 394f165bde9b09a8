"""``python -m fastbn plan``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, get_args

from .networks import MODELS, plan_network
from .plan import ALGORITHM_VARIABLE, DEFAULT_DEVICE, DEVICES, DTYPES, Algorithm, dtype_name

if TYPE_CHECKING:
    from .plan import Op

_OPS: dict[str, tuple[Op, ...]] = {
    "training": ("forward", "backward"),
    "forward": ("forward",),
    "backward": ("backward",),
    "eval": ("eval",),
}


def show_plans(options: argparse.Namespace) -> int:
    """Prints the plan for every layer of a network, and the bytes of all together.

    Args:
        options: as ``python -m fastbn plan`` takes them.

    Raises:
        ValueError: as :func:`fastbn.plan` does.
    """
    planned = plan_network(
        MODELS[options.model],
        options.batch,
        _OPS[options.op],
        dtype=options.dtype,
        layout=options.layout,
        device=options.device,
        algorithm=options.algorithm,
    )
    if options.json:
        question = {name: getattr(options, name) for name in ("model", "batch", "dtype", "layout")}
        print(json.dumps({**question, "device": planned.device, **planned.record()}, indent=2))
        return 0
    print(
        f"{options.model}, batch {options.batch}, {options.dtype} {options.layout} on "
        f"{planned.device}; GB, us (predicted) and totals count a layer as often as it occurs\n"
    )
    print(planned.table())
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What ``python -m fastbn plan`` takes."""
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--model", choices=MODELS, default="resnet50", help=default)
    add("--batch", type=_positive, default=256, help=f"images a batch {default}")
    dtypes = [dtype_name(dtype) for dtype in DTYPES]
    add("--dtype", choices=dtypes, default="bfloat16", help=f"of the activations {default}")
    add("--layout", choices=["contiguous", "channels_last"], default="contiguous", help=default)
    add(
        "--device",
        metavar="NAME",
        help=f"{', '.join(DEVICES)}, or cuda for a GPU of this machine (default: that, or else "
        f"{DEFAULT_DEVICE})",
    )
    ops = f"training is forward and backward {default}"
    add("--op", choices=_OPS, default="training", help=ops)
    add(
        "--algorithm",
        choices=get_args(Algorithm),
        help=f"force one (default: what {ALGORITHM_VARIABLE} says, else auto)",
    )
    add("--json", action="store_true", help="print one JSON object")
