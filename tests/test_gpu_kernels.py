"""Every GPU kernel on every problem it supports: its CUDA C, executed on the host through the backend's launch code.

What a GPU alone can show, the PTX in `primitives.cuh` and speed, is not seen here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import cycle
from operator import attrgetter

import numpy as np
import pytest
from gpu_on_host import HostRuntime
from host_cuda.module import thread_order
from kernel_checks import (
    assert_same_bits,
    assert_within,
    check_batch_split,
    check_rounding,
    check_unfused,
    exact_case,
    execute_on,
    expected_of,
    rng_of,
    with_batch,
)

from fusionops.device import GPU_PROFILES, H200
from fusionops.gpu import KERNELS, grouped, igemm, mma, module, sm90, stream
from fusionops.kernel import Filters, Kernel, Operands
from fusionops.problems import ALIGNED, ANY_ORDER, Problem, conv, dense, in_dtype, join
from fusionops.problems import PROBLEMS as ALL
from fusionops.spec import FusionSpec, Layout, Merge, SourceSpec
from fusionops.testing import (
    activation_bound,
    guarded_copy,
    map_operands,
    random_operands,
)

PROBLEMS = (*ALL, *ANY_ORDER)
ON_TENSOR_CORES = (*mma.KERNELS, *sm90.KERNELS)


def is_told_apart(kernel: Kernel, problem: Problem) -> bool:
    """Whether the kernel has not run the same before: CUDA cores sum in one order, asked to or not, and form none of
    the rewrites whose edges stand among the problems in every format and layout.
    """
    spec = problem.spec
    if spec.contraction is None or kernel in ON_TENSOR_CORES:
        return True
    return spec.strict or (spec.dtype == "float32" and spec.layout is Layout.NHWC)


CASES = [
    pytest.param(kernel, problem, id=f"{kernel.name}-{problem}")
    for kernel in KERNELS
    for problem in PROBLEMS
    if not kernel.unsupported(problem.spec) and is_told_apart(kernel, problem)
]
every_case = pytest.mark.parametrize(("kernel", "problem"), CASES)
# Instantiations for other formats differ in nothing but how an element is loaded and stored.
TYPICAL = [case for case in CASES if case.values[0].name.endswith(("_f32", "_bf16", "_any"))]
every_typical_case = pytest.mark.parametrize(("kernel", "problem"), TYPICAL)
every_typical_contraction = pytest.mark.parametrize(
    ("kernel", "problem"), [case for case in TYPICAL if case.values[1].spec.contraction is not None]
)
STRIDED = ("reversed", "second_axis_last")  # not the unaligned: CuPy has no such arrays


@pytest.fixture(autouse=True)
def host_runtime():
    with module.use(HostRuntime()) as runtime:
        yield runtime


execute = partial(execute_on, H200)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_support_is_not_lost(problem):
    """Whatever needs no prologue that no kernel applies yet has a kernel here; merges have those of the CPU's names."""
    spec = problem.spec
    able = {kernel.name for kernel in KERNELS if not kernel.unsupported(spec)}
    if spec.contraction is None:
        assert {name.replace("cpu.", "gpu.") for name in problem.kernels} <= able
    elif any(source.scale or source.shift or source.activation for source in spec.sources):
        assert able == set()
    else:
        is_narrow = spec.dtype in ("float16", "bfloat16")
        on_tensor_cores = not spec.strict and (is_narrow or spec.precision == "tf32")
        on_hopper = on_tensor_cores and is_narrow and spec.layout is Layout.NHWC and spec.conv.groups == 1
        assert len(able) == 1 + on_tensor_cores + on_hopper + (spec.conv.groups > 1)


@pytest.mark.parametrize("kernel", KERNELS, ids=attrgetter("name"))
def test_every_kernel_runs_some_problems_and_refuses_others_in_sentences(kernel):
    refusals = [kernel.unsupported(problem.spec) for problem in PROBLEMS]
    assert sum(not reasons for reasons in refusals) >= 3
    assert any(refusals)
    assert all(isinstance(reason, str) and reason for reasons in refusals for reason in reasons)


@every_case
def test_plan_is_legal_and_pure(kernel, problem):
    for device in GPU_PROFILES:
        config = kernel.plan(problem.spec, device)
        assert (config.illegal_on(device) == ()) == (kernel not in sm90.KERNELS or device.capability == (9, 0))
        assert config == kernel.plan(problem.spec, device)
        assert hash(config) == hash(kernel.plan(problem.spec, device))
        assert config.scratch_bytes == 0
        if kernel not in sm90.KERNELS:
            assert config.shared_bytes == 0


@every_case
def test_exact_on_integers_in_any_order_of_threads(kernel, problem):
    """Threads run as far as a barrier one after the other: where one is missing, some order reads what is not there."""
    operands, expected = exact_case(problem)
    guarded = map_operands(operands, guarded_copy)
    bound = activation_bound(problem.spec, operands)
    results = []
    for order in (0, 1, 2):
        with thread_order(order):
            results.append(execute(kernel, problem.spec, guarded))
        assert_within(results[-1][0], expected[0], bound)
        assert_same_bits(results[-1][1:], expected[1:])
        assert_same_bits(results[-1], results[0])


@pytest.mark.parametrize("kind", ["positive", "badly_scaled"])
@every_case
def test_rounds_within_the_bound(kernel, problem, kind):
    check_rounding(execute, kernel, problem, kind)


@every_typical_case
def test_strides_do_not_change_bits(kernel, problem):
    spec = problem.spec
    operands = random_operands(spec, rng_of(problem))
    plain = execute(kernel, spec, operands)
    for layout in STRIDED:
        there = map_operands(operands, lambda array: guarded_copy(array, layout if array.ndim > 1 else "contiguous"))  # noqa: B023  used at once
        assert_same_bits(execute(kernel, spec, there, layout), plain)
    layouts = cycle([*STRIDED, "contiguous"])
    mixed = replace(operands, sources=tuple(guarded_copy(source, next(layouts)) for source in operands.sources))
    assert_same_bits(execute(kernel, spec, mixed), plain)


@pytest.mark.parametrize("problem", ALIGNED, ids=str)
def test_runs_that_are_copied_have_the_bits_of_gathered_ones(problem, host_runtime):
    """Arrays of whole runs of 16 bytes at multiples of 16; the same ones elsewhere; and the reference."""
    spec = problem.spec
    operands, expected = exact_case(problem)
    for alike in (operands, random_operands(spec, rng_of(problem))):
        apart = execute(mma_kernel(spec), spec, map_operands(alike, guarded_copy))
        together = map_operands(alike, aligned_copy)
        for filters in mma.FILTERS:
            forced = replace(mma_kernel(spec), plan=lambda spec, device, n=filters: mma.with_tile(spec, n))
            assert_same_bits(execute(forced, spec, together), apart)
        strides = tuple(source.strides for source in together.sources)
        residual = None if together.residual is None else together.residual.strides
        out = np.empty(spec.out_shape, spec.dtype).strides
        head = igemm.prepare(spec, strides, together.filters.strides, out, residual, (True, True))[0]
        assert (head["vectors_a"], head["vectors_b"]) == (1, 1)
        if alike is operands:
            assert_within(apart[0], expected[0], activation_bound(spec, operands))
        for order in (1, 2):
            with thread_order(order):
                assert_same_bits(execute(mma_kernel(spec), spec, together), apart)


HOPPER = [
    pytest.param(kernel, problem, id=f"{kernel.name}-{problem}")
    for problem in ALIGNED
    for kernel in sm90.KERNELS
    if not kernel.unsupported(problem.spec)
]


@pytest.mark.parametrize(("kernel", "problem"), HOPPER)
def test_boxes_have_the_bits_of_gathered_elements(kernel, problem, monkeypatch):
    """Arrays that the copies of boxes take, runs, and elements one by one; few blocks that take several tiles each."""
    spec = problem.spec
    operands, expected = exact_case(problem)
    boxes = []
    maps = HostRuntime.tensor_map
    monkeypatch.setattr(HostRuntime, "tensor_map", lambda *args: boxes.append(args) or maps(*args))
    few = replace(H200, multiprocessors=2)
    for alike in (operands, random_operands(spec, rng_of(problem))):
        apart = execute(kernel, spec, map_operands(alike, guarded_copy))
        assert len(boxes) == 1  # of the filters
        together = map_operands(alike, aligned_copy)
        for filters in sm90.FILTERS:
            config = sm90.with_tile(spec, filters, few)
            assert config.blocks <= 2
            assert_same_bits(execute(replace(kernel, plan=lambda spec, device, c=config: c), spec, together), apart)
        for order in (1, 2):
            with thread_order(order):
                assert_same_bits(execute(kernel, spec, together), apart)
        if alike is operands:
            assert_within(apart[0], expected[0], activation_bound(spec, operands))
            plain = sum(source.is_plain for source in spec.sources)
            takes_boxes = spec.merge is Merge.CONCAT and spec.conv.stride == (1, 1)
            assert len(boxes) == 1 + (len(sm90.FILTERS) + 2) * (1 + takes_boxes * plain)
        boxes.clear()


def mma_kernel(spec: FusionSpec) -> Kernel:
    return next(kernel for kernel in mma.KERNELS if not kernel.unsupported(spec))


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A copy whose address is a multiple of 16."""
    memory = np.empty(array.nbytes + 16, np.uint8)
    copy = np.ndarray(array.shape, array.dtype, memory, -memory.ctypes.data % 16)
    copy[...] = array
    return copy


@every_typical_contraction
def test_the_tile_does_not_change_bits(kernel, problem):
    spec = problem.spec
    if kernel in sm90.KERNELS:
        configs = [sm90.with_tile(spec, filters, H200) for filters in sm90.FILTERS]
    elif kernel in mma.KERNELS:
        configs = [mma.with_tile(spec, filters) for filters in mma.FILTERS]
    elif kernel in grouped.KERNELS:
        configs = [grouped.with_blocks(spec, blocks) for blocks in {grouped.plan(spec, H200).blocks, 1, 3}]
    else:
        configs = [igemm.with_tile(spec, tile) for tile in igemm.TILES[igemm.computed_bytes(spec.dtype)]]
    assert kernel.plan(spec, H200) in configs
    operands = random_operands(spec, rng_of(problem))
    first, *others = [
        execute(replace(kernel, plan=lambda spec, device, config=config: config), spec, operands) for config in configs
    ]
    for other in others:
        assert_same_bits(other, first)


@every_typical_contraction
def test_splitting_the_batch_does_not_change_bits(kernel, problem):
    check_batch_split(execute, kernel, problem)


@every_typical_contraction
def test_fused_equals_unfused_bit_for_bit(kernel, problem):
    check_unfused(execute, kernel, problem)


def chosen(spec: FusionSpec) -> str:
    """The kernel that dispatch takes on a Hopper GPU, whatever the merge."""
    able = [kernel for kernel in KERNELS if not kernel.unsupported(spec)]
    name = next((kernel.name for kernel in able if not kernel.slow(spec, H200)), able[0].name)
    return name.replace(f".{spec.merge}_", ".")


GROUPED = [
    conv("grouped", merge, sources, groups * each, groups=groups, strict=False)
    for groups in (2, 4, 8)
    for each in (1, 2, 8, 16)
    for sources in ((groups,), (groups, groups), (3 * groups, 5 * groups), (groups + 1, 3 * groups - 1))
    for merge in Merge
    if merge is Merge.CONCAT or len(set(sources)) == 1
]


def test_the_choice_depends_on_the_merged_map_of_one_image_alone():
    """Else a fused call and an unfused one, or a batch and its parts, would sum in orders of their own."""
    specs = [
        *(problem.spec for problem in PROBLEMS if problem.spec.contraction is not None),
        *(replace(problem.spec, precision=precision) for problem in GROUPED for precision in (None, "tf32")),
        *(in_dtype(problem, "float16").spec for problem in GROUPED),
    ]
    compared = 0
    for spec in specs:
        if not any(source.scale or source.shift or source.activation for source in spec.sources):
            merged = replace(spec, sources=(SourceSpec(spec.merged_shape, spec.dtype),), return_sum=False)
            same = {chosen(replace(merged, merge=merge)) for merge in Merge}
            assert same == {chosen(spec)} == {chosen(with_batch(spec, 5))}, spec
            compared += 1
    assert compared > 500


@pytest.mark.parametrize("prologue", ["scale", "shift"])
def test_a_residual_with_a_prologue_is_refused(prologue):
    """No kernel applies one yet, and none may leave it out."""
    problem = next(problem for problem in PROBLEMS if problem.name == "add_conv_residual")
    residual = replace(problem.spec.residual, **{prologue: True})
    assert all(kernel.unsupported(replace(problem.spec, residual=residual)) for kernel in KERNELS)


def test_kept_filters_are_read_as_they_are():
    problem = next(problem for problem in PROBLEMS if problem.name == "concat_conv_odd_channels")
    kernel = next(kernel for kernel in KERNELS if not kernel.unsupported(problem.spec))
    operands = random_operands(problem.spec, rng_of(problem))
    kept = replace(operands, filters=Filters(operands.filters, problem.spec.layout))
    assert_same_bits(execute(kernel, problem.spec, kept), execute(kernel, problem.spec, operands))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_an_infinite_filter_meets_no_padding(bad):
    """Its product with a zero of the padding would be NaN where there is nothing to multiply."""
    problem = next(problem for problem in PROBLEMS if problem.name == "add_conv_many_tiles")
    spec = problem.spec
    operands = exact_case(problem)[0]
    operands.filters[0, 0, 1, 2] = bad
    kernel = next(kernel for kernel in KERNELS if not kernel.unsupported(spec))
    (actual,), (expected,) = execute(kernel, spec, operands), expected_of(spec, operands)
    np.testing.assert_array_equal(actual, expected)
    assert np.isfinite(actual[0, 0, :, 2]).all()  # the first row has no pixel above it


@pytest.mark.parametrize("merge", list(Merge))
def test_more_sources_than_a_launch_takes(merge, host_runtime):
    for problem in (
        join("two_launches", merge, *[(3, 17)] * 130, axis=1 if merge is Merge.CONCAT else 0, streams=()),
        dense("two_launches", merge, [7] * 70, 5),
    ):
        operands, expected = exact_case(problem)
        kernel = next(kernel for kernel in KERNELS if not kernel.unsupported(problem.spec))
        host_runtime.launched.clear()
        assert_same_bits(execute(kernel, problem.spec, operands), expected)
        assert len(host_runtime.launched) > 1


def test_more_axes_than_a_launch_walks_through(host_runtime):
    """Ten axes that cannot be joined, two of which the host walks through."""
    shape = (2, 3) * 5
    spec = FusionSpec(Merge.ADD, (SourceSpec(shape, "float32"),) * 2, dtype="float32")
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-9, 9, tuple(2 * extent for extent in shape)).astype("f")[(slice(None, None, 2),) * 10]
              for _ in range(2)]  # fmt: skip
    out = np.full(shape, np.nan, "f")
    kernel = next(kernel for kernel in KERNELS if not kernel.unsupported(spec))
    kernel.run(spec, kernel.plan(spec, H200), Operands(tuple(arrays)), out)
    np.testing.assert_array_equal(out, arrays[0] + arrays[1])
    assert len(host_runtime.launched) == 6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "int64", "bool"])
def test_sixteen_bytes_at_a_time_where_they_are_aligned(dtype, host_runtime):
    item = np.dtype(dtype).itemsize
    spec = FusionSpec(Merge.ADD, (SourceSpec((4, 64), dtype),) * 2, dtype=dtype)
    kernel = next(kernel for kernel in KERNELS if not kernel.unsupported(spec))
    memory = np.zeros(3 * 256 * item + 32, np.uint8)
    start = -memory.ctypes.data % 16

    def array(j: int, offset: int) -> np.ndarray:
        return np.ndarray((4, 64), dtype, memory, start + j * 256 * item + offset)

    for offset, vector in ((0, 16 // item), (item, 1)):
        kernel.run(spec, kernel.plan(spec, H200), Operands((array(0, offset), array(1, offset))), array(2, offset))
        assert f", {vector}, u32, 4>" in host_runtime.launched[-1]
    assert memory.any() == False  # noqa: E712  a NumPy bool, and zeros were added


def test_the_last_symbol_has_a_problem_of_its_own():
    """Every instantiation that a plan can name is compiled; none is compiled that no plan names."""
    assert len(set(stream.SYMBOLS)) == len(stream.SYMBOLS)
    assert len(set(igemm.SYMBOLS)) == len(igemm.SYMBOLS)
    assert len(set(grouped.SYMBOLS)) == len(grouped.SYMBOLS)
