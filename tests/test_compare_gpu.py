"""`fusionops compare` and `bench` on a GPU, and on several backends: from end to end on a stand-in for CuPy.

The stand-in's device has a clock of its own, so its times are known beforehand; they say nothing of a GPU.
"""

import json
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from gpu_stand_in import LAUNCH_NS, usable_gpu
from test_measure import SMALL_WORKLOADS

from fusionops.compare import cli, commands, measure, report, selftest
from fusionops.compare.instance import Instance, build, normal_numbers, small_integers, to_numpy
from fusionops.compare.measure import FUSED, MATERIALISED, Arm, Peak
from fusionops.spec import Merge

SMALL = ["--shape", "1,9,10", "--channels", "5,5", "--filters", "7", "--rounds", "3", "--threads", "1"]
WAYS = [(merge, way) for merge in ("add", "concat") for way in (FUSED, MATERIALISED)]
BOTH = [(backend, *arm) for backend in ("cpu", "gpu") for arm in WAYS]
PROMISED = {"merge", "way", "params", "flops", "bytes_moved", "peak_bytes", "seconds", "gflops", "kernel"}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A terminal of 80 columns, and the CPU without child processes and limits, which have tests of their own."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(measure, "memory_peak", lambda *arm, **options: Peak(1000, None))
    monkeypatch.setattr(measure, "limits", lambda dtype, threads: measure.Limits(1e9, 1e9))


@pytest.fixture
def gpu(monkeypatch):
    with usable_gpu(monkeypatch) as runtime:
        yield runtime


def cells(printed, *start):
    """The cells of the table's line that begins so."""
    return next(line.split() for line in printed.splitlines() if line.split()[: len(start)] == list(start))


def heads(printed):
    """The table's heads, as their lines lie below one another."""
    return " ".join(printed.split("─")[0].splitlines()[-3:]).split()


def assert_on_the_clock(row):
    """One kernel runs a fused way here, two a materialised one, each for LAUNCH_NS."""
    launches = 1 if row["way"] == FUSED else 2
    assert round(row["device_seconds"] * 1e9) == launches * LAUNCH_NS
    assert row["seconds"] == row["device_seconds"]
    assert row["gflops"] == row["flops"] / row["seconds"] / 1e9
    assert row["host_seconds"] == sorted(row["host_rounds_s"])[1] > 0
    assert row["host_seconds"] != row["seconds"]


def test_both_backends_end_to_end(gpu, capsys, tmp_path):
    path = tmp_path / "figures.json"
    assert cli.main(["compare", "--backend", "cpu,gpu", *SMALL, "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert max(map(len, printed.out.splitlines())) <= 80
    assert "…" not in printed.out
    figures = json.loads(path.read_text())
    assert [(row["backend"], row["merge"], row["way"]) for row in figures["rows"]] == BOTH
    on_cpu, on_gpu = figures["rows"][:4], figures["rows"][4:]
    for row in figures["rows"]:
        line = cells(printed.out, row["backend"], row["merge"], row["way"])
        device = "-" if row["device_seconds"] is None else report.digits(row["device_seconds"] * 1e3)
        assert line[7:9] == [device, report.digits(row["host_seconds"] * 1e3)]
        assert row["kernel"].startswith(row["backend"] + ".")
        assert row.keys() >= PROMISED
    for row in on_gpu:
        assert_on_the_clock(row)
    assert all(row["device_seconds"] is None and row["host_seconds"] == row["seconds"] > 0 for row in on_cpu)
    # The sum and the concatenation of maps of 9 × 10 × 5 float32, in the pool's units of 512 bytes.
    assert [row["peak_bytes"] for row in on_gpu] == [0, 2048, 0, 4096]
    assert figures["machine"]["gpu"]["gpu"] == "Pretended H200"
    share = on_gpu[2]["bytes_moved"] / on_gpu[2]["device_seconds"] / figures["machine"]["gpu"]["bandwidth"]
    assert cells(printed.out, "gpu", "concat", "fused")[-1] == f"{100 * share:.0f}"
    words = " ".join(printed.out.split())
    assert "gpu, by the device's time: Fusing the add needs 2.00 KiB less memory and is 2.0 times as fast" in words
    assert all(sentence in words for sentence in report.sentences(report.from_json(path.read_text())))


def test_the_gpu_alone_has_no_column_of_backends(gpu, capsys):
    assert cli.main(["compare", "--backend", "gpu", *SMALL, "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert heads(printed.err)[:4] == ["moved", "extra", "device", "host"]
    assert cells(printed.err, "add", "fused")[6] == report.digits(LAUNCH_NS / 1e6)
    rows = json.loads(printed.out)["rows"]
    assert [(row["backend"], row["merge"], row["way"]) for row in rows] == BOTH[4:]
    for row in rows:
        assert_on_the_clock(row)


def test_the_cpu_alone_has_one_time(capsys):
    assert cli.main(["compare", *SMALL, "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert "time" in heads(printed.err)
    assert not {"device", "host", "back"} & set(heads(printed.err))
    figures = json.loads(printed.out)
    assert {row["backend"] for row in figures["rows"]} == {"cpu"}
    assert "gpu" not in figures["machine"]
    assert "gpu" not in printed.err


def test_bench_shows_both_times_of_both_ways(gpu, capsys, tmp_path):
    path = tmp_path / "bench.json"
    argv = ["bench", "--backend", "cpu,gpu", "keras_dense", "stream_4mb", "--rounds", "3", "--json", str(path)]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    device = [report.digits(launches * LAUNCH_NS / 1e6) for launches in (1, 2)]
    assert cells(printed, "keras_dense", "gpu", "concat")[3:5] == device
    assert cells(printed, "keras_dense", "gpu", "concat")[7] == "2.00×"
    assert cells(printed, "keras_dense", "cpu", "concat")[3:5] == ["-", "-"]
    assert cells(printed, "stream_4mb", "gpu", "add")[3:5] == [device[0], "-"]
    rows = report.from_json(path.read_text())
    assert [(row.workload, row.backend, *row.arm) for row in rows] == [
        *(("keras_dense", *arm) for arm in BOTH),
        *(("stream_4mb", backend, merge, FUSED) for backend in ("cpu", "gpu") for merge in ("add", "concat")),
    ]


@pytest.mark.parametrize("command", [["compare", *SMALL], ["bench", "keras_dense"]], ids=["compare", "bench"])
@pytest.mark.parametrize("backends", ["gpu", "cpu,gpu", "gpu,cpu"])
def test_an_unusable_gpu_is_said_before_anything_is_built_or_measured(capsys, monkeypatch, command, backends):
    def fail(*arguments, **options):
        raise AssertionError("too early")

    monkeypatch.setattr("fusionops.gpu.reasons_unusable", lambda: ("there is no NVIDIA driver",))
    monkeypatch.setattr(commands, "build", fail)
    for name in ("limits", "memory_peak", "rounds", "traced_peak"):
        monkeypatch.setattr(measure, name, fail)
    assert cli.main([*command, "--backend", backends]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "fusionops: the gpu backend cannot be used here: there is no NVIDIA driver\n"


@pytest.mark.parametrize("backends", ["cpu,cpu", "cpu,", "", "cpu,reference"])
def test_lists_that_are_none_leave_with_2(capsys, backends):
    with pytest.raises(SystemExit) as left:
        cli.main(["compare", "--backend", backends])
    assert left.value.code == 2
    assert "argument --backend" in capsys.readouterr().err


def test_explain_on_a_gpu(gpu, capsys):
    assert cli.main(["explain", "--backend", "gpu", "--channels", "3,3", "--shape", "1,8,8", "--merge", "add"]) == 0
    assert "runs on  gpu: gpu.add_conv_fprop_igemm_f32" in capsys.readouterr().out
    assert gpu.launched == []


# results


def test_backends_that_disagree_return_1(gpu, capsys, monkeypatch):
    def spoil(whole):
        def spoiled(self, merge):
            whole(self, merge)
            if self.backend == "gpu":
                self.outs[merge][0, 0, 0, 0] = 100.0

        return spoiled

    monkeypatch.setattr(Instance, "fused", spoil(Instance.fused))
    monkeypatch.setattr(Instance, "materialised", spoil(Instance.materialised))
    assert cli.main(["compare", "--backend", "cpu,gpu", *SMALL]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("of 630 results differ") == 2
    assert "concat, gpu against cpu: " in printed.err


def test_narrow_maps_run_on_tensor_cores(gpu, capsys):
    assert (
        cli.main(["compare", "--backend", "cpu,gpu", *SMALL, "--filters", "32", "--dtype", "float16", "--json", "-"])
        == 0
    )
    kernels = {row["backend"]: row["kernel"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert kernels["cpu"].endswith("_f16")
    assert "_igemm_sm" in kernels["gpu"]


@pytest.mark.parametrize(
    ("dtype", "near", "far"), [("float32", 7e-6, 9e-6), ("float64", 13e-15, 17e-15), ("float16", 9e-4, 2.1e-3)]
)
def test_backends_may_differ_by_twice_the_promised_error(dtype, near, far):
    out = np.zeros(1000, dtype)

    def arms(error):
        def result(value):
            return lambda: out.fill(value)

        return [
            Arm(Merge.ADD, FUSED, result(1.0), out, "", None, "cpu"),
            Arm(Merge.ADD, FUSED, result(1.0 + error), out, "", None, "gpu"),
            Arm(Merge.ADD, MATERIALISED, result(1.0 + error), out, "", None, "gpu"),
        ]

    assert measure.differences(arms(near)) == []
    assert len(measure.differences(arms(far))) == 1
    assert measure.differences(arms(far))[0].startswith("add, gpu against cpu: 1000 of 1000 results differ")


def test_ways_on_a_gpu_have_to_have_the_same_bits(gpu, monkeypatch):
    whole = Instance.materialised

    def spoiled(self, merge):
        whole(self, merge)
        last = self.outs[merge][0, 0, 0, :1]
        last[...] = float(np.nextafter(last.get()[0], np.float32(9)))

    monkeypatch.setattr(Instance, "materialised", spoiled)
    found = measure.differences(measure.arms(build(SMALL_WORKLOADS[0], normal_numbers(), "gpu")))
    assert len(found) == 2
    assert found[0].startswith("add: 1 of 336 results differ")


@pytest.mark.parametrize("workload", SMALL_WORKLOADS, ids=lambda workload: workload.name)
def test_workloads_are_the_same_on_both_backends(gpu, workload):
    """The same numbers; ways with the same bits; and on integers the results of the cpu backend."""
    arms = [arm for name in ("cpu", "gpu") for arm in measure.arms(build(workload, normal_numbers(), name))]
    assert measure.differences(arms) == []
    exact = replace(workload, activation="relu", weights=False)
    on_cpu, on_gpu = (build(exact, small_integers(), name) for name in ("cpu", "gpu"))
    for here, there in zip(on_cpu.maps, on_gpu.maps, strict=True):
        np.testing.assert_array_equal(to_numpy(there), here)
    for merge in exact.merges:
        on_cpu.fused(merge)
        on_gpu.fused(merge)
        result = to_numpy(on_gpu.outs[merge])
        assert np.count_nonzero(result) > result.size // 4
        np.testing.assert_array_equal(result, on_cpu.outs[merge])
    assert gpu.launched != []


# figures that were written


def test_figures_of_before_there_were_backends_are_read():
    old = {"workload": "w", "merge": "add", "way": "fused", "params": 1, "flops": 10, "bytes_moved": 10,
           "peak_bytes": 0, "peak_rss_bytes": None, "rounds_s": [1.0, 2.0, 3.0], "kernel": "cpu.k"}  # fmt: skip
    (row,) = report.from_json(json.dumps({"rows": [old]}))
    assert (row.backend, row.seconds, row.host_seconds, row.device_seconds) == ("cpu", 2.0, 2.0, None)


def test_plot_names_the_backends(gpu, monkeypatch, tmp_path):
    path = tmp_path / "figures.json"
    assert cli.main(["compare", "--backend", "cpu,gpu", *SMALL, "--json", str(path)]) == 0
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")  # text stays text
    assert cli.main(["plot", str(path), "--out", str(tmp_path / "figures.svg")]) == 0
    drawn = (tmp_path / "figures.svg").read_text()
    assert all(f"{merge}, {way}, {backend}" in drawn for backend, merge, way in BOTH)


def test_the_self_test_runs_on_the_gpu(gpu):
    """Every kind of problem: arrays are brought to the GPU, and results back."""
    results = [selftest.run(problem, "gpu") for problem in selftest.EXACT_PROBLEMS[::29]]
    assert [str(result) for result in results if result.problem] == []
    kernels = {result.kernel.removeprefix("gpu.").split("_fprop_")[-1] for result in results}
    assert {"igemm_f32", "igemm_f64", "stream_any", "igemm_sm80_bf16"} <= kernels
