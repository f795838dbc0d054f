"""GPU kernels on the host under the address sanitizer: accesses outside an array are errors, and misaligned ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_cuda.module import sanitizer_environment

TESTS = Path(__file__).parent
# Run in a process of its own, which has the sanitizer from its start.
PROGRAM = """
import sys
import ml_dtypes  # bfloat16 for NumPy
import numpy as np
from gpu_on_host import HostRuntime
from kernel_checks import assert_within, exact_case
from fusionops.device import H200
from fusionops.gpu import KERNELS, module
from fusionops.problems import PROBLEMS
from fusionops.testing import activation_bound, map_operands
from test_gpu_grouped import IN_RUNS
from test_gpu_kernels import ALIGNED, aligned_copy

source, ran = sys.argv[1], 0
with module.use(HostRuntime(sanitize=True)) as runtime:
    for problem in (*ALIGNED[::3], *IN_RUNS[::3], *PROBLEMS[::9]):
        spec = problem.spec
        if len(spec.sources) > 4:
            continue  # HostRuntime compiles no more for the sanitizer
        for kernel in KERNELS:
            if kernel.unsupported(spec) or getattr(kernel.plan(spec, H200), "source", "stream.cu") != source:
                continue
            operands, expected = exact_case(problem)
            out = np.empty(spec.out_shape, spec.dtype)
            together = map_operands(operands, aligned_copy)
            together.merged = None if operands.merged is None else np.empty_like(operands.merged)
            kernel.run(spec, kernel.plan(spec, H200), together, out)
            assert_within(out, expected[0], activation_bound(spec, operands))
            ran += 1
print(ran, "ran")
"""


@pytest.mark.parametrize("source", ["stream.cu", "igemm.cu", "mma.cu", "grouped.cu", "sm90.cu"])
def test_nothing_outside_the_arrays_is_touched(source):
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, source],
        env=os.environ | sanitizer_environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    count, word = done.stdout.split()
    assert word == "ran"
    assert int(count) >= 10
