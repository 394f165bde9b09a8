"""Outputs that are computed again instead of kept: what is kept, and changes in place."""

from __future__ import annotations

import gc
import re
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fastbn
from fastbn.recompute import active
from tests.support.recomputing import Calls, assert_same, images, network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

recomputing = fastbn.recompute_activations


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks are too small for more to help."""
    torch.set_num_threads(1)
    yield
    assert active.recorder is None


# --- Memory ---------------------------------------------------------------------------------------


def test_outputs_are_not_kept(device: str) -> None:
    """No output of a fused layer is, though all are saved, as they are or as a view."""
    model, x = network(device, channels=32), images(device)
    outputs: list[StorageWeakRef] = []
    for module in model.modules():
        if isinstance(module, fastbn.BatchNormAct2d):
            module.register_forward_hook(
                lambda _, __, y: outputs.append(StorageWeakRef(y.untyped_storage()))
            )
    with Calls() as usually:
        loss = model(x).sum()
    assert len(outputs) == 13
    assert not any(output.expired() for output in outputs)
    kept_usually = usually.living_bytes(x, *model.parameters())
    del loss
    outputs.clear()
    with Calls() as calls, recomputing():
        loss = model(x).sum()
    assert len(outputs) == 13
    assert all(output.expired() for output in outputs)
    assert calls.living_bytes(x, *model.parameters()) < 0.65 * kept_usually
    with calls:
        loss.backward()
    assert calls.recomputed() == len(outputs)


def test_nothing_is_left_behind(device: str) -> None:
    """After fifty steps, some without a backward, is alive what was after the first."""
    model, x = network(device), images(device)

    def tensors_after(steps: int) -> int:
        for _ in range(steps):
            with recomputing():
                model(x).sum().backward()
                model(x)
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    before = tensors_after(1)
    assert tensors_after(50) <= before


def test_no_cycle_keeps_a_graph(device: str) -> None:
    """It is gone with its last tensor, while the context is still open."""
    model, x = network(device), images(device)
    before = (x, *model.parameters())
    gc.collect()
    gc.disable()
    try:
        with recomputing(), Calls() as calls:
            y = model(x).exp()  # which is saved, and would hold what saves it
            assert calls.living_bytes(*before) > 2 * y.nbytes
            del y
            assert calls.living_bytes(*before) == 0
    finally:
        gc.enable()


def test_output_that_stays_keeps_nothing_once_its_graph_is_gone(device: str) -> None:
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    with recomputing():
        z = x * 2
        y = fastbn.batch_norm_act(z, None, None, training=True)
        watched = StorageWeakRef(z.untyped_storage())
        del z
    assert not watched.expired()
    y.sum().backward()
    assert watched.expired()


# --- Changes in place -----------------------------------------------------------------------------


def layer(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    return fastbn.batch_norm_act(x, None, None, weight, bias, True, residual=residual)


@pytest.mark.parametrize("alias", [lambda y: y, torch.Tensor.detach, lambda y: y[:2]])
def test_output_may_change_once_it_is_saved(alias: Callable[[Tensor], Tensor], device: str) -> None:
    """Which PyTorch refuses of others; one that has changed is saved as it is."""
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    kernel = torch.randn(3, 3, 1, 1, device=device, requires_grad=True)

    def forward(separate: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = layer(x)
        first = F.conv2d(separate(y), kernel)
        residual = layer(x, separate(y))
        alias(y).mul_(3)
        second = F.conv2d(y, kernel)
        loss = (first * second * F.conv2d(residual, kernel)).sum()
        return list(torch.autograd.grad(loss, (x, kernel)))

    with recomputing():
        found = forward(lambda y: y)
    assert_same(found, forward(Tensor.clone))


def test_memory_that_was_exchanged(device: str) -> None:
    """An output that got other memory is not computed again, nor is what gets the one it had."""
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    kernel = torch.randn(3, 3, 1, 1, device=device, requires_grad=True)
    with recomputing():
        y = layer(x)
        address = y.untyped_storage()._cdata
        y.data = y.detach() * 2
        images = [y.detach().clone()]
        while images[-1].untyped_storage()._cdata != address and len(images) < 10_000:
            images.append(torch.ones(4, 3, 5, 5, device=device))
        losses = [F.conv2d(image, kernel).sum() for image in (y, images[-1])]
    for image, loss in zip((images[0], images[-1]), losses, strict=True):
        assert_same(
            list(torch.autograd.grad(loss, kernel)),
            list(torch.autograd.grad(F.conv2d(image, kernel).sum(), kernel)),
        )


@pytest.mark.parametrize("changed", ["x", "residual", "weight", "bias"])
def test_what_an_output_is_computed_from_may_not_change(changed: str, device: str) -> None:
    shapes = {"x": (4, 3, 5, 5), "residual": (4, 3, 5, 5), "weight": (3,), "bias": (3,)}
    tensors = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    kernel = torch.randn(3, 3, 1, 1, device=device, requires_grad=True)
    with recomputing():
        y = F.conv2d(layer(*(tensor.requires_grad_() for tensor in tensors.values())), kernel)
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        torch.autograd.grad(y.sum(), kernel)
    assert f"{list(shapes[changed])}] is at version 1; expected version 0" in str(caught.value)


def test_errors_are_pytorchs(device: str) -> None:
    """Of what any operation has saved, but for the name of the operation that it came from."""
    given = torch.randn(3, device=device, requires_grad=True)

    def refused(context: AbstractContextManager[object]) -> str:
        with context:
            x = given * 2
            loss = (x * x).sum()
            x += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            loss.backward()
        return str(caught.value)

    expected, versions = re.subn(r", which is output 0 of \w+, is", " is", refused(nullcontext()))
    assert versions == 1
    # What it advises differs from version to version.
    assert refused(recomputing()).split("Hint")[0] == expected.split("Hint")[0]
