"""``python -m fastbn`` reports what is installed, notices wrong results, and tells plans."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fastbn
from fastbn import __main__ as cli
from fastbn.planning.networks import RESNET50
from tests.support.devices import DEVICES

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastbn.planning import Layout

    RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("arguments", [(), ("info",)], ids=["default", "info"])
def test_report(arguments: tuple[str, ...], run_python: RunPython) -> None:
    done = run_python("-m", "fastbn", *arguments)
    assert done.returncode == 0, done.stderr
    build = fastbn.build_info()
    for fact in (build["fastbn"], torch.__version__, build["torch"], build["commit"]):
        assert str(fact) in done.stdout
    assert done.stdout.count(" ok") == 4 * len(DEVICES)  # a line for each dtype
    assert "WRONG" not in done.stdout


def test_self_check_is_within_the_resolution_of_each_dtype() -> None:
    errors = cli.self_check("cpu")
    assert set(errors) == {"float64", "float32", "bfloat16", "float16"}
    for name, error in errors.items():
        assert 0 <= error <= 8 * torch.finfo(getattr(torch, name)).eps


def test_self_check_fails_on_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fastbn.batch_norm
    monkeypatch.setattr(cli, "batch_norm", lambda *arguments: right(*arguments) * 1.01)
    assert cli.main([]) == 1
    assert capsys.readouterr().out.count("WRONG") == 4


def test_unknown_command_is_refused(run_python: RunPython) -> None:
    done = run_python("-m", "fastbn", "fly")
    assert done.returncode == 2
    assert "invalid choice: 'fly'" in done.stderr


# --- plan -----------------------------------------------------------------------------------------

# Elements of all 53 inputs of ResNet-50 at batch 256.
ELEMENTS = 2_845_179_904
GIVEN = ["--model", "resnet50", "--batch", "256", "--dtype", "bfloat16", "--device", "h200"]


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTBN_CUDA_ALGORITHM", raising=False)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert not any(line.endswith(" ") for line in out.splitlines())
    return out


def words(row: str) -> str:
    """A row without its alignment."""
    return " ".join(row.split())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("op", "ops"),
    [
        ("training", {"forward": 4, "backward": 6}),
        ("forward", {"forward": 4}),
        ("backward", {"backward": 6}),
        ("eval", {"eval": 4}),
    ],
)
def test_plan_as_json(
    op: str, ops: dict[str, int], layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row is the plan of fastbn.plan, and totals are what rows of all 53 layers add up to."""
    told = json.loads(planned(capsys, *GIVEN, "--layout", layout, "--op", op, "--json"))
    assert [told[name] for name in ("model", "batch", "dtype", "layout", "device")] == [
        "resnet50",
        256,
        "bfloat16",
        layout,
        "h200",
    ]
    rows: list[dict[str, Any]] = told["layers"]
    assert [row["op"] for row in rows] == [name for name in ops for _ in RESNET50]
    for row, layer in zip(rows, RESNET50 * len(ops), strict=True):
        assert row["shape"] == [256, layer.channels, layer.height, layer.width]
        assert row["count"] == layer.count
        plan = fastbn.plan(
            row["shape"], dtype="bfloat16", layout=layout, op=row["op"], device="h200"
        )
        for name in (
            "algorithm",
            "launches",
            "bytes_moved",
            "floor_bytes",
            "grid",
            "block",
        ):
            assert row[name] == getattr(plan, name)
        for name in (
            "cluster",
            "shared_bytes",
            "vector_bytes",
            "mapping",
            "channel_tiles",
            "splits",
        ):
            assert row[name] == getattr(plan, name)

    totals = told["totals"]
    assert totals["count"] == 53
    assert list(totals["by_op"]) == list(ops)
    for name, floor in ops.items():
        of_op = [row for row in rows if row["op"] == name]
        moved = sum(row["count"] * row["bytes_moved"] for row in of_op)
        assert totals["by_op"][name] == {
            "launches": sum(row["count"] * row["launches"] for row in of_op),
            "bytes_moved": moved,
            "floor_bytes": floor * ELEMENTS,
            "share": floor * ELEMENTS / moved,
            "microseconds": pytest.approx(sum(row["count"] * row["microseconds"] for row in of_op)),
        }
    for name in ("launches", "bytes_moved", "floor_bytes"):
        assert totals[name] == sum(of_op[name] for of_op in totals["by_op"].values())
    assert totals["share"] == totals["floor_bytes"] / totals["bytes_moved"]


def test_plan_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    forced = ("--layout", "channels_last", "--algorithm", "two_pass")
    title, empty, header, *rows = planned(capsys, *GIVEN, *forced).splitlines()
    assert title.startswith("resnet50, batch 256, bfloat16 channels_last on h200; ")
    assert empty == ""
    assert words(header) == (
        "op layer algorithm count launches blocks cluster threads vector B/element floor share GB "
        "floor GB us"
    )
    assert len(rows) == 2 * (12 + 1) + 1
    assert words(rows[0]).startswith("forward 64x112x112 two_pass 1 2 ")
    assert " 16 B 6 4 67% 1.233 0.822 " in words(rows[0])
    assert words(rows[12]).startswith("forward all 53 106 67% 17.071 11.381 ")
    assert words(rows[25]).startswith("backward all 53 106 60% 28.452 17.071 ")
    assert words(rows[26]).startswith("total all 53 212 62% 45.523 28.452 ")
    # Numbers stand below one another.
    assert len({len(row) for row in [header, *rows]}) == 1


def test_plan_of_one_operation_has_one_row_of_totals(capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(capsys, *GIVEN, "--op", "eval").splitlines()[3:]
    assert len(rows) == 12 + 1
    assert words(rows[-1]).startswith("total all 53 53 100% 11.381 11.381 ")


def test_plan_with_a_forced_algorithm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def algorithms(*arguments: str) -> set[str]:
        told = json.loads(planned(capsys, *GIVEN, *arguments, "--json"))
        return {row["algorithm"] for row in told["layers"]}

    assert algorithms("--algorithm", "two_pass") == {"two_pass"}
    monkeypatch.setenv("FASTBN_CUDA_ALGORITHM", "two_pass")
    assert algorithms() == {"two_pass"}
    assert algorithms("--algorithm", "auto") == {"persistent_cluster", "persistent_grid"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "abacus"), "there is no device 'abacus'; choose t4, a100,"),
        (("--batch", "0"), "'0' is not a positive integer"),
        (("--batch", "-1"), "'-1' is not a positive integer"),
        (("--model", "perceptron"), "invalid choice: 'perceptron'"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--layout", "strided"), "invalid choice: 'strided'"),
        (("--op", "update"), "invalid choice: 'update'"),
        (("--algorithm", "best"), "invalid choice: 'best'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_plan_refuses(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_plan_refuses_an_environment_it_does_not_understand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTBN_CUDA_ALGORITHM", "fastest")
    with pytest.raises(SystemExit):
        cli.main(["plan", *GIVEN])
    assert "FASTBN_CUDA_ALGORITHM: there is no algorithm 'fastest'" in capsys.readouterr().err


def test_plan_in_a_process_of_its_own(run_python: RunPython) -> None:
    """Where the environment is what the shell has, and plans come without a traceback."""
    done = run_python("-m", "fastbn", "plan", *GIVEN, FASTBN_CUDA_ALGORITHM="two_pass")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" two_pass ") == 2 * len(RESNET50)
    assert "Traceback" not in done.stderr
