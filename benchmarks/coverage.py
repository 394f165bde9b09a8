"""Counts, all over libraries, the batch norms that an activation follows, and those fused.

Models are built and called on the device meta, where nothing is computed. What follows a batch norm
is seen in the operators that stock's model calls, so that what fusing overlooks counts, too.
"""

from __future__ import annotations

import gc
import re
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import fastbn

from .architectures import build, write_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .rows import Environment

# PyTorch's names of operators; ReLU6 is a hardtanh, PReLU has a kernel.
_ACTIVATIONS = {
    *("relu", "hardtanh", "leaky_relu", "elu", "silu", "gelu", "hardswish", "hardsigmoid"),
    *("sigmoid", "tanh", "mish", "softplus", "celu", "_prelu_kernel", "rrelu_with_noise"),
}
_BATCH = 2
_FIGURES = ("norms", "swapped", "followed", "fused")
_SHARED = "others need what the activation is of, too"
_UNSEEN = "fuse does not see the activation"


@dataclass
class Coverage:
    """What fusing makes of a model.

    Attributes:
        model: library and name.
        norms: its batch norms.
        swapped: those that are converted.
        followed: those that an activation follows, or an addition and one; two that are added count
            as one.
        fused: those of them that are fused with it.
        left: names of the others, with reasons.
        failed: why the model could not be built or called; empty if it was.
    """

    model: str
    norms: int = 0
    swapped: int = 0
    followed: int = 0
    fused: int = 0
    left: dict[str, str] = field(default_factory=dict)
    failed: str = ""


@dataclass
class _Value:
    """What a batch norm computed, or the sum of that and something else.

    Attributes:
        tensor: it; kept, so that no other gets its identity.
        norms: batch norms of whose results it is.
        summands: those of them that are added; none where it is no sum.
        uses: how many operators took it.
    """

    tensor: Tensor
    norms: frozenset[str]
    summands: list[_Value] = field(default_factory=list)
    uses: int = 0

    def is_shared(self) -> bool:
        """Whether others than one addition and one activation function need it."""
        return any(value.uses > 1 for value in (self, *self.summands))


class _Followers(TorchDispatchMode):
    """Sees which batch norms an activation follows.

    Attributes:
        called: name of the batch norm whose forward was called last.
        activated: what activation functions were called with.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called = ""
        self.activated: list[_Value] = []
        self._values: dict[int, _Value] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls an operator, and notes what batch norms its result is of."""
        del types
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        taken = [id(arg) for arg in pytree.tree_leaves((args, kwargs)) if isinstance(arg, Tensor)]
        known = [self._values[key] for key in taken if key in self._values]
        for value in known:
            value.uses += 1
        made: Any = result if isinstance(result, Tensor) else next(iter(result or ()), None)
        self._values.pop(id(made), None)  # computed in place
        if "batch_norm" in name:
            self._values[id(made)] = _Value(made, frozenset({self.called}))
        elif name == "add" and len(taken) == 2:
            summands = [value for value in known if not value.summands]
            norms = frozenset[str]().union(*(value.norms for value in summands))
            if norms:
                self._values[id(made)] = _Value(made, norms, summands)
        elif name in _ACTIVATIONS:
            self.activated += known[:1]
        return result


def _batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)
    }


def _followed(model: nn.Module, images: Tensor) -> dict[frozenset[str], bool]:
    """Calls a model of stock's, and tells which batch norms an activation follows.

    Returns:
        Batch norms with an activation in common, and whether others need what it takes, too.
    """
    followers = _Followers()

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: setattr(followers, "called", name)

    handles = [
        norm.register_forward_pre_hook(hook(name)) for name, norm in _batch_norms(model).items()
    ]
    with torch.no_grad(), followers:
        model(images)
    for handle in handles:
        handle.remove()
    return {value.norms: value.is_shared() for value in followers.activated}


def count(name: str, model: nn.Module, images: Tensor) -> Coverage:
    """What of a model is fused, of what could be.

    Args:
        name: of the model.
        model: with batch norms of stock's.
        images: what it takes, on its device.
    """
    swap = fastbn.convert(model, dry_run=True)
    fusion = fastbn.fuse(model, dry_run=True)
    known = {**swap.left, **fusion.left}
    followed = _followed(model, images)
    left = {}
    for norms, is_shared in followed.items():
        if norms.isdisjoint(fusion.fused):
            other = _SHARED if is_shared else _UNSEEN
            reasons = [known[norm] for norm in sorted(norms) if norm in known]
            left[" and ".join(sorted(norms))] = "; ".join(reasons or [other])
    return Coverage(
        name,
        norms=len(_batch_norms(model)),
        swapped=len(swap.swapped),
        followed=len(followed),
        fused=len(followed) - len(left),
        left=left,
    )


def family(name: str) -> str:
    """A model's name without what tells sizes: its letters."""
    return "-".join(re.findall("[a-z]+", name))


def one_of_each_family() -> list[str]:
    """Library and name of models for classification; of each family the first."""
    import timm
    import torchvision

    names = {
        "torchvision": torchvision.models.list_models(module=torchvision.models),
        "timm": timm.list_models(),
    }
    models = [f"{library}/{name}" for library, found in names.items() for name in found]
    return list({family(model): model for model in reversed(models)}.values())[::-1]


def _build(name: str) -> nn.Module:
    """A model on the device meta; made there, where that can be."""
    try:
        with torch.device("meta"):
            model = build(name)
    except (NotImplementedError, RuntimeError):
        model = build(name)
    return model.to("meta")


def _images(name: str, model: nn.Module) -> Tensor:
    """What a model takes."""
    default = (3, 299, 299) if "inception" in name else (3, 224, 224)
    size = getattr(model, "default_cfg", {}).get("input_size", default)
    return torch.empty(_BATCH, *size, device="meta")


def _study(name: str) -> Coverage:
    try:
        model = _build(name)
        if not _batch_norms(model):
            return Coverage(name)
        return count(name, model, _images(name, model))
    except Exception as error:  # of any kind, and as news as a count
        return Coverage(name, failed=f"{type(error).__name__}: {error}".partition("\n")[0])


def tables(results: list[Coverage]) -> str:
    """A line for each library, and one for each reason why batch norms are left."""
    totals = []
    for library in dict.fromkeys(result.model.partition("/")[0] for result in results):
        mine = [r for r in results if r.model.startswith(f"{library}/")]
        figures = [sum(getattr(r, key) for r in mine) for key in _FIGURES]
        share = f"{figures[-1] / figures[-2]:.2%}" if figures[-2] else ""
        with_norms = sum(r.norms > 0 for r in mine)
        totals.append([library, len(mine), with_norms, *figures, share])
    reasons: dict[str, list[str]] = defaultdict(list)
    for result in results:
        for reason in result.left.values():
            reasons[reason].append(result.model)
    left = [
        [len(models), reason, ", ".join(dict.fromkeys(models))]
        for reason, models in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    headers = ["library", "models", "with batch norm", *_FIGURES, "share"]
    failed = [f"{r.model} failed: {r.failed}" for r in results if r.failed]
    parts = [tabulate(totals, headers), tabulate(left, ["left", "reason", "models"])]
    return "\n\n".join([*parts, *failed])


LEGEND = """\
Followed: an activation function takes their result, or its sum with another tensor. Fused: those in
the same pass with it. Two batch norms that are added count as one."""


def main(models: list[str], file: Path | None, where: Environment) -> int:
    """Counts, prints tables, and returns 1 if a model could not be called."""
    warnings.filterwarnings("ignore", module="torchvision|timm")
    results = []
    for name in tqdm(models, unit="model"):
        results.append(_study(name))
        gc.collect()  # models hold themselves in circles
        if file:
            write_json(file, where, [asdict(r) for r in results if r.norms or r.failed])
    print(f"{tables(results)}\n\n{LEGEND}")
    return int(any(result.failed for result in results))
