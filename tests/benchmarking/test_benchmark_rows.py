"""What is made of measured rows: figures, files, tables, comparisons and the README."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Behind everything else, so that fastbn is the one under test.
pytest.importorskip("tqdm", reason="benchmarks need the extra [bench]")
pytest.importorskip("tabulate", reason="benchmarks need the extra [bench]")

from benchmarks import compare, readme, report
from benchmarks.rows import COPY, Results, Row, Subject, groups, read
from benchmarks.shapes import shape_sets
from benchmarks.timing import Timing

ROOT = Path(__file__).parents[2]


def subject(measured: str = "forward", **rest: Any) -> Subject:
    return Subject("kernels", "resnet50", "8x4x2x2", "float32", "contiguous", measured, **rest)


def row(provider: str, seconds: float, of: Subject | None = None, detail: str = "") -> Row:
    timing = Timing(seconds, 0.9 * seconds, 1.1 * seconds, 7)
    return Row(of or subject(bytes=1000), provider, timing, detail)


def test_figures_of_a_group() -> None:
    rows = [row(COPY, 1e-6), row("fastbn", 2e-6), row("stock", 6e-6), row("compiled", 3e-6)]
    (group,) = groups(rows)
    assert group.best_other == "compiled"
    assert group.ratio("compiled") == pytest.approx(1.5)
    assert group.ratio("stock") == pytest.approx(3)
    assert group.share("fastbn") == pytest.approx(0.5)
    assert group.rows["fastbn"].gb_per_second == pytest.approx(0.5)


def test_a_network_has_its_layers_so_often() -> None:
    first, second = subject(count=3), subject(count=2, bytes=7)
    rows = [row("fastbn", 1.0, first), row("stock", 2.0, first), row("compiled", 5.0, first)]
    rows += [row("fastbn", 10.0, second), row("stock", 80.0, second)]
    (total,) = report.network_totals(groups(rows))
    assert total.count == 5
    # Who does not do all layers has no total.
    assert total.seconds == {"fastbn": 23.0, "stock": 166.0}
    assert total.mean("stock") == pytest.approx(4)
    assert total.slowest("stock") == pytest.approx(2)


def results() -> Results:
    cold, warm = (subject(cache=cache, bytes=1000) for cache in ("cold", "warm"))
    rows = [
        row("fastbn", 2e-6, cold, "persistent_grid matrix_columns 132x256"),
        row("stock", 6e-6, cold, "cudnn"),
        row(COPY, 1.5e-6, cold),
        row("fastbn", 1e-6, warm),
        row("stock", 5e-6, warm, "cudnn"),
        row(COPY, 0.5e-6, warm),
    ]
    return Results({"gpu": "made up", "date": "2020-02-02"}, rows)


def test_files_keep_every_figure(tmp_path: Path) -> None:
    results().write_json(tmp_path / "rows.json")
    assert read(tmp_path / "rows.json") == results()
    results().write_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == ["fastbn", "stock", COPY] * 2
    first = lines[0]
    assert (first["gpu"], first["date"], first["cache"]) == ("made up", "2020-02-02", "cold")
    assert float(first["median"]) == 2e-6
    assert float(first["gb_per_second"]) == pytest.approx(0.5)
    assert float(first["share_of_copy"]) == pytest.approx(0.75)
    assert float(lines[1]["times_fastbn"]) == pytest.approx(3)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"environment": {}, "rows": [{}]}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json was not written by this version of"):
        read(path)


def test_tables_show_the_cold_cache_and_the_warm_beside_it() -> None:
    text = report.kernels(results(), shape_sets(8))
    line = next(
        line
        for line in text.splitlines()
        if line.startswith("forward") and "persistent_grid" in line
    )
    cells = line.split()
    assert cells[5:8] == ["0.002000", "0.001800", "0.002200"]
    assert "75%" in cells
    assert "3.00x" in cells
    assert cells[-6:] == [
        "0.001000",
        "cudnn",
        "cold",
        "persistent_grid",
        "matrix_columns",
        "132x256",
    ]
    assert "PyTorch took its cudnn kernels" in text


# What a noisy machine does to medians: each by itself, and all rows of a run together.
NOISE, DRIFT = 0.03, 0.2
EVERYONE = ("fastbn", "stock", "compiled", COPY)


def made_up_run(seed: int, slower: dict[Subject, float] | None = None) -> Results:
    """Kernels of 12 shapes in 2 dtypes and 2 passes; fastbn slower by a factor on some."""
    random = np.random.default_rng(seed)
    drift = np.exp(DRIFT * random.standard_normal())
    rows = []
    for subject in SUBJECTS:
        for seconds, provider in enumerate(EVERYONE, start=1):
            factor = (slower or {}).get(subject, 1.0) if provider == "fastbn" else 1.0
            noise = np.exp(NOISE * random.standard_normal())
            middle = float(1e-3 * seconds * factor * drift * noise)
            timing = Timing(middle, 0.97 * middle, 1.03 * middle, 20)
            rows.append(Row(subject, provider, timing))
    return Results({"cpu": "made up", "threads": 2, "torch": "2"}, rows)


SUBJECTS = [
    replace(subject(measured), shape=f"8x{channels}x2x2", dtype=dtype, shapes=shapes)
    for measured in ("forward", "backward")
    for dtype in ("float32", "bfloat16")
    for shapes, sizes in (("resnet50", range(1, 9)), ("tall", range(9, 13)))
    for channels in sizes
]


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_the_same_commit_pass(seed: int) -> None:
    """Whatever the machine did in between."""
    comparison = compare.RunComparison(made_up_run(2 * seed), made_up_run(2 * seed + 1))
    assert not comparison.worse
    verdicts = [*comparison.computed, *comparison.shaped]
    assert [verdict.words for verdict in verdicts] == ["same"] * 8
    assert "Nothing has become slower or larger." in comparison.report()


def slower(verdicts: list[compare.Judgment]) -> list[set[Subject]]:
    return [{c.subject for c in v.changes} for v in verdicts if v.words == "slower"]


@pytest.mark.parametrize("seed", range(20))
def test_a_slowdown_by_a_fifth_is_found(seed: int) -> None:
    """Of one pass and dtype, with the machine's drift as large; and nothing else is blamed."""
    planted = {s: 1.2 for s in SUBJECTS if (s.measured, s.dtype) == ("backward", "float32")}
    comparison = compare.RunComparison(made_up_run(2 * seed), made_up_run(2 * seed + 1, planted))
    assert comparison.worse
    assert slower(comparison.computed) == [set(planted)]
    assert not slower([v for v in comparison.shaped if v.changes[0].subject.measured == "forward"])
    back = compare.RunComparison(made_up_run(2 * seed + 1, planted), made_up_run(2 * seed))
    assert not back.worse
    assert [verdict.words for verdict in back.computed].count("faster") == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_slowdown_of_one_set_of_shapes_is_found(seed: int) -> None:
    planted = {s: 1.2 for s in SUBJECTS if (s.measured, s.shapes) == ("forward", "tall")}
    comparison = compare.RunComparison(made_up_run(2 * seed), made_up_run(2 * seed + 1, planted))
    assert slower(comparison.shaped) == [set(planted)]
    assert not slower(comparison.computed)


def test_a_slow_row_stands_out() -> None:
    """It is shown, and does not fail: one row may be the machine's doing."""
    comparison = compare.RunComparison(made_up_run(0), made_up_run(1, {SUBJECTS[3]: 2.0}))
    assert not comparison.worse
    assert not slower(comparison.computed)
    assert not slower(comparison.shaped)
    (verdict,) = comparison.rows
    assert verdict.changes[0].subject == SUBJECTS[3]
    assert "forward 8x4x2x2 float32 contiguous" in comparison.report()


def test_compiled_with_fastbn_is_no_other() -> None:
    """It is judged itself, and changes nothing of what fastbn is judged by."""

    def run(ours: float, compiled: float) -> Results:
        step = replace(subject("step"), benchmark="model")
        seconds = {"fastbn": ours, "stock": 1.0, "fastbn compiled": compiled, "stock compiled": 1.0}
        rows = [Row(step, name, Timing(s, s, s, 9)) for name, s in seconds.items()]
        return Results({}, rows)

    comparison = compare.RunComparison(run(1.0, 1.0), run(1.0, 1.5))
    words = {v.changes[0].provider: v.words for v in comparison.computed}
    assert words == {"fastbn": "same", "fastbn compiled": "slower"}
    (group,) = groups(run(1.0, 0.5).rows)
    assert group.best_other == "stock"


def test_growth_of_memory_is_found() -> None:
    size = replace(subject("saved", unit="bytes", bytes=100), benchmark="memory")
    before, after = (
        Results({}, [Row(size, "fastbn", Timing(value, value, value, 1))])
        for value in (200.0, 201.0)
    )
    comparison = compare.RunComparison(before, after)
    assert comparison.worse
    assert (
        "saved 8x4x2x2 float32 contiguous: memory grew from 200 to 201 bytes" in comparison.report()
    )
    assert not compare.RunComparison(after, before).worse


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("before.json", "after.json", "slow.json")]
    slow = dict.fromkeys(SUBJECTS, 1.2)
    for name, run in zip(
        names, (made_up_run(0), made_up_run(1), made_up_run(2, slow)), strict=True
    ):
        run.write_json(Path(name))
    assert compare.main(names[:2]) == 0
    assert compare.main([names[0], names[2]]) == 1
    assert "WORSE: 8 lines are slower, 0 larger, 0 lost." in capsys.readouterr().out
    moved = replace(made_up_run(1), environment={"cpu": "another", "threads": 2, "torch": "2"})
    moved.write_json(Path(names[1]))
    compare.main(names[:2])
    assert "cpu was made up before and is another after" in capsys.readouterr().out
    Results({}, []).write_json(Path(names[1]))
    with pytest.raises(SystemExit):
        compare.main(names[:2])
    assert "no row of fastbn in common" in capsys.readouterr().err


def test_readme_says_what_results_say() -> None:
    """So do the tables beside the rows."""
    assert readme.written(ROOT) == (ROOT / "README.md").read_text()
    folders = readme.machines(ROOT / "benchmarks" / "results")
    assert folders
    for folder in folders:
        rows = read(folder / "rows.json")
        assert (folder / "tables.txt").read_text() == readme.all_tables(rows) + "\n"


def test_readme_takes_figures_from_rows() -> None:
    layers = [subject(measured, count=53) for measured in ("forward", "backward", "eval")]
    seconds = {"fastbn": 0.001, "stock": 0.0025, "compiled": 0.0015}
    rows = [row(name, value, layer) for layer in layers for name, value in seconds.items()]
    where = {"gpu": "made up", "torch": "2", "date": "2020-02-02", "fastbn commit": "abcdef"}
    text = readme.machine_section(Results(where, rows), "folder")
    figures = "| float32 | contiguous | 53 ms | 132 ms | 80 ms | 2.50x | 2.50x | 1.50x (compiled) |"
    assert text.count(figures) == 3
    assert "Measured on 2020-02-02: made up, torch 2, fastbn abcdef" in text


def test_readme_sums_up_what_follows() -> None:
    """Training is forward and backward together."""
    seconds = {"forward": (1.0, 3.0), "backward": (2.0, 6.6), "eval": (1.0, 1.5)}
    layers = [
        replace(subject(measured, count=53), epilogue=epilogue)
        for epilogue in ("plain", "relu")
        for measured in seconds
    ]
    rows = []
    for layer in layers:
        fastbn, stock = seconds[layer.measured]
        stock *= 2 if layer.epilogue == "relu" else 1
        rows += [row("fastbn", fastbn, layer), row("stock", stock, layer)]
    where = {"gpu": "made up", "torch": "2", "date": "2020-02-02", "fastbn commit": "abcdef"}
    text = readme.machine_section(Results(where, rows), "folder")
    assert (
        "| dtype | layout | training, plain | training, relu | eval, plain | eval, relu |" in text
    )
    assert "| float32 | contiguous | 3.20x | 6.40x | 1.50x | 3.00x |" in text


def test_parts_of_a_text_are_filled() -> None:
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n"
    assert readme.fill(text, "one", "new") == "a\n<!-- one -->\nnew\n<!-- /one -->\nb\n"
    with pytest.raises(ValueError, match="no part between <!-- two -->"):
        readme.fill(text, "two", "new")
