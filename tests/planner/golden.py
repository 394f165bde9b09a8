"""Golden: the planner's decisions for ResNet-50, as they were when somebody last looked at them.

They follow from a model of time whose constants may be changed, so nothing but this record says
that they are right. ``python -m tests.planner.golden`` writes it anew; look at the difference.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import fastbn
from fastbn.planning import DEVICES
from fastbn.planning.networks import RESNET50

FILE = Path(__file__).with_suffix(".json")
LAYOUTS = ("contiguous", "channels_last")
OPS = ("forward", "backward")
BATCHES = (8, 256)


def summary(device: str, layout: Any, op: Any, batch: int) -> dict[str, Any]:
    """Of all 53 layers in bfloat16: by which algorithm, how many bytes, how many of them once."""
    plans = [
        (
            layer.count,
            fastbn.plan(
                (batch, layer.channels, layer.height, layer.width),
                dtype="bfloat16",
                layout=layout,
                op=op,
                device=device,
                algorithm="auto",
            ),
        )
        for layer in RESNET50
    ]
    chosen: Counter[str] = Counter()
    for count, plan in plans:
        chosen[plan.algorithm] += count
    return {
        "algorithms": dict(sorted(chosen.items())),
        "gigabytes": round(sum(count * plan.bytes_moved for count, plan in plans) / 1e9, 3),
        "at_floor_in_one_launch": sum(
            count for count, plan in plans if plan.share == 1 and plan.launches == 1
        ),
    }


def decisions() -> dict[str, Any]:
    """The summaries, by device, layout, operation and batch."""
    questions = product(DEVICES, LAYOUTS, OPS, BATCHES)
    return {" ".join(map(str, question)): summary(*question) for question in questions}


def recorded() -> dict[str, Any]:
    """The record."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


if __name__ == "__main__":
    lines = ",\n".join(
        f"{json.dumps(question)}: {json.dumps(answer)}" for question, answer in decisions().items()
    )
    FILE.write_text(f"{{\n{lines}\n}}\n")
