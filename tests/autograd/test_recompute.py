"""Outputs that are computed again instead of kept: the same gradients."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastbn
from fastbn.recompute import active
from tests.support.epilogues import ACTIVATIONS
from tests.support.lookalikes import TimmBatchNormAct2d, TimmFrozenBatchNormAct2d
from tests.support.pairs import pairs
from tests.support.recomputing import Calls, assert_same, images, network, norm, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

recomputing = fastbn.recompute_activations
FUSED = [name for name in ACTIVATIONS if name != "identity"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks are too small for more to help."""
    torch.set_num_threads(1)
    yield
    assert active.recorder is None


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "layout", "dtype", "training"),
    pairs(
        FUSED,
        (torch.contiguous_format, torch.channels_last),
        (torch.float32, torch.bfloat16, torch.float64),
        (True, False),
    ),
    ids=str,
)
def test_gradients_are_the_same(
    activation: str, layout: torch.memory_format, dtype: torch.dtype, training: bool, device: str
) -> None:
    model = network(device, activation).to(dtype).train(training)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    x = images(device, dtype).contiguous(memory_format=layout)
    assert_same(step(model, x, recomputing()), step(model, x))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.BatchNorm2d(6), nn.SiLU()],
        lambda: [nn.BatchNorm2d(6, affine=False, track_running_stats=False), nn.Mish()],
        lambda: [TimmBatchNormAct2d(6, act_layer=nn.SiLU)],
        lambda: [TimmFrozenBatchNormAct2d(6)],
    ],
    ids=["fused", "fused, without parameters", "timm's", "timm's frozen"],
)
def test_converted_modules(layers: Callable[[], list[nn.Module]], device: str) -> None:
    """Whatever has an activation behind batch norm."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), *layers(), nn.Conv2d(6, 6, 3)).to(device)
    fastbn.fuse(model)
    x = images(device)
    with Calls() as calls:
        found = step(model, x, recomputing())
    assert calls.recomputed() == (len(layers()) + 1) // 2
    assert_same(found, step(model, x))


def test_frozen_statistics(device: str) -> None:
    """Those that forward used, whatever the buffers hold when backward runs."""
    model, x = network(device).eval(), images(device)

    def changing(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(x)
        for buffer in model.buffers():
            buffer.fill_(3)
        return y

    assert_same(step(model, x, recomputing(), changing), step(model, x, None, changing))


def test_without_gradients_nothing_is_known(device: str) -> None:
    """Of layers whose gradients nobody wants, such as frozen ones, nothing else is kept."""
    layer = fastbn.BatchNormAct2d(3, device=device).requires_grad_(False)
    conv = nn.Conv2d(3, 3, 1, device=device)
    x = images(device)
    with Calls() as calls, recomputing():
        conv(layer(x)).sum().backward()
        with torch.no_grad():
            conv(layer(x))
    assert calls.recomputed() == 0


def test_views_and_several_uses(device: str) -> None:
    """An output that is x and the residual of the next layer, and views of one."""
    x = torch.randn(6, 4, 3, 5, device=device)
    model = nn.Sequential(*(norm(4, name) for name in ("silu", "tanh", "mish"))).to(device)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        first, second, third = model.children()
        y = first(x)
        y = second(y, y)
        y = third(y.transpose(2, 3), y.transpose(2, 3))
        result: Tensor = y[1:4, ::2].sin() * y.reshape(-1)[:15].view(5, 3).sin() * y[0, 0].sin()
        return result

    with Calls() as calls:
        found = step(model, x, recomputing(), forward)
    assert calls.recomputed() == 3
    assert_same(found, step(model, x, None, forward))


def test_views_as_other_numbers(device: str) -> None:
    """The memory of an output, read as complex numbers and as the negative of some."""
    x = torch.randn(6, 4, 3, 2, device=device)
    model = norm(4, "tanh").to(device)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        z = torch.view_as_complex(model(x))
        return (z * z).abs() + z.conj().imag.square()

    assert_same(step(model, x, recomputing(), forward), step(model, x, None, forward))


def test_two_forwards_of_a_module(device: str) -> None:
    model, x = network(device), images(device)

    def twice(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(x) * model(x.flip(0) * 2)
        return y

    assert_same(step(model, x, recomputing(), twice), step(model, x, None, twice))


def test_second_derivatives(device: str) -> None:
    model, x = network(device, "silu", blocks=2).double(), images(device, torch.float64)

    def penalty(model: nn.Module, x: Tensor) -> Tensor:
        slopes = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return slopes[0]

    assert_same(step(model, x, recomputing(), penalty), step(model, x, None, penalty))


def test_backward_twice_and_in_another_thread(device: str) -> None:
    """Each output is computed once all the same."""
    model, x = network(device), images(device).requires_grad_()
    leaves = [x, *model.parameters()]
    expected = list(torch.autograd.grad(model(x).square().sum(), leaves))
    with recomputing():
        loss = model(x).square().sum()
    found: list[list[Tensor]] = []
    calls = Calls()

    def backward() -> None:
        with calls:
            found.extend(
                list(torch.autograd.grad(loss, leaves, retain_graph=True)) for _ in range(2)
            )

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert len(found) == 2
    for again in (*found, list(torch.autograd.grad(loss, leaves))):
        assert_same(again, expected)
    layers = sum(isinstance(module, fastbn.BatchNormAct2d) for module in model.modules())
    assert calls.recomputed() == layers


def test_chain_longer_than_the_stack(device: str) -> None:
    """The last output is computed from all before it."""
    x = torch.randn(4, 2, device=device, requires_grad=True)

    def forward() -> Tensor:
        y = x
        for _ in range(3000):
            y = fastbn.batch_norm_act(x, None, None, training=True, residual=y, activation="tanh")
        return y.exp().sum()

    with recomputing():
        loss = forward()
    assert_same(list(torch.autograd.grad(loss, x)), list(torch.autograd.grad(forward(), x)))


# --- With others that pack, wrap or trace ---------------------------------------------------------


def in_pieces(model: nn.Module, x: Tensor) -> Tensor:
    first, *blocks, last = model.children()
    x = first(x)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return last(x)  # type: ignore[no-any-return]


def partly_on_cpu(model: nn.Module, x: Tensor) -> Tensor:
    *layers, last = model.children()
    with save_on_cpu():
        x = nn.Sequential(*layers[:3])(x)
    return last(nn.Sequential(*layers[3:])(x))  # type: ignore[no-any-return]


def in_another_context(model: nn.Module, x: Tensor) -> Tensor:
    with recomputing():
        y: Tensor = model(x)
    return y


def in_parallel(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = DistributedDataParallel(model)(x)
    return y


WRAPPED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a context within": in_another_context,
    "a checkpoint within": partial(checkpoint, use_reentrant=False),
    "a reentrant checkpoint within": partial(checkpoint, use_reentrant=True),
    "checkpoints of blocks": in_pieces,
    "other hooks within": partly_on_cpu,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_around_others(name: str, device: str) -> None:
    model, x = network(device), images(device)
    assert_same(step(model, x, recomputing(), WRAPPED[name]), step(model, x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_within_others(use_reentrant: bool, device: str) -> None:
    """A checkpoint, within other hooks."""
    model, x = network(device), images(device)

    def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
        with save_on_cpu():
            y: Tensor = checkpoint(in_another_context, model, x, use_reentrant=use_reentrant)
        return y

    assert_same(step(model, x, None, checkpointed), step(model, x))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch has no torch.distributed")
    address = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        model, x = network("cpu"), images("cpu")
        expected = step(model, x)
        assert_same(step(model, x, recomputing(), in_parallel), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """What is saved is the output, in autocast's dtype as x is, or a copy, which is kept."""
    model = nn.Sequential(norm(3, "silu"), nn.Conv2d(3, 4, 3), norm(4, "relu"), nn.Conv2d(4, 2, 3))
    model, x = model.to(device), images(device, dtype)

    def cast(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            y: Tensor = model(x)
        return y

    with Calls() as calls:
        found = step(model, x, recomputing(), cast)
    assert calls.recomputed() == 1 + (dtype == torch.bfloat16)
    assert_same(found, step(model, x, None, cast))
