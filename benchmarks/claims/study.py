"""``python -m benchmarks claims``: runs all experiments, and writes claims.md and its pictures."""

from __future__ import annotations

import json
import platform
import time
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

from benchmarks.machine import environment
from benchmarks.training import load

from . import arithmetic, learning

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .finding import Finding

mpl.use("Agg")
_STYLE: Any = {"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
COUNT = 8


def findings(budget: learning.Budget) -> Iterator[Finding]:
    """All eight, in the order of their numbers but for those that share training runs."""
    digits = load("cpu")
    trained = learning.pairs(digits, budget)
    yield learning.acceleration(trained)
    yield learning.covariate_shift(trained)
    yield learning.learning_rates(digits, budget)
    yield arithmetic.scale_of_weights()
    yield learning.regularization(digits, budget)
    yield arithmetic.identity()
    yield arithmetic.outside_the_gradient()
    yield arithmetic.each_feature_on_its_own()


def picture(finding: Finding, path: Path) -> None:
    """Draws a finding, at the size of a README."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        finding.draw(left, right)
        figure.suptitle(f"{finding.number}. {finding.claim} {finding.verdict.capitalize()}.")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def document(found: list[Finding], seconds: float, pictures: bool) -> str:
    """The text of claims.md."""
    lines = [
        "# The article's claims, put to the test",
        "",
        "With fastbn's modules, scikit-learn's handwritten digits and the network of the MNIST "
        "experiment in the",
        "original paper: three hidden layers of 100 sigmoid units, batches of 60. Written by",
        f"`python -m benchmarks claims` in {seconds:.0f} s on {platform.machine()} with torch "
        f"{torch.__version__}.",
    ]
    for finding in found:
        lines += ["", f"## {finding.number}. {finding.claim} {finding.verdict.capitalize()}.", ""]
        lines += [finding.sentence, "", "| figure | |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in finding.figures.items()]
        if pictures:
            lines += ["", f"![claim {finding.number}](claim{finding.number}.png)"]
    return "\n".join(lines) + "\n"


def write_json(found: list[Finding], path: Path) -> None:
    """Writes all but the pictures, and where it was measured."""
    findings = [
        {
            "number": finding.number,
            "claim": finding.claim,
            "verdict": finding.verdict,
            "sentence": finding.sentence,
            "figures": finding.figures,
        }
        for finding in found
    ]
    content = {"environment": environment(), "findings": findings}
    path.write_text(json.dumps(content, indent=1) + "\n")


def run(folder: Path | None, *, quick: bool) -> list[Finding]:
    """Runs all experiments and prints the verdicts.

    Args:
        folder: where to write claims.md, claims.json and PNGs, if anywhere.
        quick: with fewer seeds and steps.
    """
    budget = learning.QUICK if quick else learning.FULL
    torch.set_num_threads(1)  # layers this small are done before a second thread is there
    start = time.perf_counter()
    found = []
    for finding in tqdm(findings(budget), desc="claims", total=COUNT):
        found.append(finding)
        tqdm.write(f"{finding.number}. {finding.claim} {finding.verdict.upper()}")
        tqdm.write(f"   {finding.sentence}")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for finding in found:
            picture(finding, folder / f"claim{finding.number}.png")
        text = document(found, time.perf_counter() - start, pictures=True)
        (folder / "claims.md").write_text(text)
        write_json(found, folder / "claims.json")
        print(f"wrote {folder / 'claims.md'}, claims.json and {len(found)} pictures")
    return found
