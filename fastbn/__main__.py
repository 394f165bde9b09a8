"""``python -m fastbn``: what is installed, whether it computes right, and what GPUs would do."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from . import composite
from ._backend import build_info, cpu_capability
from .functional import batch_norm
from .planning.cli import add_plan_options, show_plans

# Largest error of the self-check that passes, relative to the largest value: the resolution of the
# dtype, and for float32 what its sums may lose.
_TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}


def _outputs(x: torch.Tensor, dy: torch.Tensor, reference: bool) -> list[torch.Tensor]:
    """Forward in training and its three gradients; the reference is composed in x's dtype."""
    channels = x.shape[1]
    narrow = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = torch.linspace(0.5, 1.5, channels, dtype=narrow, device=x.device).requires_grad_()
    bias = torch.linspace(-1, 1, channels, dtype=narrow, device=x.device).requires_grad_()
    x = x.detach().requires_grad_()
    if reference:
        y = composite.batch_norm(x, weight, bias, None, None, None, True, 0.1, 1e-5)
    else:
        y = batch_norm(x, None, None, weight, bias, True)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)]


def self_check(device: str) -> dict[str, float]:
    """Compares forward and backward with float64.

    Args:
        device: where to compute.

    Returns:
        For each dtype the largest error of y, dx, dweight and dbias over contiguous and
        channels-last inputs, relative to the largest value of each.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (4, 17, 9, 11)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    errors = {}
    for dtype in _TOLERANCES:
        worst = 0.0
        for layout in (torch.contiguous_format, torch.channels_last):
            x_given = x.to(device, dtype).contiguous(memory_format=layout)
            dy_given = dy.to(device, dtype).contiguous(memory_format=layout)
            computed = _outputs(x_given, dy_given, reference=False)
            exact = _outputs(x_given.double().cpu(), dy_given.double().cpu(), reference=True)
            for value, truth in zip(computed, exact, strict=True):
                error = (value.double().cpu() - truth).abs().max() / truth.abs().max()
                worst = max(worst, float(error))
        errors[str(dtype).removeprefix("torch.")] = worst
    return errors


def info() -> int:
    """Prints the report; returns 1 if the self-check fails."""
    build = build_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = {
        "fastbn": build["fastbn"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "built for torch": build["torch"],
        "CUDA kernels": f"CUDA {build['cuda']}" if build["cuda"] else "none (CPU build)",
        "architectures": build["architectures"] or "none",
        "compiler": build["compiler"],
        "commit": build["commit"],
        "CPU": f"{platform.machine()}, loops for {cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
        "GPU": gpu,
    }
    for name, value in rows.items():
        print(f"{name:16} {value}")
    failed = False
    devices = ["cpu", "cuda"] if build["cuda"] and torch.cuda.is_available() else ["cpu"]
    for device in devices:
        print(f"self-check on {device}: largest error of forward and backward against float64")
        for name, error in self_check(device).items():
            passed = error <= _TOLERANCES[getattr(torch, name)]
            failed |= not passed
            print(f"  {name:14} {error:.1e}  {'ok' if passed else 'WRONG'}")
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; without one, ``info``."""
    parser = argparse.ArgumentParser(prog="python -m fastbn", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("info", help="versions, build, device and self-check (the default)")
    plans = commands.add_parser(
        "plan",
        help="what the CUDA kernels would do for the layers of a network, on any GPU",
        description="Algorithm, launches and bytes moved for every batch norm of a network, with "
        "the floor: the bytes if each input were read once and each output written once.",
    )
    add_plan_options(plans)
    options = parser.parse_args(arguments)
    if options.command == "plan":
        try:
            return show_plans(options)
        except (ValueError, NotImplementedError) as error:
            plans.error(str(error))
    return info()


if __name__ == "__main__":
    sys.exit(main())
