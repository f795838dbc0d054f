"""What a test of a kernel needs: exact operands, bounds that judge rounding, memory that catches strays.

As `numpy.testing` is to NumPy: public, and imported by nothing inside the package. Holds no expected values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusionops import reference
from fusionops.kernel import Filters, Operands
from fusionops.problems import PROBLEMS, Problem
from fusionops.spec import FusionSpec, Layout, Merge, SourceSpec

__all__ = [
    "PROBLEMS",
    "UNIT_ROUNDOFF",
    "Guarded",
    "Problem",
    "activation_bound",
    "error_bound",
    "exact_operands",
    "guarded_copy",
    "guarded_empty",
    "is_narrow",
    "last_places",
    "magnitude",
    "map_operands",
    "random_operands",
    "view_variants",
]

Array = np.ndarray[Any, Any]

UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
TF32_ROUNDOFF = 2.0**-11
SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}

# Largest slope of each activation: sigmoid and tanh at 0; silu, hardswish and gelu beyond 0, where they overshoot.
LIPSCHITZ = {
    "relu": 1.0,
    "relu6": 1.0,
    "sigmoid": 0.25,
    "tanh": 1.0,
    "silu": 1.0999,
    "hardswish": 1.5,
    "hardsigmoid": 1 / 6,
    "gelu": 1.1290,
}
EXACT_ACTIVATIONS = ("relu", "relu6", "leaky_relu")  # at most one product, and that one rounded once
TRANSCENDENTAL_ULPS = 4.0  # granted to every other activation, in units in the last place of its result
GELU_ULPS = 6.0  # a quotient, a polynomial and an exponential one after the other; 5.4 is the most that was found
GELU_UNDERFLOWS = 40.0  # below minus this gelu is 0 in float64


def exact_operands(spec: FusionSpec, rng: np.random.Generator) -> Operands:
    """Integers in [-4, 4] everywhere, weights and filters included: every sum is exact, in any order of summation.

    Asserts the condition for it: the sum of the absolute terms stays below 1 / u.
    """

    def integers(shape: tuple[int, ...], dtype: str) -> Array:
        low = 0 if np.dtype(dtype).kind in "bu" else -4
        return np.asarray(rng.integers(low, 5, shape)).astype(dtype)

    operands = _operands(spec, integers)
    if spec.contraction is not None:
        assert magnitude(spec, operands).max() < 1 / _accumulated_roundoff(spec), f"{spec} can round even integers"
    return operands


def random_operands(spec: FusionSpec, rng: np.random.Generator, kind: str = "normal") -> Operands:
    """Reals: "normal"; "positive", as after a ReLU, where errors do not cancel; "badly_scaled", over 12 decades.

    Over 2 decades in float16, whose products of two such and their sums have to stay below 65504.
    """

    def reals(shape: tuple[int, ...], dtype: str) -> Array:
        if np.dtype(dtype).kind in "iub":
            info = np.iinfo("int8" if dtype == "bool" else dtype)
            return np.asarray(rng.integers(info.min, info.max, shape, info.dtype, endpoint=True)).astype(dtype)
        values = np.asarray(rng.standard_normal(shape))
        if kind == "positive":
            values = np.abs(values)
        elif kind == "badly_scaled":
            most = 1 if dtype == "float16" else 6
            values = values * 10.0 ** rng.uniform(-most, most, shape)
        return np.asarray(values).astype(dtype)  # 0-d arithmetic returns scalars

    return _operands(spec, reals)


def _operands(spec: FusionSpec, fill: Callable[[tuple[int, ...], str], Array]) -> Operands:
    axis = -1 if spec.layout is Layout.NHWC else 1

    def vector(wanted: bool, source: SourceSpec) -> Array | None:
        return fill((source.shape[axis],), source.dtype) if wanted else None

    def weight(source: SourceSpec) -> Array | float | None:
        return float(fill((), source.dtype)) if source.weight == "scalar" else vector(source.weight == "vector", source)

    return Operands(
        sources=tuple(fill(source.shape, source.dtype) for source in spec.sources),
        weights=tuple(weight(source) for source in spec.sources),
        scales=tuple(vector(source.scale, source) for source in spec.sources),
        shifts=tuple(vector(source.shift, source) for source in spec.sources),
        filters=None if spec.contraction is None else fill(spec.filter_shape, spec.dtype),
        bias=fill((spec.conv.K,), spec.dtype) if spec.bias else None,
        residual=None if spec.residual is None else fill(spec.residual.shape, spec.dtype),
        residual_weight=None if spec.residual is None else weight(spec.residual),
        merged=np.empty(spec.merged_shape, spec.dtype) if spec.return_sum else None,
    )


def map_operands(operands: Operands, change: Callable[[Array], Array]) -> Operands:
    """The same operands with `change` applied to every array a kernel reads; None and scalars stay."""

    def changed(value: Any) -> Any:
        if isinstance(value, Filters):
            return Filters(change(value.array), value.layout)
        return change(value) if isinstance(value, np.ndarray) else value

    return Operands(
        sources=tuple(map(changed, operands.sources)),
        weights=tuple(map(changed, operands.weights)),
        scales=tuple(map(changed, operands.scales)),
        shifts=tuple(map(changed, operands.shifts)),
        filters=changed(operands.filters),
        bias=changed(operands.bias),
        residual=changed(operands.residual),
        residual_weight=changed(operands.residual_weight),
        merged=operands.merged,
    )


def magnitude(spec: FusionSpec, operands: Operands) -> Array:
    """|x| ⋆ |w| + |b| + |residual| in float64: the reference on absolute values, without activations.

    Also bounds the terms behind an activation in a prologue, because |act(x)| ≤ |x| for those that are 0 at 0.
    """
    prologues = [source.activation.name for source in spec.sources if source.activation]
    assert not {"sigmoid", "hardsigmoid"} & set(prologues), "a prologue with act(0) = 1/2 has no such bound"
    linear = replace(
        spec,
        sources=tuple(replace(source, activation=None) for source in spec.sources),
        activation=None,
        return_sum=False,
        dtype="float64",
    )
    absolute = map_operands(operands, lambda array: np.abs(array.astype(np.float64)))
    absolute.weights = tuple(None if weight is None else abs(weight) for weight in absolute.weights)
    absolute.residual_weight = None if operands.residual_weight is None else abs(operands.residual_weight)
    total = np.empty(spec.out_shape)
    reference.run(linear, absolute, total)
    return total


def error_bound(spec: FusionSpec, operands: Operands) -> Array:
    """The admissible error of a strict kernel, elementwise, against the reference.

        |error| ≤ L · ((8 + 2·√gemm_k) · u + merges · v) · (|x| ⋆ |w| + |b| + |residual|) + activation_bound + stores

    L        largest slope of the activation
    merges   roundings of the merge: one for each source added, in a narrow dtype one more for a product with a weight
    u        2⁻²⁴ for float32 and the narrow dtypes, which are summed in it; 2⁻⁵³ for float64
    v        of the dtype itself: 2⁻¹¹ for float16, 2⁻⁸ for bfloat16, u for the others
             With precision "tf32" both factors of a product are rounded once more: 2·2⁻¹¹ is added to the first factor.
    stores   in a narrow dtype, whose results round once more, one unit in the last place of the result

    Without a contraction the first term is 0: the result is NumPy's. In float64 the bound doubles, since the reference
    rounds as well. √K instead of the worst-case K: rounding errors of a sum behave like a random walk
    (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019).
    """
    bound = np.zeros(spec.out_shape)
    if spec.contraction is not None:
        sums = len(spec.sources) - 1 if spec.merge is Merge.ADD else 0
        every = (*spec.sources, spec.residual) if spec.residual else spec.sources
        products = is_narrow(spec) and any(source.weight for source in every)
        relative = (8 + 2 * math.sqrt(spec.gemm[2])) * _accumulated_roundoff(spec)
        relative += (sums + products) * UNIT_ROUNDOFF[spec.dtype]
        if spec.precision == "tf32":
            relative += 2 * TF32_ROUNDOFF
        bound = relative * magnitude(spec, operands)
        if spec.dtype == "float64":
            bound = 2 * bound
    if spec.activation is not None:
        slopes = spec.activation.parameters
        bound = bound * (max(1.0, abs(slopes[0])) if slopes else LIPSCHITZ[spec.activation.name])
        bound = bound + activation_bound(spec, operands)
    if spec.contraction is not None and is_narrow(spec):
        result = np.empty(spec.out_shape, spec.dtype)
        reference.run(replace(spec, return_sum=False), operands, result)
        bound = bound + last_places(result, SMALLEST_NORMAL[spec.dtype])
    return bound


def is_narrow(spec: FusionSpec) -> bool:
    """Whether elements are stored with fewer bits than they are computed with."""
    return UNIT_ROUNDOFF[spec.dtype] > UNIT_ROUNDOFF["float32"]


def _accumulated_roundoff(spec: FusionSpec) -> float:
    """Of what a contraction is computed in."""
    return min(UNIT_ROUNDOFF[spec.dtype], UNIT_ROUNDOFF["float32"])


def last_places(result: Array, floor: float) -> Array:
    """Units in the last place of a result, or of `floor` where it is smaller."""
    with np.errstate(over="ignore", invalid="ignore"):  # the largest number has no successor, and infinity no ulp
        size = np.maximum(np.abs(result.astype(np.float64)), floor)
        return np.asarray(2.0 * UNIT_ROUNDOFF[result.dtype.name] * 2.0 ** np.floor(np.log2(size)))


def activation_bound(spec: FusionSpec, operands: Operands) -> Array:
    """The admissible error of the activation alone, where nothing before it rounds: 0, 4 ulp of the result, 6 for gelu.

    For results below 1024 times the smallest normal number the ulp of that: there x·sigmoid(x) multiplies a subnormal.
    In float64 the bound doubles, since the reference rounds as well, and gelu gets 4·x² ulp more: both hand x/√2 to
    the C library's erfc, which turns a rounding of it into up to 2·x² ulp of the result.
    """
    if spec.activation is None or spec.activation.name in EXACT_ACTIVATIONS:
        return np.zeros(spec.out_shape)
    result, x = np.empty(spec.out_shape, spec.dtype), np.empty(spec.out_shape, spec.dtype)
    reference.run(replace(spec, return_sum=False), operands, result)
    reference.run(replace(spec, return_sum=False, activation=None), operands, x)
    ulps = GELU_ULPS if spec.activation.name == "gelu" else TRANSCENDENTAL_ULPS
    bound = ulps * last_places(result, 1024 * SMALLEST_NORMAL[spec.dtype])
    if spec.dtype == "float64":
        bound *= 2
        if spec.activation.name == "gelu":
            bound *= 1 + np.square(np.clip(x, -GELU_UNDERFLOWS, GELU_UNDERFLOWS)) / 2
    return bound


@dataclass(frozen=True, slots=True, eq=False)
class Guarded:
    """An array inside an arena of poison: NaN for floats, 0xA5 for everything else.

    The poison lies before and after the array, and in every gap that its strides leave.
    """

    array: Array
    arena: Array
    offset: int

    def assert_intact(self) -> None:
        """Fail if anything in the arena outside the array was overwritten."""
        shadow = self.arena.copy()
        poison = _poison(self.array.dtype)
        like = self.array
        raw = np.dtype((np.void, like.dtype.itemsize))  # a bool would not keep its bits
        inside = np.ndarray(like.shape, raw, shadow, self.offset, like.strides)
        inside[...] = np.full(raw.itemsize, poison, np.uint8).view(raw)[0]
        strays = np.flatnonzero(shadow != poison)
        assert strays.size == 0, (
            f"{strays.size} bytes outside an array of shape {like.shape} and strides {like.strides} were overwritten, "
            f"the first at {strays[0] - self.offset:+d} bytes from its start"
        )


GUARD_ITEMS = 64 + 3  # odd, so that no array starts where a vector register would like it to

LAYOUTS = (
    "contiguous",
    "crop",
    "step",
    "reversed",
    "fortran",
    "last_axis_second",
    "second_axis_last",
    "unaligned",
)


def guarded_empty(shape: tuple[int, ...], dtype: str | np.dtype[Any], layout: str = "contiguous") -> Guarded:
    """An array full of poison inside poison.

    layout   contiguous; crop: of a larger array; step: every second element along every axis; reversed: negative
             strides; fortran: first axis fastest; last_axis_second: an NHWC map in NCHW memory; second_axis_last: the
             other way round; unaligned: starts one byte off
    """
    kind = np.dtype(dtype)
    step, margin = (2 if layout == "step" else 1), (3 if layout == "crop" else 0)
    axes = list(range(len(shape)))
    if layout == "fortran":
        axes.reverse()
    elif layout == "last_axis_second" and axes:
        axes.insert(1, axes.pop())
    elif layout == "second_axis_last" and len(axes) > 1:
        axes.append(axes.pop(1))
    strides, span = [0] * len(shape), kind.itemsize
    for axis in reversed(axes):
        strides[axis] = span * step
        span *= shape[axis] * step + margin
    offset = GUARD_ITEMS * kind.itemsize + (layout == "unaligned")
    if layout == "reversed":
        offset += sum(stride * (extent - 1) for stride, extent in zip(strides, shape, strict=True))
        strides = [-stride for stride in strides]
    arena = np.full(span + 2 * GUARD_ITEMS * kind.itemsize + 1, _poison(kind), np.uint8)
    return Guarded(np.ndarray(shape, kind, arena, offset, tuple(strides)), arena, offset)


def _poison(dtype: np.dtype[Any]) -> int:
    return 0xA5 if dtype.kind in "iub" else 0xFF  # a float of all ones is a NaN in every format


def guarded_copy(array: Array, layout: str = "contiguous") -> Array:
    """A read-only copy of `array` inside poison: whoever reads beside it reads NaN."""
    copy = guarded_empty(array.shape, array.dtype, layout).array
    copy[...] = array
    copy.flags.writeable = False
    return copy


def view_variants(array: Array) -> Iterator[tuple[str, Array]]:
    """Read-only arrays equal to `array`, each with other strides; stride 0 along an axis whose values allow it."""
    for layout in LAYOUTS:
        yield layout, guarded_copy(array, layout)
    for axis, extent in enumerate(array.shape):
        first = array.take([0], axis)
        if extent > 1 and np.array_equal(array, np.broadcast_to(first, array.shape)):
            yield f"broadcast_axis_{axis}", np.broadcast_to(guarded_copy(first), array.shape)
