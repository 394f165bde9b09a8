"""``make carry`` asks for the interpreter and the torch that are named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "Makefile").exists(), reason="the sources are not there"
)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (
            ["PYTHON=3.12", "TORCH=2.11.0"],
            ["PYENV_VERSION=3.12", "FASTBN_CARRY_TORCH=2.11.0", "python3.12"],
        ),
        (
            ["PYTHON=/opt/python", "TORCH=torch==2.13.0"],
            ["PYENV_VERSION=", "FASTBN_CARRY_TORCH=2.13.0", "/opt/python"],
        ),
    ],
    ids=["versions", "as for other targets"],
)
def test_what_is_carried(given: list[str], asked: list[str]) -> None:
    command = ["make", "--dry-run", "--no-print-directory", "carry", *given]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.replace("\\\n", " ").split() == [*asked, "-m", "tests.support.carry"]
