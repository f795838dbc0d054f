"""A test that does not run is counted and can be made to fail: tries it on a small suite under tests/conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest

SUITE = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3))
def test_on_a_device(number):
    pass

def test_elsewhere():
    pass
"""
WITHOUT_GPU = """
def why_no_gpu():
    return "no CUDA device"
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    conftest = Path(__file__).with_name("conftest.py").read_text()
    pytester.makeconftest(conftest.replace('pytest_plugins = ["pytester"]', "") + WITHOUT_GPU)
    pytester.makepyfile(SUITE)
    return pytester


def test_what_does_not_run_is_counted(suite):
    result = suite.runpytest("--strict-markers")
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(["gpu: 3 tests not run (no CUDA device)"])


def test_a_required_gpu_that_is_missing_is_a_failure(suite):
    result = suite.runpytest("--strict-markers", "--require-gpu")
    result.assert_outcomes(passed=1, errors=3)
    result.stdout.fnmatch_lines(["*--require-gpu, but no CUDA device*"])
