"""What the tests of all backends share: operands of a problem, what they give, and how results are judged."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fusionops import reference
from fusionops.kernel import Kernel, Operands
from fusionops.problems import Problem
from fusionops.spec import FusionSpec, SourceSpec
from fusionops.testing import error_bound, exact_operands, guarded_copy, guarded_empty, map_operands, random_operands

Execute = Callable[[Kernel, FusionSpec, Operands], list[np.ndarray]]


def rng_of(problem: Problem) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(problem.name.encode()))


def expected_of(spec: FusionSpec, operands: Operands) -> list[np.ndarray]:
    out = np.empty(spec.out_shape, spec.dtype)
    reference.run(spec, operands, out)
    return [out, operands.merged] if spec.return_sum else [out]


def assert_same_bits(actual: list[np.ndarray], expected: list[np.ndarray], what: str = "") -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        same = one.tobytes() == other.tobytes()
        assert same, f"{np.count_nonzero(one != other)} of {one.size} elements differ {what}"


def assert_within(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    error = np.abs(np.where(same, 0, actual.astype(np.float64)) - np.where(same, 0, expected.astype(np.float64)))
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), (
        f"{np.count_nonzero(~(error <= bound))} of {error.size} elements leave the bound; at {tuple(map(int, worst))}: "
        f"got {actual[worst]}, expected {expected[worst]}, error {error[worst]:.3g}, bound {bound[worst]:.3g}"
    )


def is_meaningful(expected: np.ndarray) -> bool:
    return 4 * np.count_nonzero(expected) >= expected.size


def exact_case(problem: Problem) -> tuple[Operands, list[np.ndarray]]:
    """Exact operands and what they give; fails where it is mostly zeros, which would prove nothing."""
    rng = rng_of(problem)
    for _ in range(8):  # a single number may well be 0
        operands = exact_operands(problem.spec, rng)
        expected = expected_of(problem.spec, operands)
        if is_meaningful(expected[0]):
            return operands, expected
    raise AssertionError(f"the results of {problem} are mostly zeros and prove nothing")


def with_batch(spec: FusionSpec, batch: int) -> FusionSpec:
    """The same problem over `batch` images, or rows of a dense layer."""

    def resized(source: SourceSpec) -> SourceSpec:
        return replace(source, shape=(batch, *source.shape[1:]))

    residual = None if spec.residual is None else resized(spec.residual)
    return replace(spec, sources=tuple(map(resized, spec.sources)), residual=residual)


def execute_on(
    device: Any, kernel: Kernel, spec: FusionSpec, operands: Operands, layout: str = "contiguous"
) -> list[np.ndarray]:
    """What the kernel writes, into poisoned memory that must stay poisoned around it."""
    outputs = [guarded_empty(spec.out_shape, spec.dtype, layout)]
    if spec.return_sum:
        outputs.append(guarded_empty(spec.merged_shape, spec.dtype, layout))
        operands = replace(operands, merged=outputs[1].array)
    kernel.run(spec, kernel.plan(spec, device), operands, outputs[0].array)
    for output in outputs:
        output.assert_intact()
    return [output.array for output in outputs]


# What every backend's kernels promise; `execute` is execute_on its device.


def check_rounding(execute: Execute, kernel: Kernel, problem: Problem, kind: str) -> None:
    spec = problem.spec
    operands = map_operands(random_operands(spec, rng_of(problem), kind), guarded_copy)
    expected = expected_of(spec, operands)
    actual = execute(kernel, spec, operands)
    assert_within(actual[0], expected[0], error_bound(spec, operands))
    assert_same_bits(actual[1:], expected[1:])


def check_batch_split(execute: Execute, kernel: Kernel, problem: Problem) -> None:
    """The same bits from a batch and from its parts."""
    spec = with_batch(problem.spec, 3)
    operands = random_operands(spec, rng_of(problem))
    whole = execute(kernel, spec, operands)
    for part in (slice(0, 1), slice(1, 3)):
        split = replace(
            operands,
            sources=tuple(source[part] for source in operands.sources),
            residual=None if operands.residual is None else operands.residual[part],
        )
        alone = execute(kernel, with_batch(spec, part.stop - part.start), split)
        assert_same_bits(alone, [output[part] for output in whole])


def check_unfused(execute: Execute, kernel: Kernel, problem: Problem) -> None:
    """The same bits from a map that NumPy merged before."""
    spec = problem.spec
    operands = random_operands(spec, rng_of(problem))
    join = replace(spec, contraction=None, bias=False, residual=None, activation=None, return_sum=False)
    join = replace(join, axis=spec.channel_axis)
    merged = np.empty(spec.merged_shape, spec.dtype)
    reference.run(join, operands, merged)
    one = replace(spec, sources=(SourceSpec(merged.shape, spec.dtype),), return_sum=False)
    unfused = replace(operands, sources=(merged,), weights=(None,), scales=(None,), shifts=(None,), merged=None)
    assert_same_bits(execute(kernel, one, unfused), execute(kernel, spec, operands)[:1])
