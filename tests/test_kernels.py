"""Every kernel on every problem it supports, driven as dispatch drives it: plan, then run.

Correctness of the kernels alone; what users pass and which kernel is chosen is proved elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import cycle
from operator import attrgetter

import numpy as np
import pytest
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

import fusionops as fo
from fusionops import cpu, reference
from fusionops.cpu import amx, threads, winograd
from fusionops.cpu.add_task import add_task
from fusionops.cpu.conv import conv_task
from fusionops.cpu.gemm_task import gemm_task
from fusionops.cpu.simd import VECTOR_BYTES
from fusionops.device import CPU_PROFILES
from fusionops.kernel import Filters, Kernel
from fusionops.problems import PROBLEMS, Problem, conv
from fusionops.spec import Merge
from fusionops.testing import (
    LAYOUTS,
    UNIT_ROUNDOFF,
    activation_bound,
    guarded_copy,
    is_narrow,
    last_places,
    map_operands,
    random_operands,
)

KERNELS = {kernel.name: kernel for kernel in cpu.KERNELS}
CASES = [
    pytest.param(kernel, problem, id=f"{kernel.name}-{problem}")
    for kernel in cpu.KERNELS
    for problem in PROBLEMS
    if not kernel.unsupported(problem.spec)
]
CONTRACTIONS = [case for case in CASES if case.values[1].spec.contraction is not None]

REWRITES = [case for case in CASES if case.values[0].unsupported(replace(case.values[1].spec, strict=True))]

every_case = pytest.mark.parametrize(("kernel", "problem"), CASES)
every_rewrite = pytest.mark.parametrize(("kernel", "problem"), REWRITES)
every_winograd = pytest.mark.parametrize(
    ("kernel", "problem"), [case for case in REWRITES if case.values[0].name.endswith("winograd_f32")]
)
every_strict_case = pytest.mark.parametrize(("kernel", "problem"), [case for case in CASES if case not in REWRITES])
every_contraction = pytest.mark.parametrize(("kernel", "problem"), CONTRACTIONS)


execute = partial(execute_on, cpu.device())


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_support_is_not_lost(problem):
    for name in problem.kernels:
        assert set(KERNELS[name].unsupported(problem.spec)) <= {amx.without_tiles()}


@pytest.mark.parametrize("kernel", cpu.KERNELS, ids=attrgetter("name"))
def test_every_kernel_is_pinned_to_problems(kernel):
    pinned = [problem for problem in PROBLEMS if kernel.name in problem.kernels]
    assert len(pinned) >= 3


@pytest.mark.parametrize("kernel", cpu.KERNELS, ids=attrgetter("name"))
def test_refusals_are_sentences_and_every_kernel_refuses_something(kernel):
    refusals = [reasons for problem in PROBLEMS if (reasons := kernel.unsupported(problem.spec))]
    assert refusals
    assert all(isinstance(reason, str) and reason for reasons in refusals for reason in reasons)


@every_case
def test_plan_is_legal(kernel, problem):
    for device in CPU_PROFILES:
        config = kernel.plan(problem.spec, device)
        assert config.illegal_on(device) == ()
        assert config == kernel.plan(problem.spec, device)
        assert hash(config) == hash(kernel.plan(problem.spec, device))
        assert 0 <= config.scratch_bytes <= 4 * 2**20


def is_rewrite(kernel: Kernel, problem: Problem) -> bool:
    """Whether the kernel forms other products than a strict one."""
    return bool(kernel.unsupported(replace(problem.spec, strict=True)))


@every_case
def test_exact_on_integers(kernel, problem):
    """Bit for bit; a rewrite, whose products are no integers, within a quarter of the integer that it should be."""
    spec = problem.spec
    operands, expected = exact_case(problem)
    actual = execute(kernel, spec, map_operands(operands, guarded_copy))
    bound = activation_bound(spec, operands)
    if is_rewrite(kernel, problem):
        bound = bound + 0.25 + (last_places(expected[0], 1.0) if is_narrow(spec) else 0.0)
    assert_within(actual[0], expected[0], bound)
    assert_same_bits(actual[1:], expected[1:])


@pytest.mark.parametrize("kind", ["normal", "positive", "badly_scaled"])
@every_rewrite
def test_a_rewrite_rounds_little_more_than_a_strict_kernel(kernel, problem, kind):
    """Relative L2 error at most 4e-6, and three times that of the strict kernel; of numbers over 12 decades, where one
    product makes a sum and a strict sum hardly rounds, only the first. Over many images, as errors of few vary. In
    float64 as many units of roundoff; a narrow dtype rounds its merged map and its results as well.
    """
    spec = with_batch(problem.spec, 16)
    posed = replace(spec, strict=True)
    after = cpu.KERNELS[cpu.KERNELS.index(kernel) :]  # where it is chosen those before it are slow, strict or not
    able = [other for other in after if not other.unsupported(posed)]
    strict = next((other for other in able if not other.slow(posed, cpu.device())), able[0])
    operands = random_operands(spec, rng_of(problem), kind)
    expected = expected_of(spec, operands)
    exact = np.linalg.norm(expected[0].astype(np.float64))
    errors = [
        np.linalg.norm(execute(each, spec, operands)[0].astype(np.float64) - expected[0]) / exact
        for each in (kernel, strict)
    ]
    unit = UNIT_ROUNDOFF[spec.dtype]
    if is_narrow(spec):
        assert errors[0] <= 4e-6 + (1 + len(spec.sources)) * unit
    else:
        assert 0 < errors[0] <= 4e-6 * unit / UNIT_ROUNDOFF["float32"]
    if (
        spec.dtype == "float32" and kind != "badly_scaled"
    ):  # the reference rounds as float64 kernels do: no judge of them
        assert errors[0] <= 3 * errors[1]


@pytest.mark.parametrize("kind", ["normal", "positive", "badly_scaled"])
@every_strict_case
def test_rounds_within_the_bound(kernel, problem, kind):
    check_rounding(execute, kernel, problem, kind)


@every_case
def test_two_runs_are_the_same_bits_and_leave_nothing_behind(kernel, problem):
    spec = problem.spec
    operands = random_operands(spec, rng_of(problem))
    first = execute(kernel, spec, operands)
    assert_same_bits(execute(kernel, spec, operands), first)
    if spec.contraction is not None:  # another batch full of NaN, so that whatever stays behind is seen
        larger = with_batch(spec, 1 + spec.merged_shape[0])
        poisoned = map_operands(random_operands(larger, rng_of(problem)), lambda array: np.full_like(array, np.nan))
        execute(kernel, larger, poisoned)
        assert_same_bits(execute(kernel, spec, operands), first)


@every_case
def test_strides_do_not_change_bits(kernel, problem):
    spec = problem.spec
    operands = random_operands(spec, rng_of(problem))
    plain = execute(kernel, spec, operands)
    for layout in LAYOUTS:  # of the sources: the same for all, and mixed
        layouts = cycle([layout, "contiguous", layout])
        everywhere = map_operands(operands, partial(_in_layout, layout=layout))
        mixed = replace(operands, sources=tuple(guarded_copy(source, next(layouts)) for source in operands.sources))
        assert_same_bits(execute(kernel, spec, everywhere, layout), plain, f"where all are {layout}")
        assert_same_bits(execute(kernel, spec, mixed), plain, f"where some sources are {layout}")
        assert_same_bits(execute(kernel, spec, operands, layout), plain, f"where the output is {layout}")


def _in_layout(array: np.ndarray, layout: str) -> np.ndarray:
    return guarded_copy(array, layout if array.ndim > 1 else "contiguous")


@every_case
def test_a_stride_of_zero_does_not_change_bits(kernel, problem):
    spec = problem.spec
    operands = random_operands(spec, rng_of(problem))
    for axis in range(len(spec.out_shape)):
        constant = [
            np.broadcast_to(x.take([0], axis), x.shape) if x.ndim > axis and x.shape[axis] else x
            for x in operands.sources
        ]
        copied = replace(operands, sources=tuple(x.copy() for x in constant))
        assert_same_bits(
            execute(kernel, spec, replace(operands, sources=tuple(constant))), execute(kernel, spec, copied)
        )


@every_case
def test_the_number_of_threads_does_not_change_bits(kernel, problem, monkeypatch):
    """Nor does the number of launches. Little work would be left to one thread, but not here."""
    spec = problem.spec
    operands = random_operands(spec, rng_of(problem))
    before = cpu.get_num_threads()
    serial = execute(kernel, spec, operands)
    monkeypatch.setattr(threads, "SERIAL_FLOPS", 0.0)
    try:
        for count, launch_flops in ((1, 1.0), (2, threads.LAUNCH_FLOPS), (2, 1.0), (3, 1e5), (8, threads.LAUNCH_FLOPS)):
            cpu.set_num_threads(count)
            monkeypatch.setattr(threads, "LAUNCH_FLOPS", launch_flops)
            assert_same_bits(execute(kernel, spec, operands), serial)
    finally:
        cpu.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "crop", "unaligned", "step", "last_axis_second"])
@every_winograd
def test_stores_around_the_caches_do_not_change_bits(kernel, problem, layout, monkeypatch):
    """Only large outputs are stored so; here all are whose filters fill whole blocks."""
    spec = problem.spec
    operands = random_operands(spec, rng_of(problem))
    plain = execute(kernel, spec, operands, layout)
    monkeypatch.setattr(winograd, "AROUND_BYTES", 0)
    assert kernel.plan(spec, cpu.device()).around == (spec.conv.K % kernel.plan(spec, cpu.device()).width == 0)
    assert_same_bits(execute(kernel, spec, operands, layout), plain)


@every_contraction
def test_splitting_the_batch_does_not_change_bits(kernel, problem):
    check_batch_split(execute, kernel, problem)


@pytest.mark.parametrize(
    ("kernel", "problem"), [case for case in CONTRACTIONS if "commuted" not in case.values[0].name]
)
def test_fused_equals_unfused_bit_for_bit(kernel, problem):
    """But for products that are formed before an upsampling, which a stored map does not show."""
    check_unfused(execute, kernel, problem)


@every_contraction
def test_packed_filters_give_the_same_bits(kernel, problem):
    spec = problem.spec
    operands = random_operands(spec, rng_of(problem))
    plain = execute(kernel, spec, operands)
    packed = replace(operands, filters=Filters(operands.filters, spec.layout))
    assert_same_bits(execute(kernel, spec, packed), plain)
    assert_same_bits(execute(kernel, spec, packed), plain)  # the second call finds them packed


def test_the_instruments_would_notice():
    """A kernel that loses a tap, writes beside its output, or leaves some of it, is caught by the checks above."""
    problem = next(problem for problem in PROBLEMS if problem.name == "concat_conv_odd_channels")
    spec = problem.spec
    operands, (expected,) = exact_case(problem)
    honest = Kernel("honest", lambda spec: (), lambda spec, device: None, lambda s, c, o, out: reference.run(s, o, out))
    assert_same_bits(execute(honest, spec, operands), [expected])

    def loses_a_tap(spec, config, operands, out):
        filters = operands.filters.copy()
        filters[-1, -1] = 0
        reference.run(spec, replace(operands, filters=filters), out)

    lossy = execute(replace(honest, run=loses_a_tap), spec, operands)[0]
    with pytest.raises(AssertionError, match="leave the bound"):
        assert_within(lossy, expected, np.zeros(expected.shape))

    def leaves_a_pixel(spec, config, operands, out):
        last = out[-1, -1, -1].copy()
        reference.run(spec, operands, out)
        out[-1, -1, -1] = last

    incomplete = execute(replace(honest, run=leaves_a_pixel), spec, operands)[0]
    with pytest.raises(AssertionError, match="leave the bound"):
        assert_within(incomplete, expected, np.full(expected.shape, np.inf))

    def writes_beside(spec, config, operands, out):
        reference.run(spec, operands, out)
        np.lib.stride_tricks.as_strided(out, (out.size + 1,), out.strides[-1:])[-1] = 0

    with pytest.raises(AssertionError, match="outside an array"):
        execute(replace(honest, run=writes_beside), spec, operands)


def test_results_that_are_mostly_zeros_are_refused():
    problem = conv("mostly_padding", Merge.ADD, (3,), 3, H=3, W=3, padding=((20, 20), (20, 20)), bias=False)
    with pytest.raises(AssertionError, match="mostly zeros"):
        exact_case(problem)


def test_warmup_compiles_all_that_it_names():
    """Little is left to compile: this runs after the kernels have."""
    told: list[tuple[int, int, str]] = []
    cpu.warmup(lambda *step: told.append(step))
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert {total for _, total, _ in told} == {len(told) - 1}
    assert len({what for _, _, what in told}) == len(told)
    assert told[-1][2] == "done"
    names = {what for _, _, what in told}
    assert {f"{kind} add float32" for kind in ("plain", "contiguous", "any")} <= names
    assert any("half" in name for name in names) == (cpu.device().vector_bytes < VECTOR_BYTES)
    tasks = add_task, conv_task, gemm_task
    compiled = [task.cache_info().misses for task in tasks]
    x, coarse = np.ones((1, 4, 4, 32), np.float32), np.ones((1, 2, 2, 32), np.float32)
    for filters in (24, 32):
        for taps in (1, 3):
            fo.add_conv([x, x], np.ones((taps, taps, 32, filters), np.float32), strict=True)
    for sources in ([x, x], [x, fo.Source(x, weight=2.0)], [x, fo.Source(coarse, upsample=2)], [x, x[..., ::-1]]):
        fo.add(sources)
    assert [task.cache_info().misses for task in tasks] == compiled
