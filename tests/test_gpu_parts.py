"""Cases in processes of their own: what errors, crashes, hangs and deadlines cost, on processes without a GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_parts
from gpu_parts import LOST, Part, run_cases, run_parts

BENCHMARKS = Path(gpu_parts.__file__).parent

# Stands for gpu_check.py: the cases of a part are words, which say what becomes of them.
PROGRAM = f"""
import argparse, os, sys, time
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_parts
from gpu_parts import run_cases
gpu_parts.STOPPING = float(os.environ.get("STOPPING", gpu_parts.STOPPING))

def case(word):
    def run():
        kind = word.split("-")[0]
        if kind == "wrong":
            raise AssertionError("2 elements differ")
        if kind == "lost":
            raise RuntimeError("illegal memory access")
        if kind == "crash":
            print("the last words", flush=True)
            os._exit(139)
        if kind == "hang":
            time.sleep(60)
        if kind == "slow":
            time.sleep(0.4)
        return {{"pid": os.getpid()}} if kind == "fact" else None
    return word, run

parser = argparse.ArgumentParser()
for option, kind in (("only", str), ("shard", str), ("first", int), ("until", float), ("notes", Path)):
    parser.add_argument("--" + option, type=kind)
given = parser.parse_args()
if given.only.startswith("unlisted"):
    sys.exit("no module named cupy")
index, shards = map(int, given.shard.split("/"))
cases = list(map(case, given.only.split()))[index::shards]
lost = []
code = run_cases(cases, given.notes, given.first, given.until, {{"torch": "none"}}, lambda: "lost-1" in given.only)
sys.exit(code or (9 if "hazard" in given.only else 0))
"""


def ran(tmp_path: Path, words: str, seconds: float = 30.0, **options) -> dict:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    part = Part(words, seconds, **options)
    return run_parts([part], time.time() + seconds, [sys.executable, str(program)], tmp_path)[words]


def test_an_error_costs_its_case(tmp_path):
    found = ran(tmp_path, "good-1 wrong-1 fact-1 good-2")
    assert (found["cases"], found["not_run"], found["facts"]) == (4, 0, {"torch": "none"})
    assert list(found["results"]) == ["fact-1"]
    assert found["failures"].keys() == {"wrong-1"}
    assert found["failures"]["wrong-1"]["type"] == "AssertionError"
    assert found["failures"]["wrong-1"]["text"] == "2 elements differ"
    assert "in run" in found["failures"]["wrong-1"]["where"]


def test_a_crash_costs_its_case_and_another_process_goes_on(tmp_path):
    found = ran(tmp_path, "fact-1 crash-1 fact-2 crash-2")
    assert found["not_run"] == 0
    assert found["failures"].keys() == {"crash-1", "crash-2"}
    assert found["failures"]["crash-1"]["text"] == "the process ended with 139"
    assert found["failures"]["crash-1"]["printed"] == "the last words"
    assert found["results"]["fact-1"] != found["results"]["fact-2"]


def test_a_process_that_lost_its_gpu_hands_over_to_another(tmp_path):
    found = ran(tmp_path, "fact-1 lost-1 fact-2")
    assert found["not_run"] == 0
    assert found["failures"].keys() == {"lost-1"}
    assert found["failures"]["lost-1"]["text"] == "illegal memory access"
    assert found["results"]["fact-1"] != found["results"]["fact-2"]


def test_a_hang_is_ended(tmp_path):
    begin = time.monotonic()
    found = ran(tmp_path, "fact-1 hang-1 fact-2", stall=0.5)
    assert time.monotonic() - begin < 20
    assert found["not_run"] == 0
    assert found["failures"].keys() == {"hang-1"}
    assert found["failures"]["hang-1"]["text"].startswith("nothing came of it for")
    assert found["results"].keys() == {"fact-1", "fact-2"}


def test_cases_beyond_the_deadline_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("STOPPING", "0")
    found = ran(tmp_path, "fact-1 hang-1 good-1 good-2", seconds=1.5)
    assert (found["cases"], found["not_run"], found["failures"]) == (4, 3, {})
    assert found["cut_short"] == ["hang-1"]
    assert found["results"].keys() == {"fact-1"}


def test_a_process_begins_no_case_that_would_be_late(tmp_path):
    notes = tmp_path / "notes.json"
    assert run_cases([("late", lambda: {"ran": True})], notes, 0, time.time() + gpu_parts.STOPPING / 2) == 0
    found = json.loads(notes.read_text())
    assert (found["cases"], found["next"], found["results"]) == (1, 0, {})


def test_shards_share_the_cases(tmp_path):
    found = ran(tmp_path, "fact-1 fact-2 wrong-1 fact-3 crash-1", shards=2)
    assert (found["cases"], found["not_run"]) == (5, 0)
    assert found["results"].keys() == {"fact-1", "fact-2", "fact-3"}
    assert found["failures"].keys() == {"wrong-1", "crash-1"}
    assert len({result["pid"] for result in found["results"].values()}) >= 2


def test_a_process_that_lists_no_cases_is_a_failure(tmp_path):
    found = ran(tmp_path, "unlisted")
    assert found["cases"] == 0
    (failure,) = found["failures"].values()
    assert (failure["text"], failure["printed"]) == ("the process ended with 1", "no module named cupy")


def test_the_exit_status_of_a_sanitizer_is_a_failure(tmp_path):
    found = ran(tmp_path, "good-hazard")
    assert found["not_run"] == 0
    (failure,) = found["failures"].values()
    assert failure["text"] == "the process ended with 9"


def test_a_prefix_stands_before_the_command(tmp_path):
    assert ran(tmp_path, "fact-1", prefix=("env", "-u", "HOME"))["results"].keys() == {"fact-1"}
    with pytest.raises(FileNotFoundError):
        ran(tmp_path, "fact-1", prefix=(str(tmp_path / "nothing"),))


def test_errors_of_every_kind_are_noted(tmp_path):
    def raises(error):
        def run():
            raise error

        return type(error).__name__, run

    errors = [MemoryError("141 GB"), RuntimeError("a compiler's"), KeyError("x"), AssertionError()]
    notes = tmp_path / "notes.json"
    assert run_cases([raises(error) for error in errors], notes, 0, time.time() + 60) == 0
    assert json.loads(notes.read_text())["failures"].keys() == {type(error).__name__ for error in errors}
    assert run_cases([raises(errors[0])], notes, 0, time.time() + 60, is_lost=lambda: True) == LOST
