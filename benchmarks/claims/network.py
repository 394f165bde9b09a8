"""The network of the paper's MNIST experiment, on handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

import fastbn

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.training import Digits

BATCH = 60
HIDDEN = 100
CLASSES = 10
# Weights start as small Gaussian values.
_INITIAL_DEVIATION = 0.1
_DROPPED = 0.5
PERCENTILES = (0.15, 0.5, 0.85)


def build(*, batch_norm: bool, dropout: bool = False, pixels: int = 64) -> nn.Sequential:
    """Three hidden layers of 100 sigmoid units, from images (N, 1, H, W) to logits (N, 10).

    Args:
        batch_norm: whether each layer normalizes what goes into its sigmoids, and so needs no bias.
        dropout: whether half of each layer's outputs are dropped in training.
        pixels: of an image, H * W.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (pixels, HIDDEN, HIDDEN):
        layers.append(nn.Linear(inputs, HIDDEN, bias=not batch_norm))
        if batch_norm:
            layers.append(fastbn.BatchNorm1d(HIDDEN))
        layers.append(nn.Sigmoid())
        if dropout:
            layers.append(nn.Dropout(_DROPPED))
    layers.append(nn.Linear(HIDDEN, CLASSES))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=_INITIAL_DEVIATION)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


@dataclass
class History:
    """What was seen while a network was trained.

    Attributes:
        steps: at which it was looked at.
        accuracy: on the test images, 0 to 1.
        inputs: the 15th, 50th and 85th percentile of what goes into each sigmoid of the last hidden
            layer, over the test images: (3, 100) each time.
    """

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Highest test accuracy."""
        return max(self.accuracy)

    def steps_to(self, accuracy: float) -> float:
        """Steps until a test accuracy was first reached; infinity if it never was."""
        reached = (s for s, a in zip(self.steps, self.accuracy, strict=True) if a >= accuracy)
        return next(reached, float("inf"))


@torch.no_grad()
def _look(model: nn.Sequential, digits: Digits, step: int, history: History) -> None:
    model.eval()
    last_sigmoid = max(i for i, layer in enumerate(model) if isinstance(layer, nn.Sigmoid))
    inputs = model[:last_sigmoid](digits.test_images)
    right = model[last_sigmoid:](inputs).argmax(1) == digits.test_labels
    history.steps.append(step)
    history.accuracy.append(right.float().mean().item())
    history.inputs.append(torch.quantile(inputs, torch.tensor(PERCENTILES), dim=0))
    model.train()


def train(
    model: nn.Sequential, digits: Digits, *, rate: float, steps: int, every: int, seed: int
) -> History:
    """Trains in place by plain stochastic gradient descent on batches of 60.

    Args:
        model: from :func:`build`.
        digits: the data.
        rate: the learning rate.
        steps: how many.
        every: after so many steps the model is looked at, and before the first.
        seed: of the order of images.
    """
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    history = History()
    count = len(digits.train_labels)
    _look(model, digits, 0, history)
    for step in range(1, steps + 1):
        batch = torch.randint(count, (BATCH,), generator=order)
        loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            _look(model, digits, step, history)
    return history


def run(
    digits: Digits,
    *,
    batch_norm: bool,
    dropout: bool = False,
    rate: float,
    steps: int,
    every: int,
    seed: int,
) -> History:
    """Builds and trains, both from a seed; see :func:`build` and :func:`train`."""
    torch.manual_seed(seed)
    model = build(batch_norm=batch_norm, dropout=dropout)
    return train(model, digits, rate=rate, steps=steps, every=every, seed=seed)
