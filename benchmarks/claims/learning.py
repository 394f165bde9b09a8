"""Claims about training: 1, 2, 3 and 5 train the network of network.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

import torch

from .finding import Finding
from .network import PERCENTILES, History, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from benchmarks.training import Digits


@dataclass(frozen=True)
class Budget:
    """How much to train.

    Attributes:
        seeds: every experiment is repeated with each.
        steps: of a training run for claims 1 and 2.
        sweep_steps: of a run at one learning rate, for claim 3.
        small_steps: of a run on few images, for claim 5.
        every: after so many steps a network is looked at.
        rates: learning rates to try.
        few: images that claim 5 trains on.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 6000
    sweep_steps: int = 1200
    small_steps: int = 1500
    every: int = 20
    rates: tuple[float, ...] = tuple(10 ** (e / 2) for e in range(-6, 5))
    few: int = 200


FULL = Budget()
QUICK = replace(
    FULL, seeds=(0, 1), steps=2500, sweep_steps=400, every=50, rates=(1e-2, 1e-1, 1.0, 10.0)
)

# Of the training runs for claims 1 and 2: the same for both networks, as in the paper.
RATE = 0.5
# From here on a network counts as trained.
TRAINS = 0.9
_NAMES = {False: "plain", True: "batch norm"}
_COLORS = {False: "#d94801", True: "#08519c"}


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, of shares in percent."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.1%} +- {deviation:.1%}"


def pairs(digits: Digits, budget: Budget) -> dict[bool, list[History]]:
    """Plain networks and those with batch norm, trained alike: for claims 1 and 2."""
    return {
        batch_norm: [
            run(
                digits,
                batch_norm=batch_norm,
                rate=RATE,
                steps=budget.steps,
                every=budget.every,
                seed=seed,
            )
            for seed in budget.seeds
        ]
        for batch_norm in (False, True)
    }


def acceleration(trained: dict[bool, list[History]]) -> Finding:
    """Claim 1: steps to the plain network's best test accuracy, at the same learning rate."""
    plain, normalized = trained[False], trained[True]
    ratios, plain_steps, normalized_steps = [], [], []
    for before, after in zip(plain, normalized, strict=True):
        plain_steps.append(before.steps_to(before.best))
        normalized_steps.append(after.steps_to(before.best))
        ratios.append(plain_steps[-1] / normalized_steps[-1])
    fewer = median(ratios)

    def draw(left: Axes, right: Axes) -> None:
        for axes in (left, right):
            for batch_norm, histories in trained.items():
                for i, history in enumerate(histories):
                    label = _NAMES[batch_norm] if i == 0 else None
                    color = _COLORS[batch_norm]
                    axes.plot(history.steps, history.accuracy, color=color, alpha=0.6, label=label)
            axes.set(xlabel="step", ylabel="test accuracy")
            axes.legend(loc="lower right")
        right.set(xlim=(0, max(plain[0].steps) / 10), title="the first tenth")
        left.set_title(f"learning rate {RATE:g}, {len(plain)} seeds")

    return Finding(
        1,
        "Training is accelerated.",
        fewer > 1,
        {
            "times fewer steps, median": fewer,
            "least": min(ratios),
            "most": max(ratios),
            "steps, plain": median(plain_steps),
            "steps, batch norm": median(normalized_steps),
        },
        f"The plain network reached its best test accuracy ({mean(h.best for h in plain):.1%}) "
        f"after {median(plain_steps):.0f} steps, the one with batch norm got there after "
        f"{median(normalized_steps):.0f}: {fewer:.0f} times fewer (between {min(ratios):.0f} and "
        f"{max(ratios):.0f} over the seeds; the paper has 14 on ImageNet).",
        draw,
    )


def _drift(history: History) -> float:
    """How far the median input of a sigmoid wanders while training, in widths of its distribution.

    The standard deviation of the median over time, over the mean distance of the 15th from the 85th
    percentile; the median over all units of the layer.
    """
    inputs = torch.stack(history.inputs)  # (times, percentiles, units)
    width = (inputs[:, 2] - inputs[:, 0]).mean(0)
    return float((inputs[:, 1].std(0) / width).median())


def covariate_shift(trained: dict[bool, list[History]]) -> Finding:
    """Claim 2: percentiles of what goes into the last hidden layer's sigmoids, over training."""
    drifts = {kind: [_drift(history) for history in trained[kind]] for kind in trained}
    plain, normalized = median(drifts[False]), median(drifts[True])

    def draw(left: Axes, right: Axes) -> None:
        for axes, batch_norm in ((left, False), (right, True)):
            history = trained[batch_norm][0]
            unit = torch.stack(history.inputs)[:, :, 0]
            for i, share in enumerate(PERCENTILES):
                label = f"{share:.0%} lie below"
                axes.plot(
                    history.steps,
                    unit[:, i],
                    color=_COLORS[batch_norm],
                    label=label,
                    linestyle=(":", "-", "--")[i],
                )
            axes.set(xlabel="step", ylabel="input of a sigmoid", title=_NAMES[batch_norm])
            axes.legend()

    return Finding(
        2,
        "Internal covariate shift is suppressed.",
        normalized < plain,
        {"drift, plain": plain, "drift, batch norm": normalized},
        "While training, the median input of a sigmoid in the last hidden layer wandered by "
        f"{plain:.2f} widths of its distribution in the plain network and by {normalized:.2f} with "
        "batch norm (standard deviation over time; width from the 15th to the 85th percentile).",
        draw,
    )


def learning_rates(digits: Digits, budget: Budget) -> Finding:
    """Claim 3: accuracy over learning rates, and the largest that still trains."""
    reached: dict[bool, list[list[float]]] = {}
    for batch_norm in (False, True):
        reached[batch_norm] = [
            [
                run(
                    digits,
                    batch_norm=batch_norm,
                    rate=rate,
                    steps=budget.sweep_steps,
                    every=budget.sweep_steps,
                    seed=seed,
                ).accuracy[-1]
                for seed in budget.seeds
            ]
            for rate in budget.rates
        ]
    largest = {}
    for batch_norm, accuracies in reached.items():
        trains = [
            rate
            for rate, values in zip(budget.rates, accuracies, strict=True)
            if median(values) >= TRAINS
        ]
        largest[batch_norm] = max(trains, default=0.0)

    def draw(left: Axes, right: Axes) -> None:
        for batch_norm, accuracies in reached.items():
            middle = [median(values) for values in accuracies]
            low, high = [min(v) for v in accuracies], [max(v) for v in accuracies]
            color = _COLORS[batch_norm]
            left.semilogx(budget.rates, middle, "o-", color=color, label=_NAMES[batch_norm])
            left.fill_between(budget.rates, low, high, color=color, alpha=0.2)
        left.axhline(TRAINS, color="gray", linestyle=":")
        left.set(xlabel="learning rate", ylabel=f"test accuracy after {budget.sweep_steps} steps")
        left.legend()
        right.bar(
            list(_NAMES.values()),
            [largest[kind] for kind in _NAMES],
            color=[_COLORS[kind] for kind in _NAMES],
        )
        right.set(ylabel=f"largest learning rate that reaches {TRAINS:.0%}")

    return Finding(
        3,
        "Higher learning rates do not lead to divergence.",
        largest[True] > largest[False],
        {"largest rate, plain": largest[False], "largest rate, batch norm": largest[True]},
        f"In {budget.sweep_steps} steps the plain network reached {TRAINS:.0%} at learning rates "
        + (f"up to {largest[False]:.3g}" if largest[False] else "in no case")
        + f", the one with batch norm at rates up to {largest[True]:.3g} (of those tried, "
        f"{budget.rates[0]:.3g} to {budget.rates[-1]:.3g}; median of {len(budget.seeds)} seeds).",
        draw,
    )


def regularization(digits: Digits, budget: Budget) -> Finding:
    """Claim 5: test accuracy after training on few images, with and without dropout."""
    few = replace(
        digits,
        train_images=digits.train_images[: budget.few],
        train_labels=digits.train_labels[: budget.few],
    )
    kinds = {
        "plain": (False, False),
        "dropout": (False, True),
        "batch norm": (True, False),
        "batch norm\nand dropout": (True, True),
    }
    accuracies: dict[str, list[float]] = {}
    for name, (batch_norm, dropout) in kinds.items():
        # Each is given the steps it needs: without batch norm that is several times as many.
        steps = budget.small_steps * (1 if batch_norm else 5)
        accuracies[name] = [
            run(
                few,
                batch_norm=batch_norm,
                dropout=dropout,
                rate=RATE,
                steps=steps,
                every=steps,
                seed=seed,
            ).accuracy[-1]
            for seed in budget.seeds
        ]
    means = {name: mean(values) for name, values in accuracies.items()}
    gained = {
        "without batch norm": means["dropout"] - means["plain"],
        "with it": means["batch norm\nand dropout"] - means["batch norm"],
    }
    held = means["batch norm"] > means["plain"] and (
        gained["with it"] < gained["without batch norm"]
    )

    def draw(left: Axes, right: Axes) -> None:
        names = list(kinds)
        for axes in (left, right):
            for i, name in enumerate(names):
                axes.plot([i] * len(accuracies[name]), accuracies[name], "o", color="gray")
            axes.bar(
                range(len(names)),
                [means[name] for name in names],
                color=["#fdae6b", "#d94801", "#6baed6", "#08519c"],
                alpha=0.8,
            )
            axes.set_xticks(range(len(names)), names)
            axes.set_ylabel("test accuracy")
        low = min(min(values) for values in accuracies.values())
        right.set_ylim(math.floor(low * 50) / 50 - 0.02, 1)
        left.set_title(f"trained on {budget.few} images")
        right.set_title("the upper end")

    return Finding(
        5,
        "It regularizes, reducing the need for dropout.",
        held,
        {
            **{f"accuracy, {name}".replace("\n", " "): value for name, value in means.items()},
            **{f"gained by dropout {name}": value for name, value in gained.items()},
        },
        f"Trained on {budget.few} images, test accuracy was "
        + ", ".join(
            f"{_spread(values)} {'with ' if name != 'plain' else ''}{name}".replace("\n", " ")
            for name, values in accuracies.items()
        )
        + f" ({len(budget.seeds)} seeds).",
        draw,
    )
