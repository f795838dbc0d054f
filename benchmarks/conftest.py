"""What every benchmark shares: the machine's limits, the arrays of a workload, and a table at the end.

`pytest benchmarks` runs them; `--benchmark-json FILE` keeps the figures.
"""

from functools import cache

import pytest

from fusionops.compare import measure

ROWS = pytest.StashKey[list]()
HEADER = ("workload", "merge", "way", "params", "GFLOP", "moved MiB", "extra MiB", "ms", "GFLOP/s", "peak %")
LINE = "{:<15} {:<6} {:<12} {:>9} {:>7} {:>9} {:>9} {:>9} {:>8} {:>6}"
MIB = 2**20


def pytest_configure(config):
    config.stash[ROWS] = []


@cache
def limits():
    """FMA peak and copy bandwidth of this machine, with the threads that the benchmarks use."""
    return measure.limits("float32", measure.default_threads())


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fusionops"] = measure.machine(measure.default_threads(), limits())


@pytest.fixture
def record(request, benchmark):
    """Notes what an arm costs and, once it has been timed, how near the peak it came."""

    def note(workload, arm, peak_bytes):
        benchmark.group = workload.name
        info = {
            "merge": str(arm.merge),
            "way": arm.way,
            "kernel": arm.kernel,
            "params": arm.cost.params,
            "flops": arm.cost.flops,
            "bytes_moved": arm.cost.bytes_moved,
            "peak_bytes": peak_bytes,
        }
        benchmark.extra_info |= info
        benchmark(arm.run)
        if benchmark.stats is None:  # --benchmark-disable runs each arm once and times none
            return
        seconds = benchmark.stats.stats.median
        share = info["flops"] / seconds / limits().peak_flops
        benchmark.extra_info["peak_share"] = share
        request.config.stash[ROWS].append(
            LINE.format(
                workload.name,
                arm.merge,
                arm.way,
                info["params"],
                f"{info['flops'] / 1e9:.3f}",
                f"{info['bytes_moved'] / MIB:.2f}",
                f"{peak_bytes / MIB:.2f}",
                f"{seconds * 1e3:.3f}",
                f"{info['flops'] / seconds / 1e9:.0f}",
                f"{100 * share:.0f}",
            )
        )

    return note


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.section("add against concat, fused against materialised: medians")
        for line in (LINE.format(*HEADER), *config.stash[ROWS]):
            terminalreporter.write_line(line)
