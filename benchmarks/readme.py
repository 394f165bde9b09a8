"""``python -m benchmarks readme``: writes all that is measured in README.md, from kept rows.

Every folder of benchmarks/results with a rows.json is a machine: its tables and pictures are made
anew. The folder claims there has claims.json, by ``python -m benchmarks claims``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import EPILOGUES, LAYOUT_NAMES, NETWORK_NAMES, PASS_NAMES
from .machine import name_of
from .report import network_totals, tables
from .rows import Results, coldest, read
from .shapes import shape_sets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .report import NetworkTotal
    from .rows import Group

_ROOT = Path(__file__).parents[1]
_RESULTS = Path("benchmarks", "results")


def _table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2f} ms"


def _time(total: NetworkTotal, name: str) -> str:
    return _milliseconds(total.seconds[name]) if name in total.seconds else ""


def _network(groups: Iterable[Group]) -> str:
    """The batch norms of ResNet-50, nothing following them."""
    totals = [t for t in network_totals(coldest(groups)) if t.subject.epilogue == "plain"]
    several = any("compiled" in total.seconds for total in totals)
    headers = ["pass", "dtype", "layout", "fastbn", "stock"]
    headers += ["compiled"] if several else []
    lines = []
    for total in totals:
        line = [
            PASS_NAMES[total.subject.measured],
            total.subject.dtype,
            LAYOUT_NAMES[total.subject.layout],
        ]
        line += [_time(total, "fastbn"), _time(total, "stock")]
        line += [_time(total, "compiled")] if several else []
        line.append(f"{total.ratio('stock'):.2f}x")
        line.append(f"{total.slowest('stock'):.2f}x")
        line.append(f"{total.ratio(total.best_other):.2f}x ({_words(total.best_other)})")
        lines.append(line)
    headers += ["vs stock", "slowest layer", "vs best alternative"]
    first = totals[0]
    batch = first.subject.shape.split("x")[0]
    compiled = ", and as torch.compile makes it" if several else ""
    return (
        f"The {first.count} batch norms of ResNet-50 on {batch} images, with `nn.BatchNorm2d`"
        f"{compiled}. Ratios are another's time over\nfastbn's: of all layers together, and of the "
        f"layer where that is least.\n\n{_table(headers, lines)}"
    )


def _endings(groups: Iterable[Group]) -> str:
    """The same with what may follow; nothing where that was not measured."""
    totals = {
        (t.subject.dtype, t.subject.layout, t.subject.epilogue, t.subject.measured): t.seconds
        for t in network_totals(coldest(groups))
        if "stock" in t.seconds
    }

    def ratio(place: tuple[str, str], epilogue: str, passes: Sequence[str]) -> str:
        keys = [(*place, epilogue, measured) for measured in passes]
        taken = [totals[key] for key in keys]
        return f"{sum(t['stock'] for t in taken) / sum(t['fastbn'] for t in taken):.2f}x"

    endings = [name for name in EPILOGUES if any(key[2] == name for key in totals)]
    if len(endings) < 2:
        return ""
    parts = {"training": ("forward", "backward"), "eval": ("eval",)}
    lines = [
        [dtype, LAYOUT_NAMES[layout]]
        + [ratio((dtype, layout), e, passes) for passes in parts.values() for e in endings]
        for dtype, layout in dict.fromkeys(key[:2] for key in totals)
    ]
    headers = ["dtype", "layout", *(f"{part}, {e}" for part in parts for e in endings)]
    return (
        "With what follows in the same pass, against `nn.BatchNorm2d` and PyTorch's operations "
        "behind it; training is\nforward and backward. Stock's time over fastbn's, of all layers "
        f"together:\n\n{_table(headers, lines)}"
    )


def _words(provider: str) -> str:
    return provider.replace("channels_last", "channels last")


def _training(results: Results) -> str:
    """Steps of the network."""
    steps = [g for g in results.select("model") if g.subject.measured == "step"]
    names = list(dict.fromkeys(name for group in steps for name in group.rows))
    lines = []
    for group in steps:
        batch, *_, width = group.subject.shape.split("x")
        line = [
            NETWORK_NAMES[group.subject.shapes],
            f"{batch} of {width} x {width}",
            group.subject.dtype,
            LAYOUT_NAMES[group.subject.layout],
        ]
        for name in names:
            if name not in group.rows:
                line.append("")
                continue
            per_second = int(batch) / group.rows[name].value.median
            line.append(f"{per_second:.1f} ({1 / group.ratio(name) * group.ratio('stock'):.2f}x)")
        lines.append(line)
    return "Training, images per second (and how many times stock's):\n\n" + _table(
        ["network", "images", "dtype", "layout", *names], lines
    )


def _overhead(results: Results) -> str:
    calls = {group.subject.measured: group for group in results.select("overhead")}
    parts = []
    for measured, words in (
        ("forward", "a training forward"),
        ("forward and backward", "one with its backward"),
        ("eval", "an eval forward"),
    ):
        fast, stock = (calls[measured].rows[n].value.median * 1e6 for n in ("fastbn", "stock"))
        parts.append(f"{words} {fast:.0f} µs (stock {stock:.0f})")
    return "On 64 elements, where there is next to nothing to compute: " + ", ".join(parts) + "."


def _memory(results: Results) -> str:
    peaks = [g for g in results.select("memory") if g.subject.measured == "peak"]
    plain = next(group for group in peaks if group.subject.epilogue == "plain")
    fast, stock = (plain.rows[n].value.median / plain.subject.bytes for n in ("fastbn", "stock"))
    return (
        f"A forward and backward takes {fast:.1f} times the input's memory at its peak; stock's, "
        f"{stock:.1f} times."
    )


def machine_section(results: Results, folder: str) -> str:
    """What a README says of a machine.

    Args:
        results: of all benchmarks.
        folder: where its tables and pictures are, relative to the README.
    """
    where = results.environment
    groups = results.select("kernels")
    dtype = groups[0].subject.dtype
    parts = [_network(groups), *filter(None, [_endings(groups)])]
    parts.append(f"![time of all batch norms of ResNet-50]({folder}/network-{dtype}.png)")
    parts.append(f"![throughput against a memory copy]({folder}/roofline-{dtype}.png)")
    parts += [
        make(results)
        for name, make in (("model", _training), ("overhead", _overhead), ("memory", _memory))
        if results.select(name)
    ]
    parts.append(
        f"Measured on {where['date']}: {name_of(where)}, torch {where['torch']}, fastbn "
        f"{str(where['fastbn commit'])[:10]}; medians, interleaved. "
        f"[All tables]({folder}/tables.txt) and [rows]({folder}/rows.json): other shapes, what "
        "follows the batch norm, p20 and p80, shares of a memory copy."
    )
    return "\n\n".join(parts)


def claims_section(found: Mapping[str, Any], folder: str) -> str:
    """What a README says of the claims."""
    held = sum(finding["verdict"] == "held" for finding in found["findings"])
    return (
        f"`python -m benchmarks claims` puts {len(found['findings'])} claims of the paper that "
        f"introduced batch normalization to the\ntest; {held} held "
        f"([figures and pictures]({folder}/claims.md))."
    )


def fill(text: str, part: str, content: str) -> str:
    """A text with other content between ``<!-- part -->`` and ``<!-- /part -->``.

    Raises:
        ValueError: it has no such part.
    """
    begin, end = f"<!-- {part} -->\n", f"\n<!-- /{part} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"there is no part between {begin.strip()} and {end.strip()}")
    return f"{before}{begin}{content}{end}{after}"


def machines(results: Path) -> list[Path]:
    """Folders of machines, GPUs first."""
    folders = sorted(path.parent for path in results.glob("*/rows.json"))
    return sorted(folders, key=lambda path: "gpu" not in read(path / "rows.json").environment)


def written(root: Path) -> str:
    """The text of README.md with what results say now.

    Args:
        root: folder of README.md.
    """
    folders = machines(root / _RESULTS)
    sections = [
        machine_section(read(folder / "rows.json"), str(_RESULTS / folder.name))
        for folder in folders
    ]
    text = fill((root / "README.md").read_text(), "results", "\n\n".join(sections))
    claims = json.loads((root / _RESULTS / "claims" / "claims.json").read_text())
    return fill(text, "claims", claims_section(claims, str(_RESULTS / "claims")))


def all_tables(results: Results) -> str:
    """Everything, as it is printed when it is measured."""
    batch = next(
        int(group.subject.shape.split("x")[0])
        for group in results.select("kernels")
        if group.subject.shapes == "resnet50"
    )
    return tables(results, shape_sets(batch))


def main(arguments: list[str]) -> int:
    """Writes files, or returns 1 if README.md or tables are not what they would be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail if texts differ")
    options = parser.parse_args(arguments)
    texts = {_ROOT / "README.md": written(_ROOT)}
    for folder in machines(_ROOT / _RESULTS):
        texts[folder / "tables.txt"] = all_tables(read(folder / "rows.json")) + "\n"
    if options.check:
        stale = [path for path, text in texts.items() if path.read_text() != text]
        for path in stale:
            print(f"{path.relative_to(_ROOT)} is not what the results say")
        return int(bool(stale))
    for path, text in texts.items():
        path.write_text(text)
    from .plots import plot_kernels

    for folder in machines(_ROOT / _RESULTS):
        results = read(folder / "rows.json")
        plot_kernels(results.select("kernels"), name_of(results.environment), folder)
    return 0
