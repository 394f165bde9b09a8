"""Trains with several processes whose batch norms share their statistics.

Run it with as many processes as there are GPUs, or on CPUs with any number::

    torchrun --standalone --nproc-per-node 2 examples/ddp.py

Each process sees 4 images at a time, too few for statistics of their own.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastbn

EPOCHS = 4
IMAGES_PER_PROCESS = 4


def images() -> TensorDataset:
    """Noise, brighter on the side that the label tells."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (128,), generator=generator)
    x = torch.randn(128, 3, 16, 16, generator=generator)
    x[labels == 0, :, :, :8] += 0.2
    x[labels == 1, :, :, 8:] += 0.2
    return TensorDataset(x, labels)


def network() -> nn.Module:
    """A small network with batch norms of stock's."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 6 * 6, 2),
    )


def main() -> None:
    """Trains, and compares running statistics over processes."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)
    # Statistics of all processes. On several nodes those of a node are as a rule enough, and wait
    # for no network: fastbn.convert_sync_batchnorm(model, fastbn.sync_group("node")).
    model = fastbn.convert_sync_batchnorm(network().to(device))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02, momentum=0.9)

    data = images()
    sampler: DistributedSampler[Tensor] = DistributedSampler(data)
    loader = DataLoader(data, IMAGES_PER_PROCESS, sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        losses = []
        for x, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(parallel(x.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"epoch {epoch}: loss {mean.item() / dist.get_world_size():.4f}")

    for name, buffer in model.named_buffers():
        everywhere = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, buffer)
        if not all(torch.equal(other, buffer) for other in everywhere):
            raise RuntimeError(f"{name} differs")
    if rank == 0:
        print(f"running statistics are the same on {dist.get_world_size()} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
