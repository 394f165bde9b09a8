"""CUDA graphs: what is captured once computes the same on every replay as a call does."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fastbn
from tests.support.devices import GPU, MISSING, REQUIRED
from tests.support.training_step import SHAPES, Step, assert_same_bits

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from torch import Tensor

if MISSING is not None and not REQUIRED:
    reason = f"{MISSING}; FASTBN_REQUIRE_CUDA=1 takes that for a failure"
    pytest.skip(reason, allow_module_level=True)
pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

each_size = pytest.mark.parametrize("size", SHAPES)
each_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def capture(
    call: Callable[[], list[Tensor]], stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The graph of a call, and where its replays leave results. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    return graph, results


@each_layout
@pytest.mark.parametrize("momentum", [0.1, None])
@each_size
def test_replays_of_training_steps(size: str, momentum: float | None, layout: str) -> None:
    """Of new data each: results, gradients, running statistics and the counter."""
    step = Step.make(SHAPES[size], layout, momentum)
    twin = step.twin()
    graph, results = capture(step)
    assert_same_bits(step.state(), twin.state())
    for seed in range(4):
        for each in (step, twin):
            each.load(seed)
        graph.replay()
        assert_same_bits(results + step.state(), twin() + twin.state())
    assert step.module.num_batches_tracked == 4


@each_layout
@each_size
def test_replays_of_eval(size: str, layout: str) -> None:
    step = Step.make(SHAPES[size], layout)
    step.module.eval()
    twin = step.twin()
    graph, results = capture(step)
    for seed in range(2):
        for each in (step, twin):
            each.load(seed)
        graph.replay()
        assert_same_bits(results + step.state(), twin() + twin.state())


FIRST_CALL = """
from tests.gpu import test_cuda_graphs as graphs
step = graphs.Step.make(graphs.SHAPES[{size!r}])
twin = step.twin()
graph, results = graphs.capture(step)
graph.replay()
graphs.assert_same_bits(results + step.state(), twin() + twin.state())
print("same")
"""


@pytest.mark.parametrize("size", ["one_block", "splits"])
def test_first_call_of_all_is_captured(
    size: str,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """In a process of its own: no kernel is loaded there yet, and no memory set aside."""
    done = run_python("-c", FIRST_CALL.format(size=size))
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@each_size
def test_calls_and_replays_take_turns(size: str) -> None:
    """On one stream, in any order and without a pause."""
    stream = torch.cuda.Stream()
    captured, called = Step.make(SHAPES[size]), Step.make(SHAPES[size])
    twins = captured.twin(), called.twin()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        before = called()
    graph, replayed = capture(captured, stream)
    kept = []
    with torch.cuda.stream(stream):
        for replays in (1, 3, 0, 2):
            for _ in range(replays):
                graph.replay()
            kept += [*called(), *(result.clone() for result in replayed)]
    torch.cuda.synchronize()

    assert_same_bits(before, twins[1]())
    expected: list[Tensor] = []
    last: list[Tensor] = []
    for replays in (1, 3, 0, 2):
        for _ in range(replays):
            last = twins[0]()
        expected += [*twins[1](), *last]
    assert_same_bits(kept, expected)
    for step, twin in zip((captured, called), twins, strict=True):
        assert_same_bits(step.state(), twin.state())


@each_size
def test_two_graphs_at_once(size: str) -> None:
    """Captured on the same stream, one after the other, and replayed on two."""
    steps = [Step.make(SHAPES[size]) for _ in range(2)]
    twins = [step.twin() for step in steps]
    graphs = [capture(step) for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for step, twin, (_, results) in zip(steps, twins, graphs, strict=True):
        for _ in range(20):
            expected = twin()
        assert_same_bits(results + step.state(), expected + twin.state())


def test_graph_outlives_the_next_one() -> None:
    """Capturing another, and dropping that, leaves the first one's memory alone."""
    first = Step.make(SHAPES["splits"])
    twin = first.twin()
    graph, results = capture(first)
    for _ in range(3):
        other, _ = capture(Step.make((8, 200_000)))
        other.replay()
        del other
        torch.cuda.empty_cache()
        junk = torch.full((4 << 20,), torch.nan, device=GPU)
        graph.replay()
        assert_same_bits(results + first.state(), twin() + twin.state())
        del junk


@pytest.mark.parametrize("momentum", [0.1, None])
@each_size
def test_captured_calls_hold_no_memory(size: str, momentum: float | None) -> None:
    """Of the graph's pool only results are taken, as those who manage pools insist."""
    graph, results = capture(Step.make(SHAPES[size], momentum=momentum))
    taken = {
        block["address"]
        for segment in torch.cuda.memory_snapshot()
        if segment["segment_pool_id"] == graph.pool()
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
    assert taken == {result.untyped_storage().data_ptr() for result in results}
    graph.replay()


@each_size
def test_replays_run_beside_calls(size: str) -> None:
    """On another stream than that of the capture, where calls go on: all of two passes."""
    captured, called = (Step.make(SHAPES[size], momentum=None) for _ in range(2))
    twins = captured.twin(), called.twin()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        called()
    graph, results = capture(captured, streams[0])
    kept = []
    for _ in range(20):
        with torch.cuda.stream(streams[1]):
            graph.replay()
        with torch.cuda.stream(streams[0]):
            kept = called()
    torch.cuda.synchronize()
    for _ in range(20):
        expected = twins[0]()
    assert_same_bits(results + captured.state(), expected + twins[0].state())
    for _ in range(21):
        expected = twins[1]()
    assert_same_bits(kept + called.state(), expected + twins[1].state())


def test_several_sizes_in_one_graph() -> None:
    """Among them one that needs more memory than those before it."""
    shapes = [SHAPES["splits"], (8, 200_000), SHAPES["one_block"], SHAPES["large"], (8, 400_000)]
    steps = [Step.make(shape) for shape in shapes]
    twins = [step.twin() for step in steps]
    graph, results = capture(lambda: [result for step in steps for result in step()])
    for _ in range(3):
        graph.replay()
        expected = [result for twin in twins for result in twin()]
        assert_same_bits(results, expected)
    for step, twin in zip(steps, twins, strict=True):
        assert_same_bits(step.state(), twin.state())


@each_size
def test_graphed_callables(size: str) -> None:
    """PyTorch's own wrapper, which warms up with steps of its own."""
    step = Step.make(SHAPES[size])
    eager = step.twin()
    state = copy.deepcopy(step.module.state_dict())
    graphed = torch.cuda.make_graphed_callables(step.module, (step.x.detach().requires_grad_(),))
    assert isinstance(graphed, fastbn.BatchNorm2d)
    graphed.load_state_dict(state)
    for seed in range(3):
        for each in (step, eager):
            each.load(seed)
        results = Step(graphed, step.x, step.dy)()
        assert_same_bits(results + step.state(), eager() + eager.state())


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = (
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16, momentum=None),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, bias=False),
        nn.BatchNorm2d(24),
    )
    return fastbn.convert(nn.Sequential(*layers)).to(GPU)


def test_compiled_with_graphs() -> None:
    """mode="reduce-overhead": running statistics are updated in the graph, too."""
    torch._dynamo.reset()
    counters.clear()
    model, eager = network(), network()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        x = torch.randn(8, 3, 20, 20, device=GPU)
        torch.compiler.cudagraph_mark_step_begin()
        results = []
        for called, owner in ((compiled, model), (eager, eager)):
            owner.zero_grad()
            y = called(x)
            y.pow(3).mean().backward()
            gradients = []
            for parameter in owner.parameters():
                assert parameter.grad is not None
                gradients.append(parameter.grad.clone())
            results.append([y.detach().clone(), *gradients, *owner.buffers()])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()
