"""What only a GPU shows: streams, memory, launches, several devices, and sizes past 32 bits.

The numbers themselves are the business of the other files, whose tests run on each device.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fastbn
from fastbn.ops import batch_norm_backward, batch_norm_training
from tests.support import oracle
from tests.support.case_checks import EPS, check
from tests.support.devices import GPU, MISSING, REQUIRED, kernels
from tests.support.tables import DTYPES, Case, Tensors, make
from tests.support.tolerances import assert_near, rounding_error
from tests.support.training_step import SHAPES, Step, assert_same_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from fastbn.planning import Op

if MISSING is not None and not REQUIRED:
    reason = f"{MISSING}; FASTBN_REQUIRE_CUDA=1 takes that for a failure"
    pytest.skip(reason, allow_module_level=True)
pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

each_size = pytest.mark.parametrize("size", SHAPES)
each_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def repeat(step: Step, times: int) -> list[Tensor]:
    """All results of all repetitions."""
    return [result for _ in range(times) for result in step()]


# --- Streams ------------------------------------------------------------------------------------


@each_size
def test_work_goes_to_the_current_stream(size: str) -> None:
    """Where the input is made, and late: on any other stream it would be read too early."""
    step = Step.make(SHAPES[size])
    twin = step.twin()
    x = torch.randn_like(step.x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        step.x.data.copy_(x)
        results = step()
    stream.synchronize()
    twin.x.data.copy_(x)
    assert_same_bits(results + step.state(), twin() + twin.state())


@each_layout
@each_size
def test_two_streams_at_once(size: str, layout: str) -> None:
    """With other data on each: neither sees the partial results of the other."""
    steps = [Step.make(SHAPES[size], layout) for _ in range(2)]
    twins = [step.twin() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    results: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(15):
        for step, stream, kept in zip(steps, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept += step()
    torch.cuda.synchronize()
    for step, twin, kept in zip(steps, twins, results, strict=True):
        assert_same_bits(kept + step.state(), repeat(twin, 15) + twin.state())


@pytest.mark.parametrize("size", ["one_block", "splits"])
def test_threads_with_streams_of_their_own(size: str) -> None:
    steps = [Step.make(SHAPES[size]) for _ in range(4)]
    twins = [step.twin() for step in steps]
    torch.cuda.synchronize()

    def work(step: Step) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            return repeat(step, 20)

    with ThreadPoolExecutor(len(steps)) as pool:
        results = list(pool.map(work, steps))
    torch.cuda.synchronize()
    for step, twin, kept in zip(steps, twins, results, strict=True):
        assert_same_bits(kept + step.state(), repeat(twin, 20) + twin.state())


@each_layout
@each_size
def test_calls_in_a_row_wait_for_each_other(size: str, layout: str) -> None:
    """Each reads what the last one wrote, though kernels may start before others end."""
    chain = [Step.make(SHAPES[size], layout) for _ in range(30)]
    results = []
    waits: list[Callable[[], None]] = [torch.cuda.synchronize, lambda: None, lambda: None]
    for wait in waits:
        x, outputs = chain[0].x, []
        modules = [step.twin().module for step in chain]
        for module in modules:
            x = module(x)
            x.register_hook(lambda dy, wait=wait: wait())
            outputs.append(x.detach())
            wait()
        gradients = torch.autograd.grad(x, [chain[0].x, modules[0].weight], chain[0].dy)
        results.append([*outputs, *gradients, *(b for m in modules for b in m.buffers())])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_workspaces_of_all_sizes_in_a_row() -> None:
    """A wide matrix needs more memory than calls of its stream before and after."""
    shapes = [SHAPES["splits"], (8, 200_000), SHAPES["splits"], (8, 400_000), SHAPES["large"]]
    steps = [Step.make(shape) for shape in shapes]
    twins = [step.twin() for step in steps]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        results = [step() for step in steps]
    torch.cuda.synchronize()
    for step, twin, kept in zip(steps, twins, results, strict=True):
        assert_same_bits(kept + step.state(), twin() + twin.state())


def test_more_streams_than_counters() -> None:
    """The last ones clear counters of their own; and so do streams that PyTorch did not make."""
    steps = [Step.make(SHAPES["splits"], momentum=None) for _ in range(3)]
    twins = [step.twin() for step in steps]
    streams = [torch.cuda.Stream(priority=priority) for _ in range(32) for priority in (0, -1)]
    streams += [torch.cuda.ExternalStream(stream.cuda_stream) for stream in streams[:2]]
    torch.cuda.synchronize()
    for stream in streams:
        for step, twin in zip(steps, twins, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = step()
            torch.cuda.current_stream().wait_stream(stream)
            assert_same_bits(results + step.state(), twin() + twin.state())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_host_threads_share_a_stream(momentum: float | None) -> None:
    """Their kernels alternate as they come."""
    stream = torch.cuda.Stream()
    steps = [Step.make(SHAPES["splits"], momentum=momentum) for _ in range(4)]
    twins = [step.twin() for step in steps]
    torch.cuda.synchronize()

    def call(step: Step) -> list[Tensor]:
        with torch.cuda.stream(stream):
            return repeat(step, 50)

    with ThreadPoolExecutor(len(steps)) as pool:
        results = list(pool.map(call, steps))
    torch.cuda.synchronize()
    for step, twin, ours in zip(steps, twins, results, strict=True):
        assert_same_bits(ours + step.state(), repeat(twin, 50) + twin.state())


@pytest.mark.parametrize("place", ["allocator", "pool"])
@each_size
def test_calls_hold_no_memory(size: str, place: str) -> None:
    """Neither of the allocator's own nor of a pool's, from the first call on."""
    step = Step.make(SHAPES[size])
    pool = torch.cuda.MemPool()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    inside = torch.cuda.use_mem_pool(pool) if place == "pool" else nullcontext()
    with torch.cuda.stream(stream), inside:
        repeat(step, 2)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@each_layout
@each_size
def test_same_bits_on_a_busy_gpu(size: str, layout: str) -> None:
    """Blocks come and go in another order when they have to share the GPU."""
    step = Step.make(SHAPES[size], layout)
    expected = repeat(step, 20)
    square = torch.randn(2048, 2048, device=GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(40):
            square @ square
    assert_same_bits(repeat(step, 20), expected)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whoever makes the host wait for the GPU gets an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None])
@each_size
def test_host_does_not_wait(size: str, momentum: float | None, training: bool) -> None:
    step = Step.make(SHAPES[size], momentum=momentum)
    step.module.train(training)
    twin = step.twin()
    expected = twin()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        with no_waiting():
            results = step()
        torch.cuda.synchronize()
    assert_same_bits(results + step.state(), expected + twin.state())


# --- Memory and launches ------------------------------------------------------------------------


@each_layout
@each_size
def test_a_thousand_steps_take_no_more_memory_than_one(size: str, layout: str) -> None:
    step = Step.make(SHAPES[size], layout)
    for _ in range(2):
        step()
    used = []
    for steps in (1, 1000):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        used.append(
            (
                torch.cuda.memory_allocated(),
                torch.cuda.max_memory_allocated(),
                torch.cuda.memory_reserved(),
            )
        )
    assert used[1] == used[0]


@each_layout
@each_size
def test_launches(size: str, layout: str) -> None:
    """As many as planned, of fastbn's kernels, and nothing that clears, copies or counts."""
    step = Step.make(SHAPES[size], layout)
    module, x = step.module, step.x
    y = module(x)
    backward = kernels(
        lambda: torch.autograd.grad(y, [x, module.weight, module.bias], step.dy, retain_graph=True)
    )
    forward = kernels(lambda: module(x))
    evaluated = kernels(torch.no_grad()(lambda: module.eval()(x)))
    launched: dict[Op, list[str]] = {"forward": forward, "backward": backward, "eval": evaluated}
    most = {"forward": 1, "backward": 1, "eval": 1}
    if size != "one_block":
        most.update(forward=2, backward=2)
    for op, names in launched.items():
        plan = fastbn.plan(x, op=op)
        assert all(name.startswith("fastbn::") for name in names), names
        assert len(names) == plan.launches <= most[op], (op, names, str(plan))


# --- Where tensors lie --------------------------------------------------------------------------


# Everything that goes with x; the first four through the function, all through the operators.
VECTORS = ("weight", "bias", "running_mean", "running_var")
OTHER = {"cpu": GPU, GPU: "cpu"}


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("stray", [*VECTORS, "num_batches_tracked"])
def test_forward_refuses_tensors_of_two_devices(stray: str, device: str) -> None:
    """Named in stock's words for other mixes of devices, and before anything is changed."""
    tensors = make(Case("image", (4, 3, 5, 7), "contiguous", torch.float32), device)
    vectors = {name: getattr(tensors, name) for name in VECTORS}
    vectors["num_batches_tracked"] = torch.tensor(3, device=device)
    vectors[stray] = vectors[stray].to(OTHER[device])
    before = {name: vector.clone() for name, vector in vectors.items()}
    words = f"Tensor on device {vectors[stray].device} is not on the expected device"
    with pytest.raises(RuntimeError, match=words):
        batch_norm_training(tensors.x, **vectors, momentum=0.1, eps=EPS)
    for name in ("running_mean", "running_var"):
        assert torch.equal(vectors[name], before[name])
    if stray in VECTORS:
        weight, bias, mean, var = (vectors[name] for name in VECTORS)
        for training in (True, False):
            with pytest.raises(RuntimeError, match=words):
                fastbn.batch_norm(tensors.x.requires_grad_(), mean, var, weight, bias, training)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("stray", ["dy", "weight", "mean", "invstd"])
def test_backward_refuses_tensors_of_two_devices(stray: str, device: str) -> None:
    x, dy = torch.randn(2, 4, 3, 5, device=device)
    tensors = {"dy": dy, "x": x}
    tensors.update((name, torch.ones(3, device=device)) for name in ("weight", "mean", "invstd"))
    tensors[stray] = tensors[stray].to(OTHER[device])
    words = f"Tensor on device {tensors[stray].device} is not on the expected device"
    with pytest.raises(RuntimeError, match=words):
        batch_norm_backward(
            **tensors, training=True, want_dx=True, want_dweight=True, want_dbias=True
        )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_size
def test_work_goes_to_the_gpu_of_the_input(size: str) -> None:
    """Whichever is the current one."""
    case = Case(size, SHAPES[size], "contiguous", torch.float32)
    assert torch.cuda.current_device() == 0
    check(make(case, "cuda:1"), training=True)
    assert torch.cuda.current_device() == 0


# Gradients of vectors alone leave no result that x and dy could be out of step with.
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("behind", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_equally_far_behind_a_vector(
    dtype: torch.dtype, behind: int, training: bool
) -> None:
    case = Case("image", (5, 3, 17, 19), "contiguous", dtype)
    tensors = make(case, GPU)
    memory = torch.full((2, behind + tensors.x.numel()), torch.nan, dtype=dtype, device=GPU)
    # A row begins where a vector does only if it is made to.
    memory = nn.functional.pad(memory, (0, -memory.shape[1] % 16))
    x, dy = (row[behind : behind + tensors.x.numel()].view(case.shape) for row in memory)
    x.copy_(tensors.x), dy.copy_(tensors.dy)
    if training:
        statistics = oracle.batch_statistics(x, EPS)
    else:
        vectors = tensors.running_mean, tensors.running_var
        statistics = oracle.given_statistics(x, *vectors, EPS)
    expected = oracle.gradients(dy, x, tensors.weight, statistics, training)
    mean, invstd = (s.to(GPU, tensors.weight.dtype) for s in (statistics.mean, statistics.invstd))
    wanted = (False, True, True)
    results = batch_norm_backward(dy, x, tensors.weight, mean, invstd, training, *wanted)
    assert_near(results[1], expected["dweight"], "dweight")
    assert_near(results[2], expected["dbias"], "dbias")


# --- Sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("shape", [(3, 70_001, 2, 3), (40, 70_001), (70_001, 2, 3)], ids=str)
def test_more_channels_or_samples_than_16_bits_count(shape: tuple[int, ...], layout: str) -> None:
    if len(shape) == 2 and layout == "channels_last":
        layout = "contiguous"  # which is the same
    check(make(Case("wide", shape, layout, torch.bfloat16), GPU), training=True)


@pytest.fixture
def memory_for() -> Iterator[Callable[[float], None]]:
    """Asks for gigabytes; leaves none behind."""

    def ask(gigabytes: float) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of free memory on the GPU; there are {free:.0f}")

    yield ask
    torch.cuda.empty_cache()


def rows_of(tensor: Tensor, channel: int) -> Iterator[Tensor]:
    """A channel in pieces small enough to be computed with in float64."""
    rows = (1 << 25) // tensor.shape[3]
    for sample in tensor:
        yield from sample[channel].split(rows)


# Each is past 2 ** 31 elements: with partial vectors, in columns, and all in one channel.
HUGE = {
    "contiguous": (3, 5, 12001, 12003),
    "channels_last": (2, 8, 11601, 11602),
    "one channel": (1, 1, 46341, 46342),
}


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("kind", HUGE)
def test_more_elements_than_32_bits_count(kind: str, memory_for: Callable[[float], None]) -> None:
    """Every element of y and dx, against float64 on the GPU."""
    shape = HUGE[kind]
    assert math.prod(shape) > 2**31
    memory_for(26)  # four tensors of 4.3 GB, and what a channel's pieces take
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": GPU}
    if kind == "channels_last":
        n, c, h, w = shape
        x, dy = (torch.randn(n, h, w, c, **options).movedim(-1, 1) for _ in range(2))
    else:
        x, dy = (torch.randn(shape, **options) for _ in range(2))
    y, mean, invstd = batch_norm_training(x, None, None, None, None, None, 0.1, EPS)
    wanted = (True, True, True)
    dx, dweight, dbias = batch_norm_backward(dy, x, None, mean, invstd, True, *wanted)
    assert y.stride() == dx.stride() == x.stride()

    count = math.prod(shape) // shape[1]
    # A sum of terms of random sign is about as large as the root of their number.
    sums = {"rtol": 0.0, "atol": 256 * torch.finfo(torch.float32).eps * count**0.5}
    for c in range(shape[1]):
        exact_mean = sum(piece.double().sum() for piece in rows_of(x, c)) / count
        moments = [
            torch.stack(
                [
                    (a.double() - exact_mean).square().sum(),
                    b.double().sum(),
                    (b.double() * (a.double() - exact_mean)).sum(),
                ]
            )
            for a, b in zip(rows_of(x, c), rows_of(dy, c), strict=True)
        ]
        squares, sum_dy, sum_dy_xmu = torch.stack(moments).sum(0)
        exact_invstd = (squares / count + EPS).rsqrt()
        torch.testing.assert_close(dbias[c].double(), sum_dy, **sums)
        torch.testing.assert_close(dweight[c].double(), sum_dy_xmu * exact_invstd, **sums)
        for a, b, ours, gradient in zip(*(rows_of(t, c) for t in (x, dy, y, dx)), strict=True):
            x_hat = (a.double() - exact_mean) * exact_invstd
            assert_rounded(ours, x_hat)
            along = sum_dy / count + x_hat * (sum_dy_xmu * exact_invstd / count)
            assert_rounded(gradient, exact_invstd * (b.double() - along))


def assert_rounded(actual: Tensor, exact: Tensor) -> None:
    """Half a unit of the result's dtype, and some of float32's at the size of the largest value."""
    allowed = rounding_error(actual.dtype, exact) + 2e-5
    assert bool(((actual.double() - exact).abs() <= allowed).all())


@pytest.mark.xdist_group("large")
def test_strides_past_32_bits(memory_for: Callable[[float], None]) -> None:
    memory_for(6)
    memory = torch.empty(2**31 + 2**16, dtype=torch.bfloat16, device=GPU)
    shape, strides = (5, 3, 4, 6), (2**29, 2**12, 2**6, 3)
    tensors = make(Case("far apart", shape, "contiguous", torch.bfloat16), GPU)
    x, dy = (memory.as_strided(shape, strides, start) for start in (0, 1))
    x.copy_(tensors.x), dy.copy_(tensors.dy)
    vectors = [getattr(tensors, name) for name in VECTORS]
    check(Tensors(x, dy, *vectors), training=True)


# --- Mixed precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_step_under_autocast(dtype: torch.dtype, layout: str) -> None:
    """16-bit activations, float32 parameters, and numbers that are right in the midst of it."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, bias=False),
        nn.BatchNorm2d(24),
    )
    target: dict[str, Any] = {"device": GPU, "memory_format": getattr(torch, layout)}
    model = fastbn.convert(model).to(**target)
    norms = [module for module in model if isinstance(module, fastbn.BatchNorm2d)]
    passed: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        passed.append((inputs[0], y))
        for tensor in passed[-1]:
            tensor.retain_grad()

    for norm in norms:
        norm.register_forward_hook(keep)
    weights = [norm.weight.detach().clone() for norm in norms]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(GPU, init_scale=256.0, enabled=dtype == torch.float16)
    x = torch.randn(8, 3, 20, 20, device=GPU).to(memory_format=getattr(torch, layout))
    with torch.autocast(GPU, dtype=dtype):
        loss = model(x).float().pow(3).mean()
    scaler.scale(loss).backward()
    for norm, (into, out) in zip(norms, passed, strict=True):
        assert into.dtype == out.dtype == dtype
        dx, dy, dweight, running_var = into.grad, out.grad, norm.weight.grad, norm.running_var
        assert dx is not None
        assert dy is not None
        assert dweight is not None
        assert running_var is not None
        assert dweight.dtype == running_var.dtype == torch.float32
        statistics = oracle.batch_statistics(into, norm.eps)
        assert_near(out, oracle.output(into, norm.weight, norm.bias, statistics), "y")
        expected = oracle.gradients(dy, into, norm.weight, statistics, True)
        assert_near(dx, expected["dx"], "dx")
        assert_near(dweight, expected["dweight"], "dweight")
    scaler.step(optimizer)
    assert all(not torch.equal(n.weight, w) for n, w in zip(norms, weights, strict=True))
