"""What each command of `fusionops` does: measures, shows, writes. Each returns whether all was well."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import fusionops as fo
from fusionops.compare import measure, report, selftest
from fusionops.compare.instance import build, library, normal_numbers
from fusionops.compare.instance import explain as explain_workload
from fusionops.compare.measure import Arm, Peak, Times
from fusionops.compare.report import Row
from fusionops.compare.workloads import WORKLOADS, Workload
from fusionops.spec import Merge

# One of each kind: dense, the example of the Keras guide, many channels, upsampled, added, residual, many sources, 1×1.
BENCHED = (
    "keras_dense",
    "keras_conv",
    "unet256_l3",
    "unet256_l1_up",
    "fpn_p4_out",
    "resnet_l2",
    "densenet_b2_l7",
    "yolov8s_p4_td",
)


def compare(options: Namespace) -> bool:
    """One merge four ways, on each backend: proved equal, measured, shown."""
    workload = options.workload_of(options)
    console = _console(options.json)
    with _threads(options.threads) as threads, _progress() as progress:
        arms = _arms(workload, options.backend)
        bar = progress.add_task("compiling", total=3 + len(arms) * (1 + options.rounds))
        found = measure.differences(arms)
        if found:
            return _fail(found)
        progress.update(bar, advance=1, description="machine")
        before = measure.limits(workload.dtype, threads)
        progress.update(bar, advance=1, description="memory")
        peaks = []
        for arm in arms:
            if arm.backend == "gpu":
                peaks.append(measure.allocated_peak(arm))
            else:
                peaks.append(
                    measure.memory_peak(workload, arm.merge, arm.way, backend=arm.backend, threads=options.threads)
                )
            progress.advance(bar)
        progress.update(bar, description="time")
        times = measure.rounds(arms, options.rounds, lambda: progress.advance(bar))
        machine = _machine(options.backend, threads, before, measure.limits(workload.dtype, threads))
    rows = _rows(workload, arms, peaks, times)
    console.print(report.describe(workload))
    console.print(report.describe_machine(machine))
    console.print(report.four_ways(rows, machine))
    console.print(report.legend(options.rounds, "gpu" in options.backend), style="dim")
    for sentence in report.sentences(rows):
        console.print()
        console.print(sentence)
    _write(options.json, report.as_json(rows, machine))
    return True


def bench(options: Namespace) -> bool:
    """Fused against materialised on several workloads."""
    if options.list:
        _console(None).print(report.workload_list(WORKLOADS.values()))
        return True
    console = _console(options.json)
    for backend in options.backend:
        library(backend)
    names = options.names or BENCHED
    rows: list[Row] = []
    with _threads(options.threads) as threads, _progress() as progress:
        bar = progress.add_task("machine", total=len(names))
        before = measure.limits(options.dtype, threads)
        for name in names:
            progress.update(bar, description=name)
            workload = replace(WORKLOADS[name], dtype=options.dtype, layout=options.layout)
            arms = _arms(workload, options.backend)
            found = measure.differences(arms)
            if found:
                return _fail([f"{name}: {line}" for line in found])
            peaks = [measure.allocated_peak(arm) for arm in arms]
            rows += _rows(workload, arms, peaks, measure.rounds(arms, options.rounds))
            progress.advance(bar)
        machine = _machine(options.backend, threads, before, measure.limits(options.dtype, threads))
    console.print(report.describe_machine(machine))
    console.print(report.fused_or_not(rows, machine))
    console.print(report.bench_legend("gpu" in options.backend), style="dim")
    _write(options.json, report.as_json(rows, machine))
    return True


def explain(options: Namespace) -> bool:
    workload = options.workload_of(options)
    console = _console(None)
    with _threads(options.threads):
        for merge in workload.merges if options.merge is None else (Merge(options.merge),):
            console.print(str(explain_workload(workload, merge, options.backend)), soft_wrap=True)
            console.print()
    return True


def info(options: Namespace) -> bool:
    _console(None).print(str(fo.info()), soft_wrap=True)
    return True


def check(options: Namespace) -> bool:
    """Every problem of the table on every usable backend, or on the one that is asked for."""
    console = _console(None)
    usable = [name for name, unusable in fo.info().backends if not unusable and name != "reference"]
    backends = usable if options.backend is None else [options.backend]
    with _threads(options.threads), _progress() as progress:
        bar = progress.add_task("checking", total=len(backends) * len(selftest.EXACT_PROBLEMS))
        results = []
        for backend in backends:
            for problem in selftest.EXACT_PROBLEMS:
                results.append(selftest.run(problem, backend))
                progress.advance(bar)
    console.print(report.check_table(results))
    failures = [str(result) for result in results if result.problem]
    return _fail(failures) if failures else True


def plot(options: Namespace) -> bool:
    """A PNG of the figures of a --json file."""
    from fusionops.compare import plots

    path = Path(options.json)
    out = Path(options.out) if options.out else path.with_suffix(".png")
    try:
        rows = report.from_json(path.read_text())
    except ValueError as problem:
        raise ValueError(f"{path} is no file that compare or bench wrote with --json") from problem
    plots.draw(rows, out)
    _console(None).print(f"wrote {out}", soft_wrap=True)
    return True


def _arms(workload: Workload, backends: Sequence[str]) -> list[Arm]:
    """Every arm on every backend, from the same numbers. Raises BackendError before it builds any."""
    for backend in backends:
        library(backend)
    return [arm for backend in backends for arm in measure.arms(build(workload, normal_numbers(), backend))]


def _machine(backends: Sequence[str], threads: int, *measured: measure.Limits) -> dict[str, Any]:
    """The facts of the machine; those of its GPU are a mapping of their own, where it was used."""
    machine = measure.machine(threads, *measured)
    return machine | {"gpu": measure.gpu_machine()} if "gpu" in backends else machine


def _rows(
    workload: Workload, arms: Sequence[Arm], peaks: Sequence[Peak], times: Sequence[tuple[Times, ...]]
) -> list[Row]:
    return [
        Row(
            workload=workload.name,
            merge=str(arm.merge),
            way=arm.way,
            params=arm.cost.params,
            flops=arm.cost.flops,
            bytes_moved=arm.cost.bytes_moved,
            peak_bytes=peak.traced,
            peak_rss_bytes=peak.resident,
            rounds_s=tuple(each.seconds for each in of_arm),
            kernel=arm.kernel,
            backend=arm.backend,
            host_rounds_s=tuple(each.host_s for each in of_arm if each.host_s is not None) or None,
        )
        for arm, peak, of_arm in zip(arms, peaks, times, strict=True)
    ]


def _console(json: str | None) -> Console:
    """For tables: standard output, unless the figures go there."""
    return Console(file=sys.stderr if json == "-" else sys.stdout, highlight=False, markup=False)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(file=sys.stderr)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield progress


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """As many threads as asked for, and how many that are."""
    before = measure.default_threads()
    if count is not None:
        fo.set_num_threads(count)
    try:
        yield before if count is None else count
    finally:
        fo.set_num_threads(before)


def _write(path: str | None, text: str) -> None:
    if path == "-":
        sys.stdout.write(text + "\n")
    elif path is not None:
        Path(path).write_text(text + "\n")


def _fail(found: Sequence[str]) -> bool:
    sys.stderr.write("fusionops: a check failed\n" + "".join(f"  {line}\n" for line in found))
    return False
