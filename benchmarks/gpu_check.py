"""Proves and times the GPU backend on the GPU that is here, and writes what it found as JSON.

    python benchmarks/gpu_check.py [--out FILE] [--only PART,PART] [--patience 2]

compile      every instantiation, by 16 processes at once, into the cache on disk that the other parts read
primitives   every PTX primitive against NumPy's formula for it
kernels      every kernel on every problem against the reference, within the bounds of `fusionops.testing`
memcheck, racecheck   compute-sanitizer on some problems of every family of kernels
times        device copies; add and concat beside them; layers beside torch: milliseconds of the device
compiled     the same layers by torch.compile, as many as there is time for

Every part has its own seconds, 8 minutes in all, which --patience multiplies; its cases run in processes of their own
(gpu_parts.py). The file is written after each part; parts that did not run keep what the file has of them at the same
commit. Exits with 1 if anything is wrong, or required and not run. Needs CuPy and ml_dtypes; takes torch and
compute-sanitizer where they are installed, and says so where they are not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_cases
import gpu_times
from gpu_parts import Case, Part, error_of, run_cases, run_parts, write_json

from fusionops import gpu
from fusionops.gpu import module

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Seconds: 8 minutes for all, of which the last two parts take what the others leave. Compilers take 1 to 4 s for each
# of 150 instantiations; a case of `kernels` some milliseconds, of which most are the reference's; under a sanitizer a
# process starts in 10 s and a case takes one or two.
PARTS = {
    part.name: part
    for part in (
        Part("compile", 75, shards=16, stall=60),
        Part("primitives", 30, stall=30),
        Part("kernels", 85, shards=6),
        Part("memcheck", 90, shards=4, stall=60),
        Part("racecheck", 90, shards=4, stall=60),
        Part("times", 100, stall=40),
        Part("compiled", 100, stall=60, required=False),
    )
}
STAGES = (("compile",), ("primitives",), ("kernels",), ("memcheck", "racecheck"), ("times",), ("compiled",))
SANITIZERS = ("memcheck", "racecheck")
SCRIPT = Path(__file__).resolve()
TOOLKITS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")

CASES: dict[str, Callable[[], list[Case]]] = {
    "compile": gpu_cases.compilations,
    "primitives": gpu_cases.primitives,
    "kernels": gpu_cases.kernels,
    "memcheck": gpu_cases.sanitized,
    "racecheck": gpu_cases.sanitized,
    "times": gpu_times.timed,
    "compiled": gpu_times.compiled,
}


def run_shard(arguments: argparse.Namespace) -> int:
    """One share of a part's cases, in this process."""
    facts = gpu_times.prepare() if arguments.only in ("times", "compiled") else {}
    index, shards = map(int, arguments.shard.split("/"))
    cases = CASES[arguments.only]()[index::shards]
    return run_cases(cases, arguments.notes, arguments.first, arguments.until, facts, gpu_cases.is_lost)


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(TOOLKITS))


def run_stage(names: tuple[str, ...], until: float, folder: Path) -> dict[str, dict[str, Any]]:
    found, here = {}, []
    for name in names:
        part, tool = PARTS[name], sanitizer()
        if name not in SANITIZERS:
            here.append(part)
        elif tool is None:
            found[name] = {"note": "compute-sanitizer is not installed"}
        else:
            # CuPy asks the driver for attributes that it may not have, and takes no for an answer.
            quiet = ("--report-api-errors", "no") if name == "memcheck" else ()
            prefix = (tool, "--tool", name, *quiet, "--error-exitcode", "9", "--print-limit", "5")
            here.append(replace(part, prefix=prefix))
    return found | run_parts(here, until, [sys.executable, str(SCRIPT)], folder)


def wrong(report: dict[str, Any]) -> list[str]:
    """Everything for which the exit status is 1."""
    found = [f"{name}: {error['type']}: {error['text']}" for name, error in report["errors"].items()]
    for name, part in report["parts"].items():
        for case, failure in part.get("failures", {}).items():
            found.append(f"{name}, {case}: {failure['type']}: {failure['text'].strip()[:200]}")
        if part.get("not_run") and part["required"]:
            found.append(f"{name}: {part['not_run']} of {part['cases']} cases were not run")
    return found + gpu_times.wrong_rows(report["parts"].get("times", {}).get("results", {}))


def state() -> dict[str, Any]:
    """Which GPU, which software, which commit."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    driver = module.runtime().arrays.cuda.runtime.driverGetVersion()
    packages = ("numpy", "ml_dtypes", "torch", "triton")
    versions = {name: _version(name) for name in packages}
    return {"device": gpu.facts(), "driver supports CUDA": driver, "commit": git("rev-parse", "HEAD"),
            "changed": git("status", "--porcelain", "fusionops", "tests", "benchmarks/*.py").splitlines(),
            "date": time.strftime("%Y-%m-%d"), "versions": versions}  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def default_path(facts: dict[str, Any]) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", str(facts["device"].get("gpu", "gpu")).lower()).strip("-")
    return RESULTS / f"{device}-{facts['commit'][:8]}.json"


def parts_before(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What the file has of the same commit."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = facts["commit"] != "unknown" and all(
        before.get(name) == facts[name] for name in ("device", "commit", "changed")
    )
    return dict(before.get("parts", {})) if same else {}


def check(wanted: list[str], out: Path | None, patience: float) -> int:
    begin = time.time()
    facts = state()
    out = out or default_path(facts)
    out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = facts | {"parts": parts_before(out, facts), "errors": {}}

    def write() -> None:
        parts = report["parts"]
        times, compiled = (parts.get(name, {}).get("results", {}) for name in ("times", "compiled"))
        report["summary"] = gpu_times.summary(times, compiled)
        report["seconds"] = round(time.time() - begin, 1)
        report["wrong"] = wrong(report)
        write_json(out, report)

    until = begin
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            names = tuple(name for name in stage if name in wanted)
            if not names:
                continue
            until += patience * max(PARTS[name].seconds for name in names)
            try:
                report["parts"] |= run_stage(names, until, Path(folder))
            except BaseException as error:
                report["errors"][", ".join(names)] = error_of(error)
                if not isinstance(error, Exception):  # an interrupt: what is known is kept
                    write()
                    raise
            write()
            for name in names:
                part = report["parts"].get(name, {})
                print(name, {key: value for key, value in part.items() if key not in ("results", "failures", "facts")},
                      f"{len(part.get('failures', {}))} failed", flush=True)  # fmt: skip
    print(json.dumps(report["summary"], indent=1), *report["wrong"], out, sep="\n")
    return int(bool(report["wrong"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="the default is benchmarks/results/DEVICE-COMMIT.json")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the seconds of every part")
    for option, kind in (("shard", str), ("first", int), ("until", float), ("notes", Path)):  # of a part's processes
        parser.add_argument(f"--{option}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if reasons := gpu.reasons_unusable():
        print("; ".join(reasons), file=sys.stderr)
        return 1
    if arguments.notes:
        return run_shard(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that an end from outside leaves a report too
    return check(wanted, arguments.out, arguments.patience)


if __name__ == "__main__":
    sys.exit(main())
