"""What the measurements say: tables for 80 columns, two sentences, JSON. Measures and decides nothing."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

from fusionops.compare.selftest import Result
from fusionops.compare.workloads import Map, Workload

MIB = 2.0**20


@dataclass(frozen=True, slots=True)
class Row:
    """One merge, one way, measured.

    params, flops, bytes_moved   counted, see `fusionops.cost`
    peak_bytes, peak_rss_bytes   the most memory a call holds besides maps, parameters and result, see `measure.Peak`
    rounds_s   seconds of a call in each round; round i of every row ran side by side
    """

    workload: str
    merge: str
    way: str
    params: int
    flops: int
    bytes_moved: int
    peak_bytes: int
    peak_rss_bytes: int | None
    rounds_s: tuple[float, ...]
    kernel: str

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds_s)

    @property
    def gflops(self) -> float:
        return self.flops / self.seconds / 1e9

    @property
    def arm(self) -> tuple[str, str]:
        return self.merge, self.way

    def shares(self, machine: Mapping[str, Any]) -> tuple[float, float]:
        """Of the peak FLOP rate and of the copy bandwidth that were measured in the same run."""
        return (
            self.flops / self.seconds / machine["peak_flops"],
            self.bytes_moved / self.seconds / machine["bandwidth"],
        )


def quantity(value: float) -> str:
    """At most five characters: 73.9k, 1.18M, 512.

    >>> quantity(73_792), quantity(1_180_160), quantity(512), quantity(0)
    ('73.8k', '1.18M', '512', '0')
    """
    for unit in ("", "k", "M"):
        if value < 1000:
            return (f"{value:.0f}" if unit == "" else f"{value:.3g}") + unit
        value /= 1000
    return f"{value:.3g}G"


def digits(value: float) -> str:
    """About three significant digits.

    >>> digits(0.01234), digits(5.678), digits(12.34), digits(4321.0), digits(0.0)
    ('0.012', '5.68', '12.3', '4321', '0')
    """
    for least, decimals in ((100, 0), (10, 1), (1, 2)):
        if value >= least:
            return f"{value:.{decimals}f}"
    return f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def describe(workload: Workload) -> str:
    """The problem in words, and where it comes from."""
    maps = ", ".join(
        (f"{count} × " if count > 1 else "") + _map(m)
        for m, count in ((m, len(list(run))) for m, run in groupby(workload.maps))
    )
    lines = [f"{workload.name}: {maps}" + (f", batch {workload.N}" if workload.N > 1 else "")]
    if workload.K is not None:
        to, layout = f"{workload.K} units", ""
        if workload.kernel is not None:
            layout = f", {workload.layout}"
            stride = "" if workload.stride == (1, 1) else f", stride {_times(workload.stride)}"
            to = f"{workload.K} filters {_times(workload.kernel)}{stride}, padding {workload.padding}"
        lines.append(f"into {to}, {workload.activation or 'no activation'}, {workload.dtype}{layout}")
    if workload.network:
        lines.append(workload.network)
    return "\n".join(lines)


def _map(m: Map) -> str:
    extents = [m.C] if (m.H, m.W) == (1, 1) else [m.H, m.W, m.C]
    return _times(extents) + (f" upsampled by {m.upsample}" if m.upsample > 1 else "")


def _times(numbers: Sequence[int]) -> str:
    return "×".join(map(str, numbers))


def describe_machine(machine: Mapping[str, Any]) -> str:
    """The machine and the most it did in this run."""
    return (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, "
        f"{8 * machine['vector_bytes']} bit vectors\n"
        f"measured now: peak {digits(machine['peak_flops'] / 1e9)} GFLOP/s, "
        f"copying {digits(machine['bandwidth'] / 1e9)} GB/s"
    )


def four_ways(rows: Sequence[Row], machine: Mapping[str, Any]) -> Table:
    """The table of `fusionops compare`: one line for each merge and way."""
    names = ("params", "GFLOP", "moved\nMiB", "extra\nMiB", "RSS\nMiB", "time\nms", "GFLOP\n/s", "peak\n%", "mem\n%")
    table = _table(("merge", "way"), names)
    for row in rows:
        peak, memory = row.shares(machine)
        table.add_row(
            row.merge,
            row.way,
            quantity(row.params),
            digits(row.flops / 1e9),
            digits(row.bytes_moved / MIB),
            digits(row.peak_bytes / MIB),
            "-" if row.peak_rss_bytes is None else digits(row.peak_rss_bytes / MIB),
            digits(row.seconds * 1e3),
            digits(row.gflops),
            f"{100 * peak:.0f}",
            f"{100 * memory:.0f}",
        )
    return table


def legend(rounds: int) -> str:
    return (
        "moved: every array once, counted. extra, RSS: the most memory a call holds beside maps, filters and result, "
        "as allocated and as resident. peak, mem: shares of the FLOP rate and the copy rate above; "
        "GFLOP counts every tap, so Winograd, which multiplies less, may pass 100 %. "
        f"time: median of {rounds} interleaved rounds, filters packed beforehand."
    )


def fused_or_not(rows: Sequence[Row], machine: Mapping[str, Any]) -> Table:
    """The table of `fusionops bench`: one line for each workload and merge."""
    names = ("fused\nms", "stored\nms", "speed", "extra\nMiB", "stored\nMiB", "GFLOP\n/s", "peak\n%")
    table = _table(("workload", "merge"), names)
    arms = {(row.workload, *row.arm): row for row in rows}
    for fused in rows:
        stored = arms.get((fused.workload, fused.merge, "materialised"))
        if fused.way == "fused":
            table.add_row(
                fused.workload,
                fused.merge,
                digits(fused.seconds * 1e3),
                "-" if stored is None else digits(stored.seconds * 1e3),
                "-" if stored is None else f"{stored.seconds / fused.seconds:.2f}×",
                digits(fused.peak_bytes / MIB),
                "-" if stored is None else digits(stored.peak_bytes / MIB),
                digits(fused.gflops),
                f"{100 * fused.shares(machine)[0]:.0f}",
            )
    return table


def workload_list(workloads: Iterable[Workload]) -> Table:
    table = _table(("workload", "merge", "network"), ())
    table.columns[-1].no_wrap = False
    for workload in workloads:
        table.add_row(workload.name, str(workload.merge), workload.network)
    return table


def check_table(results: Iterable[Result]) -> Table:
    """The table of `fusionops check`: how many problems each kernel ran, and how many of them exactly."""
    table = _table(("kernel",), ("problems", "exact", "wrong"))
    tally = Counter((result.kernel, bool(result.problem)) for result in results)
    for kernel in sorted({kernel for kernel, _ in tally}):
        exact, wrong = tally[kernel, False], tally[kernel, True]
        if kernel:
            table.add_row(kernel, str(exact + wrong), str(exact), str(wrong))
        else:
            table.add_row("no kernel for them yet", str(exact), "-", "-")
    return table


def _table(left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def sentences(rows: Sequence[Row]) -> tuple[str, str]:
    """What adding saves over concatenating, and what fusing saves, as far as `rows` say; losses are named as losses."""
    arms = {row.arm: row for row in rows}
    return _add_over_concat(arms), _fused_over_materialised(arms)


def _add_over_concat(arms: Mapping[tuple[str, str], Row]) -> str:
    add, concat = arms.get(("add", "fused")), arms.get(("concat", "fused"))
    if add is None or concat is None:
        return "These maps fit one merge only, so there is no add to compare with a concat."
    if not concat.flops:
        return "No filters follow this merge, so adding saves none over concatenating; it has a smaller result."
    return (
        f"Adding instead of concatenating takes {_percent(add.params, concat.params)} of the parameters and "
        f"{_percent(add.flops, concat.flops)} of the arithmetic, and {_speed(add, concat)}: "
        f"{_milliseconds(add)} instead of {_milliseconds(concat)} ms."
    )


def _fused_over_materialised(arms: Mapping[tuple[str, str], Row]) -> str:
    parts = []
    for merge in ("add", "concat"):
        fused, materialised = arms.get((merge, "fused")), arms.get((merge, "materialised"))
        if fused is not None and materialised is not None:
            memory = _memory(fused, materialised)
            parts.append(f"fusing the {merge} {memory} and {_speed(fused, materialised)}")
    if not parts:
        return "Nothing is stored between merge and result here, so there is nothing to fuse."
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def _milliseconds(row: Row) -> str:
    return digits(row.seconds * 1e3)


def _memory(fused: Row, materialised: Row) -> str:
    saved = materialised.peak_bytes - fused.peak_bytes
    if saved == 0:
        return "needs the same memory"
    size = f"{digits(abs(saved) / MIB)} MiB" if abs(saved) >= MIB else f"{digits(abs(saved) / 1024)} KiB"
    return f"needs {size} {'less' if saved > 0 else 'more'} memory"


def _speed(row: Row, other: Row) -> str:
    """How fast `row` is beside `other`, by their medians; as fast unless three rounds in four agree with that."""
    ratio = other.seconds / row.seconds
    low, _, high = statistics.quantiles(
        (theirs / ours for ours, theirs in zip(row.rounds_s, other.rounds_s, strict=True)), n=4, method="inclusive"
    )
    if not (low > 1 < ratio or high < 1 > ratio):
        return "is as fast, as far as the rounds can tell"
    if ratio > 1:
        return f"is {ratio:.1f} times as fast" if ratio >= 1.5 else f"is {100 * (ratio - 1):.0f} % faster"
    longer = 1 / ratio
    return f"takes {longer:.1f} times as long" if longer >= 1.5 else f"takes {100 * (longer - 1):.0f} % longer"


def as_json(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """The rows and the machine they were measured on."""
    listed = [asdict(row) | {"seconds": row.seconds, "gflops": row.gflops} for row in rows]
    return json.dumps({"rows": listed, "machine": dict(machine)}, indent=2)


def from_json(text: str) -> list[Row]:
    """The rows of `as_json`; raises ValueError for any other text."""
    names = {field.name for field in fields(Row)}
    try:
        listed = json.loads(text)["rows"]
        return [
            Row(**{name: value for name, value in row.items() if name in names} | {"rounds_s": tuple(row["rounds_s"])})
            for row in listed
        ]
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError("the text has no rows of as_json") from problem
