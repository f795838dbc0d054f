"""The program that proves the backend on a GPU, as far as it runs without one: its judgements, on the host."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpu_on_host import HostRuntime

from fusionops.device import H200
from fusionops.gpu import module

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_check

CASES = [
    (kernel, problem)
    for kernel, problem in gpu_check.cases()
    if problem.name in ("add_conv_return_sum", "concat_conv_tiled_bf16", "concat_uint8", "add_conv_odd_channels_f16")
]


def same(array: np.ndarray) -> np.ndarray:
    return array.copy()


@pytest.fixture(autouse=True)
def host_runtime():
    with module.use(HostRuntime()):
        yield


@pytest.mark.parametrize(("kernel", "problem"), CASES, ids=lambda case: case.name)
def test_a_right_kernel_passes(kernel, problem):
    gpu_check.check_case(kernel, problem, H200, same, same)


def test_a_wrong_kernel_does_not():
    kernel, problem = CASES[0]

    def wrong(spec, config, operands, out):
        kernel.run(spec, config, operands, out)
        out[(0,) * out.ndim] += 1

    with pytest.raises(AssertionError):
        gpu_check.check_case(replace(kernel, run=wrong), problem, H200, same, same)


def test_without_a_gpu_it_says_so_and_fails(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check.gpu, "reasons_unusable", lambda: ("there is no GPU",))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 1
    assert "there is no GPU" in capsys.readouterr().err
