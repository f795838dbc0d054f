"""Arguments of `add_dense` and `concat_dense`: any leading axes, collapsed to rows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fusionops.binding import cuda, options
from fusionops.binding.arrays import Array, Shape, is_of_rows
from fusionops.binding.call import CACHED_JUDGEMENTS, Call, Judgement, bound, judge_out, judge_size
from fusionops.binding.contraction import (
    Keys,
    judge_bias,
    judge_dtype,
    labelled,
    merge_of,
    read_operands,
    residual_spec,
    settle,
)
from fusionops.binding.messages import Labelled, complaint
from fusionops.binding.sources import PLAIN, Key, source_spec
from fusionops.errors import SpecError
from fusionops.kernel import Operands
from fusionops.spec import Activation, Dense, FusionSpec, Layout, Merge

ROLE = "matrix"


def bind_dense(
    op: str,
    sources: Any,
    matrix: Any,
    bias: Any = None,
    residual: Any = None,
    *,
    weights: Any = None,
    normalize: Any = None,
    activation: Any = None,
    precision: Any = None,
    out: Any = None,
) -> Call:
    """Bind `add_dense` or `concat_dense`."""
    operands, keys, out, intake = read_operands(op, ROLE, sources, matrix, bias, residual, weights, normalize, out)
    judgement = _judge_dense(
        op,
        keys,
        options.activation(op, "activation", activation),
        options.choice(op, "precision", precision, options.PRECISIONS),
    )
    if out is not None:
        judge_out(op, out, judgement)
    if intake is not None:
        settle(intake, ROLE, operands, judgement.dtype)
    copies = () if len(judgement.shape) == 2 else _collapse(operands, judgement.spec.W)
    return bound(op, judgement, operands, out, intake, copies)


@lru_cache(maxsize=CACHED_JUDGEMENTS)
def _judge_dense(op: str, keys: Keys, activation: Activation | None, precision: str | None) -> Judgement:
    arrays = labelled(keys, ROLE)
    sources, (matrix, *_), bias, residual = keys
    dtype = judge_dtype(op, arrays)
    merge = merge_of(op)
    lead, channels = _judge_sources(op, merge, sources, arrays)
    if len(matrix) != 2:
        problem = f"matrix has {len(matrix)} axes, needs 2: (channels, units)"
        raise SpecError(complaint(op, problem, arrays=arrays))
    depth, K = matrix
    if depth != channels:
        problem = f"matrix has {depth} rows, {_counted(merge, sources)}"
        hint = "matrix.T fits, as the weight of PyTorch's Linear needs" if channels == K else ""
        raise SpecError(complaint(op, problem, arrays=arrays, hint=hint))
    if K == 0:
        raise SpecError(complaint(op, "matrix has 0 columns, needs at least one", arrays=arrays))
    judge_bias(op, bias, K, arrays)
    shape = (*lead, K)
    judge_size(op, "the result", shape, dtype, arrays)
    rows = math.prod(lead)
    addend = residual_spec(op, residual, shape, dtype, Layout.NHWC, -1, arrays)
    if addend is not None and addend.upsample != (1, 1):
        problem = f"residual is upsampled by {addend.upsample}; the result of a dense layer has no H and W"
        raise SpecError(complaint(op, problem, arrays=arrays))
    spec = FusionSpec(
        merge,
        tuple(source_spec(op, f"sources[{i}]", _as_rows(key, rows), dtype, -1) for i, key in enumerate(sources)),
        Dense(K),
        dtype=dtype.name,
        bias=bias is not None,
        residual=None if addend is None else replace(addend, shape=(rows, K)),
        activation=options.rounded_activation(activation, dtype),
        precision=precision,
    )
    return Judgement(spec, shape, dtype)


def _judge_sources(op: str, merge: Merge, keys: tuple[Key, ...], arrays: list[Labelled]) -> tuple[Shape, int]:
    """The leading axes, which all sources share, and the channels after the merge."""
    for i, (shape, _, prologue) in enumerate(keys):
        upsample = (prologue or PLAIN).upsample
        if not shape:
            raise SpecError(complaint(op, f"sources[{i}] has no axes, needs (…, C)", arrays=arrays))
        if upsample != (1, 1):
            problem = f"sources[{i}] is upsampled by {upsample}; the sources of a dense layer have no H and W"
            raise SpecError(complaint(op, problem, arrays=arrays))
        if shape[-1] == 0:
            raise SpecError(complaint(op, f"sources[{i}] has 0 channels, needs at least one", arrays=arrays))
        if shape[:-1] != keys[0][0][:-1]:
            problem = f"sources[{i}] has leading axes {shape[:-1]}, sources[0] has {keys[0][0][:-1]}; all need the same"
            raise SpecError(complaint(op, problem, arrays=arrays))
        if merge is Merge.ADD and shape[-1] != keys[0][0][-1]:
            problem = f"sources[{i}] has {shape[-1]} channels, sources[0] has {keys[0][0][-1]}; an add needs the same"
            hint = f"concat_{op.partition('_')[2]} takes unequal channels"
            raise SpecError(complaint(op, problem, arrays=arrays, hint=hint))
    channels = [shape[-1] for shape, *_ in keys]
    return keys[0][0][:-1], channels[0] if merge is Merge.ADD else sum(channels)


def _counted(merge: Merge, keys: tuple[Key, ...]) -> str:
    channels = [shape[-1] for shape, *_ in keys]
    if merge is Merge.ADD or len(channels) == 1:
        return f"the sources have {channels[0]} channels"
    return f"the sources have {' + '.join(map(str, channels))} = {sum(channels)} channels"


def _as_rows(key: Key, rows: int) -> Key:
    shape, dtype, prologue = key
    return (rows, shape[-1]), dtype, prologue


def _collapse(operands: Operands, rows: int) -> tuple[str, ...]:
    """(…, C) as (rows, C): views where the strides allow it, else copies; returns what was copied and why."""
    copies: tuple[str, ...] = ()

    def collapsed(name: str, array: Array) -> Array:
        nonlocal copies
        if not is_of_rows(array):
            copies += (f"{name}: leading axes cannot be collapsed to rows in place",)
        return array.reshape(rows, array.shape[-1])

    with cuda.device_of(operands.sources[0]):
        operands.sources = tuple(collapsed(f"sources[{i}]", array) for i, array in enumerate(operands.sources))
        if operands.residual is not None:
            operands.residual = collapsed("residual", operands.residual)
    return copies
