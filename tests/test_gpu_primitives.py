"""The stand-ins of the CUDA primitives on the host, against NumPy; a GPU's are checked by benchmarks/gpu_check.py."""

from __future__ import annotations

import numpy as np
import primitive_checks
import pytest
from gpu_on_host import host_flags
from host_cuda.module import HostModule


@pytest.fixture(scope="module")
def launch():
    module = HostModule(primitive_checks.source(), host_flags(), primitive_checks.NAMES)

    def run(name, blocks, threads, arrays, shared_bytes):
        module.get_function(name)((blocks,), (threads,), arrays, shared_mem=shared_bytes)

    return run


def test_arithmetic_rounds_once(launch):
    primitive_checks.check_rounded_arithmetic(launch)


def test_tf32(launch):
    primitive_checks.check_tf32(launch)


@pytest.mark.parametrize("kind", primitive_checks.FORMATS)
@pytest.mark.parametrize("check", ["check_conversions", "check_pairs", "check_tile_product"])
def test_sixteen_bit_formats(launch, check, kind):
    getattr(primitive_checks, check)(launch, kind)


def test_the_checks_notice_flushed_subnormal_numbers(launch):
    def flushing(name, blocks, threads, arrays, shared_bytes):
        launch(name, blocks, threads, arrays, shared_bytes)
        for array in arrays[2:]:
            array[np.abs(array) < np.finfo(np.float32).tiny] = 0

    with pytest.raises(AssertionError):
        primitive_checks.check_rounded_arithmetic(flushing)
