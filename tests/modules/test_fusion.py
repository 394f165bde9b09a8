"""fuse finds what follows batch norms in blocks as networks have them, and computes the same."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbn
from fastbn.modules.batchnorm import FastBatchNorm
from tests.support.blocks import BLOCKS, CHANNELS, Basic, Functional, conv, norm
from tests.support.tolerances import AGAINST_STOCK_FLOAT64

if TYPE_CHECKING:
    from fastbn.activations import Activation

each_block = pytest.mark.parametrize("name", BLOCKS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def example(device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, CHANNELS, 5, 7, dtype=torch.float64, generator=generator).to(device)


def step(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> list[Tensor]:
    """Outputs, gradients and buffers after a forward and a backward."""
    model.zero_grad()
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = model(*leaves, **kwargs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    gradients = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).to(y.device) for y in outputs]
    torch.autograd.backward(
        outputs, [g.reshape(y.shape) for g, y in zip(gradients, outputs, strict=True)]
    )
    tensors = (*leaves, *model.parameters())
    return [*outputs, *(t.grad for t in tensors if t.grad is not None), *model.buffers()]


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, **AGAINST_STOCK_FLOAT64)


def classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes what each fused call does, in the words of the report."""
    calls = []
    original = FastBatchNorm._forward

    def noted(
        self: FastBatchNorm,
        x: Tensor,
        residual: Tensor | None = None,
        activation: Activation | None = None,
    ) -> Tensor:
        if activation is not None:
            calls.append(("" if residual is None else "addition and ") + activation.name)
        return original(self, x, residual, activation)

    monkeypatch.setattr(FastBatchNorm, "_forward", noted)
    return calls


@each_block
@each_mode
def test_fused_block_computes_the_same(
    name: str, training: bool, device: str, fused_calls: list[str]
) -> None:
    make, expected = BLOCKS[name]
    model = make().to(device, torch.float64).train(training)
    plain = copy.deepcopy(model)
    tensors = {**model.state_dict(keep_vars=True)}
    before = classes(model)
    assert fastbn.fuse(model) is model
    x = example(device)
    for _ in range(2):
        fused_calls.clear()
        assert_same(step(model, x), step(plain, x))
    calls = [call for norm, call in expected.items() if training or not norm.startswith("aux")]
    assert sorted(fused_calls) == sorted(calls)
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(tensors)
    assert all(now[key] is tensor for key, tensor in tensors.items())
    fastbn.revert(model)
    assert classes(model) == before
    assert_same(step(model, x), step(plain, x))


@each_block
def test_report_and_dry_run(name: str) -> None:
    make, expected = BLOCKS[name]
    model = make()
    before = classes(model)
    report = fastbn.fuse(model, dry_run=True)
    assert classes(model) == before
    assert {norm: str(fusion) for norm, fusion in report.fused.items()} == expected
    assert report.left == {}
    fastbn.fuse(model)
    after = classes(model)
    assert fastbn.fuse(model, dry_run=True) == report
    assert classes(model) == after
    fastbn.fuse(model)
    assert classes(model) == after


@each_block
@each_mode
def test_example_inputs_are_compared(name: str, training: bool) -> None:
    model = BLOCKS[name][0]().train(training)
    plain = copy.deepcopy(model)
    x = torch.randn(4, CHANNELS, 5, 7)
    fastbn.fuse(model, x)
    assert all(parameter.grad is None for parameter in model.parameters())
    for ours, stocks in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, stocks)


def test_mode_may_change_after_fusing(device: str) -> None:
    """A trace is of one mode; the model has those of both."""
    model = BLOCKS["Auxiliary"][0]().to(device, torch.float64)
    plain = copy.deepcopy(model)
    fastbn.fuse(model)
    x = example(device)
    for training in (True, False, True):
        model.train(training), plain.train(training)
        assert_same(step(model, x), step(plain, x))


Function = Callable[[Any, Tensor], Any]


class Block(nn.Module):
    """A batch norm and what a function makes of it."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(), norm(), nn.ReLU()
        self.function = function
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _used_twice(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    return self.act(y) + y


def _sum_used_twice(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x)) + x
    return self.act(y) * y


def _into_the_other(self: Any, x: Tensor) -> Any:
    z = self.conv(x)
    z += self.bn(x)
    return self.act(z)


def _number_added(self: Any, x: Tensor) -> Any:
    return self.act(self.bn(x) + 1)


def _scaled(self: Any, x: Tensor) -> Any:
    return self.act(torch.add(self.bn(self.conv(x)), x, alpha=2))


def _into_what_may_be_the_input(self: Any, x: Tensor) -> Any:
    z = self.conv(x)
    same = F.dropout(z, training=False)
    same += self.bn(x)
    return self.act(same) + z


def _changed_in_between(self: Any, x: Tensor) -> Any:
    z = self.conv(x)
    y = self.bn(x)
    z.mul_(2)
    return self.act(y + z)


def _changed_by_another_name(self: Any, x: Tensor) -> Any:
    z = self.conv(x)
    y = self.bn(x)
    z.view(-1).mul_(2)
    return self.act(y + z)


def _residual_changed_later(self: Any, x: Tensor) -> Any:
    """Which backward of an addition does not mind."""
    z = self.conv(x)
    y = self.act(self.bn(x) + z)
    return y + z.mul_(2)


def scaled(z: Tensor) -> Tensor:
    """Cannot be traced, and changes what it takes."""
    return z.mul_(2) if int(z.shape[0]) > 0 else z


def _changed_by_a_function(self: Any, x: Tensor) -> Any:
    z = self.conv(x)
    y = self.bn(x)
    scaled(z)
    return self.act(y + z)


def nothing_if_large(z: Tensor):  # type: ignore[no-untyped-def]
    """Does not say that it returns a tensor."""
    return z if int(z.shape[0]) < 3 else None


def _by_a_function_for_nothing(self: Any, x: Tensor) -> Any:
    y = self.act(self.bn(x))
    return y if nothing_if_large(x) is None else y * 2


def _called_again(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x))
    return self.act(y + self.bn(x))


def _on_values(self: Any, x: Tensor) -> Any:
    return self.act(self.bn(x)) if x.sum() > 0 else x


def _random(self: Any, x: Tensor) -> Any:
    return self.act(self.bn(x)) * torch.rand(1, dtype=torch.float64).item()


def _without_gradients(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        z = self.conv(x)
    return self.act(self.bn(z))


def _in_autocast(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", enabled=True):
        return self.act(self.bn(x))


def _checkpointed(self: Any, x: Tensor) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda z: self.act(self.bn(z)), x, use_reentrant=False)


def _on_the_mode_of_a_child(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    return self.act(y) if self.conv.training else torch.tanh(y)


def _with_memory(self: Any, x: Tensor) -> Any:
    self.last = self.act(self.bn(x))
    return self.last


def _with_a_list(self: Any, x: Tensor) -> Any:
    self.seen.append(self.act(self.bn(x)))
    return self.seen[-1]


def _type_of_a_value(self: Any, x: Tensor) -> Any:
    y = torch.relu(self.bn(x))
    return y if isinstance(y, Tensor) else y[0]


def _whether_a_value_is_a_tensor(self: Any, x: Tensor) -> Any:
    y = torch.relu(self.bn(x))
    return y if torch.is_tensor(y) else y[0]


NEAR_MISSES: dict[Function, str] = {
    _used_twice: "its output is used 2 times",
    _sum_used_twice: "the sum is used 2 times",
    _into_the_other: "added to another tensor in place",
    _into_what_may_be_the_input: "added to another tensor in place",
    _number_added: "is not a tensor",
    _scaled: "is scaled",
    _changed_in_between: "may change its input or the residual in between",
    _changed_by_another_name: "may change its input or the residual in between",
    _residual_changed_later: "may change its input or the residual before backward",
    _changed_by_a_function: "scaled may change its input or the residual in between",
    _by_a_function_for_nothing: "cannot be traced: int()",
    _on_values: "cannot be traced: symbolically traced variables cannot be used as inputs to",
    _random: "draws random numbers",
    _without_gradients: "switches gradients",
    _checkpointed: "under checkpointing",
    _on_the_mode_of_a_child: "depends on the mode of its children",
    _with_memory: "sets the attribute last",
    _with_a_list: "changes the list seen",
    _type_of_a_value: "asks for the type of relu",
    _whether_a_value_is_a_tensor: "asks for the type of relu",
}


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda function: function.__name__[1:])
@each_mode
def test_near_miss_is_left_with_its_reason(function: Function, training: bool, device: str) -> None:
    model = Block(function).to(device, torch.float64).train(training)
    # Converted, as a checkpoint updates stock's running statistics twice.
    plain = fastbn.convert(copy.deepcopy(model))
    report = fastbn.fuse(model, dry_run=True)
    assert report.fused == {}
    assert NEAR_MISSES[function] in report.left["bn"]
    assert model.seen == []
    fastbn.fuse(model)
    assert type(model) is Block
    x = example(device)
    torch.manual_seed(0)
    ours = step(model, x)
    torch.manual_seed(0)
    assert_same(ours, step(plain, x))


def test_input_changed_before_the_residual_is_there(device: str) -> None:
    """Stock refuses to differentiate this, so there is nothing but outputs to compare."""

    def changed(self: Any, x: Tensor) -> Any:
        z = self.conv(x)
        y = self.bn(z)
        z.mul_(2)
        return self.act(y + self.conv(z))

    model = Block(changed).to(device, torch.float64)
    plain = copy.deepcopy(model)
    assert "mul_ may change its input" in fastbn.fuse(model, dry_run=True).left["bn"]
    fastbn.fuse(model)
    with torch.no_grad():
        assert_same([model(example(device))], [plain(example(device))])


def test_other_context_is_no_trace() -> None:
    report = fastbn.fuse(Block(_in_autocast), dry_run=True)
    assert "switches gradients or autocast" in report.left["bn"]


def test_of_two_calls_the_second_takes_the_first_as_residual(device: str) -> None:
    """The order of updates of running statistics stays."""
    model = Block(_called_again).to(device, torch.float64)
    plain = copy.deepcopy(model)
    report = fastbn.fuse(model, dry_run=True)
    assert str(report.fused["bn"]) == "addition and relu"
    fastbn.fuse(model)
    assert_same(step(model, example(device)), step(plain, example(device)))


@pytest.mark.parametrize("hooked", ["bn1", "relu"])
def test_hooks_see_what_they_saw(hooked: str, device: str, fused_calls: list[str]) -> None:
    model = Basic().to(device, torch.float64)
    plain = copy.deepcopy(model)
    seen: list[list[Tensor]] = [[], []]
    for one, into in zip((model, plain), seen, strict=True):
        module = one.get_submodule(hooked)
        module.register_forward_hook(lambda _, x, y, into=into: into.append(y.detach().clone()))
    report = fastbn.fuse(model, dry_run=True)
    assert "hooks" in report.left["bn1"]
    assert ("bn2" in report.fused) == (hooked == "bn1")
    fastbn.fuse(model)
    assert_same(step(model, example(device)), step(plain, example(device)))
    assert_same(*seen)
    assert len(fused_calls) == len(report.fused)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, (8, 6)), (nn.BatchNorm1d, (4, 6, 9)), (nn.BatchNorm3d, (2, 6, 3, 4, 5))],
)
def test_other_ranks(
    kind: type[nn.Module], shape: tuple[int, ...], device: str, fused_calls: list[str]
) -> None:
    model = nn.Sequential(kind(6), nn.LeakyReLU(0.3), kind(6), nn.ELU(0.7), kind(6))
    model = model.to(device, torch.float64)
    plain = copy.deepcopy(model)
    fastbn.fuse(model)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    assert_same(step(model, x), step(plain, x))
    assert fused_calls == ["leaky_relu", "elu"]


def test_fastbn_and_stock_norms_alike(device: str, fused_calls: list[str]) -> None:
    plain = Basic().to(device, torch.float64)
    model = fastbn.convert(copy.deepcopy(plain))
    fastbn.fuse(model)
    assert_same(step(model, example(device)), step(plain, example(device)))
    assert fused_calls == ["relu", "addition and relu"]


def test_norm_with_an_activation_of_its_own_is_left_alone(device: str) -> None:
    """What follows it is applied to that activation's result."""
    model = nn.Sequential(
        fastbn.BatchNormAct2d(CHANNELS, activation="tanh"), nn.SiLU(), norm(), nn.ReLU()
    )
    model = model.to(device, torch.float64)
    x = example(device)
    expected = F.relu(copy.deepcopy(model[2])(F.silu(copy.deepcopy(model[0])(x))))
    report = fastbn.fuse(model, dry_run=True)
    assert {name: str(fusion) for name, fusion in report.fused.items()} == {
        "0": "tanh",
        "2": "relu",
    }
    fastbn.fuse(model)
    assert_same([model(x)], [expected])


def _on_the_exact_type(self: Any, x: Tensor) -> Any:
    y = self.act(self.bn(x))
    return y if type(x) is Tensor else y * 2


def test_wrong_trace_is_found_by_example_inputs() -> None:
    """This block computes something else when it is traced, which no trace can tell."""
    model = nn.Sequential(Block(_on_the_exact_type))
    before = classes(model)
    with pytest.raises(RuntimeError, match=r"fusing 0\.bn changes .* the output 0 differs by"):
        fastbn.fuse(model, torch.randn(4, CHANNELS, 3, 3))
    assert classes(model) == before
    assert type(model.get_submodule("0.bn")) is nn.BatchNorm2d


def test_report_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastbn"):
        fastbn.fuse(nn.Sequential(Block(_used_twice), Functional()))
    assert "fuse: 7 fused, 1 left" in caplog.text
    assert "left 0.bn: its output is used 2 times" in caplog.text
    assert "fused 1.norms.4: addition and elu" in caplog.text
