"""Synchronized modules: stock's constructor and state, groups, copies, and what is refused."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fastbn
from fastbn.collectives import LostGroup
from tests.support.ranks import Collective, collectives, on_threads
from tests.support.stock_versions import TAKES_BIAS
from tests.support.tolerances import AGAINST_STOCK

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = [
    (fastbn.SyncBatchNorm, nn.SyncBatchNorm, (4, 6, 5)),
    (fastbn.SyncBatchNorm1d, nn.BatchNorm1d, (4, 6, 5)),
    (fastbn.SyncBatchNorm2d, nn.BatchNorm2d, (4, 6, 5, 5)),
    (fastbn.SyncBatchNorm3d, nn.BatchNorm3d, (4, 6, 3, 5, 4)),
]
each_class = pytest.mark.parametrize(
    ("kind", "stock", "shape"), CLASSES, ids=lambda value: getattr(value, "__name__", str(value))
)


@each_class
def test_it_is_stock_s_in_state_and_constructor(
    kind: type[nn.Module], stock: type[nn.Module], shape: tuple[int, ...]
) -> None:
    without_bias: dict[str, Any] = {"bias": False} if TAKES_BIAS else {}
    ours: Any = kind(6, 1e-3, None, False, **without_bias)
    theirs: Any = stock(6, 1e-3, None, False, **without_bias)
    assert isinstance(ours, stock)
    assert isinstance(ours, nn.SyncBatchNorm) == (stock is nn.SyncBatchNorm)
    assert repr(ours).partition("(")[2] == repr(theirs).partition("(")[2]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert inspect.signature(kind).parameters.keys() == (
        {*inspect.signature(nn.SyncBatchNorm).parameters.keys(), "bias"}
    )
    assert kind(6, device="meta", dtype=torch.float64).weight.dtype == torch.float64
    del shape


# --- Groups ---------------------------------------------------------------------------------------


def shared_by(group: Callable[[int], object], world: int = 4) -> list[Tensor]:
    """The running mean of each rank, whose x is its number; see the result of momentum 1."""

    def step(rank: int) -> Tensor:
        process_group: Any = group(rank)
        module = fastbn.SyncBatchNorm(1, momentum=1.0, process_group=process_group)
        module(torch.full((2, 1), float(rank)))
        return module.get_buffer("running_mean")

    return on_threads(world, step)


def pairs_of_ranks(rank: int) -> dist.ProcessGroup | None:
    groups: list[dist.ProcessGroup | None] = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return groups[rank // 2]


GROUPS: dict[str, tuple[Callable[[int], object], list[float]]] = {
    "None is all": (lambda _: None, [1.5] * 4),
    "all by name": (lambda _: dist.group.WORLD, [1.5] * 4),
    "process group": (pairs_of_ranks, [0.5, 0.5, 2.5, 2.5]),
    "mesh": (lambda _: init_device_mesh("cpu", (4,)), [1.5] * 4),
    "dimension of a mesh": (
        lambda _: init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["a"],
        [1.0, 2.0, 1.0, 2.0],
    ),
    "sync_group of 2": (lambda _: fastbn.sync_group(2), [0.5, 0.5, 2.5, 2.5]),
    "sync_group of 1": (lambda _: fastbn.sync_group(1), [0.0, 1.0, 2.0, 3.0]),
    "sync_group of all": (lambda _: fastbn.sync_group(None), [1.5] * 4),
    "sync_group of all, own": (lambda _: fastbn.sync_group(None, own=True), [1.5] * 4),
    "sync_group of this host": (lambda _: fastbn.sync_group(), [1.5] * 4),
}


@pytest.mark.parametrize("name", GROUPS)
def test_statistics_are_those_of_the_group(name: str) -> None:
    group, expected = GROUPS[name]
    found = torch.cat(shared_by(group))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_sync_group_makes_a_communicator_only_if_it_must() -> None:
    def call(_: int) -> list[bool]:
        made = [fastbn.sync_group(2), fastbn.sync_group(1), fastbn.sync_group(own=True, size=2)]
        return [group is dist.group.WORLD for group in made]

    assert on_threads(2, call) == [[True, False, False]] * 2


def test_an_own_communicator_of_nccl_is_small_and_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its options, by a stand-in for NCCL."""

    class Options:
        def __init__(self, **given: bool) -> None:
            self.given = given
            self.config = SimpleNamespace()

    given: list[Any] = []

    def make(groups: object, pg_options: Any) -> tuple[object, list[object]]:
        given.append((groups, pg_options))
        return object(), []

    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", make)
    on_threads(1, lambda _: [fastbn.sync_group(1, own=True), fastbn.sync_group(1)])
    ((groups, options),) = given
    assert groups == [[0]]
    assert options.given == {"is_high_priority_stream": True}
    assert vars(options.config) == {"min_ctas": 1, "max_ctas": 2}


@pytest.mark.parametrize("size", [0, 3, -1])
def test_sync_group_needs_a_divisor(size: int) -> None:
    def call(_: int) -> None:
        with pytest.raises(ValueError, match=f"4 processes do not make groups of {size}"):
            fastbn.sync_group(size)

    on_threads(4, call)


def test_nodes_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else hosts; ranks of a node need not be neighbors."""
    given = {0: "a", 1: "b", 2: "a", 3: "b"}

    def gather(nodes: list[Any], node: object) -> None:
        assert node == "7"
        nodes[:] = given.values()

    monkeypatch.setenv("GROUP_RANK", "7")
    monkeypatch.setattr(dist, "all_gather_object", gather)
    found = torch.cat(shared_by(lambda _: fastbn.sync_group("node")))
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 1.0, 2.0]))


def test_a_rank_outside_the_group_is_told() -> None:
    def step(rank: int) -> None:
        group = dist.new_group([0])
        module = fastbn.SyncBatchNorm(2, process_group=group)
        if rank == 0:
            module(torch.randn(4, 2))
            return
        with pytest.raises(RuntimeError, match="rank 1 is not in the process group"):
            module(torch.randn(4, 2))

    on_threads(2, step)


# --- Copies ---------------------------------------------------------------------------------------


@each_class
def test_copies_share_the_group(
    kind: type[nn.Module], stock: type[nn.Module], shape: tuple[int, ...]
) -> None:
    del stock
    x = torch.randn(shape)

    def step(rank: int) -> None:
        module: Any = kind(6, process_group=dist.group.WORLD)
        for copied in (copy.deepcopy(module), copy.copy(module)):
            assert copied.process_group is dist.group.WORLD
        average = torch.optim.swa_utils.AveragedModel(nn.Sequential(module))
        average.update_parameters(nn.Sequential(module))
        module(x.split(2)[rank])
        assert len(collectives()) == 1

    on_threads(2, step)


def unpickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("travel", [unpickled, saved])
def test_pickles_drop_the_group_and_say_so(travel: Callable[[nn.Module], Any]) -> None:
    def step(_: int) -> list[Collective]:
        x = torch.randn(4, 6, 5)
        module = travel(fastbn.SyncBatchNorm(6, process_group=fastbn.sync_group(None, own=True)))
        assert isinstance(module.process_group, LostGroup)
        with pytest.raises(RuntimeError, match=r"set its process_group, or call fastbn\.convert_"):
            module(x)
        with pytest.raises(RuntimeError, match="cannot be pickled, and this module"):
            travel(copy.deepcopy(module))(x)
        module.eval()(x)
        assert not collectives()
        fastbn.convert_sync_batchnorm(module).train()(x)
        # Without a group there was nothing to lose.
        travel(fastbn.SyncBatchNorm(6))(x)
        return collectives()

    assert [len(exchanged) for exchanged in on_threads(2, step)] == [2, 2]


def test_a_lost_group_does_not_matter_where_a_process_is_alone() -> None:
    x = torch.randn(4, 6)
    module = fastbn.SyncBatchNorm(6)
    module.process_group = LostGroup()
    assert torch.equal(module(x), fastbn.BatchNorm1d(6)(x))
    on_threads(1, lambda _: module(x))


# --- Errors ---------------------------------------------------------------------------------------

# The module, its input, the exception and its words; ours are those of stock's batch norm.
WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], type[Exception], str]] = {
    "rank": (
        lambda: fastbn.SyncBatchNorm2d(3),
        lambda: torch.randn(4, 3, 5),
        ValueError,
        r"expected 4D input \(got 3D input\)",
    ),
    "rank of any": (
        lambda: fastbn.SyncBatchNorm(3),
        lambda: torch.randn(3),
        ValueError,
        r"expected at least 2D input \(got 1D input\)",
    ),
    "no channels": (
        lambda: fastbn.SyncBatchNorm(3),
        lambda: torch.randn(3, 0),
        ValueError,
        "SyncBatchNorm number of input channels should be non-zero",
    ),
    "channels": (
        lambda: fastbn.SyncBatchNorm(3),
        lambda: torch.randn(2, 4),
        RuntimeError,
        "running_mean should contain 4 elements not 3",
    ),
    "channels of an empty batch": (
        lambda: fastbn.SyncBatchNorm(3),
        lambda: torch.randn(0, 4),
        RuntimeError,
        "running_mean should contain 4 elements not 3",
    ),
    "eps": (
        lambda: fastbn.SyncBatchNorm(3, eps=0.0),
        lambda: torch.randn(2, 3),
        ValueError,
        "batch_norm eps must be positive during training",
    ),
    "momentum": (
        lambda: fastbn.SyncBatchNorm(3, momentum="0.1"),  # type: ignore[arg-type]
        lambda: torch.randn(2, 3),
        TypeError,
        "argument 'momentum'",
    ),
    "dtype": (
        lambda: fastbn.SyncBatchNorm(3),
        lambda: torch.ones(2, 3).long(),
        NotImplementedError,
        '"batch_norm" not implemented for',
    ),
    "mixed dtypes": (
        lambda: fastbn.SyncBatchNorm(3),
        lambda: torch.randn(2, 3).double(),
        RuntimeError,
        r"mixed dtype \(CPU\)",
    ),
    "device": (
        lambda: fastbn.SyncBatchNorm(3),
        lambda: torch.randn(2, 3, device="meta"),
        RuntimeError,
        "is not on the expected device",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_others_wait(name: str) -> None:
    make, given, error, words = WRONG[name]

    def call(_: int) -> tuple[list[Collective], int]:
        module, x = make(), given()
        with pytest.raises(error, match=words):
            module(x)
        return collectives(), int(module.get_buffer("num_batches_tracked"))

    assert on_threads(2, call) == [([], 0)] * 2


def test_running_statistics_have_no_gradients() -> None:
    def call(_: int) -> list[Collective]:
        module = fastbn.SyncBatchNorm(3)
        module.get_buffer("running_var").requires_grad_()
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'runn"):
            module(torch.randn(2, 3))
        return collectives()

    assert on_threads(2, call) == [[], []]


def test_a_failed_collective_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer")

    def call(rank: int) -> None:
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
        fastbn.convert_sync_batchnorm(model)
        words = (
            rf"SyncBatchNorm1d 1 on rank {rank} of 2 could not exchange 7 numbers with the other "
            "processes: Connection closed by peer"
        )
        with pytest.raises(RuntimeError, match=words):
            model(torch.randn(4, 3))
        with pytest.raises(RuntimeError, match=r"^SyncBatchNorm on rank"):
            fastbn.SyncBatchNorm(3)(torch.randn(4, 3))

    monkeypatch.setattr(fastbn.collectives, "_all_gather", fail)
    on_threads(2, call)


def test_loaded_weights_train_on(tmp_path: Any) -> None:
    """A checkpoint of stock's goes in, and ours into stock's."""
    stocks = nn.SyncBatchNorm(3)
    torch.save(stocks.state_dict(), tmp_path / "weights.pt")
    ours = fastbn.SyncBatchNorm2d(3)
    ours.load_state_dict(torch.load(tmp_path / "weights.pt"))
    x = torch.randn(4, 3, 5, 5)
    on_threads(2, lambda rank: copy.deepcopy(ours)(x.split(2)[rank]))
    stocks.load_state_dict(ours.state_dict())
    torch.testing.assert_close(stocks.eval()(x), ours.eval()(x), **AGAINST_STOCK)
