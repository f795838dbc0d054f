"""Arguments of `add` and `concat`: broadcasting, promotion and axes as NumPy has them; no filters."""

from __future__ import annotations

import operator
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from fusionops.binding import options
from fusionops.binding.arrays import Array, Intake, Shape, is_floating, is_plain, native, plain_on_gpu
from fusionops.binding.call import CACHED_JUDGEMENTS, Call, Judgement, bound, judge_out, judge_size
from fusionops.binding.messages import Labelled, complaint, spelled
from fusionops.binding.sources import Key, plain_sources, read_sources, settle_parameters, source_spec
from fusionops.errors import SpecAxisError, SpecError, SpecTypeError
from fusionops.kernel import Operands
from fusionops.spec import Activation, FusionSpec, Merge

_WEAK = (int, float)  # Python numbers: NumPy lets them take the dtype of their neighbour


def bind_merge(
    op: str,
    sources: Any,
    *,
    axis: Any = 0,
    weights: Any = None,
    normalize: Any = None,
    activation: Any = None,
    out: Any = None,
) -> Call:
    """Bind `add`, which has the options from `weights` on, or `concat`, which has `axis`."""
    intake = plain = None
    if weights is None and normalize is None:
        plain = plain_sources(sources, is_plain) if out is None or type(out) is np.ndarray else None
        if plain is None:
            plain = plain_on_gpu(plain_sources, sources, out=out)
    if plain is not None:
        arrays, keys = plain
        operands = Operands(arrays)
    else:
        intake = Intake(op)
        operands, keys = _read_operands(intake, sources, weights, normalize)
        out = intake.destination(out)
    judgement = _judge_merge(
        op, keys, axis if type(axis) is int else _axis(op, axis), options.activation(op, "activation", activation)
    )
    if out is not None:
        judge_out(op, out, judgement)
    if judgement.mixed and intake is None:
        intake = Intake(op)
        operands, _ = _read_operands(intake, sources, weights, normalize)
    if intake is not None:
        _settle(intake, operands, judgement)
    return bound(op, judgement, operands, out, intake, elementwise=op == "add")


def _read_operands(intake: Intake, sources: Any, weights: Any, normalize: Any) -> tuple[Operands, tuple[Key, ...]]:
    """Every source as given, and its key."""
    arrays, keys, parameters = read_sources(intake, sources, weights, normalize)
    if intake.op == "add" and any(type(source) in _WEAK for source in sources):
        arrays = _with_strong_numbers(intake.op, sources, arrays)
        keys = tuple((shape, array.dtype, prologue) for array, (shape, _, prologue) in zip(arrays, keys, strict=True))
    return Operands(arrays, *parameters), keys


def _settle(intake: Intake, operands: Operands, judgement: Judgement) -> None:
    """Make the arrays what kernels take, all of one dtype where the spec says so."""
    with intake.device:
        arrays = [intake.settle(f"sources[{i}]", array) for i, array in enumerate(operands.sources)]
        for i, array in enumerate(arrays):
            if judgement.mixed and array.dtype != judgement.dtype:
                arrays[i] = array.astype(judgement.dtype)
                change = f"converted from {array.dtype} to {judgement.dtype}, the dtype of the result"
                intake.copies += (f"sources[{i}]: {change}",)
        operands.sources = tuple(arrays)
        settle_parameters(intake, operands, judgement.dtype)


@lru_cache(maxsize=CACHED_JUDGEMENTS)
def _judge_merge(op: str, keys: tuple[Key, ...], axis: int, activation: Activation | None) -> Judgement:
    shapes = [_upsampled(op, i, key) for i, key in enumerate(keys)]
    try:
        dtype = reduce(np.promote_types, (native(dtype) for _, dtype, _ in keys))
    except TypeError as error:
        problem = "the sources have no common dtype"
        raise SpecTypeError(complaint(op, problem, arrays=_labels(keys), hint="cast them to one dtype")) from error
    if op == "add":
        _judge_broadcast(op, keys, shapes)
    else:
        axis = _judge_joint(op, keys, shapes, axis)
    fuses = activation is not None or any(prologue is not None for *_, prologue in keys)
    if fuses and not is_floating(dtype):
        problem = f"weights, upsampling and activations need a floating dtype, the result has {dtype.name}"
        raise SpecTypeError(complaint(op, problem, arrays=_labels(keys), hint="x.astype(np.float32) makes one"))
    # Plain sums keep the dtypes of the sources: NumPy rounds and wraps each partial sum in the dtype of its two terms.
    spec = FusionSpec(
        Merge(op),
        tuple(source_spec(op, f"sources[{i}]", key, dtype if fuses else key[1], -1) for i, key in enumerate(keys)),
        dtype=dtype.name,
        axis=axis,
        activation=options.rounded_activation(activation, dtype),
    )
    judge_size(op, "the result", spec.out_shape, dtype, _labels(keys))
    return Judgement(spec, spec.out_shape, dtype, mixed=fuses and any(native(key[1]) != dtype for key in keys))


def _judge_broadcast(op: str, keys: tuple[Key, ...], shapes: list[Shape]) -> None:
    """Aligned at the last axis, extents must be equal or 1."""
    for back in range(1, max(map(len, shapes)) + 1):
        extents = [(i, shape[-back]) for i, shape in enumerate(shapes) if len(shape) >= back and shape[-back] != 1]
        for i, extent in extents:
            first, expected = extents[0]
            if extent != expected:
                problem = f"sources[{i}] has {extent} along axis {-back}, sources[{first}] has {expected}"
                limit = "broadcasting needs equal extents or 1"
                raise SpecError(complaint(op, f"{problem}; {limit}", arrays=_labels(keys)))


def _judge_joint(op: str, keys: tuple[Key, ...], shapes: list[Shape], axis: int) -> int:
    """Equal ranks, and equal extents but along `axis`, which is returned without sign."""
    rank = len(shapes[0])
    for i, shape in enumerate(shapes):
        if not shape:
            hint = f"np.atleast_1d(sources[{i}]) gives it one"
            problem = f"sources[{i}] has no axes, needs at least one"
            raise SpecError(complaint(op, problem, arrays=_labels(keys), hint=hint))
        if len(shape) != rank:
            problem = f"sources[{i}] has {len(shape)} axes, sources[0] has {rank}; all need equally many"
            raise SpecError(complaint(op, problem, arrays=_labels(keys)))
    if not -rank <= axis < rank:
        problem = f"axis is {axis}, arrays of {rank} axes need {-rank} … {rank - 1}"
        raise SpecAxisError(complaint(op, problem, arrays=_labels(keys)))
    axis %= rank
    for i, shape in enumerate(shapes):
        for along, (extent, expected) in enumerate(zip(shape, shapes[0], strict=True)):
            if along != axis and extent != expected:
                problem = f"sources[{i}] has {extent} along axis {along}, sources[0] has {expected}"
                raise SpecError(complaint(op, f"{problem}; only axis {axis} may differ", arrays=_labels(keys)))
    return axis


def _upsampled(op: str, i: int, key: Key) -> Shape:
    """The shape of sources[i] after upsampling, for which it must be a map (N, H, W, C)."""
    shape, dtype, prologue = key
    if prologue is None or prologue.upsample == (1, 1):
        return shape
    if len(shape) != 4:
        problem = f"sources[{i}] has {len(shape)} axes, upsampling needs a map (N, H, W, C)"
        raise SpecError(complaint(op, problem, arrays=[(f"sources[{i}]", shape, dtype)]))
    up_h, up_w = prologue.upsample
    return shape[0], shape[1] * up_h, shape[2] * up_w, shape[3]


def _axis(op: str, axis: Any) -> int:
    """A whole number of either sign; whether the arrays have that axis is judged with their shapes."""
    try:
        number = None if isinstance(axis, (bool, np.bool_)) else operator.index(axis)
    except TypeError:
        number = None
    if number is None:
        hint = "flatten first: concat([x.ravel(), y.ravel()])" if axis is None else ""
        raise SpecTypeError(complaint(op, f"axis is {spelled(axis)}, needs an integer", hint=hint))
    return number


def _with_strong_numbers(op: str, sources: Any, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """`arrays` with Python numbers in the dtype that they take next to their neighbours in (x0 + x1) + x2 + …"""
    terms = [source if type(source) in _WEAK else array.dtype for source, array in zip(sources, arrays, strict=True)]
    strong = list(arrays)
    dtype = terms[0]
    for i, term in enumerate(terms[1:], 1):
        dtype = np.result_type(dtype, term)
        for j in (0, i) if i == 1 else (i,):
            if type(sources[j]) in _WEAK:
                try:
                    strong[j] = np.asarray(sources[j], dtype)
                except OverflowError as error:
                    raise SpecError(complaint(op, f"sources[{j}] is {sources[j]}, beyond {dtype}")) from error
    return tuple(strong)


def _labels(keys: tuple[Key, ...]) -> list[Labelled]:
    return [(f"sources[{i}]", shape, dtype) for i, (shape, dtype, _) in enumerate(keys)]
