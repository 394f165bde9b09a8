"""The one table of cases: shapes, layouts, dtypes and data that numerical promises are tried on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .pairs import pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

# Every size here stands for something that loops over memory get wrong: remainders of vectors of
# any width, rows shorter than a vector, a single channel or sample, and the borders of blocks.
SHAPES = {
    # (N, C)
    "matrix": (5, 7),
    "matrix-one-channel": (64, 1),
    "matrix-three-channels": (1000, 3),
    "matrix-65-channels": (33, 65),
    "matrix-many-channels": (9, 1037),
    # (N, C, L)
    "line": (3, 5, 17),
    "line-one-sample": (1, 3, 129),
    "line-49": (2, 65, 49),
    # (N, C, H, W)
    "image-small": (4, 3, 5, 7),
    "image-odd": (8, 3, 17, 19),
    "image-49": (2, 65, 7, 7),
    "image-one-sample": (1, 17, 9, 11),
    "image-one-channel": (7, 1, 37, 41),
    "image-one-pixel": (33, 5, 1, 1),
    "image-wide-vectors": (3, 64, 8, 8),
    "image-short-segments": (2, 1030, 2, 3),
    "image-samples-share-a-block": (150, 2, 7, 9),
    # (N, C, D, H, W) and beyond, which only the function takes
    "volume": (2, 3, 3, 5, 7),
    "volume-65-channels": (1, 65, 2, 3, 5),
    "six-dimensions": (2, 3, 2, 3, 2, 5),
}

# So many elements in a channel that threads share them.
SHARED = {"few-channels": (3, 2, 200, 211)}
# Outputs of more than 16 MiB, which are written past the cache where rows are long or a whole
# number of cache lines. The batch is that of 2-byte elements; see streamed_cases().
STREAMED = {
    ("streamed-rows", "contiguous"): (8, 32, 182, 181),
    ("streamed-rows", "offset"): (8, 32, 182, 181),
    ("streamed-channels", "channels_last"): (10, 1024, 29, 29),
    ("streamed-channels", "channels_last_offset"): (10, 1024, 29, 29),
}


def channels_last(values: Tensor) -> Tensor:
    """(N, ..., C) in memory."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def channel_major(values: Tensor) -> Tensor:
    """(C, N, ...) in memory: dense, and neither contiguous nor channels last."""
    return values.transpose(0, 1).contiguous().transpose(0, 1)


def batch_minor(values: Tensor) -> Tensor:
    """(C, ..., N) in memory."""
    return values.movedim(0, -1).contiguous().movedim(-1, 0)


def stepped(values: Tensor) -> Tensor:
    """Every other element of a tensor whose remaining elements are NaN."""
    wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), torch.nan)
    view = wide[..., ::2]
    return view.copy_(values)


def expanded(values: Tensor) -> Tensor:
    """The same elements for all samples (all positions of the only one): strides of zero."""
    one = values[:1] if values.shape[0] > 1 else values[..., :1]
    return one.expand_as(values)


def _behind_one_element(values: Tensor) -> Tensor:
    storage = values.new_full((values.numel() + 1,), torch.nan)
    return storage[1:].view(values.shape).copy_(values)


def offset(values: Tensor) -> Tensor:
    """Contiguous, and not aligned to anything but its own elements."""
    return _behind_one_element(values)


def channels_last_offset(values: Tensor) -> Tensor:
    """Channels last, and not aligned to anything but its own elements."""
    return _behind_one_element(values.movedim(1, -1)).movedim(-1, 1)


def as_it_lies(view: Tensor, device: str) -> Tensor:
    """A view of a copy, on a device, of all the memory that is viewed; `to` would pack it."""
    memory = view.new_empty(0).set_(view.untyped_storage()).to(device, copy=True)
    return memory.as_strided(view.shape, view.stride(), view.storage_offset())


# Each returns a tensor of the shape and, `expanded` aside, the elements it is given.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "channel_major": channel_major,
    "batch_minor": batch_minor,
    "stepped": stepped,
    "expanded": expanded,
    "offset": offset,
    "channels_last_offset": channels_last_offset,
}
# A matrix is channels last as it stands, and has no third dimension to permute.
MATRIX_LAYOUTS = ("contiguous", "channel_major", "stepped", "expanded", "offset")
# Those that the fast paths take.
DENSE_LAYOUTS = ("contiguous", "channels_last", "offset", "channels_last_offset")


# Data that ruins careless arithmetic. Mean 1e4 with deviation 1 is left to the wide types, and
# 6e4 +- 100 to float16: in the others such data is (nearly) constant.
HARD_KINDS = [
    ("far", torch.float64),
    ("far", torch.float32),
    ("top", torch.float16),
    *((kind, dtype) for kind in ("constant", "outlier") for dtype in DTYPES),
]


@dataclass(frozen=True)
class Case:
    """An input: see :func:`make`."""

    name: str
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    data: str = "normal"

    def __str__(self) -> str:
        """As in a test's name."""
        dtype = str(self.dtype).removeprefix("torch.")
        data = "" if self.data == "normal" else f"-{self.data}"
        return f"{self.name}-{self.layout}-{dtype}{data}"


@dataclass(frozen=True)
class Tensors:
    """Arguments of batch norm and the gradient of its result."""

    x: Tensor
    dy: Tensor
    weight: Any  # a tensor, or None; few tests do without
    bias: Any
    running_mean: Tensor
    running_var: Tensor

    def requiring_grad(self) -> Tensors:
        """Fresh leaves for x, weight and bias."""
        x, weight, bias = (
            None if t is None else t.detach().requires_grad_()
            for t in (self.x, self.weight, self.bias)
        )
        assert x is not None
        return replace(self, x=x, weight=weight, bias=bias)


def lies(name: str, layout: str) -> bool:
    """Whether the shape of that name has the layout."""
    return len({**SHAPES, **SHARED}[name]) > 2 or layout in MATRIX_LAYOUTS


def small_cases(dtypes: Iterable[torch.dtype] = DTYPES) -> list[Any]:
    """Pairs of a shape, which loops walk, a layout, which chooses them, and a dtype (see pairs)."""
    shapes = {**SHAPES, **SHARED}
    return pairs(
        shapes,
        LAYOUTS,
        dtypes,
        where=lambda name, layout, _: lies(name, layout),
        of=lambda name, layout, dtype: Case(name, shapes[name], layout, dtype),
    )


def streamed_case(name: str, layout: str, dtype: torch.dtype) -> Case:
    """The smallest batch that reaches 16 MiB, so in each dtype another one."""
    batch, *rest = STREAMED[name, layout]
    return Case(name, (-(-2 * batch // dtype.itemsize), *rest), layout, dtype)


def streamed_cases() -> list[Case]:
    """Each in each dtype."""
    return [streamed_case(*streamed, dtype) for streamed in STREAMED for dtype in DTYPES]


def hard_cases() -> list[Any]:
    """Data that ruins careless arithmetic, in pairs with ways through memory and shapes on them."""
    names = ("matrix-65-channels", "image-odd", "image-49")
    shapes = {**{name: SHAPES[name] for name in names}, **SHARED}
    return pairs(
        shapes,
        ("contiguous", "channels_last", "stepped"),
        HARD_KINDS,
        where=lambda name, layout, _: lies(name, layout),
        of=lambda name, layout, kind: Case(name, shapes[name], layout, kind[1], kind[0]),
    )


def _data(kind: str, shape: tuple[int, ...]) -> Tensor:
    normal = torch.randn(shape, dtype=torch.float64)
    channel = torch.randn(shape[1], dtype=torch.float64).reshape(1, -1, *[1] * (len(shape) - 2))
    if kind == "normal":
        return normal * (0.5 + channel.abs()) + channel
    if kind == "far":
        return normal + 1e4
    if kind == "top":
        return normal * 100 + 6e4
    if kind == "outlier":
        # In front, where algorithms look for a first guess of the mean.
        normal[0].reshape(shape[1], -1)[:, 0] = 1e3
        return normal
    assert kind == "constant"
    return (channel * 100).expand(shape)


def make(
    case: Case,
    device: str = "cpu",
    *,
    parameters: torch.dtype | None = None,
    statistics: torch.dtype | None = None,
) -> Tensors:
    """Random tensors for a case; vectors are float64 for float64, else float32 unless given."""
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    channels = case.shape[1]
    x = LAYOUTS[case.layout](_data(case.data, case.shape).to(device, case.dtype))
    running_mean = torch.randn(channels)
    running_mean += {"far": 1e4, "top": 6e4}.get(case.data, 0)
    return Tensors(
        x,
        torch.randn(case.shape, dtype=torch.float64).to(device, case.dtype),
        torch.randn(channels).to(device, parameters or wide),
        torch.randn(channels).to(device, parameters or wide),
        running_mean.to(device, statistics or wide),
        (torch.rand(channels) + 0.5).to(device, statistics or wide),
    )
