"""Claims about the operation itself: 4, 6, 7 and 8 need no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

import fastbn

from .finding import Finding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

EPS = 1e-5
# As good as none, which batch norm does not take: less than the last place of any variance here.
NO_EPS = 1e-30


def _distance(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((value - truth).abs().max() / truth.abs().max())


def _gradients(weight: Tensor, u: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """BN(Wu) of u (N, inputs) and its gradients to W (outputs, inputs) and to u, given dy."""
    weight, u = (t.detach().requires_grad_() for t in (weight, u))
    y = fastbn.batch_norm(u @ weight.t(), None, None, training=True, eps=eps)
    dweight, du = torch.autograd.grad(y, (weight, u), dy)
    return y.detach(), dweight, du


def scale_of_weights() -> Finding:
    """Claim 4, for scales from 1e-3 to 1e3 in float64."""
    generator = torch.Generator().manual_seed(0)
    weight, u, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((100, 64), (60, 64), (60, 100))
    )
    scales = [10 ** (exponent / 2) for exponent in range(-6, 7)]
    names = ("BN((aW)u) against BN(Wu)", "gradient to u", "a times gradient to aW")
    errors: dict[float, dict[str, list[float]]] = {}
    for eps in (NO_EPS, EPS):
        y, dweight, du = _gradients(weight, u, dy, eps)
        errors[eps] = {name: [] for name in names}
        for scale in scales:
            scaled_y, scaled_dweight, scaled_du = _gradients(scale * weight, u, dy, eps)
            found = ((scaled_y, y), (scaled_du, du), (scale * scaled_dweight, dweight))
            for name, (value, truth) in zip(names, found, strict=True):
                errors[eps][name].append(_distance(value, truth))
    worst = max(max(values) for values in errors[NO_EPS].values())
    with_eps = max(max(values) for values in errors[EPS].values())

    def draw(left: Axes, right: Axes) -> None:
        for axes, eps in ((left, NO_EPS), (right, EPS)):
            for name, marker in zip(names, "osx", strict=True):
                values = [max(value, 1e-17) for value in errors[eps][name]]
                axes.loglog(scales, values, marker=marker, label=name)
            axes.set(xlabel="scale a of the weights", ylabel="relative difference")
            axes.set_title(f"eps = {eps:g}")
            axes.set_ylim(1e-18, 10)
            axes.legend()

    return Finding(
        4,
        "Gradients do not depend on the scale of the weights.",
        worst < 1e-12,
        {"worst relative difference": worst, f"with eps = {EPS:g}": with_eps},
        "For scales from 0.001 to 1000, BN((aW)u), its gradient to u and a times that to aW differ "
        f"from those at a = 1 by {worst:.1e} at most, which is rounding, where eps is next to "
        f"nothing. With the usual eps of {EPS:g} small scales make it matter: up to {with_eps:.1e} "
        "at a = 0.001.",
        draw,
    )


def identity() -> Finding:
    """Claim 6: the error in units of the last place of the channel's largest value."""
    generator = torch.Generator().manual_seed(0)
    figures: dict[str, float] = {}
    shown: dict[str, tuple[Tensor, Tensor]] = {}
    for dtype in (torch.float64, torch.float32):
        x = torch.randn((256, 100), generator=generator, dtype=torch.float64)
        x = (x * torch.linspace(0.1, 10, 100) + torch.linspace(-3, 3, 100)).to(dtype)
        mean, var = x.mean(0), x.var(0, unbiased=False)
        gamma, beta = (var + EPS).sqrt(), mean
        restored = fastbn.batch_norm(x, None, None, gamma, beta, True, eps=EPS)
        unit = torch.finfo(dtype).eps * x.abs().amax(0)
        name = str(dtype).removeprefix("torch.")
        figures[name] = float(((restored - x).abs() / unit).max())
        shown[name] = (x, restored)

    def draw(left: Axes, right: Axes) -> None:
        x, restored = shown["float32"]
        left.plot(x[:, ::9].flatten(), restored[:, ::9].flatten(), ".", markersize=3)
        left.set(xlabel="input", ylabel="output", title="gamma = sqrt(var + eps), beta = mean")
        unit = torch.finfo(torch.float32).eps * x.abs().amax(0)
        right.hist(((restored - x).abs() / unit).flatten().tolist(), bins=40, log=True)
        right.set(xlabel="error, units in the last place", ylabel="elements", title="float32")

    return Finding(
        6,
        "Scale and shift can restore the identity.",
        max(figures.values()) <= 4,
        {f"units in the last place, {name}": value for name, value in figures.items()},
        "With gamma = sqrt(var + eps) and beta = mean the output is the input to within "
        + " and ".join(
            f"{value:.1f} units in the last place in {n}" for n, value in figures.items()
        )
        + ".",
        draw,
    )


def outside_the_gradient(steps: int = 2000) -> Finding:
    """Claim 7: a learned bias b before x - E[x], with a gradient that takes E[x] for a constant."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn((512, 1), generator=generator, dtype=torch.float64)
    target = u.clone().mul_(0.5).add_(1)  # the mean is out of reach, as no shift follows
    rate = 0.1
    histories: dict[str, tuple[list[float], list[float]]] = {}
    for name in ("outside", "inside"):
        bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        values, losses = [], []
        for _ in range(steps):
            x = u + bias
            if name == "outside":
                normalized = x - x.mean().detach()
            else:
                normalized = fastbn.batch_norm(x, None, None, training=True)
            loss = (normalized - target).square().mean()
            (gradient,) = torch.autograd.grad(loss, bias)
            with torch.no_grad():
                bias -= rate * gradient
            values.append(float(bias.detach().abs()))
            losses.append(float(loss.detach()))
        histories[name] = (values, losses)
    (grown, outside_losses), (still, _) = histories["outside"], histories["inside"]
    change = abs(outside_losses[-1] / outside_losses[0] - 1)

    def draw(left: Axes, right: Axes) -> None:
        labels = {"outside": "normalized outside the gradient", "inside": "batch norm (fastbn)"}
        for name, (values, losses) in histories.items():
            style = "--" if name == "inside" else "-"  # the losses lie on each other
            left.plot(values, style, label=labels[name])
            right.plot(losses, style, label=labels[name])
        left.set(xlabel="step", ylabel="absolute value of the bias")
        highest = max(max(losses) for _, losses in histories.values())
        right.set(xlabel="step", ylabel="loss", ylim=(0, 1.2 * highest))
        for axes in (left, right):
            axes.legend()

    return Finding(
        7,
        "Normalizing outside the gradient step blows up.",
        grown[-1] > 100 and change < 1e-9 and still[-1] < 1e-9,
        {"bias outside": grown[-1], "bias inside": still[-1], "change of the loss": change},
        f"When the gradient ignores the normalization, the bias grows by {grown[-1] / steps:.2f} a "
        f"step, to {grown[-1]:.0f} after {steps}, and the loss stays where it was (to "
        f"{change:.0e}). Through batch norm its gradient is 0: it stays at {still[-1]:.0e}.",
        draw,
    )


# Shape and memory format of inputs.
_INPUTS = {
    "(N, C)": ((128, 16), torch.contiguous_format),
    "(N, C, L)": ((32, 16, 50), torch.contiguous_format),
    "(N, C, H, W)": ((16, 16, 12, 10), torch.contiguous_format),
    "(N, C, H, W), channels last": ((16, 16, 12, 10), torch.channels_last),
    "(N, C, D, H, W)": ((8, 16, 5, 6, 7), torch.contiguous_format),
    "(N, C, D, H, W), channels last": ((8, 16, 5, 6, 7), torch.channels_last_3d),
}
_MODULES = {
    2: fastbn.BatchNorm1d,
    3: fastbn.BatchNorm1d,
    4: fastbn.BatchNorm2d,
    5: fastbn.BatchNorm3d,
}


def each_feature_on_its_own() -> Finding:
    """Claim 8: mean and variance of each channel of the output, by layout, in float32."""
    generator = torch.Generator().manual_seed(0)
    means: dict[str, list[float]] = {}
    variances: dict[str, list[float]] = {}
    for name, (shape, memory_format) in _INPUTS.items():
        module: nn.Module = _MODULES[len(shape)](shape[1], eps=NO_EPS)
        per_channel = (1, -1, *[1] * (len(shape) - 2))
        deviation = torch.logspace(-2, 2, shape[1]).reshape(per_channel)
        x = torch.randn(shape, generator=generator) * deviation + deviation.flip(1)
        y = module(x.contiguous(memory_format=memory_format)).detach().double()
        others = [d for d in range(y.dim()) if d != 1]
        means[name] = y.mean(others).tolist()
        variances[name] = y.var(others, unbiased=False).tolist()
    worst_mean = max(abs(value) for values in means.values() for value in values)
    worst_var = max(abs(value - 1) for values in variances.values() for value in values)

    def draw(left: Axes, right: Axes) -> None:
        for name in _INPUTS:
            left.plot(means[name], ".-", label=name)
            right.plot([value - 1 for value in variances[name]], ".-", label=name)
        left.set(xlabel="channel", ylabel="mean of the output")
        right.set(xlabel="channel", ylabel="variance of the output, less 1")
        right.legend(fontsize=8)

    return Finding(
        8,
        "Each feature is normalized on its own.",
        worst_mean < 1e-4 and worst_var < 1e-4,
        {"largest mean": worst_mean, "largest error of a variance": worst_var},
        "Whatever the layout, channels whose deviations span 0.01 to 100 come out with means "
        f"within {worst_mean:.0e} of 0 and variances within {worst_var:.0e} of 1.",
        draw,
    )
