"""What the tests of all backends share: operands of a problem, what they give, and how results are judged."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from fusionops import reference
from fusionops.kernel import Operands
from fusionops.problems import Problem
from fusionops.spec import FusionSpec, SourceSpec
from fusionops.testing import exact_operands


def rng_of(problem: Problem) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(problem.name.encode()))


def expected_of(spec: FusionSpec, operands: Operands) -> list[np.ndarray]:
    out = np.empty(spec.out_shape, spec.dtype)
    reference.run(spec, operands, out)
    return [out, operands.merged] if spec.return_sum else [out]


def assert_same_bits(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes(), f"{np.count_nonzero(one != other)} of {one.size} elements differ"


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
