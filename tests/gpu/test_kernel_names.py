"""Kernels are told apart by name, as profilers spell them."""

from __future__ import annotations

from tests.support.devices import only_fastbn, short_name

# What a forward puts on a GPU where torch must be deterministic: it fills all new memory.
FILL = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
    "std::array<char*, 1ul> >(int, at::native::FillFunctor<float>, std::array<char*, 1ul>)"
)
REDUCE, APPLY = (
    f"void fastbn::cuda::two_pass_forward_{step}<fastbn::cuda::Contiguous<float, 4> >"
    "(fastbn::TrainingForward, fastbn::cuda::Geometry, fastbn::cuda::Workspace)"
    for step in ("reduce", "apply")
)


def test_kernels_are_found_between_those_of_torch() -> None:
    names = [short_name(name) for name in (FILL, FILL, REDUCE, APPLY, FILL)]
    assert names[0] == FILL
    assert only_fastbn(names) == [
        "fastbn::two_pass_forward_reduce",
        "fastbn::two_pass_forward_apply",
    ]
