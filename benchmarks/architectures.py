"""Converts and fuses whole networks of torchvision and timm, and compares them with stock's.

``python -m benchmarks architectures [MODEL ...] [--count] [--json FILE]``. Weights are random,
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

import fastbn

from .machine import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .rows import Environment

_LIBRARIES = ("torchvision", "timm")
MODELS = (
    *(f"torchvision/{name}" for name in ("resnet18", "resnet50", "mobilenet_v2")),
    *(f"torchvision/{name}" for name in ("mobilenet_v3_small", "efficientnet_b0", "densenet121")),
    *(f"torchvision/{name}" for name in ("googlenet", "inception_v3", "regnet_y_400mf")),
    *(f"torchvision/{name}" for name in ("shufflenet_v2_x1_0", "mnasnet1_0", "vgg11_bn")),
    *(f"timm/{name}" for name in ("resnet50", "efficientnet_b0", "mobilenetv3_small_100")),
    *(f"timm/{name}" for name in ("regnety_004", "densenet121", "seresnet50", "repvgg_a0")),
    *(f"timm/{name}" for name in ("dla34", "res2net50_26w_4s", "xception41", "cspresnet50")),
)

_BATCH = 4
_WIDTH = 64
# Networks that need larger images.
_WIDTHS = {"torchvision/inception_v3": 299}
_STEPS = 10
# In float64, relative to the largest element of the tensor.
_TOLERANCE = 1e-9
# Tensors below this share of the largest are what is left where terms cancel, as in the gradient of
# a bias before batch norm, or in the mean of what is a sum of normalized channels.
_CANCELED = 1e-3
# How many times stock's distance from float64 the fused network's may be: both are rounding, which
# one step passes on to the next. Where it changes the sign of what goes into a ReLU, a distance is
# dozens of times larger than where it does not, so stock's is the largest of several that start a
# rounding apart.
_AS_NEAR = 2.0
_NUDGES = 4
_NUDGE = 1e-7


@dataclass
class Result:
    """What became of a network.

    Attributes:
        model: library and name.
        norms: its batch norms.
        swapped: those that were converted.
        fused: those with an activation in the same pass.
        with_addition: of these, with an addition, too.
        left: names of the others that an activation follows, or that stay stock's, with reasons.
        outputs: largest difference from stock's in float64, as a share of the largest element.
        gradients: the same of parameters' gradients.
        statistics: the same of buffers.
        steps: distance from float64 of parameters and buffers after ten steps of SGD in float32,
            as a share of how far they moved.
        stock_steps: the same of stock's.
        nudged_steps: the largest of stock's that start with parameters a rounding apart.
        reverted: whether revert gave back all classes, tensors and names.
    """

    model: str
    norms: int
    swapped: int
    fused: int
    with_addition: int
    left: dict[str, str] = field(default_factory=dict)
    outputs: float = 0.0
    gradients: float = 0.0
    statistics: float = 0.0
    steps: float = 0.0
    stock_steps: float = 0.0
    nudged_steps: float = 0.0
    reverted: bool = False

    @property
    def right(self) -> bool:
        """Whether it computes what stock's does; written so that NaN does not count."""
        exact = all(e <= _TOLERANCE for e in (self.outputs, self.gradients, self.statistics))
        near = self.steps <= _AS_NEAR * max(self.stock_steps, self.nudged_steps)
        return exact and near and self.reverted


def missing() -> str | None:
    """A sentence on what to install; None if everything is there."""
    absent = [name for name in _LIBRARIES if find_spec(name) is None]
    if not absent:
        return None
    return (
        f"the architectures need {' and '.join(absent)}, which cannot be imported; "
        "pip install 'fastbn[architectures]' installs what is needed"
    )


def build(name: str) -> nn.Module:
    """A network with random weights that drops nothing at random, as dtypes draw differently.

    Args:
        name: ``torchvision/`` or ``timm/`` and the name that the library gives it.
    """
    library, _, kind = name.partition("/")
    torch.manual_seed(0)
    model: nn.Module
    if library == "timm":
        import timm

        model = timm.create_model(kind, pretrained=False)
    else:
        import torchvision

        model = torchvision.models.get_model(kind, weights=None)
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0  # type: ignore[assignment]
    return model.train()


def _loss(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """All outputs, and a loss in which each class of each image counts differently."""
    outputs: list[Tensor] = pytree.tree_leaves(model(images))
    return outputs, torch.stack([(y * _weights(y)).mean() for y in outputs]).sum()


def _weights(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)


def _difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference of two lists of tensors, each relative to its largest element."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    sizes = [float(b.abs().max()) for _, b in pairs]
    floor = _CANCELED * max(sizes)
    errors = [
        float((a - b).abs().max()) / max(size, floor)
        for (a, b), size in zip(pairs, sizes, strict=True)
        if max(size, floor) > 0
    ]
    return max(errors)


def _compare_exactly(result: Result, ours: nn.Module, stock: nn.Module, images: Tensor) -> None:
    found = []
    for model in (ours, stock):
        outputs, loss = _loss(model, images)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        found.append(([y.detach() for y in outputs], gradients, buffers))
    (outputs, gradients, buffers), (outputs_, gradients_, buffers_) = found
    result.outputs = _difference(outputs, outputs_)
    result.gradients = _difference(gradients, gradients_)
    result.statistics = _difference(buffers, buffers_)


def _trained(model: nn.Module, images: Tensor) -> Tensor:
    """All parameters and statistics after some steps, in float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(_STEPS):
        optimizer.zero_grad()
        _loss(model, images.roll(step, 1).to(next(model.parameters())))[1].backward()
        optimizer.step()
    return _state(model)


def _nudged(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters differ from a model's by as much as rounding does."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1)
            parameter.mul_(1 + _NUDGE * noise)
    return model


def _state(model: nn.Module) -> Tensor:
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _classes_and_tensors(model: nn.Module) -> tuple[list[tuple[str, type]], dict[str, int]]:
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    return [(name, type(module)) for name, module in model.named_modules()], tensors


def study(name: str) -> Result:
    """Converts, fuses, runs, trains and reverts a network.

    Args:
        name: ``torchvision/`` or ``timm/`` and the name that the library gives it.
    """
    original = build(name)
    width = _WIDTHS.get(name, _WIDTH)
    images = torch.randn(_BATCH, 3, width, width, dtype=torch.float64)
    swap = fastbn.convert(original, dry_run=True)
    fusion = fastbn.fuse(original, dry_run=True)
    result = Result(
        name,
        norms=len(swap.swapped) + len(swap.left),
        swapped=len(swap.swapped),
        fused=len(fusion.fused),
        with_addition=sum(fused.residual for fused in fusion.fused.values()),
        left={**swap.left, **fusion.left},
    )
    stock = copy.deepcopy(original).double()
    ours = fastbn.fuse(copy.deepcopy(stock))
    _compare_exactly(result, ours, stock, images)
    del ours, stock
    start = _state(original)
    exact = _trained(copy.deepcopy(original).double(), images)
    moved = float((exact - start).norm())

    def distance(model: nn.Module) -> float:
        return float((_trained(model, images) - exact).norm()) / moved

    result.stock_steps = distance(copy.deepcopy(original))
    result.nudged_steps = max(distance(_nudged(original, seed)) for seed in range(_NUDGES))
    before = _classes_and_tensors(original)
    result.steps = distance(fastbn.fuse(original))
    fastbn.revert(original)
    result.reverted = _classes_and_tensors(original) == before
    return result


def table(results: Iterable[Result]) -> str:
    """A line for each network."""
    columns: dict[str, Callable[[Result], object]] = {
        "network": lambda r: r.model,
        "batch norms": lambda r: r.norms,
        "swapped": lambda r: r.swapped,
        "fused": lambda r: r.fused,
        "with addition": lambda r: r.with_addition,
        "left": lambda r: len(r.left),
        "outputs": lambda r: f"{r.outputs:.0e}",
        "gradients": lambda r: f"{r.gradients:.0e}",
        "statistics": lambda r: f"{r.statistics:.0e}",
        f"{_STEPS} steps": lambda r: f"{r.steps:.1e}",
        "stock's": lambda r: f"{r.stock_steps:.1e}",
        "nudged": lambda r: f"{r.nudged_steps:.1e}",
        "reverts": lambda r: "yes" if r.reverted else "NO",
        "right": lambda r: "yes" if r.right else "NO",
    }
    rows = [[cell(result) for cell in columns.values()] for result in results]
    text: str = tabulate(rows, list(columns), disable_numparse=True, colalign=("left",))
    return text


LEGEND = f"""\
Fused: with an activation in the same pass. Left: an activation follows and is not fused, or the
module stays stock's. Outputs, gradients, statistics: largest difference from stock's in float64,
after one step on {_BATCH} images; at most {_TOLERANCE:.0e} is right.
{_STEPS} steps: distance from float64 after so many steps of SGD in float32, as a share of the way.
Nudged: the largest of stock's, {_NUDGES} times, with parameters up to {_NUDGE:.0e} apart; at most
{_AS_NEAR:.0f} times stock's, nudged or not, is right.
Reverts: fastbn.revert gives back all classes and tensors."""


def write_json(file: Path, where: Environment, rows: Iterable[dict[str, Any]]) -> None:
    """Writes the environment once, and a line for each network."""
    lines = ",\n".join(map(json.dumps, rows))
    file.write_text(
        f'{{"environment": {json.dumps(where, indent=1)},\n"networks": [\n{lines}\n]}}\n'
    )


def main(arguments: list[str]) -> int:
    """Studies networks, prints a table, and returns 1 if one is not right."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="LIBRARY/NAME (default: some; to count, one of each family)",
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="compute nothing: count batch norms that an activation follows, and those fused",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    sentence = missing()
    if sentence is not None:
        parser.error(sentence)
    versions = {name: version(name) for name in _LIBRARIES if find_spec(name)}
    where = {**environment(), **versions}
    print("\n".join(f"{key:<15} {value}" for key, value in where.items()), end="\n\n")
    if options.count:
        from . import coverage

        return coverage.main(options.models or coverage.one_of_each_family(), options.json, where)
    results = []
    for name in tqdm(options.models or MODELS, unit="network"):
        results.append(study(name))
        gc.collect()  # models hold themselves in circles
        if options.json:
            rows = [{**asdict(result), "right": result.right} for result in results]
            write_json(options.json, where, rows)
    print(f"{table(results)}\n\n{LEGEND}\n")
    for result in results:
        for norm, reason in result.left.items():
            print(f"{result.model}, left {norm}: {reason}")
    return int(not all(result.right for result in results))
