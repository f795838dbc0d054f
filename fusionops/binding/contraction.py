"""What convolutions and dense layers share: reading filters, bias and residual; one floating dtype for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionops.binding.arrays import (
    Array,
    DType,
    Intake,
    IsPlain,
    Shape,
    is_floating,
    is_plain,
    native,
    plain_on_gpu,
)
from fusionops.binding.messages import Labelled, complaint
from fusionops.binding.sources import (
    PLAIN,
    Key,
    plain_sources,
    read_source,
    read_sources,
    settle_parameters,
    source_spec,
)
from fusionops.errors import SpecError, SpecTypeError
from fusionops.kernel import Filters, Operands
from fusionops.spec import Layout, Merge, SourceSpec

ArrayKey = tuple[Shape, DType]
FiltersKey = tuple[Shape, DType, Layout | None]  # the layout that Filters were packed for; an array has none of its own


# What the judgement of a contraction has to know of its arrays: of sources, filters, bias and residual.
Keys = tuple[tuple[Key, ...], FiltersKey, ArrayKey | None, Key | None]


def read_operands(
    op: str, role: str, sources: Any, filters: Any, bias: Any, residual: Any, weights: Any, normalize: Any, out: Any
) -> tuple[Operands, Keys, Array | None, Intake | None]:
    """Every array as given, their keys, `out`, and what has yet to be settled: None where kernels take all as it is."""
    if weights is None and normalize is None:
        plain = None
        if out is None or type(out) is np.ndarray:
            plain = _plain_operands(sources, filters, bias, residual, is_plain)
        if plain is None:
            plain = plain_on_gpu(_plain_operands, sources, filters, bias, residual, out=out)
        if plain is not None:
            operands, keys = plain
            return operands, keys, out, None
    intake = Intake(op)
    maps, source_keys, parameters = read_sources(intake, sources, weights, normalize)
    bias_key = residual_key = None
    if isinstance(filters, Filters):
        intake.array(role, filters.array)
        filters_key: FiltersKey = filters.shape, filters.array.dtype, filters.layout
    else:
        filters = intake.array(role, filters)
        filters_key = filters.shape, filters.dtype, None
    operands = Operands(maps, *parameters, filters)
    if bias is not None:
        operands.bias = bias = intake.array("bias", bias)
        bias_key = bias.shape, bias.dtype
    if residual is not None:
        loaded = read_source(intake, "residual", residual)
        operands.residual, operands.residual_weight, residual_key = loaded.array, loaded.weight, loaded.key
    out = intake.destination(out)
    return operands, (source_keys, filters_key, bias_key, residual_key), out, intake


def _plain_operands(
    sources: Any, filters: Any, bias: Any, residual: Any, is_plain: IsPlain
) -> tuple[Operands, Keys] | None:
    """The operands and their keys, if kernels take all arrays as they are."""
    plain = plain_sources(sources, is_plain)
    if plain is None:
        return None
    arrays, source_keys = plain
    bias_key = residual_key = None
    if is_plain(filters):
        filters_key: FiltersKey = filters.shape, filters.dtype, None
    elif isinstance(filters, Filters) and is_plain(filters.array):
        filters_key = filters.shape, filters.array.dtype, filters.layout
    else:
        return None
    if bias is not None:
        if not (is_plain(bias) and bias.flags.c_contiguous):
            return None
        bias_key = bias.shape, bias.dtype
    if residual is not None:
        plain = plain_sources((residual,), is_plain)
        if plain is None:
            return None
        (residual,), (residual_key,) = plain
    return Operands(arrays, (), (), (), filters, bias, residual), (source_keys, filters_key, bias_key, residual_key)


def settle(intake: Intake, role: str, operands: Operands, dtype: DType) -> None:
    """Make the arrays what kernels take, with parameters in the dtype of the data."""
    with intake.device:
        if intake.unsettled or intake.on_gpu:
            operands.sources = tuple(intake.settle(f"sources[{i}]", array) for i, array in enumerate(operands.sources))
            for name, attribute in ((role, "filters"), ("bias", "bias"), ("residual", "residual")):
                array = getattr(operands, attribute)
                if array is not None and not isinstance(array, Filters):
                    setattr(operands, attribute, intake.settle(name, array))
        if operands.bias is not None and not operands.bias.flags.c_contiguous:
            intake.copies += ("bias: not contiguous",)
            operands.bias = operands.bias.copy()
        settle_parameters(intake, operands, dtype)


def labelled(keys: Keys, role: str) -> list[Labelled]:
    """Every array of the call as messages list it, in native byte order; `role` is what the op calls its filters."""
    sources, filters, bias, residual = keys
    listed = [(f"sources[{i}]", shape, native(dtype)) for i, (shape, dtype, _) in enumerate(sources)]
    for name, key in ((role, filters), ("bias", bias), ("residual", residual)):
        if key is not None:
            listed.append((name, key[0], native(key[1])))
    return listed


def judge_dtype(op: str, arrays: list[Labelled]) -> DType:
    """The one floating dtype of all arrays; a contraction promotes nothing, lest it silently runs in float64."""
    expected, _, dtype = arrays[0]
    for name, _, other in arrays:
        if not is_floating(other):
            problem = f"{name} has dtype {other.name}, needs a floating dtype"
            hint = f"{name}.astype(np.float32) makes one"
            raise SpecTypeError(complaint(op, problem, arrays=arrays, hint=hint))
        if other != dtype:
            problem = f"{name} has dtype {other.name}, {expected} has {dtype.name}; all need the same"
            hint = f"{name}.astype({expected}.dtype) makes them equal"
            raise SpecTypeError(complaint(op, problem, arrays=arrays, hint=hint))
    return dtype


def judge_bias(op: str, key: ArrayKey | None, K: int, arrays: list[Labelled]) -> None:
    if key is not None and key[0] != (K,):
        problem = f"bias has shape {key[0]}, {K} filters need ({K},)"
        hint = "bias.ravel() has it" if len(key[0]) > 1 and max(key[0]) == K else ""
        raise SpecError(complaint(op, problem, arrays=arrays, hint=hint))


def residual_spec(
    op: str, key: Key | None, shape: Shape, dtype: DType, layout: Layout, channel_axis: int, arrays: list[Labelled]
) -> SourceSpec | None:
    """The residual as the spec states it; after upsampling it must have exactly the shape of the result."""
    if key is None:
        return None
    prologue = key[2] or PLAIN
    if prologue.scale is not None or prologue.shift is not None:
        problem = "residual has scale or shift, which only sources take"
        raise SpecError(complaint(op, problem, arrays=arrays, hint="x * scale + shift beforehand"))
    if prologue.upsample != (1, 1) and len(key[0]) != 4:
        problem = f"residual has {len(key[0])} axes, upsampling needs a map of rank 4"
        raise SpecError(complaint(op, problem, arrays=arrays))
    spec = source_spec(op, "residual", key, dtype, channel_axis)
    upsampled = spec.upsampled_shape(layout)
    if upsampled != shape:
        now = f"{key[0]}" if upsampled == key[0] else f"{upsampled} after upsampling"
        problem = f"residual has shape {now}, the result has {shape}; a residual is never broadcast"
        raise SpecError(complaint(op, problem, arrays=arrays))
    return spec


def merge_of(op: str) -> Merge:
    """ADD for add_conv and add_dense, CONCAT for concat_conv and concat_dense."""
    return Merge(op.split("_")[0])
