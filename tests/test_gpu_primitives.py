"""The stand-ins of the CUDA primitives on the host, against NumPy; a GPU's are checked by benchmarks/gpu_check.py."""

from __future__ import annotations

import numpy as np
import primitive_checks
import pytest
from gpu_on_host import HostRuntime, host_flags
from host_cuda.module import HostModule
from primitive_checks import HOPPER_SOURCE, Boxes


@pytest.fixture(scope="module")
def launch():
    module = HostModule(primitive_checks.source(), host_flags(), primitive_checks.NAMES)

    def run(name, blocks, threads, arrays, shared_bytes):
        module.get_function(name)((blocks,), (threads,), arrays, shared_mem=shared_bytes)

    return run


@pytest.fixture(scope="module")
def launch_on_hopper():
    runtime = HostRuntime()
    module = HostModule(primitive_checks.source(HOPPER_SOURCE), host_flags(), primitive_checks.HOPPER_NAMES)

    def run(name, blocks, threads, arguments, shared_bytes):
        function = module.get_function(name)
        function.max_dynamic_shared_size_bytes = shared_bytes
        given = tuple(
            each.tensor_map(runtime, runtime.address(each.array)) if isinstance(each, Boxes) else each
            for each in arguments
        )
        function((blocks,), (threads,), given, shared_mem=shared_bytes)

    return run


@pytest.mark.parametrize("kind", primitive_checks.FORMATS)
def test_products_of_what_threads_stored(launch_on_hopper, kind):
    primitive_checks.check_stored_product(launch_on_hopper, kind)


@pytest.mark.parametrize("filters", primitive_checks.HOPPER_FILTERS)
@pytest.mark.parametrize("kind", primitive_checks.FORMATS)
def test_products_of_boxes(launch_on_hopper, kind, filters):
    primitive_checks.check_box_product(launch_on_hopper, kind, filters)


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
