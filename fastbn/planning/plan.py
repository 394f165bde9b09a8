"""Tells what the CUDA backend would do with an input, on GPUs that need not be there.

The decisions are those of csrc/cuda/planner, which the backend asks before every launch; here they
are put into words. networks.py does so for all layers of a network.
"""

from __future__ import annotations

import math
import operator
import os
import re
import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import _C
from .._backend import build_info
from .._multiprocessors import free_multiprocessors
from ..activations import IDENTITY, activation_of
from ..ops import CHANNELS_LAST, memory_format_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Op = Literal["forward", "backward", "eval"]
Layout = Literal["contiguous", "channels_last", "generic"]
Algorithm = Literal[
    "auto", "two_pass", "one_block", "persistent_block", "persistent_cluster", "persistent_grid"
]

# Forces an algorithm, for benchmarks.
ALGORITHM_VARIABLE = "FASTBN_CUDA_ALGORITHM"

# What is planned for where neither the caller nor the machine names a GPU.
DEFAULT_DEVICE = "h200"

DTYPES = {
    torch.float64: _C.DType.float64,
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
}
OPS: dict[str, _C.Operation] = {
    "forward": _C.Operation.forward,
    "backward": _C.Operation.backward,
    "eval": _C.Operation.eval,
}
LAYOUTS: dict[str, _C.Layout] = {
    "contiguous": _C.Layout.contiguous,
    "channels_last": _C.Layout.channels_last,
    "generic": _C.Layout.generic,
}

# GPUs by their published properties.
DEVICES = {device.name: device for device in _C.known_devices()}

_VECTOR_BYTES = 16

# Bytes of an activation that the planner's 64-bit sums over several of them are sure to hold.
_LARGEST = 2**56


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Plan:
    """What the CUDA backend does for one call; see :func:`plan`.

    Bytes are those of activations and of masks, which tell backward on which side of a kink the sum
    with a residual was; values per channel are not counted.

    Attributes:
        op: ``forward`` (in training), ``backward`` or ``eval``.
        shape: of the input, (N, C, ...).
        dtype: of the activations.
        layout: how they lie in memory: ``contiguous``, ``channels_last`` (as is every contiguous
            input with one position a sample) or ``generic``.
        activation: the function behind batch norm; ``identity`` for none.
        residual: whether something is added before it.
        device: name of the GPU.
        free_multiprocessors: that ``persistent_grid`` has to leave to kernels of other streams,
            such as those of an all-reduce; see FASTBN_CUDA_FREE_SMS in docs/environment.md.
        algorithm: ``two_pass`` reduces and then applies, in a launch each where both are needed;
            ``one_block`` does both in one; ``persistent_block``, ``persistent_cluster`` and
            ``persistent_grid`` do so too, and keep tensors in the shared memory of a block, of a
            cluster or of blocks all over the device in between; ``elementwise`` applies given
            statistics; ``none`` has nothing to do.
        mapping: what threads share out: ``matrix_columns``, vectors of a ``contiguous`` channel, or
            its elements one by one (``generic``); ``none``.
        launches: kernels launched, one after the other.
        grid: blocks of each launch, ``channel_tiles * splits``, or ``cta_groups * splits`` of a
            persistent algorithm.
        block: threads of each block.
        cluster: blocks that share their memory.
        shared_bytes: shared memory of each block.
        vector_bytes: what a thread reads or writes at once.
        channel_tiles: pieces that the channels are cut into.
        splits: blocks that share the elements of a channel tile.
        cta_groups: channel tiles that a persistent algorithm works on at once; else 0.
        blocks_per_multiprocessor: of a persistent algorithm, that share a multiprocessor's memory
            and registers; else 0.
        bytes_read: by all launches together, from memory or a cache.
        bytes_written: likewise.
        floor_bytes: if each input were read once and each output written once.
        workspace_bytes: device memory for partial results, as long as the call.
        microseconds: of the device's time that the planner's model predicts. It tells plans apart;
            its constants have not been fitted to measurements yet.
        considered: every algorithm that fits, with the microseconds predicted for its best plan.
            Unless one was forced, that of the least time was chosen. Times within 15 % of each
            other count as equal, and the plan that moves the fewest bytes is taken, then one with
            two blocks to a multiprocessor, then a cluster. A grid must be a quarter faster than
            other persistent plans, and take at most an equal time to those that are not.
    """

    op: Op
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    activation: str
    residual: bool
    device: str
    free_multiprocessors: int
    algorithm: str
    mapping: str
    launches: int
    grid: int
    block: int
    cluster: int
    shared_bytes: int
    vector_bytes: int
    channel_tiles: int
    splits: int
    cta_groups: int
    blocks_per_multiprocessor: int
    bytes_read: int
    bytes_written: int
    floor_bytes: int
    workspace_bytes: int
    microseconds: float
    considered: tuple[tuple[str, float], ...]

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written by all launches together."""
        return self.bytes_read + self.bytes_written

    @property
    def bytes_per_element(self) -> float:
        """``bytes_moved`` per element of the input; 0 if it is empty."""
        return self.bytes_moved / max(1, math.prod(self.shape))

    @property
    def floor_per_element(self) -> float:
        """``floor_bytes`` per element of the input; 0 if it is empty."""
        return self.floor_bytes / max(1, math.prod(self.shape))

    @property
    def share(self) -> float:
        """``floor_bytes / bytes_moved``: 1 is as few bytes as the math allows."""
        return self.floor_bytes / self.bytes_moved if self.bytes_moved else 1.0

    def __str__(self) -> str:
        """The plan in a sentence."""
        behind = " and a residual" if self.residual else ""
        behind += f" and {self.activation}" if self.activation != IDENTITY.name else ""
        what = (
            f"{self.op} of {self.shape} {dtype_name(self.dtype)} {self.layout}{behind} on "
            f"{self.device}: "
        )
        if self.launches == 0:
            return what + "nothing to launch."
        times = "1 launch" if self.launches == 1 else f"{self.launches} launches"
        clusters = f" in clusters of {self.cluster}" if self.cluster > 1 else ""
        others = [f"{name} {time:.1f}" for name, time in self.considered if name != self.algorithm]
        return (
            what + f"{self.algorithm} over {self.mapping} in {times} of {self.grid} blocks of "
            f"{self.block} threads{clusters}, {self.vector_bytes} bytes at a time; moves "
            f"{self.bytes_moved / 1e6:.1f} MB, {self.bytes_per_element:.4g} bytes an element, "
            f"where the floor is {self.floor_per_element:g} ({self.share:.0%}); predicted to take "
            f"{self.microseconds:.1f} us" + (f", and {', '.join(others)}." if others else ".")
        )


# The attributes that the planner answers by the same names.
_ANSWERED = tuple(
    field.name for field in fields(Plan)[8:] if field.name not in {"microseconds", "considered"}
)
# The plan for an empty input, and for a gradient that nobody wants.
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(_ANSWERED, 0),
    "algorithm": "none",
    "mapping": "none",
    "microseconds": 0,
    "considered": (),
}


def _choose(what: str, given: str, known: Sequence[str]) -> str:
    if given not in known:
        raise ValueError(f"there is no {what} {given!r}; choose {', '.join(known)}")
    return given


def _dtype(given: torch.dtype | str) -> torch.dtype:
    dtype = given
    if isinstance(given, str):
        dtype = getattr(torch, given.removeprefix("torch."), given)
    elif not isinstance(given, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or its name, not {type(given).__name__}")
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(
            f"batch norm does not take dtype {given}; choose "
            f"{', '.join(dtype_name(known) for known in DTYPES)}"
        )
    return dtype


def _shape(given: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(size) for size in given)
    except TypeError:
        raise TypeError(
            f"x must be a tensor or a shape (N, C, ...) of integers, but got {given!r}"
        ) from None
    if any(size < 0 for size in shape):
        raise ValueError(f"sizes cannot be negative, but got shape {shape}")
    return shape


def _layout_of_tensor(x: Tensor) -> Layout:
    """As ``layout_of`` in csrc/ops/tensors.h has it."""
    memory_format = memory_format_of(x)
    if not x.is_contiguous(memory_format=memory_format):
        return "generic"
    if memory_format != torch.contiguous_format or math.prod(x.shape[2:]) == 1:
        return "channels_last"
    return "contiguous"


def _layout_of_shape(shape: tuple[int, ...], layout: str) -> Layout:
    """The layout of a tensor that was asked to have one."""
    _choose("layout", layout, tuple(LAYOUTS))
    if layout == "generic":
        return "generic"
    if math.prod(shape[2:]) == 1:
        return "channels_last"
    if layout == "contiguous":
        return "contiguous"
    if len(shape) not in CHANNELS_LAST:
        raise ValueError(
            f"channels_last is a memory format of 4-D and 5-D tensors, but got shape {shape}; a "
            "permuted one is generic"
        )
    return "contiguous" if shape[1] == 1 else "channels_last"


def _gpu(index: int | None) -> _C.Device:
    """A GPU of this machine; the current one for None."""
    if build_info()["cuda"] is not None:
        count = torch.cuda.device_count()
        if index is None and count > 0:
            index = torch.cuda.current_device()
        if not 0 <= (index or 0) < count:
            raise ValueError(f"there is no GPU {index or 0} here; GPUs: {count}")
    return _C.device_properties(index or 0)


def _device(given: str | int | torch.device | None, x: Tensor | None) -> _C.Device:
    if given is None:
        if x is not None and x.is_cuda:
            return _gpu(x.device.index)
        if build_info()["cuda"] is not None and torch.cuda.is_available():
            return _gpu(None)
        given = DEFAULT_DEVICE
    if isinstance(given, int):
        return _gpu(given)
    if isinstance(given, str):
        name = re.sub(r"[\s_-]", "", given).lower()
        if name in DEVICES:
            return DEVICES[name]
        if not re.fullmatch(r"cuda(:\d+)?", name):
            raise ValueError(
                f"there is no device {given!r}; choose {', '.join(DEVICES)}, or cuda for a GPU of "
                "this machine"
            )
        given = torch.device(name)
    if not isinstance(given, torch.device):
        raise TypeError(
            f"device must be a name, a torch.device or an index, not {type(given).__name__}"
        )
    if given.type != "cuda":
        raise ValueError(f"only GPUs have plans, but got device {str(given)!r}")
    return _gpu(given.index)


def _ask(request: _C.Request, device: _C.Device, algorithm: str | None) -> _C.Plan:
    """The planner's answer; without an algorithm, the environment may force one."""
    if algorithm is not None:
        return _C.plan(request, device, algorithm)
    given = os.environ.get(ALGORITHM_VARIABLE) or "auto"
    forced = _C.current_name(given)
    if forced != given:
        warnings.warn(f"{ALGORITHM_VARIABLE}={given} is called {forced} now", stacklevel=3)
    try:
        return _C.plan(request, device, forced)
    except ValueError as error:
        raise ValueError(f"{ALGORITHM_VARIABLE}: {error}") from None


def plan(
    x: Tensor | Sequence[int],
    *,
    dtype: torch.dtype | str | None = None,
    layout: Layout | None = None,
    op: Op = "forward",
    device: str | int | torch.device | None = None,
    algorithm: Algorithm | None = None,
    activation: str | None = None,
    residual: bool = False,
    momentum: float | None = 0.1,
    training: bool = True,
    want_dx: bool = True,
    want_dresidual: bool = True,
    want_dweight: bool = True,
    want_dbias: bool = True,
) -> Plan:
    """Tells what the CUDA backend would do: algorithm, launches, bytes moved and their floor.

    Nothing is computed and no GPU is needed; every build can plan for every device. Results and
    gradients are taken to start at multiples of 16 bytes, as newly allocated tensors do.

    Args:
        x: the input, or its shape (N, C, ...). A tensor tells its own dtype, layout, alignment and
            GPU; its values are not looked at. An empty one is planned for too: nothing is launched.
        dtype: of the activations, float64, float32, bfloat16 or float16, or its name; default:
            that of ``x``, for a shape ``torch.get_default_dtype()``.
        layout: ``contiguous``, ``channels_last`` or ``generic``; default: that of ``x``, for a
            shape ``contiguous``. Where both name the same memory, the plan says which the backend
            takes it for: (N, C) is always ``channels_last``.
        op: ``forward`` (in training), ``backward`` or ``eval`` (forward with given statistics).
        device: a name (t4, a100, h100, h200, rtx4090, rtx5090 or b200; case, spaces and dashes do
            not matter), or a GPU of this machine as a ``torch.device``, its name or its index;
            default: that of ``x`` if it is on one, else the current GPU if there is one and this
            build has CUDA kernels, else h200.
        algorithm: one to use whatever it costs, for operations that reduce and then apply, and so
            leave a choice; ``auto`` for the planner's choice; default:
            what the environment variable FASTBN_CUDA_ALGORITHM says, else ``auto``. The backend
            knows the variable alone, and reads it once.
        activation: the function that follows, as :func:`fastbn.batch_norm_act` names it; None for
            none.
        residual: something is added before it.
        momentum: forward: that of the module; only whether it is None matters.
        training: backward: the statistics are those of the batch.
        want_dx: backward: the gradient of the input is needed.
        want_dresidual: backward: that of the residual is, if there is one.
        want_dweight: backward: that of the weight is.
        want_dbias: backward: that of the bias is.

    Raises:
        ValueError: a shape of fewer than two dimensions, or too large for any memory; an unknown
            op, layout, activation, algorithm or device; an unsupported dtype; channels last for
            other than 4-D and 5-D tensors; an algorithm that does not fit.
        TypeError: an argument of another type.
        NotImplementedError: a GPU of this machine in a build without CUDA kernels.
    """
    tensor = x if isinstance(x, torch.Tensor) else None
    shape = _shape(x.shape if isinstance(x, torch.Tensor) else x)
    if len(shape) < 2:
        raise ValueError(f"batch norm takes (N, C, ...) of two dimensions or more, but got {shape}")
    operation = OPS[_choose("op", op, tuple(OPS))]
    default_dtype = torch.get_default_dtype() if tensor is None else tensor.dtype
    dtype = _dtype(default_dtype if dtype is None else dtype)
    if tensor is not None and layout is None:
        layout = _layout_of_tensor(tensor)
    else:
        layout = _layout_of_shape(shape, layout or "contiguous")
    function = activation_of(activation).name
    gpu = _device(device, tensor)
    if math.prod(shape) * dtype.itemsize > _LARGEST:
        raise ValueError(f"no memory holds a tensor of shape {shape}")
    question: dict[str, Any] = {
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "layout": layout,
        "activation": function,
        "residual": residual,
        "device": gpu.name,
        "free_multiprocessors": free_multiprocessors(),
    }
    if 0 in shape:
        return Plan(**question, **_NOTHING)

    request = _C.Request(
        operation, DTYPES[dtype], LAYOUTS[layout], shape[0], shape[1], math.prod(shape[2:])
    )
    # Results start at multiples of a vector: x is out of step with them or is at one too.
    if tensor is not None and tensor.data_ptr() % _VECTOR_BYTES:
        request.aligned = False
    request.cumulative = momentum is None
    request.training = training
    request.set_epilogue(_C.ActivationFunction.__members__[function], residual)
    request.want_dx = want_dx
    request.want_dresidual &= want_dresidual
    request.want_dweight = want_dweight
    request.want_dbias = want_dbias
    request.free_multiprocessors = question["free_multiprocessors"]
    planned = _ask(request, gpu, algorithm)
    if planned.launches == 0:
        return Plan(**question, **_NOTHING)
    considered = tuple(
        (other.algorithm, _microseconds(other)) for other in _C.alternatives(request, gpu)
    )
    answer = {name: getattr(planned, name) for name in _ANSWERED}
    return Plan(**question, **answer, microseconds=_microseconds(planned), considered=considered)


def _microseconds(planned: _C.Plan) -> float:
    return round(planned.seconds * 1e6, 3)
