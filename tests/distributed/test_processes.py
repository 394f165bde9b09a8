"""Two processes with gloo: DistributedDataParallel, compilation, and one that ends."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastbn
from fastbn.collectives import LostGroup
from tests.support.ranks import ProcessError, Processes
from tests.support.tolerances import AGAINST_STOCK, AGAINST_STOCK_FLOAT64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from subprocess import CompletedProcess

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5),
    ).double()


def steps(model: nn.Module, x: Tensor, prepare: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Two steps of SGD, with an optimizer from before the model is prepared."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained = prepare(model)
    for _ in range(2):
        optimizer.zero_grad()
        trained(x).square().mean().backward()
        optimizer.step()
    return model


PREPARED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "converted, then wrapped": lambda model: DistributedDataParallel(
        fastbn.convert_sync_batchnorm(model)
    ),
    "wrapped, then converted": lambda model: fastbn.convert_sync_batchnorm(
        DistributedDataParallel(model)
    ),
    "fused": lambda model: DistributedDataParallel(
        fastbn.convert_sync_batchnorm(fastbn.fuse(model))
    ),
    "wrapped as stock's": lambda model: fastbn.convert(
        _wrapped(model, nn.SyncBatchNorm.convert_sync_batchnorm)
    ),
}


def _wrapped(model: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Converted by others once it is wrapped, as DDP refuses stock's SyncBatchNorm on a CPU."""
    wrapped = DistributedDataParallel(model)
    convert(wrapped)
    return wrapped


def train(rank: int, name: str, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    steps(model, x.chunk(2)[rank], PREPARED[name])
    return model.state_dict()


@pytest.mark.parametrize("name", PREPARED)
def test_data_parallel_training_is_that_of_one_process(processes: Processes, name: str) -> None:
    model, x = network(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    found = processes(train, name, model, x)
    expected = steps(copy.deepcopy(model), x, lambda alone: alone).state_dict()
    for state in found:
        torch.testing.assert_close(state, expected, **AGAINST_STOCK_FLOAT64)
        for key, value in state.items():
            assert torch.equal(value, found[0][key])


def compiled(
    rank: int, own_group: bool, sums: bool, backend: str, x: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Results of a compiled model, each beside that of the model itself."""
    group = fastbn.sync_group(None, own=True) if own_group else None
    model = fastbn.convert_sync_batchnorm(network(), group)
    model.append(fastbn.SyncBatchNorm(5, process_group=group)).to(x.dtype)
    twin = copy.deepcopy(model)
    outcomes = []
    calls: tuple[Any, ...] = (torch.compile(twin, backend=backend, fullgraph=True), model)
    fastbn.collectives.GATHERING_PROCESSES = 1 if sums else 8
    for call, each in zip(calls, (twin, model), strict=True):
        leaf = x.chunk(2)[rank].clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        assert leaf.grad is not None
        gradients = [p.grad for p in each.parameters() if p.grad is not None]
        outcomes.append([y.detach(), leaf.grad, *gradients, *each.buffers()])
    return list(zip(*outcomes, strict=True))


@pytest.mark.parametrize(
    ("own_group", "sums", "backend"),
    [
        (False, False, "aot_eager"),
        (True, False, "aot_eager"),
        # As more processes would: but not of float64.
        (False, True, "aot_eager"),
        pytest.param(False, False, "inductor", marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_without_graph_breaks(
    processes: Processes, own_group: bool, sums: bool, backend: str
) -> None:
    x = torch.randn(6, 3, 8, 8, dtype=torch.float32 if sums else torch.float64)
    close = AGAINST_STOCK if sums else AGAINST_STOCK_FLOAT64
    for results in processes(compiled, own_group, sums, backend, x):
        assert len(results) == 2 + 4 + 6 + 2 + 9
        for ours, theirs in results:
            torch.testing.assert_close(ours, theirs, **close)


def travel(_: int) -> None:
    """Process groups of gloo, which deepcopy and pickle refuse."""
    group: Any = dist.new_group([0, 1])
    module = fastbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), group)
    assert copy.deepcopy(module)[0].process_group is group
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=False)[0].process_group, LostGroup)


def test_models_with_a_group_can_be_copied_and_saved(processes: Processes) -> None:
    processes(travel)


def fail_alone(rank: int) -> None:
    """One rank raises for its input, and its process ends, as those of torchrun do."""
    model = fastbn.convert_sync_batchnorm(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    try:
        model(torch.randn(2, 3, 4, 4) if rank == 0 else torch.randn(2, 3, 4))
    except ValueError:
        os._exit(1)


def test_a_rank_that_raises_ends_the_other(tmp_path: Path) -> None:
    pair = Processes(tmp_path)
    waiting, ended = pair.answers(fail_alone)
    pair.close()
    assert ended is None
    assert isinstance(waiting, ProcessError)
    words = "RuntimeError: SyncBatchNorm2d 1 on rank 0 of 2 could not exchange 7 numbers with the"
    assert words in str(waiting)


def test_the_example_runs(run_python: Callable[..., CompletedProcess[str]]) -> None:
    launched = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        str(ROOT / "examples" / "ddp.py"),
        OMP_NUM_THREADS="1",
    )
    # Not by its status: DistributedDataParallel keeps gloo's threads beyond the process group, and
    # a run in fifty ends with "terminate called without an active exception" after all is done.
    lines = launched.stdout.splitlines()
    assert lines, launched.stderr
    losses = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("epoch")]
    assert losses[-1] < losses[0] / 2
    assert lines[-1] == "running statistics are the same on 2 ranks"
