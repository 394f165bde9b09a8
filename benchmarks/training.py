"""Trains a small convolutional network on scikit-learn's bundled handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

_BATCH = 64


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) of range 0 to 1 in float32 and their labels (N,), split for a test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Curves:
    """Mean training loss (cross-entropy in nats) and test accuracy (0 to 1) of each epoch."""

    loss: list[float]
    accuracy: list[float]


def load(device: str) -> Digits:
    """The 1797 digits on a device, a fifth of them for the test; always the same split."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(16).unsqueeze(1).to(device)
    labels = torch.from_numpy(data.target).to(device)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0)
    return Digits(images[train], labels[train], images[test], labels[test])


def network() -> nn.Sequential:
    """Four blocks of convolution, batch norm and ReLU, then a linear layer: 61,050 parameters."""
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 1), (32, 64, 2), (64, 64, 1)):
        blocks += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(model: nn.Module, digits: Digits, epochs: int, name: str) -> Curves:
    """Trains in place, with the same batches in the same order at every call.

    Args:
        model: maps images (N, 1, 8, 8) to logits (N, 10).
        digits: the data.
        epochs: how many times to go through it.
        name: label of the progress bar on stderr.

    Returns:
        What the progress bar showed, for each epoch.
    """
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    curves = Curves([], [])
    progress = tqdm(range(epochs), desc=name, unit="epoch")
    for _ in progress:
        model.train()
        total = 0.0
        for batch in torch.randperm(len(digits.train_labels), generator=order).split(_BATCH):
            loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        model.eval()
        with torch.no_grad():
            right = model(digits.test_images).argmax(1) == digits.test_labels
        curves.loss.append(total / len(digits.train_labels))
        curves.accuracy.append(right.float().mean().item())
        progress.set_postfix(loss=curves.loss[-1], accuracy=curves.accuracy[-1])
    return curves
