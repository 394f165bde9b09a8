"""A comparison that fails says where: the tests themselves are tested here."""

from __future__ import annotations

import pytest
import torch

from tests.support.oracle import Expected
from tests.support.tolerances import assert_near


def expected(value: torch.Tensor) -> Expected:
    """Of terms of size one."""
    ones = torch.ones_like(value)
    return Expected(value.double(), ones.double(), 0 * ones.double())


def test_wrong_elements_are_named_by_their_coordinates() -> None:
    exact = torch.randn(2, 5, 3, 4)
    found = exact.clone()
    found[1, 3, 2, 1] += 0.5
    found[0, 3, 0, 0] += 0.25
    found[0, 1, 0, 0] = torch.nan
    with pytest.raises(AssertionError) as caught:
        assert_near(found, expected(exact), "y")
    words = str(caught.value)
    assert "y: 3 of 120 elements are off, in 2 of 5 channels: 1 (1), 3 (2); " in words
    # What is not a number is as wrong as can be.
    assert "the worst, at n=0, c=1, position=[0, 0], is nan instead of " in words
    found[0, 1] = exact[0, 1]
    with pytest.raises(AssertionError, match=r"the worst, at n=1, c=3, position=\[2, 1\], is "):
        assert_near(found, expected(exact), "y")


def test_wrong_elements_of_vectors_and_matrices() -> None:
    exact = torch.randn(30)
    found = exact + 1
    with pytest.raises(AssertionError, match=r"30 of 30 channels: 0 \(1\).*, and 18 more; .*c="):
        assert_near(found, expected(exact), "mean")
    exact = torch.randn(3, 4)
    found = exact.clone()
    found[2, 1] += 1
    with pytest.raises(AssertionError, match="the worst, at n=2, c=1, is "):
        assert_near(found, expected(exact), "y")


def test_rounding_to_the_dtype_of_the_result_is_allowed() -> None:
    exact = torch.randn(4, 3, 5)
    assert_near(exact.bfloat16(), expected(exact), "y")
    with pytest.raises(AssertionError):
        assert_near(exact.bfloat16().float(), expected(exact), "y")
