"""What the measurements say: tables for 80 columns, two sentences, JSON. Measures and decides nothing."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    rounds_s   seconds of a call in each round, on a GPU the device's; round i of every row ran side by side
    host_rounds_s   on a GPU, seconds until the call returned, which waits for nothing; None where it returns when done
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
    backend: str = "cpu"
    host_rounds_s: tuple[float, ...] | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds_s)

    @property
    def device_seconds(self) -> float | None:
        """None on the CPU, which is the host."""
        return None if self.host_rounds_s is None else self.seconds

    @property
    def host_seconds(self) -> float:
        return self.seconds if self.host_rounds_s is None else statistics.median(self.host_rounds_s)

    @property
    def gflops(self) -> float:
        return self.flops / self.seconds / 1e9

    @property
    def arm(self) -> tuple[str, str]:
        return self.merge, self.way

    def peak_share(self, machine: Mapping[str, Any]) -> float:
        """Of the CPU's peak FLOP rate that was measured in the same run; that of a GPU is not measured."""
        return float(self.flops / self.seconds / machine["peak_flops"])

    def bandwidth_share(self, machine: Mapping[str, Any]) -> float:
        """Of the copy bandwidth of the backend's memory that was measured in the same run."""
        memory = machine["gpu"] if self.backend == "gpu" else machine
        return float(self.bytes_moved / self.seconds / memory["bandwidth"])


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
    cpu = (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, "
        f"{8 * machine['vector_bytes']} bit vectors\n"
        f"measured now: peak {digits(machine['peak_flops'] / 1e9)} GFLOP/s, "
        f"copying {digits(machine['bandwidth'] / 1e9)} GB/s"
    )
    if "gpu" not in machine:
        return cpu
    gpu = machine["gpu"]
    return f"{cpu}\n{gpu['gpu']}: copying {digits(gpu['bandwidth'] / 1e9)} GB/s"


UNKNOWN = "-"
Column = tuple[str, Callable[[Row], str]]


def four_ways(rows: Sequence[Row], machine: Mapping[str, Any]) -> Table:
    """The table of `fusionops compare`: one line for each backend, merge and way."""
    on_gpu = any(row.backend == "gpu" for row in rows)
    left: list[Column] = [*_backend(rows), ("merge", lambda row: row.merge), ("way", lambda row: row.way)]
    right: list[Column] = [
        ("params", lambda row: quantity(row.params)),
        ("GFLOP", lambda row: digits(row.flops / 1e9)),
        ("moved\nMiB", lambda row: digits(row.bytes_moved / MIB)),
        ("extra\nMiB", lambda row: digits(row.peak_bytes / MIB)),
    ]
    if on_gpu:  # in the room of what is measured on the CPU alone: resident memory, and the share of its peak
        right += [("device\nms", _device_milliseconds), ("host\nms", _host_milliseconds)]
    else:
        right += [("RSS\nMiB", _resident), ("time\nms", _milliseconds)]
    right.append(("GFLOP\n/s", lambda row: digits(row.gflops)))
    if not on_gpu:
        right.append(("peak\n%", lambda row: f"{100 * row.peak_share(machine):.0f}"))
    right.append(("mem\n%", lambda row: f"{100 * row.bandwidth_share(machine):.0f}"))
    return _filled(left, right, rows)


def legend(rounds: int, on_gpu: bool = False) -> str:
    memory, time = (GPU_MEMORY, f"{GPU_TIME} Both") if on_gpu else (MEMORY, "time")
    return (
        f"moved: every array once, counted. {memory} GFLOP counts every tap, so Winograd, which multiplies less, may "
        f"pass 100 %. {time}: median of {rounds} interleaved rounds, filters packed beforehand."
    )


MEMORY = (
    "extra, RSS: the most memory a call holds beside maps, filters and result, as allocated and as resident. "
    "peak, mem: shares of the FLOP rate and the copy rate above;"
)
GPU_MEMORY = (
    "extra: the most memory a call holds beside maps, filters and result, as allocated. "
    "mem: share of the copy rate above."
)
GPU_TIME = (
    "device: the GPU's time for a call, its caches cold. host: until the call returned, on a GPU before it is done."
)


def fused_or_not(rows: Sequence[Row], machine: Mapping[str, Any]) -> Table:
    """The table of `fusionops bench`: one line for each workload, backend and merge."""
    arms = {(row.workload, row.backend, *row.arm): row for row in rows}

    def stored(value: Callable[[Row], str]) -> Callable[[Row], str]:
        """Of the materialised way, where it is another."""

        def of(fused: Row) -> str:
            row = arms.get((fused.workload, fused.backend, fused.merge, "materialised"))
            return UNKNOWN if row is None else value(row)

        return of

    def speed(fused: Row) -> str:
        return stored(lambda row: f"{row.seconds / fused.seconds:.2f}×")(fused)

    def extra(row: Row) -> str:
        return digits(row.peak_bytes / MIB)

    left: list[Column] = [("workload", lambda row: row.workload), *_backend(rows), ("merge", lambda row: row.merge)]
    memory: list[Column] = [("extra\nMiB", extra), ("stored\nMiB", stored(extra))]
    if any(row.backend == "gpu" for row in rows):
        right: list[Column] = [
            ("device\nms", _device_milliseconds),
            ("stored\nms", stored(_device_milliseconds)),
            ("host\nms", _host_milliseconds),
            ("stored\nms", stored(_host_milliseconds)),
            ("speed", speed),
            *memory,
        ]
    else:
        right = [
            ("fused\nms", _milliseconds),
            ("stored\nms", stored(_milliseconds)),
            ("speed", speed),
            *memory,
            ("GFLOP\n/s", lambda row: digits(row.gflops)),
            ("peak\n%", lambda row: f"{100 * row.peak_share(machine):.0f}"),
        ]
    return _filled(left, right, [row for row in rows if row.way == "fused"])


def bench_legend(on_gpu: bool) -> str:
    text = "stored: the same, with every map between the merge and the result stored."
    return f"{text} {GPU_TIME} speed: by the device's time, where there is one." if on_gpu else text


def _backend(rows: Iterable[Row]) -> list[Column]:
    """The column of the backends, where there is more than one."""
    return [("back\nend", lambda row: row.backend)] if len({row.backend for row in rows}) > 1 else []


def _resident(row: Row) -> str:
    return UNKNOWN if row.peak_rss_bytes is None else digits(row.peak_rss_bytes / MIB)


def _milliseconds(row: Row) -> str:
    return digits(row.seconds * 1e3)


def _host_milliseconds(row: Row) -> str:
    return digits(row.host_seconds * 1e3)


def _device_milliseconds(row: Row) -> str:
    return UNKNOWN if row.device_seconds is None else digits(row.device_seconds * 1e3)


def _filled(left: Sequence[Column], right: Sequence[Column], rows: Iterable[Row]) -> Table:
    table = _table((name for name, _ in left), (name for name, _ in right))
    for row in rows:
        table.add_row(*(cell(row) for _, cell in (*left, *right)))
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


def sentences(rows: Sequence[Row]) -> tuple[str, ...]:
    """What adding saves over concatenating, and what fusing saves, as far as `rows` say; losses are named as losses.

    Of each backend; named where it is not the CPU alone.
    """
    said: list[str] = []
    backends = list(dict.fromkeys(row.backend for row in rows))
    for backend in backends:
        arms = {row.arm: row for row in rows if row.backend == backend}
        name = "" if backends == ["cpu"] else "gpu, by the device's time: " if backend == "gpu" else f"{backend}: "
        said += (name + _add_over_concat(arms), name + _fused_over_materialised(arms))
    return tuple(said)


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
    computed = ("seconds", "device_seconds", "host_seconds", "gflops")
    listed = [asdict(row) | {name: getattr(row, name) for name in computed} for row in rows]
    return json.dumps({"rows": listed, "machine": dict(machine)}, indent=2)


def from_json(text: str) -> list[Row]:
    """The rows of `as_json`; raises ValueError for any other text."""
    names = {field.name for field in fields(Row)}
    try:
        listed = json.loads(text)["rows"]
        return [_row({name: value for name, value in row.items() if name in names}) for row in listed]
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError("the text has no rows of as_json") from problem


def _row(values: dict[str, Any]) -> Row:
    host = values.get("host_rounds_s")
    return Row(**values | {"rounds_s": tuple(values["rounds_s"]), "host_rounds_s": host and tuple(host)})
