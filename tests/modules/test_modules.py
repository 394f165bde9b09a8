"""The modules are stock's to the letter: constructor, state, effects, and all who handle them."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.optim.swa_utils import AveragedModel, update_bn

import fastbn
from tests.support.stock_versions import TAKES_BIAS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn.modules.batchnorm import _BatchNorm

PAIRS = {
    "1d": (fastbn.BatchNorm1d, nn.BatchNorm1d, (6, 5, 7)),
    "2d": (fastbn.BatchNorm2d, nn.BatchNorm2d, (4, 5, 6, 3)),
    "3d": (fastbn.BatchNorm3d, nn.BatchNorm3d, (2, 5, 3, 4, 3)),
}
each_class = pytest.mark.parametrize("kind", PAIRS)

# Everything the constructor takes, one at a time and in the combinations that interact.
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-2},
    {"momentum": 0.9},
    {"momentum": 0.0},
    {"momentum": 2.0},
    {"momentum": -1.2},
    {"momentum": 1},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"affine": False, "bias": False},
    {"track_running_stats": False},
    {"track_running_stats": False, "momentum": None},
    {"track_running_stats": False, "affine": False},
    {"dtype": torch.float64},
    {"momentum": None, "bias": False},
]
ARGUMENTS = [given for given in ARGUMENTS if TAKES_BIAS or "bias" not in given]
each_argument = pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-11, "atol": 1e-11}}


def pair(
    kind: str, device: str = "cpu", **arguments: Any
) -> tuple[_BatchNorm, _BatchNorm, tuple[int, ...]]:
    """Fastbn's and stock's module with the same random state, and a shape they take."""
    ours, theirs, shape = PAIRS[kind]
    stock = theirs(5, device=device, **arguments)
    for tensor in [*stock.parameters(), *stock.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    fast = ours(5, device=device, **arguments)
    fast.load_state_dict(stock.state_dict())
    return fast, stock, shape


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """The same keys, and values that agree."""
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    for name, tensor in theirs_state.items():
        torch.testing.assert_close(ours_state[name], tensor, rtol=1e-5, atol=1e-6)


def assert_same_run(
    ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], device: str
) -> None:
    """Two batches forward and backward leave the same results, gradients and state."""
    floats = [t.dtype for t in theirs.state_dict().values() if t.is_floating_point()]
    dtype = floats[0] if floats else torch.float32
    for _ in range(2):
        x = torch.randn(shape, dtype=dtype, device=device) * 2 + 1
        dy = torch.randn(shape, dtype=dtype, device=device)
        results = []
        for module in (ours, theirs):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(dy)
            results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
        for our, their in zip(*results, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=CLOSE[dtype]["atol"] * 10)
        assert_same_state(ours, theirs)


@each_class
def test_constructor_is_stock_s(kind: str) -> None:
    ours, theirs, _ = PAIRS[kind]
    signatures = [dict(inspect.signature(cls).parameters) for cls in (ours, theirs)]
    if not TAKES_BIAS:
        signatures[0].pop("bias", None)
    parameters = [signature.values() for signature in signatures]
    for our, their in zip(*parameters, strict=True):
        assert (our.name, our.kind, our.default) == (their.name, their.kind, their.default)
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__


@each_class
@each_argument
def test_module_looks_like_stock_s(kind: str, arguments: dict[str, Any]) -> None:
    ours, theirs, _ = pair(kind, **arguments)
    assert repr(ours) == repr(theirs)
    assert list(ours._parameters) == list(theirs._parameters)
    assert list(ours._buffers) == list(theirs._buffers)
    expected: dict[str, Any] = {**theirs._parameters, **theirs._buffers}
    for name, tensor in expected.items():
        our = getattr(ours, name)
        assert type(our) is type(tensor)
        assert tensor is None or (our.dtype, our.shape) == (tensor.dtype, tensor.shape)
    for module in (ours, theirs):
        module.reset_parameters()
    assert_same_state(ours, theirs)


@each_class
@each_argument
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_module_computes_like_stock_s(
    kind: str, arguments: dict[str, Any], training: bool, device: str
) -> None:
    ours, theirs, shape = pair(kind, device, **arguments)
    assert_same_run(ours.train(training), theirs.train(training), shape, device)


def test_matrices_are_batches_too(device: str) -> None:
    ours, theirs, _ = pair("1d", device)
    assert_same_run(ours, theirs, (9, 5), device)


def without(*names: str) -> Callable[[nn.Module], None]:
    """Sets attributes of a module to None."""

    def change(module: nn.Module) -> None:
        for name in names:
            setattr(module, name, None)

    return change


# What people do to a module after making it.
CHANGES: dict[str, Callable[[_BatchNorm], object]] = {
    "tracking switched off": lambda m: setattr(m, "track_running_stats", False),
    "statistics removed": without("running_mean", "running_var"),
    "counter removed": without("num_batches_tracked"),
    "counter removed, no momentum": without("num_batches_tracked", "momentum"),
    "weight frozen": lambda m: m.weight.requires_grad_(False),
    "bias removed": without("bias"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_changed_module_behaves_like_stock_s(change: str, training: bool, device: str) -> None:
    ours, theirs, shape = pair("2d", device)
    for module in (ours, theirs):
        CHANGES[change](module.train(training))
    x = torch.randn(shape, device=device)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for our, their in zip(*results, strict=True):
        if their is None:
            assert our is None
        else:
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    assert_same_state(ours, theirs)


@each_class
def test_empty_batch(kind: str, device: str) -> None:
    ours, theirs, shape = pair(kind, device)
    x = torch.empty(0, *shape[1:], device=device, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = ours(x), theirs(other)
    assert y.shape == expected.shape
    for result in (y, expected):
        result.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert our.grad is not None
        assert their.grad is not None
        assert torch.equal(our.grad, their.grad)
    assert_same_state(ours, theirs)
    assert ours.get_buffer("num_batches_tracked").item() == 1


def test_buffers_are_updated_in_place(device: str) -> None:
    module = fastbn.BatchNorm2d(3, device=device)
    buffers = dict(module.named_buffers())
    addresses = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    versions = {name: buffer._version for name, buffer in buffers.items()}
    module(torch.randn(2, 3, 4, 4, device=device))
    for name, buffer in module.named_buffers():
        assert buffer is buffers[name]
        assert buffer.data_ptr() == addresses[name]
    assert buffers["num_batches_tracked"]._version > versions["num_batches_tracked"]
    assert buffers["num_batches_tracked"].item() == 1
    assert buffers["running_mean"].any()


@each_class
def test_state_goes_both_ways(kind: str, device: str) -> None:
    ours, theirs, shape = pair(kind, device)
    ours(torch.randn(shape, device=device))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(ours, theirs)
    theirs(torch.randn(shape, device=device))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_old_checkpoints_load_as_in_stock(version: int | None) -> None:
    """Before version 2 there was no counter, and loading fills it in."""
    modules = [cls(3) for cls in (fastbn.BatchNorm2d, nn.BatchNorm2d)]
    outcomes: list[object] = []
    for module in modules:
        module.get_buffer("num_batches_tracked").fill_(7)
        state: Any = nn.BatchNorm2d(3).state_dict()
        del state["num_batches_tracked"]
        if version is not None:
            state._metadata[""]["version"] = version
        else:
            state = dict(state)
        try:
            module.load_state_dict(state)
            outcomes.append(module.get_buffer("num_batches_tracked").item())
        except RuntimeError as error:
            outcomes.append(str(error).partition("\n")[2])
    assert outcomes[0] == outcomes[1]


def test_assigning_to_a_meta_module_makes_it_real() -> None:
    """Without a counter in the state, as that one is created on the CPU."""
    module = fastbn.BatchNorm2d(3, device="meta")
    state = dict(nn.BatchNorm2d(3).state_dict())
    del state["num_batches_tracked"]
    module.load_state_dict(state, assign=True)
    stock = nn.BatchNorm2d(3)
    assert_same_run(module, stock, (2, 3, 4, 4), "cpu")


def test_meta_module_becomes_real(device: str) -> None:
    module = fastbn.BatchNorm2d(3, device="meta").to_empty(device=device)
    module.reset_parameters()
    assert_same_run(module, nn.BatchNorm2d(3, device=device), (2, 3, 4, 4), device)


@pytest.mark.parametrize("training", [True, False])
def test_meta_module_tells_shapes(training: bool) -> None:
    module = fastbn.BatchNorm2d(3, device="meta").train(training)
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    y = module(x)
    assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)


@pytest.mark.parametrize("how", ["pickle", "torch", "deepcopy"])
def test_copies_are_equal_and_independent(how: str, device: str) -> None:
    module = fastbn.BatchNorm2d(3, momentum=None, device=device)
    module(torch.randn(2, 3, 4, 4, device=device))
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif how == "torch":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(module)
    assert type(twin) is fastbn.BatchNorm2d
    x = torch.randn(2, 3, 4, 4, device=device)
    assert torch.equal(twin(x), module(x))
    assert_same_state(twin, module)
    twin(x)
    counts = [m.get_buffer("num_batches_tracked").item() for m in (twin, module)]
    assert counts[0] == counts[1] + 1


def test_functional_call_uses_the_given_tensors(device: str) -> None:
    ours, theirs, shape = pair("2d", device)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    ours.reset_parameters()
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(functional_call(ours, given, x), theirs(x))
    torch.testing.assert_close(given["running_mean"], theirs.running_mean)
    assert given["num_batches_tracked"].item() == 1
    assert ours.get_buffer("num_batches_tracked").item() == 0


def test_ensemble_by_vmap(device: str) -> None:
    """Stacked parameters and buffers, each member with its own statistics."""
    results = []
    x = torch.randn(4, 3, 5, 5, device=device)
    for cls in (fastbn.BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(3)
        members = [cls(3, device=device) for _ in range(2)]
        for member in members:
            nn.init.normal_(member.weight)
        parameters, buffers = stack_module_state(members)
        base = copy.deepcopy(members[0]).to("meta")

        def call(p: Any, b: Any, base: nn.Module = base) -> torch.Tensor:
            y: torch.Tensor = functional_call(base, (p, b), (x,))
            return y

        y = torch.vmap(call)(parameters, buffers)
        results.append([y.detach(), *buffers.values()])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_stochastic_weight_averaging_updates_statistics(device: str) -> None:
    """update_bn resets statistics and sets momentum to None, on every batch norm it finds."""
    models = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fastbn.convert(models[0])
    data = [torch.randn(5, 3, 4, 4, device=device) for _ in range(3)]
    averaged = [AveragedModel(model) for model in models]
    for model in averaged:
        model.update_parameters(model.module)
        update_bn(data, model)
    assert_same_state(*averaged)
    norm = averaged[0].module.get_submodule("1")
    assert norm.momentum == 0.1
    assert norm.get_buffer("num_batches_tracked").item() == 3


def test_inference_mode(device: str) -> None:
    ours, theirs, shape = pair("2d", device)
    x = torch.randn(shape, device=device)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert_same_state(ours, theirs)


def test_autocast_leaves_dtypes_alone(device: str) -> None:
    """Batch norm is on no autocast list: it takes what comes, with float32 parameters."""
    ours, theirs, shape = pair("2d", device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape).to(device, dtype)
        with torch.autocast(device, dtype=torch.bfloat16):
            y, expected = ours(x), theirs(x)
        assert y.dtype == expected.dtype == dtype
        resolution = torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected, rtol=4 * resolution, atol=16 * resolution)
    assert_same_state(ours, theirs)


def test_convolution_fuses_with_it(device: str) -> None:
    conv, norm = nn.Conv2d(3, 4, 3, device=device), fastbn.BatchNorm2d(4, device=device)
    norm(torch.randn(5, 4, 6, 6, device=device) * 3)
    conv.eval(), norm.eval()
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    x = torch.randn(2, 3, 7, 7, device=device)
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=1e-4, atol=1e-5)


def test_it_converts_to_sync_batch_norm(device: str) -> None:
    module = fastbn.BatchNorm2d(3, device=device)
    module(torch.randn(2, 3, 4, 4, device=device))
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(module))[0].eval()
    assert type(sync) is nn.SyncBatchNorm
    x = torch.randn(2, 3, 4, 4, device=device)
    torch.testing.assert_close(module.eval()(x), sync(x), rtol=1e-4, atol=1e-5)


def test_parametrized_weight_is_used(device: str) -> None:
    results = []
    x = torch.randn(2, 3, 4, 4, device=device)
    for cls in (fastbn.BatchNorm2d, nn.BatchNorm2d):
        module = cls(3, device=device)
        nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
        results.append(module(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_pruned_weight_is_used(device: str) -> None:
    from torch.nn.utils import prune

    results = []
    x = torch.randn(2, 3, 4, 4, device=device)
    for cls in (fastbn.BatchNorm2d, nn.BatchNorm2d):
        module = cls(3, device=device)
        prune.custom_from_mask(module, "weight", torch.tensor([1.0, 0.0, 1.0], device=device))
        results.append(module(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["to", "constructor", "meta"])
def test_16_bit_module_keeps_statistics_in_float32(
    dtype: torch.dtype, way: str, device: str
) -> None:
    """2000 identical batches bring the running mean home, which in 16 bits it never reaches."""
    if way == "to":
        module = fastbn.BatchNorm2d(2, momentum=0.01).to(device, dtype)
    elif way == "constructor":
        module = fastbn.BatchNorm2d(2, momentum=0.01, device=device, dtype=dtype)
    else:
        module = fastbn.BatchNorm2d(2, momentum=0.01, device="meta").to(dtype)
        module = module.to_empty(device=device)
        module.reset_parameters()
    assert module.weight.dtype == dtype
    assert module.running_mean is not None
    assert module.running_var is not None
    assert module.running_mean.dtype == module.running_var.dtype == torch.float32
    x = (torch.randn(4, 2, 3, 3) + 1).to(device, dtype)
    with torch.no_grad():
        for _ in range(2000):
            module(x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(module.running_mean.double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.running_var.double(), var, rtol=1e-4, atol=1e-4)


def test_statistics_survive_a_trip_through_16_bits(device: str) -> None:
    module = fastbn.BatchNorm2d(2, device=device)
    running_mean = module.get_buffer("running_mean")
    running_mean.copy_(torch.tensor([1 + 2**-20, 3.0]))
    expected = running_mean.clone()
    assert torch.equal(module.half().float().get_buffer("running_mean"), expected)
