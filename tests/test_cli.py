"""``python -m fastbn`` reports what is installed, and notices when it computes wrongly."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
import torch

import fastbn
from fastbn import __main__ as cli

if TYPE_CHECKING:
    from collections.abc import Callable

    RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("arguments", [(), ("info",)], ids=["default", "info"])
def test_report(arguments: tuple[str, ...], run_python: RunPython) -> None:
    done = run_python("-m", "fastbn", *arguments)
    assert done.returncode == 0, done.stderr
    build = fastbn.build_info()
    for fact in (build["fastbn"], torch.__version__, build["torch"], build["commit"]):
        assert str(fact) in done.stdout
    assert done.stdout.count(" ok") == 4  # a line for each dtype
    assert "WRONG" not in done.stdout


def test_self_check_is_within_the_resolution_of_each_dtype() -> None:
    errors = cli.self_check("cpu")
    assert set(errors) == {"float64", "float32", "bfloat16", "float16"}
    for name, error in errors.items():
        assert 0 <= error <= 8 * torch.finfo(getattr(torch, name)).eps


def test_self_check_fails_on_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = cli.batch_norm
    monkeypatch.setattr(cli, "batch_norm", lambda *arguments: right(*arguments) * 1.01)
    assert cli.main([]) == 1
    assert capsys.readouterr().out.count("WRONG") == 4


def test_unknown_command_is_refused(run_python: RunPython) -> None:
    done = run_python("-m", "fastbn", "fly")
    assert done.returncode == 2
    assert "invalid choice: 'fly'" in done.stderr
