"""The suite of `benchmarks/` where there is no GPU, and on a stand-in for one, whose times are known beforehand."""

import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_stand_in import LAUNCH_NS

ROOT = Path(__file__).parent.parent
FOUR = [(way, backend) for backend in ("cpu", "gpu") for way in ("fused", "materialised")]


def benchmarks(*options: str, **environment: str) -> str:
    """What pytest prints of four benchmarks: an add of two small maps, both ways, on both backends."""
    # -P: the package under test is the one that these tests import, be it installed or this folder's.
    command = [sys.executable, "-P", "-m", "pytest", "benchmarks/test_merge.py", "-k", "keras_dense and add"]
    paths = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, "-W", "error", "-p", "no:cacheprovider", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_benchmarks_of_a_gpu_that_is_not_there_are_counted():
    printed = benchmarks("--benchmark-disable", CUDA_VISIBLE_DEVICES="")
    assert "2 passed, 2 skipped" in printed
    (counted,) = (line for line in printed.splitlines() if "not run" in line)
    reason = counted.removeprefix("gpu: 2 benchmarks not run (").removesuffix(")")
    assert reason
    (skipped,) = (line for line in printed.splitlines() if line.startswith("SKIPPED [2]"))
    assert skipped.endswith(f": {reason}")


def test_benchmarks_on_a_gpu_wait_for_it_and_note_its_time_beside(tmp_path):
    path = tmp_path / "figures.json"
    printed = benchmarks("-p", "gpu_stand_in", f"--benchmark-json={path}")
    assert "4 passed" in printed
    assert "not run" not in printed
    figures = json.loads(path.read_text())
    assert figures["machine_info"]["fusionops"]["gpu"]["gpu"] == "Pretended H200"
    assert [tuple(each["extra_info"][name] for name in ("way", "backend")) for each in figures["benchmarks"]] == FOUR
    for each, launches in zip(figures["benchmarks"][2:], (1, 2), strict=True):
        assert round(each["extra_info"]["device_s"] * 1e9) == launches * LAUNCH_NS
        assert each["extra_info"]["host_s"] > 0
        assert each["stats"]["min"] >= launches * LAUNCH_NS / 1e9
        assert "peak_share" not in each["extra_info"]
        start = ["keras_dense", "add", each["extra_info"]["way"], "gpu"]
        line = next(line.split() for line in printed.splitlines() if line.split()[:4] == start)
        assert line[9:11] == [f"{each['extra_info'][name] * 1e3:.3f}" for name in ("device_s", "host_s")]
    assert all("device_s" not in each["extra_info"] for each in figures["benchmarks"][:2])
