"""Times a training step of whole networks, with one batch norm or another in them."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import fastbn

from .cases import NETWORK_NAMES
from .memory import peak_bytes
from .rows import Row, Subject, exact
from .timing import measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.profiler.profiler import _KinetoProfile

# By device: batch and width of the images, first without --quick and then with it.
_SIZES = {"cpu": ((8, 224), (4, 128)), "cuda": ((256, 224), (64, 224))}
# By device: dtypes, which below float32 are autocast's, and layouts.
_SETTINGS = {
    "cpu": ((torch.float32, "channels_last"), (torch.bfloat16, "channels_last")),
    "cuda": ((torch.bfloat16, "channels_last"),),
}
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_CLASSES = 1000
# Errors of gradients that count as right: so many times stock's, plus the tolerance of the dtype.
_WORSE_THAN_STOCK = 2
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-6}
# Images to compare on, so that float64 has room.
_CHECKED = 8
# By device: steps between two looks at the clock. A GPU must be waited for at each.
_STEPS = {"cpu": 1, "cuda": 5}

# The variant inside fastbn.recompute_activations().
_RECOMPUTING = "fastbn fused, recomputing"

_BATCH_NORM = re.compile(r"(aten|fastbn)::.*batch_norm")
_COMPILED_BATCH_NORM = re.compile(r"triton.*batch_norm")


def _resnet50() -> nn.Module:
    """ResNet-50 with random weights, in its standard configuration."""
    from transformers import ResNetConfig, ResNetForImageClassification

    configuration: Any = ResNetConfig  # its arguments are those of a base class, unannotated
    model: nn.Module = ResNetForImageClassification(configuration(num_labels=_CLASSES))
    return model


def _efficientnet_b0() -> nn.Module:
    """EfficientNet-B0 with random weights, and nothing dropped: every step computes the same."""
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    configuration: Any = EfficientNetConfig
    b0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    dropped = {"dropout_rate": 0.0, "drop_connect_rate": 0.0}
    model: nn.Module = EfficientNetForImageClassification(
        configuration(num_labels=_CLASSES, **b0, **dropped)
    )
    return model


# By their names in rows; the first alone with --quick.
_MAKERS = {"resnet50": _resnet50, "efficientnet_b0": _efficientnet_b0}


class Training:
    """Steps of SGD on one batch.

    Attributes:
        model: what is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        recompute: bool = False,
    ) -> None:
        self.model = model.train()
        self._images, self._labels = images, labels
        self._dtype = dtype
        self._activations = fastbn.recompute_activations if recompute else nullcontext
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        """Cross-entropy of a training forward."""
        autocast: Any = nullcontext()
        if self._dtype.itemsize < 4:
            autocast = torch.autocast(self._images.device.type, self._dtype)
        with autocast, self._activations():
            loss: Tensor = self.model(self._images, labels=self._labels).loss
        return loss

    def step(self) -> None:
        """Forward, backward and an update."""
        self._optimizer.zero_grad()
        self.loss().backward()
        self._optimizer.step()

    def steps(self, count: int) -> None:
        """Several steps, to the end of the last one."""
        for _ in range(count):
            self.step()
        if self._images.is_cuda:
            torch.cuda.synchronize()


def _variants(model: nn.Module, compiled: bool) -> dict[str, nn.Module]:
    """A network in all the ways to train it."""
    variants: dict[str, nn.Module] = {
        "fastbn": fastbn.convert(copy.deepcopy(model)),
        "fastbn fused": fastbn.fuse(copy.deepcopy(model)),
        _RECOMPUTING: fastbn.fuse(copy.deepcopy(model)),
        "stock": copy.deepcopy(model),
    }
    if compiled:
        torch._dynamo.reset()
        for name in ("fastbn fused", "stock"):
            original: Any = copy.deepcopy(variants[name])
            compiled_model: Any = torch.compile(original, dynamic=False)
            variants[f"{name} compiled"] = compiled_model
    return variants


def _share_of_batch_norm(call: Callable[[], object], device: str) -> float | None:
    """The share of batch norm in the time of all operators or, on a GPU, of all kernels.

    None where the profiler does not tell which are those of batch norm.
    """
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        call()
    return _share(profiled, device)


def _share(profiled: _KinetoProfile, device: str) -> float | None:
    averages = profiled.key_averages()
    on_host = [event for event in averages if event.device_type == DeviceType.CPU]
    own = [event for event in on_host if _BATCH_NORM.search(event.key)]
    if device == "cpu":
        seconds = sum(event.self_cpu_time_total for event in own)
        total = sum(event.self_cpu_time_total for event in on_host)
    else:
        # What programs annotate covers kernels that are there themselves.
        kernels = [
            event
            for event in averages
            if event.device_type != DeviceType.CPU and not event.is_user_annotation
        ]
        seconds = sum(event.self_device_time_total for event in own)
        seconds += sum(
            event.self_device_time_total
            for event in kernels
            if _COMPILED_BATCH_NORM.search(event.key)
        )
        total = sum(event.self_device_time_total for event in kernels)
    return seconds / total if seconds else None


def _gradients(training: Training) -> list[Tensor]:
    """The gradients of the first and last parameters, with all of the network between them."""
    parameters = list(training.model.parameters())
    wanted = (parameters[0], parameters[-2])
    return [g.double() for g in torch.autograd.grad(training.loss(), wanted)]


def _errors(training: Training, exact: list[Tensor]) -> list[float]:
    """Errors of gradients, relative to their size."""
    found = _gradients(training)
    return [float((g - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True)]


def _wrong(errors: dict[str, list[float]], what: str, dtype: torch.dtype) -> dict[str, str]:
    """A sentence for each variant whose gradients are further off than stock's may be."""
    allowed = [_WORSE_THAN_STOCK * error + _TOLERANCES[dtype] for error in errors["stock"]]
    return {
        name: f"{name}, {what}: gradients are off by "
        + " and ".join(f"{error:.0e}" for error in own)
        + " of their size, stock's by "
        + " and ".join(f"{error:.0e}" for error in errors["stock"])
        for name, own in errors.items()
        # Written so that NaN fails too.
        if not all(error <= most for error, most in zip(own, allowed, strict=True))
    }


@dataclass(frozen=True)
class _Batch:
    """What a network is trained on."""

    images: Tensor
    labels: Tensor

    def training(self, name: str, model: nn.Module, setting: tuple[torch.dtype, str]) -> Training:
        dtype, layout = setting
        images = self.images.to(memory_format=_FORMATS[layout])
        return Training(model, images, self.labels, dtype, recompute=name == _RECOMPUTING)

    def few(self) -> _Batch:
        """As many as are compared."""
        return _Batch(self.images[:_CHECKED], self.labels[:_CHECKED])


def _measure_setting(
    network: str,
    original: nn.Module,
    batch: _Batch,
    exact_gradients: list[Tensor],
    setting: tuple[torch.dtype, str],
    compiled: bool,
    budget: float,
) -> tuple[list[Row], list[str]]:
    """Rows of all variants of a network that are right, and a sentence for each that is wrong."""
    dtype, layout = setting
    model: Any = copy.deepcopy(original)
    variants = _variants(model.to(memory_format=_FORMATS[layout]), compiled)
    errors = {
        name: _errors(batch.few().training(name, variant, setting), exact_gradients)
        for name, variant in variants.items()
    }
    wrong = _wrong(errors, f"{NETWORK_NAMES[network]} in {dtype}", dtype)
    trainings = {
        name: batch.training(name, variant, setting)
        for name, variant in variants.items()
        if name not in wrong
    }
    subject = partial(
        Subject,
        benchmark="model",
        shapes=network,
        shape="x".join(map(str, batch.images.shape)),
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
    )
    device = batch.images.device.type
    count = _STEPS[device]
    runs = {name: partial(training.steps, count) for name, training in trainings.items()}
    rows = [
        Row(subject(measured="step"), name, timing.divided(count))
        for name, timing in measure(runs, budget).items()
    ]
    for name, training in trainings.items():
        peak = peak_bytes(training.step, device)
        rows.append(Row(subject(measured="peak", unit="bytes"), name, exact(peak)))
        share = _share_of_batch_norm(partial(training.steps, 1), device)
        if share is not None:
            rows.append(Row(subject(measured="batch norm", unit="share"), name, exact(share)))
    return rows, list(wrong.values())


def measure_model(
    device: str, *, quick: bool, compiled: bool, budget: float
) -> tuple[list[Row], list[str]]:
    """Times steps of all variants in turns, after checking gradients against float64's.

    Args:
        device: where to train.
        quick: ResNet-50 alone, on fewer and smaller images.
        compiled: what torch.compile makes of the networks as well, which takes minutes.
        budget: seconds for each setting.

    Returns:
        Rows of seconds a step, of the share that batch norm has of it, and of memory; and a
        sentence for each variant that was wrong.

    Raises:
        ImportError: transformers is not installed.
    """
    size, width = _SIZES[device][quick]
    makers = list(_MAKERS.items())[: 1 if quick else None]
    settings = _SETTINGS[device][: 1 if quick else None]
    rows: list[Row] = []
    wrong: list[str] = []
    progress = tqdm(total=len(makers) * len(settings), desc="model", unit="setting")
    for network, make in makers:
        torch.manual_seed(0)
        original = make().to(device)
        images = torch.randn(size, 3, width, width, device=device)
        batch = _Batch(images, torch.randint(_CLASSES, (size,), device=device))
        few = batch.few()
        exact_gradients = _gradients(
            Training(
                copy.deepcopy(original).double(), few.images.double(), few.labels, torch.float64
            )
        )
        for setting in settings:
            found, sentences = _measure_setting(
                network, original, batch, exact_gradients, setting, compiled, budget
            )
            rows += found
            wrong += sentences
            progress.update()
    progress.close()
    return rows, wrong
