"""Groups of few filters on the GPU: what is moved in runs, who runs which groups, and indices of more than 32 bits.

Its CUDA C is executed on the host; test_gpu_kernels.py holds it to what every kernel promises.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from gpu_on_host import HostRuntime, host_flags
from host_cuda.module import HostModule, thread_order
from kernel_checks import assert_same_bits, assert_within, exact_case, execute_on, expected_of, rng_of
from test_gpu_kernels import aligned_copy

from fusionops.device import H200
from fusionops.gpu import grouped, module
from fusionops.kernel import Kernel
from fusionops.problems import Part, conv, in_dtype
from fusionops.problems.rows import ADD, CONCAT, RELU, in_nchw
from fusionops.spec import FusionSpec
from fusionops.testing import activation_bound, error_bound, guarded_copy, map_operands, random_operands

RUNS = (
    conv("depthwise", ADD, (16, 16), 16, H=6, W=13, groups=16),
    conv("depthwise", CONCAT, (8, 12), 20, N=2, H=5, W=17, groups=20, residual=Part(20), activation=RELU),
    conv("depthwise_seven_by_seven", ADD, (12,), 12, 7, 7, H=9, W=11, groups=12),
    conv("depthwise_four_columns", ADD, (8, 8), 8, 2, 4, H=5, W=9, groups=8),
    conv("depthwise_strided", ADD, (8, 8), 8, H=9, W=20, stride=(2, 2), groups=8),
    conv("depthwise_dilated", CONCAT, (8, 4), 12, H=9, W=12, dilation=(2, 3), groups=12),
    conv("depthwise_valid", ADD, (4, 4, 4), 4, H=5, W=12, padding=((0, 0), (0, 0)), groups=4),
    conv("depthwise_upsampled", ADD, (8, Part(8, (2, 2))), 8, H=6, W=10, groups=8),
    conv("depthwise_upsampled", CONCAT, (4, Part(8, (3, 2))), 12, H=6, W=10, groups=12),
    conv("depthwise_weighted", ADD, (Part(8, weight="scalar"), Part(8, (2, 2), "vector"), 8), 8, H=4, W=8, groups=8),
    conv("depthwise_weighted", CONCAT, (Part(8, weight="scalar"), Part(4, weight="vector")), 12, groups=12),
    conv("depthwise_pointwise", ADD, (8, 8), 8, 1, 1, groups=8),
    conv("groups_of_four", ADD, (16, 16), 16, H=5, W=9, groups=4),
    conv(
        "groups_of_eight_across_sources", CONCAT, (12, 20), 64, H=5, W=9, groups=4, residual=Part(64, weight="vector")
    ),
    conv("groups_of_four_strided", CONCAT, (8, 8), 8, H=8, W=9, stride=(2, 2), groups=2),
    conv("depthwise_return_sum", ADD, (8, 8), 8, groups=8, return_sum=True),
)
IN_RUNS = (*RUNS, *(in_dtype(problem, dtype) for dtype in ("float16", "bfloat16", "float64") for problem in RUNS[::2]))

execute = partial(execute_on, H200)


@pytest.fixture(autouse=True)
def host_runtime():
    with module.use(HostRuntime()) as runtime:
        yield runtime


def kernel_for(spec: FusionSpec) -> Kernel:
    return next(kernel for kernel in grouped.KERNELS if not kernel.unsupported(spec))


def result_on_aligned(kernel, spec, operands):
    """What the kernel writes to an `out` at a multiple of 16 bytes, in memory that was poisoned."""
    out = aligned_copy(np.full(spec.out_shape, np.nan, spec.dtype))
    together = map_operands(operands, aligned_copy)
    if spec.return_sum:
        together = replace(together, merged=aligned_copy(np.full(spec.merged_shape, np.nan, spec.dtype)))
    kernel.run(spec, kernel.plan(spec, H200), together, out)
    return [out, together.merged] if spec.return_sum else [out]


@pytest.mark.parametrize("problem", IN_RUNS, ids=str)
def test_runs_have_the_bits_of_single_elements(problem, host_runtime):
    """Aligned arrays, in one block too, which takes every strip; the same ones elsewhere; and the reference."""
    spec = problem.spec
    kernel = kernel_for(spec)
    one_block = replace(kernel, plan=lambda spec, device: grouped.with_blocks(spec, 1))
    operands, expected = exact_case(problem)
    for alike in (operands, random_operands(spec, rng_of(problem))):
        apart = execute(kernel, spec, map_operands(alike, guarded_copy))
        assert ", 1, 4>" in host_runtime.launched[-1]
        for each in (kernel, one_block):
            for order in (0, 1, 2):
                with thread_order(order):
                    assert_same_bits(result_on_aligned(each, spec, alike), apart)
                assert f", {grouped.RUNS[spec.dtype]}, 4>" in host_runtime.launched[-1]
        if alike is operands:
            assert_within(apart[0], expected[0], activation_bound(spec, operands))


@pytest.mark.parametrize(
    "broken", ["channels", "one filter a group less", "source", "address", "out", "columns apart by an odd step"]
)
def test_what_does_not_lie_in_runs_is_read_element_by_element(broken, host_runtime):
    extents = {"channels": ((6,), 6, 6), "source": ((6, 6), 12, 12), "one filter a group less": ((8,), 6, 2)}
    channels, K, groups = extents.get(broken, ((8, 8), 16, 16))
    spec = conv("broken", CONCAT, channels, K, groups=groups).spec
    operands = map_operands(random_operands(spec, np.random.default_rng(0)), aligned_copy)
    first, *others = operands.sources
    out = aligned_copy(np.empty(spec.out_shape, spec.dtype))
    if broken == "address":
        memory = aligned_copy(np.zeros(first.size + 4, "f"))
        shifted = memory[1 : 1 + first.size].reshape(first.shape)
        shifted[...] = first
        operands = replace(operands, sources=(shifted, *others))
    elif broken == "out":
        out = aligned_copy(np.empty((*spec.out_shape[:-1], spec.conv.K + 1), spec.dtype))[..., :-1]
    elif broken == "columns apart by an odd step":
        wide = aligned_copy(np.zeros((*first.shape[:-1], first.shape[-1] + 1), "f"))
        wide[..., :-1] = first
        operands = replace(operands, sources=(wide[..., :-1], *others))
    kernel = kernel_for(spec)
    kernel.run(spec, kernel.plan(spec, H200), operands, out)
    assert host_runtime.launched[-1] == "conv_fprop_grouped<float, false, 1, 4>"
    assert_within(out, expected_of(spec, operands)[0], error_bound(spec, operands))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_an_infinite_filter_meets_no_padding(bad, stride):
    problem = conv("infinite", ADD, (8, 8), 8, H=8, W=20, padding=((1, 1), (1, 1)), stride=stride, groups=8)
    operands = exact_case(problem)[0]
    operands.filters[0, 0, 0, 2] = bad
    out = result_on_aligned(kernel_for(problem.spec), problem.spec, operands)
    np.testing.assert_array_equal(out[0], expected_of(problem.spec, operands)[0])
    assert np.isfinite(out[0][0, 0, :, 2]).all()  # no pixel lies above the first row
    assert np.isfinite(out[0][0, :, 0, 2]).all()  # nor left of the first column
    assert not np.isfinite(out[0][0, 1:, 1:, 2]).any()


class WideIndices(HostRuntime):
    """As HostRuntime, with strips counted in 64 bits however few there are."""

    def function(self, source, name):
        narrow, wide = "items >> 32 ?", "true ?"
        code = module.read_source(source)
        assert code.count(narrow) == 1
        return HostModule(code.replace(narrow, wide), host_flags(), [name]).get_function(name)


@pytest.mark.parametrize("problem", [RUNS[2], in_nchw(RUNS[2])], ids=str)
def test_indices_of_64_bits_lead_to_the_same_places(problem):
    operands = random_operands(problem.spec, rng_of(problem))
    kernel = kernel_for(problem.spec)
    narrow = result_on_aligned(kernel, problem.spec, operands)
    with module.use(WideIndices()):
        assert_same_bits(result_on_aligned(kernel, problem.spec, operands), narrow)


def test_a_plan_has_a_thread_for_each_strip_but_not_more_than_a_launch_holds():
    spec = conv("plan", ADD, (64,), 64, N=2, H=14, W=20, groups=64).spec  # 2 images of 14 rows of 3 strips of 16 runs
    assert grouped.plan(spec, H200).blocks == -(-2 * 14 * 3 * 16 // grouped.THREADS)
    huge = conv("plan", ADD, (64,), 64, N=2**20, H=64, W=64, groups=64).spec
    assert grouped.plan(huge, H200).blocks == grouped.MOST_BLOCKS


def test_depthwise_convolutions_are_never_slow_and_wide_groups_are():
    for layout in (lambda problem: problem, in_nchw):
        for dtype in ("float16", "bfloat16", "float64"):
            for strict in (True, False):
                depthwise = in_dtype(layout(conv("d", ADD, (64, 64), 64, groups=64, strict=strict)), dtype)
                wide = in_dtype(layout(conv("w", ADD, (256, 256), 256, groups=2, strict=strict)), dtype)
                assert grouped.slow(depthwise.spec, H200) == ()
                (reason,) = grouped.slow(wide.spec, H200)
                assert reason.startswith("a group has 128 filters of 128 channels")


def test_one_group_is_refused():
    spec = conv("one", ADD, (8,), 8).spec
    reasons = [kernel.unsupported(spec) for kernel in grouped.KERNELS]
    assert ("the convolution has one group, needs more",) in reasons
    assert all(reasons)
