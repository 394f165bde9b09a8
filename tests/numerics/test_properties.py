"""Shapes and strides that nobody thought of: a search for failing cases outside of the table."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.case_checks import check
from tests.support.tables import DTYPES, LAYOUTS, MATRIX_LAYOUTS, Tensors, as_it_lies

# Found examples are not kept and the search is the same every time: a failure must not depend on
# who ran the tests before.
thorough = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """(N, C, ...) with more than one value per channel: a view of larger memory.

    Dimensions lie in memory in any order, each may be stepped over, and one may be expanded.
    """
    rank = draw(st.integers(2, 6))
    shape = draw(st.lists(st.integers(1, 7), min_size=rank, max_size=rank))
    # Where the longest dimension is decides which loop runs; let it be long enough to matter.
    long = draw(st.integers(0, rank - 1))
    shape[long] += draw(st.sampled_from([0, 9, 33, 70]))
    if torch.Size(shape).numel() == shape[1]:
        shape[0] += 1
    order = draw(st.permutations(range(rank)))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=rank, max_size=rank))
    expand = draw(st.one_of(st.none(), st.integers(0, rank - 1)))
    offset = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from(DTYPES))

    sizes = [shape[d] * steps[d] for d in order]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    memory = torch.randn(offset + torch.Size(sizes).numel(), generator=generator).to(dtype)
    inverse = [order.index(d) for d in range(rank)]
    view = memory[offset:].view(sizes).permute(inverse)
    view = view[tuple(slice(None, None, step) for step in steps)]
    if expand is not None:
        view = view.narrow(expand, 0, 1).expand(shape)
    assert view.shape == tuple(shape)
    return view


@thorough
@given(
    x=strided(),
    dy_layout=st.sampled_from(MATRIX_LAYOUTS),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_strides(
    x: torch.Tensor, dy_layout: str, training: bool, seed: int, device: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias, mean, var = torch.randn(4, x.shape[1], generator=generator).to(wide)
    dy = LAYOUTS[dy_layout](torch.randn(x.shape, generator=generator).to(x.dtype))
    vectors = (vector.to(device) for vector in (weight, bias, mean, var.abs() + 0.5))
    tensors = Tensors(as_it_lies(x, device), as_it_lies(dy, device), *vectors)
    # Where there are few values, most of them may lie far off their mean; see tolerances.CONDITION.
    check(tensors, training, condition=5.0)
