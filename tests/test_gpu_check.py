"""The program that proves the backend on a GPU, as far as it runs without one: its judgements, on the host."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpu_on_host import HostRuntime
from kernel_checks import rng_of
from test_gpu_parts import PROGRAM

from fusionops import testing
from fusionops.device import A100, H200
from fusionops.gpu import host, module

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_cases
import gpu_check
from gpu_parts import Part

PAIRS = [
    (kernel, problem)
    for kernel, problem in gpu_cases.pairs()
    if problem.name in ("add_conv_return_sum", "concat_conv_tiled_bf16", "concat_uint8", "add_conv_odd_channels_f16")
]


class NoRuntime(HostRuntime):
    """Keeps what kernels are launched with, and runs none."""

    max_dynamic_shared_size_bytes = 1 << 20

    def function(self, source, name):
        self.launched.append(name)
        return self

    def __call__(self, grid, block, args, *, shared_mem=0):
        self.params = args[0][0]


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setattr(gpu_cases.gpu, "device", lambda: H200)
    monkeypatch.setattr(host, "compiler", lambda: (13, 0))
    with module.use(HostRuntime()):
        yield


# The cases.


@pytest.mark.parametrize(("kernel", "problem"), PAIRS, ids=lambda case: case.name)
def test_a_right_kernel_passes(kernel, problem):
    gpu_cases.check_case(kernel, problem, H200, np.copy, np.copy)


def test_a_wrong_kernel_does_not():
    kernel, problem = PAIRS[0]

    def wrong(spec, config, operands, out):
        kernel.run(spec, config, operands, out)
        out[(0,) * out.ndim] += 1

    with pytest.raises(AssertionError, match="leave the bound"):
        gpu_cases.check_case(replace(kernel, run=wrong), problem, H200, np.copy, np.copy)


def test_a_kernel_that_repeats_itself_with_other_bits_does_not():
    kernel, problem = PAIRS[0]
    runs = []

    def unsteady(spec, config, operands, out):
        kernel.run(spec, config, operands, out)
        runs.append(out)
        if len(runs) == 2:
            out.view(f"u{out.itemsize}")[(0,) * out.ndim] ^= 1

    with pytest.raises(AssertionError, match="when run again"):
        gpu_cases.check_case(replace(kernel, run=unsteady), problem, H200, np.copy, np.copy)


def launches(pairs):
    """The problem, and the parameters of the last launch of every config that a case runs."""
    for kernel, problem in pairs:
        spec = problem.spec
        operands, out = testing.random_operands(spec, rng_of(problem)), np.empty(spec.out_shape, spec.dtype)
        operands.merged = np.empty(spec.merged_shape, spec.dtype) if spec.return_sum else None
        others = (config for _, config in gpu_cases.other_tiles(kernel, problem, H200))
        for config in (kernel.plan(spec, H200), *others):
            with module.use(NoRuntime()) as runtime:
                kernel.run(spec, config, operands, out)
            yield kernel, problem, runtime


def test_a_sanitizer_sees_every_family_and_every_way_to_load():
    seen = list(launches(gpu_cases.watched()))
    for family in gpu_cases.FAMILIES:
        assert len({problem for kernel, problem, _ in seen if kernel in family.KERNELS}) >= 8, family.__name__
    assert any("Run<u64, 2>" in name for *_, runtime in seen for name in runtime.launched)
    last = [(runtime.launched[-1], runtime.params) for _, _, runtime in seen if runtime.launched]
    for start in ("conv_fprop_igemm_sm80<f16", "conv_fprop_igemm_sm80<bf16", "conv_fprop_igemm_sm80<float"):
        flags = {
            (params["vectors_a"] != 0, params["vectors_b"] != 0) for name, params in last if name.startswith(start)
        }
        assert {(True, True), (False, False)} <= flags, start
    hopper = [params for name, params in last if name.startswith("conv_fprop_igemm_sm90")]
    assert sum(params["boxes"] != 0 for params in hopper) >= 4
    assert sum(params["boxes"] == 0 and params["runs"] != 0 for params in hopper) >= 4
    assert sum(params["boxes"] == 0 and params["runs"] == 0 for params in hopper) >= 4


def test_whatever_a_case_launches_was_compiled_before():
    every = list(gpu_cases.pairs())
    named = {name.split(" ", 1)[1] for name, _ in gpu_cases.compilations()}
    launched = {name for *_, runtime in launches(every[::7]) for name in runtime.launched}
    assert len(launched) > 60
    assert launched <= named


def test_a_gpu_is_given_the_kernels_that_it_can_run(monkeypatch):
    hopper = {kernel.name for kernel in gpu_cases.sm90.KERNELS}
    assert hopper & {name.split()[0] for name, _ in gpu_cases.kernels()} == hopper
    monkeypatch.setattr(gpu_cases.gpu, "device", lambda: A100)
    assert not hopper & {name.split()[0] for name, _ in gpu_cases.kernels()}
    assert not any(name.startswith("sm90.cu") for name, _ in gpu_cases.compilations())


def test_cases_have_names_of_their_own():
    for cases in (gpu_cases.kernels(), gpu_cases.compilations(), gpu_check.gpu_times.timed()):
        assert len({name for name, _ in cases}) == len(cases)


def test_a_lost_gpu_is_known():
    class Lost:
        class cuda:
            class runtime:
                @staticmethod
                def deviceSynchronize():
                    raise RuntimeError("cudaErrorIllegalAddress")

    with module.use(HostRuntime()) as runtime:
        runtime.arrays = Lost
        assert gpu_cases.is_lost()
        Lost.cuda.runtime.deviceSynchronize = lambda: None
        assert not gpu_cases.is_lost()


# The program.


@pytest.fixture
def usable(monkeypatch, tmp_path):
    """main() as on a machine with a GPU; processes run the program of test_gpu_parts, whose cases are words."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    facts = {"device": {"gpu": "NVIDIA H200"}, "commit": "0123456789abcdef", "changed": []}
    monkeypatch.setattr(gpu_check.gpu, "reasons_unusable", tuple)
    monkeypatch.setattr(gpu_check, "state", lambda: dict(facts))
    monkeypatch.setattr(gpu_check, "SCRIPT", script)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    monkeypatch.setenv("STOPPING", "0")

    def main(*stages: str, options: tuple[str, ...] = (), **of_parts) -> tuple[int, dict]:
        """With one part for each stage; what is printed at the end is the path of the report."""
        parts = {words: Part(words, **{"seconds": 20, "stall": 1.0} | of_parts.get(words, {})) for words in stages}
        monkeypatch.setattr(gpu_check, "PARTS", parts)
        monkeypatch.setattr(gpu_check, "STAGES", tuple((words,) for words in stages))
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
        code = gpu_check.main()
        path = tmp_path / "out" / "report.json" if options else tmp_path / "results" / "nvidia-h200-01234567.json"
        return code, json.loads(path.read_text())

    return main


def test_without_a_gpu_it_says_so_and_fails(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check.gpu, "reasons_unusable", lambda: ("there is no GPU",))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 1
    assert "there is no GPU" in capsys.readouterr().err


def test_all_is_well(usable, capsys):
    code, report = usable("good-1", "good-2 fact-1")
    assert (code, report["wrong"]) == (0, [])
    assert report["parts"].keys() == {"good-1", "good-2 fact-1"}
    assert report["commit"] == "0123456789abcdef"
    assert capsys.readouterr().out.rstrip().endswith("nvidia-h200-01234567.json")


def test_every_part_runs_whatever_befell_the_others(usable):
    code, report = usable("wrong-1 good-1", "crash-1", "hang-1", "unlisted", "fact-1")
    assert code == 1
    assert {name: len(part["failures"]) for name, part in report["parts"].items()} == {
        "wrong-1 good-1": 1, "crash-1": 1, "hang-1": 1, "unlisted": 1, "fact-1": 0,
    }  # fmt: skip
    assert len(report["wrong"]) == 4
    assert "wrong-1 good-1, wrong-1: AssertionError: 2 elements differ" in report["wrong"]


def test_cases_that_did_not_fit_are_wrong_unless_optional(usable):
    short = {"hang-1 good-1": {"seconds": 1.0, "stall": 60.0}}
    code, report = usable("hang-1 good-1", "good-2", **short)
    assert (code, report["wrong"]) == (1, ["hang-1 good-1: 2 of 2 cases were not run"])
    short["hang-1 good-1"]["required"] = False
    code, report = usable("hang-1 good-1", **short)
    assert (code, report["wrong"]) == (0, [])
    assert report["parts"]["hang-1 good-1"]["not_run"] == 2


def test_a_part_has_what_the_ones_before_left(usable):
    parts = {"good-1": {"seconds": 10}, "slow-1 slow-2 slow-3": {"seconds": 0.1}}
    code, _ = usable("good-1", "slow-1 slow-2 slow-3", **parts)
    assert code == 0


def test_the_report_is_written_after_each_part(usable, monkeypatch, tmp_path):
    run_parts = gpu_check.run_parts

    def interrupted(parts, *rest):
        if parts[0].name == "good-2":
            raise KeyboardInterrupt
        return run_parts(parts, *rest)

    monkeypatch.setattr(gpu_check, "run_parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        usable("fact-1", "good-2", "good-3")
    report = json.loads((tmp_path / "results" / "nvidia-h200-01234567.json").read_text())
    assert report["parts"].keys() == {"fact-1"}
    assert report["wrong"] == ["good-2: KeyboardInterrupt: "]


def test_an_error_of_the_program_itself_costs_one_part(usable, monkeypatch):
    run_parts = gpu_check.run_parts

    def failing(parts, *rest):
        if parts[0].name == "good-1":
            raise OSError("no space left on device")
        return run_parts(parts, *rest)

    monkeypatch.setattr(gpu_check, "run_parts", failing)
    code, report = usable("good-1", "good-2")
    assert (code, report["wrong"]) == (1, ["good-1: OSError: no space left on device"])
    assert report["parts"].keys() == {"good-2"}


def test_parts_of_the_same_commit_are_kept(usable, monkeypatch, tmp_path):
    out = ("--out", str(tmp_path / "out" / "report.json"))
    assert usable("wrong-1", "good-1", options=out)[0] == 1
    code, report = usable("wrong-1", "good-1", options=(*out, "--only", "good-1"))
    assert (code, report["parts"].keys()) == (1, {"wrong-1", "good-1"})
    monkeypatch.setattr(gpu_check, "state", lambda: {"device": {}, "commit": "another", "changed": []})
    code, report = usable("wrong-1", "good-1", options=(*out, "--only", "good-1"))
    assert (code, report["parts"].keys()) == (0, {"good-1"})


def test_a_part_that_does_not_exist_is_refused(usable, capsys):
    with pytest.raises(SystemExit):
        usable("good-1", options=("--only", "good-7"))
    assert "there is no part good-7; there are good-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "parts"), [(None, ["kernels"]), ("/bin/compute-sanitizer", ["kernels", "memcheck"])]
)
def test_a_sanitizer_runs_where_it_is_installed(monkeypatch, tmp_path, installed, parts):
    started = []
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: installed)
    monkeypatch.setattr(gpu_check, "run_parts", lambda parts, *_: started.extend(parts) or {})
    found = gpu_check.run_stage(("kernels", "memcheck"), time.time(), tmp_path)
    assert [part.name for part in started] == parts
    if installed:
        assert started[1].prefix[:7] == (
            installed, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")  # fmt: skip
    else:
        assert found == {"memcheck": {"note": "compute-sanitizer is not installed"}}
        assert gpu_check.wrong({"errors": {}, "parts": found}) == []


def test_wrong_rows_are_wrong():
    part = {"results": {"a row": {"dtype": "float32", "relative_l2": 1.0}}, "failures": {}, "not_run": 0}
    (said,) = gpu_check.wrong({"errors": {}, "parts": {"times": part}})
    assert said == "times, a row: relative L2 distance 1 from torch, bound 8e-06"


def test_the_parts_fit_into_eight_minutes():
    assert [name for stage in gpu_check.STAGES for name in stage] == list(gpu_check.PARTS) == list(gpu_check.CASES)
    assert sum(max(gpu_check.PARTS[name].seconds for name in stage) for stage in gpu_check.STAGES) <= 480


def test_a_process_runs_its_share_of_the_cases(monkeypatch, tmp_path):
    problems = tuple(problem for problem in gpu_cases.EVERY if problem.name in ("concat_uint8", "add_int8_wraps"))
    cases = [gpu_cases._case(*pair) for pair in gpu_cases.pairs(problems)]
    monkeypatch.setitem(gpu_check.CASES, "kernels", lambda: cases)
    for name in ("to_gpu", "to_host"):
        monkeypatch.setattr(gpu_cases, name, np.copy)
    monkeypatch.setattr(gpu_cases.gpu, "device", lambda: H200)
    monkeypatch.setattr(gpu_check.gpu, "reasons_unusable", tuple)
    notes = tmp_path / "notes.json"
    share = ["--only", "kernels", "--shard", "1/2", "--first", "0", "--until", str(time.time() + 60)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *share, "--notes", str(notes)])
    assert gpu_check.main() == 0
    found = json.loads(notes.read_text())
    assert (found["cases"], found["next"], found["failures"]) == (1, 1, {})


def test_the_program_starts_from_any_folder(tmp_path):
    program = Path(gpu_check.__file__)
    done = subprocess.run([sys.executable, program, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--patience" in done.stdout
    assert not any(f"--{hidden}" in done.stdout for hidden in ("shard", "first", "until", "notes"))
