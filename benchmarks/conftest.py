"""What every benchmark shares: the machine's limits, the arrays of a workload, and a table at the end.

`pytest benchmarks` runs them; `--benchmark-json FILE` keeps the figures. Those of a GPU that cannot be used here do
not run, and are counted at the end.
"""

from functools import cache
from statistics import median

import pytest

from fusionops import gpu
from fusionops.compare import measure
from fusionops.gpu.module import runtime

ROWS = pytest.StashKey[list]()
NOT_RUN = pytest.StashKey[list]()
HEADER = (
    *("workload", "merge", "way", "backend", "params", "GFLOP", "moved MiB", "extra MiB"),
    *("ms", "device ms", "host ms", "GFLOP/s", "peak %"),
)
LINE = "{:<15} {:<6} {:<12} {:<7} {:>9} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>6}"
MIB = 2**20
ROUNDS = 5  # of the device's time


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CuPy and a GPU that the gpu backend can use")
    config.stash[ROWS] = []
    config.stash[NOT_RUN] = []


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and gpu.reasons_unusable():
        item.config.stash[NOT_RUN].append(item.nodeid)
        pytest.skip("; ".join(gpu.reasons_unusable()))


@cache
def limits():
    """FMA peak and copy bandwidth of this machine, with the threads that the benchmarks use."""
    return measure.limits("float32", measure.default_threads())


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fusionops"] = measure.machine(measure.default_threads(), limits())
    if not gpu.reasons_unusable():
        machine_info["fusionops"]["gpu"] = measure.gpu_machine()


def run_and_wait(arm):
    """A call that returns when its result is there."""
    if arm.backend != "gpu":
        return arm.run

    def run():
        arm.run()
        runtime().wait()

    return run


@pytest.fixture
def record(request, benchmark):
    """Notes what an arm costs and, once it has been timed, how near the peak it came.

    On a GPU the time of a benchmark lasts until the result is there; those of the device alone, and of the host until
    the call returns, are noted beside it. Its peak is not measured.
    """

    def note(workload, arm, peak_bytes):
        benchmark.group = workload.name
        info = {
            "merge": str(arm.merge),
            "way": arm.way,
            "backend": arm.backend,
            "kernel": arm.kernel,
            "params": arm.cost.params,
            "flops": arm.cost.flops,
            "bytes_moved": arm.cost.bytes_moved,
            "peak_bytes": peak_bytes,
        }
        benchmark.extra_info |= info
        benchmark(run_and_wait(arm))
        if benchmark.stats is None:  # --benchmark-disable runs each arm once and times none
            return
        seconds = benchmark.stats.stats.median
        device = host = share = "-"
        flops_s = info["flops"] / seconds
        if arm.backend == "gpu":
            (times,) = measure.rounds([arm], ROUNDS)
            device_s, host_s = median(each.seconds for each in times), median(each.host_s for each in times)
            benchmark.extra_info |= {"device_s": device_s, "host_s": host_s}
            device, host = f"{device_s * 1e3:.3f}", f"{host_s * 1e3:.3f}"
            flops_s = info["flops"] / device_s
        else:
            benchmark.extra_info["peak_share"] = flops_s / limits().peak_flops
            share = f"{100 * flops_s / limits().peak_flops:.0f}"
        request.config.stash[ROWS].append(
            LINE.format(
                workload.name,
                arm.merge,
                arm.way,
                arm.backend,
                info["params"],
                f"{info['flops'] / 1e9:.3f}",
                f"{info['bytes_moved'] / MIB:.2f}",
                f"{peak_bytes / MIB:.2f}",
                f"{seconds * 1e3:.3f}",
                device,
                host,
                f"{flops_s / 1e9:.0f}",
                share,
            )
        )

    return note


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.section("add against concat, fused against materialised: medians")
        for line in (LINE.format(*HEADER), *config.stash[ROWS]):
            terminalreporter.write_line(line)
    if not_run := config.stash[NOT_RUN]:
        reasons = "; ".join(gpu.reasons_unusable())
        terminalreporter.write_line(f"gpu: {len(not_run)} benchmarks not run ({reasons})", yellow=True)
