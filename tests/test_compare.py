"""The program `fusionops`: what it prints, writes and returns, and what it says of the figures."""

import doctest
import io
import json
import struct
import sys

import numpy as np
import pytest

import fusionops as fo
from fusionops.compare import cli, commands, measure, report, selftest
from fusionops.compare.instance import Instance
from fusionops.compare.measure import Peak
from fusionops.compare.report import Row
from fusionops.compare.workloads import WORKLOADS, Map, Workload
from fusionops.spec import Merge
from fusionops.testing import PROBLEMS

CONCAT = Merge.CONCAT
MIB = 2**20
SMALL = ["--shape", "1,9,10", "--channels", "5,5", "--filters", "7", "--rounds", "3", "--threads", "1"]
WAYS = [("add", "fused"), ("add", "materialised"), ("concat", "fused"), ("concat", "materialised")]
EXAMPLES = {problem.name: problem for problem in PROBLEMS}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def quick(monkeypatch):
    """Without the child processes and the machine's limits, which have tests of their own."""
    monkeypatch.setattr(measure, "memory_peak", lambda *arm, **options: Peak(1000, None))
    monkeypatch.setattr(measure, "limits", lambda dtype, threads: measure.Limits(1e9, 1e9))


def row(merge, way, seconds, peak_bytes=0, params=100, flops=1000, workload="w"):
    times = (seconds,) if isinstance(seconds, float) else seconds
    return Row(workload, merge, way, params, flops, 10, peak_bytes, None, times * (3 // len(times)), "cpu.some_kernel")


def four_rows(add=1.0, add_stored=1.0, concat=2.0, concat_stored=2.0, peaks=(0, 0, 0, 0)):
    costs = ((50, 500), (50, 500), (100, 1000), (100, 1000))
    seconds = add, add_stored, concat, concat_stored
    return [row(*arm, time, peak, *cost) for arm, time, peak, cost in zip(WAYS, seconds, peaks, costs, strict=True)]


def test_doctests():
    assert doctest.testmod(report) == (0, 2)


# compare


def test_compare_end_to_end(capsys, tmp_path):
    """The one run with nothing replaced: child processes, limits, JSON, table, sentences, no escape codes."""
    path = tmp_path / "figures.json"
    assert cli.main(["compare", *SMALL, "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\x1b" not in printed.out
    assert max(map(len, printed.out.splitlines())) <= 80
    assert "…" not in printed.out
    figures = json.loads(path.read_text())
    assert [(each["merge"], each["way"]) for each in figures["rows"]] == WAYS
    for each in figures["rows"]:
        line = next(line for line in printed.out.splitlines() if line.split()[:2] == [each["merge"], each["way"]])
        assert report.digits(each["seconds"] * 1e3) in line.split()
        assert each["peak_bytes"] > 0
        assert each["seconds"] == sorted(each["rounds_s"])[1]
        assert each["gflops"] == each["flops"] / each["seconds"] / 1e9
        assert each["kernel"].startswith("cpu.")
    assert all(
        sentence in " ".join(printed.out.split()) for sentence in report.sentences(report.from_json(path.read_text()))
    )


def test_json_has_what_issue_and_cost_say(quick, capsys):
    assert cli.main(["compare", *SMALL, "--json", "-"]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert "add    fused" in printed.err
    required = {"merge", "way", "params", "flops", "bytes_moved", "peak_bytes", "seconds", "gflops", "kernel"}
    assert all(required <= set(each) for each in figures["rows"])
    facts = {"processor", "cores", "threads", "vector_bytes", "python", "numpy", "numba", "peak_flops", "bandwidth"}
    assert facts <= set(figures["machine"])
    assert figures["machine"]["threads"] == 1
    x, filters, bias = np.ones((1, 9, 10, 5), "f4"), np.ones((3, 3, 10, 7), "f4"), np.ones(7, "f4")
    expected = fo.cost("concat_conv", [x, x], filters, bias, padding="same")
    fused, stored = figures["rows"][2:]
    assert (fused["params"], fused["flops"], fused["bytes_moved"]) == (637, expected.flops, expected.bytes_moved)
    assert stored["bytes_moved"] == expected.materialised.bytes_moved


def test_default_is_the_keras_example():
    options = cli._parser().parse_args(["compare"])
    assert options.workload_of(options) == WORKLOADS["keras_conv"]


def test_options_describe_the_problem():
    argv = (
        "compare --shape 2,12,8 --channels 3,4,5 --upsample 1,2,4 --filters 6 --kernel 5,3 --stride 2 --padding 1,2,0,3"
    )
    options = cli._parser().parse_args(
        [*argv.split(), "--activation", "none", "--dtype", "float64", "--layout", "NCHW"]
    )
    assert options.workload_of(options) == Workload(
        "custom",
        CONCAT,
        (Map(3, 12, 8), Map(4, 6, 4, upsample=2), Map(5, 3, 2, upsample=4)),
        6,
        (5, 3),
        N=2,
        stride=(2, 2),
        padding=((1, 2), (0, 3)),
        dtype="float64",
        layout="NCHW",
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "required: COMMAND"),
        ("compare --shape 1,2", "has 2 numbers, needs 3"),
        ("compare --channels 0,3", "no positive integer"),
        ("compare --kernel 1,2,3", "needs one or two"),
        ("compare --padding 1,2,3", "is not same, valid"),
        ("compare --rounds 2", "too few for a median, needs 3"),
        ("compare --workload unknown", "bench --list shows them"),
        ("compare --workload keras_conv --filters 3", "leave one of them out"),
        ("compare --upsample 2", "1 factors, --channels 2 sources"),
        ("compare --shape 1,9,9 --upsample 2,1", "no multiple of an upsampling by 2"),
        ("compare --json no/such/folder/file", "cannot be written"),
        ("compare --activation other", "invalid choice"),
        ("compare --backend reference", "its time and memory say nothing"),
        ("plot", "required: FILE.json"),
    ],
)
def test_wrong_usage_leaves_with_2(capsys, argv, message):
    with pytest.raises(SystemExit) as left:
        cli.main(argv.split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("compare --backend gpu", "the gpu backend cannot be used"),
        ("compare --backend other", 'needs None or one of "cpu"'),
        ("compare --kernel 500 --padding valid", "the result would be empty"),
        ("compare --shape 1,3000000,3000000", "too little memory"),
        ("check --backend gpu", "the gpu backend cannot be used"),
        ("explain --channels 3,5 --merge add", "an add needs equal"),
        ("plot no/such/file.json", "No such file"),
    ],
)
def test_what_cannot_be_done_returns_2_without_a_traceback(capsys, argv, message):
    assert cli.main(argv.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fusionops: ")
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_different_results_return_1(quick, capsys, monkeypatch):
    whole = Instance.materialised

    def spoiled(self, merge):
        whole(self, merge)
        if merge is CONCAT:
            self.outs[merge].flat[3] += 1

    monkeypatch.setattr(Instance, "materialised", spoiled)
    assert cli.main(["compare", *SMALL]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "concat: 1 of 630 results differ, by up to 1" in printed.err


def test_missing_extra_names_the_remedy(capsys, monkeypatch):
    for name in ("commands", "report", "plots"):
        monkeypatch.delitem(sys.modules, f"fusionops.compare.{name}")
        monkeypatch.delattr(f"fusionops.compare.{name}")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["info"]) == 2
    assert 'needs rich.console: pip install "fusionops[cli]"' in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_bar_only_on_a_terminal(quick, monkeypatch, is_terminal):
    class Terminal(io.StringIO):
        def isatty(self):
            return is_terminal

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.main(["compare", *SMALL]) == 0
    assert ("time" in sys.stderr.getvalue()) == is_terminal


def test_threads_are_set_and_given_back(quick):
    before = measure.default_threads()
    seen = []
    with commands._threads(before + 1) as threads:
        seen.append((threads, measure.default_threads()))
    assert seen == [(before + 1, before + 1)]
    assert measure.default_threads() == before


# what is said of the figures


def test_sentences_agree_with_the_figures():
    rows = four_rows(0.010, 0.012, 0.030, 0.033, peaks=(MIB, 5 * MIB, 2 * MIB, 10 * MIB))
    assert report.sentences(rows) == (
        "Adding instead of concatenating takes 50 % of the parameters and 50 % of the arithmetic, "
        "and is 3.0 times as fast: 10.0 instead of 30.0 ms.",
        "Fusing the add needs 4.00 MiB less memory and is 20 % faster; "
        "fusing the concat needs 8.00 MiB less memory and is 10 % faster.",
    )


def test_losses_are_said():
    rows = four_rows(0.030, 0.018, 0.010, 0.009, peaks=(2048, 1024, 0, 0))
    adding, fusing = report.sentences(rows)
    assert "and takes 3.0 times as long: 30.0 instead of 10.0 ms" in adding
    assert fusing == (
        "Fusing the add needs 1.00 KiB more memory and takes 1.7 times as long; "
        "fusing the concat needs the same memory and takes 11 % longer."
    )


def test_scatter_is_no_difference():
    rows = four_rows((0.010, 0.020, 0.012), (0.012, 0.011, 0.020), 0.03, 0.03)
    assert "is as fast, as far as the rounds can tell;" in report.sentences(rows)[1]
    assert report._speed(rows[2], rows[2]) == "is as fast, as far as the rounds can tell"


def test_one_merge_and_nothing_stored_are_said():
    concat = row("concat", "fused", 1.0)
    assert report.sentences([concat]) == (
        "These maps fit one merge only, so there is no add to compare with a concat.",
        "Nothing is stored between merge and result here, so there is nothing to fuse.",
    )
    streams = [row("add", "fused", 1.0, flops=5), row("concat", "fused", 1.0, flops=0)]
    assert report.sentences(streams)[0].startswith("No filters follow this merge")


def test_json_comes_back():
    rows = four_rows()
    assert report.from_json(report.as_json(rows, {"threads": 1})) == rows
    for text in ("[]", "{}", '{"rows": [{}]}', '{"rows": 3}'):
        with pytest.raises(ValueError, match="no rows of as_json"):
            report.from_json(text)
    with pytest.raises(ValueError, match="Expecting value"):
        report.from_json("nonsense")


# check, bench, explain, info, plot


@pytest.fixture
def few(monkeypatch):
    names = "add_one_element", "concat_last_axis", "add_conv_odd_channels", "add_conv_normalised_and_relu"
    monkeypatch.setattr(selftest, "EXACT_PROBLEMS", tuple(p for p in PROBLEMS if p.name in names))
    return selftest.EXACT_PROBLEMS


def test_check_counts_what_it_ran(few, capsys):
    assert cli.main(["check"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["cpu.add_conv_fprop_direct_f32", "1", "1", "0"] in lines
    counted = sum(int(line[-3]) for line in lines if line and line[-1].isdecimal())
    refused = sum(int(line[-3]) for line in lines if line[:2] == ["no", "kernel"])
    assert counted + refused == len(few)


def test_check_fails_on_a_wrong_result_and_on_an_exception(few, capsys, monkeypatch):
    whole = fo.concat

    def spoiled(*arguments, backend, **options):
        result = whole(*arguments, **options)
        return result if backend == "reference" else result + (np.arange(result.size).reshape(result.shape) == 2)

    def broken(*arguments, backend, **options):
        if backend != "reference":
            raise RuntimeError("broken on purpose")
        return whole(*arguments, **options)

    monkeypatch.setattr(fo, "concat", spoiled)
    assert cli.main(["check", "--backend", "cpu"]) == 1
    assert "concat_last_axis, cpu.concat_fprop_stream_any: 1 of 72 results differ" in capsys.readouterr().err
    monkeypatch.setattr(fo, "concat", broken)
    assert cli.main(["check"]) == 1
    assert "RuntimeError: broken on purpose" in capsys.readouterr().err


def test_bench_shows_both_ways(quick, capsys, tmp_path):
    path = tmp_path / "bench.json"
    assert cli.main(["bench", "keras_dense", "resnet_l5", "stream_4mb", "--rounds", "3", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for name, merge in (("keras_dense", "add"), ("keras_dense", "concat"), ("resnet_l5", "add"), ("stream_4mb", "add")):
        line = next(line.split() for line in printed.splitlines() if line.split()[:2] == [name, merge])
        assert (line[3] == "-") == (name == "stream_4mb")
    rows = report.from_json(path.read_text())
    assert [(each.workload, *each.arm) for each in rows] == [
        *(("keras_dense", *arm) for arm in WAYS),
        *(("resnet_l5", *arm) for arm in WAYS[:2]),
        ("stream_4mb", "add", "fused"),
        ("stream_4mb", "concat", "fused"),
    ]


def test_bench_fails_where_the_ways_differ(quick, capsys, monkeypatch):
    monkeypatch.setattr(Instance, "materialised", lambda self, merge: self.outs[merge].fill(1))
    assert cli.main(["bench", "keras_dense", "--rounds", "3"]) == 1
    assert "keras_dense: concat: " in capsys.readouterr().err


def test_bench_lists_every_workload(capsys):
    assert cli.main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line.strip()} >= set(WORKLOADS)


def test_explain_names_problem_and_kernel(capsys):
    argv = ["explain", "--channels", "3,3", "--shape", "1,8,8", "--stride", "2"]
    assert cli.main(argv) == 0
    both = capsys.readouterr().out
    assert "add_conv fprop float32 N1 H8 W8 C(3=3) K64 R3 S3 stride 2x2" in both
    assert "runs on  cpu: cpu.concat_conv_fprop_direct_f32" in both
    assert cli.main([*argv, "--merge", "add"]) == 0
    assert "concat_conv fprop" not in capsys.readouterr().out


def test_info_is_that_of_the_library(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"{fo.__version__}\n" in printed
    assert "gpu" in printed


def test_plot_draws_a_picture(capsys, tmp_path):
    path = tmp_path / "figures.json"
    path.write_text(report.as_json([*four_rows(), row("add", "fused", 1.0, workload="other")], {}))
    assert cli.main(["plot", str(path)]) == 0
    assert f"wrote {tmp_path / 'figures.png'}" in capsys.readouterr().out
    png = (tmp_path / "figures.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert width > height > 300  # two rows of five panels
    assert cli.main(["plot", str(path), "--out", str(tmp_path / "other.svg")]) == 0
    assert "concat, materialised" not in (tmp_path / "figures.json").read_text()
    assert (tmp_path / "other.svg").read_text().count('<g id="axes_') == 10


def test_plot_refuses_other_files(capsys, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": [{"merge": "add"}]}')
    assert cli.main(["plot", str(path)]) == 2
    assert "is no file that compare or bench wrote" in capsys.readouterr().err
