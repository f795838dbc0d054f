"""The float64 oracle: the whole family in literal loops over the filter taps, written to be read against the equations.

It is not fast, shares no code with a kernel, and is chosen only by name (`backend="reference"`).

    p_i = weight_i · act_i(scale_i · up(x_i) + shift_i)                                     prologue
    m   = p_0 + p_1 + …  or  concat(p_0, p_1, …)                                            merge
    a[n,p,q,k] = Σ_{r,s,c} m[n, h, w, c] · f[r,s,c,k]                                       contraction
                 h = p·stride_h + r·dilation_h − pad_top        w = q·stride_w + s·dilation_w − pad_left
    y   = act(a + bias + residual)                                                          epilogue

A tap outside the map is skipped, never multiplied by zero, so an Inf next to a border stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from fusionops.kernel import Filters, Operands
from fusionops.spec import Activation, Dense, FusionSpec, Layout, Merge, SourceSpec

Array = np.ndarray[Any, Any]

NHWC_AXES = (0, 2, 3, 1)  # transposes NCHW to NHWC
NCHW_AXES = (0, 3, 1, 2)  # and back
HWIO_AXES = (2, 3, 1, 0)  # transposes OIHW to HWIO


def run(spec: FusionSpec, operands: Operands, out: Array) -> None:
    """Write the result of `spec` into `out`, and the merged map into `operands.merged` where the spec returns it.

    out   any strides, shape spec.out_shape, dtype spec.dtype

    Numerics: a contraction happens in float64, from the loads to the activation, and is rounded once, when stored.
    Without a contraction, and for the returned merged map, every product and sum is NumPy's in the dtype of the data
    (a left fold over the sources), so the result is NumPy's bit for bit.
    """
    with np.errstate(all="ignore"):
        if spec.contraction is None or spec.return_sum:
            merged = _merge(spec, operands)
            if spec.contraction is None:
                out[...] = merged if spec.activation is None else _activate(merged, spec.activation)
            if spec.return_sum:
                cast(Array, operands.merged)[...] = merged
        if spec.contraction is not None:
            _round_into(out, _contract(spec, operands))


def _merge(spec: FusionSpec, operands: Operands, dtype: str | None = None) -> Array:
    """The merged map in the layout of the spec, in `dtype` or in the dtypes of the sources."""
    count = len(spec.sources)
    none = (None,) * count
    maps = [
        _load(spec, source, array if dtype is None else array.astype(dtype), *vectors)
        for source, array, *vectors in zip(
            spec.sources,
            operands.sources,
            operands.scales or none,
            operands.shifts or none,
            operands.weights or none,
            strict=True,
        )
    ]
    if spec.merge is Merge.CONCAT:
        return np.concatenate(maps, axis=spec.channel_axis)
    merged = maps[0]
    for addend in maps[1:]:
        merged = merged + addend
    return merged


def _load(spec: FusionSpec, source: SourceSpec, x: Array, scale: Any, shift: Any, weight: Any) -> Array:
    """The prologue of one source: upsample, scale, shift, activation, weight."""
    if source.upsample != (1, 1):
        h = 1 if spec.layout is Layout.NHWC else 2
        x = x.repeat(source.upsample[0], axis=h).repeat(source.upsample[1], axis=h + 1)
    if scale is not None:
        x = x * _along_channels(spec, scale, x.dtype)
    if shift is not None:
        x = x + _along_channels(spec, shift, x.dtype)
    if source.activation is not None:
        x = _activate(x, source.activation)
    if weight is not None:
        x = x * _along_channels(spec, weight, x.dtype)
    return x


def _along_channels(spec: FusionSpec, value: Any, dtype: np.dtype[Any]) -> Array:
    """A scalar, or a vector (C,) shaped to broadcast along the channels of a map."""
    values = np.asarray(value, dtype)
    return values[:, None, None] if values.ndim and spec.layout is Layout.NCHW else values


def _contract(spec: FusionSpec, operands: Operands) -> Array:
    """The contraction and its epilogue in float64, in the layout of the spec, not yet rounded."""
    merged = _merge(spec, operands, "float64")
    filters = operands.filters.array if isinstance(operands.filters, Filters) else operands.filters
    weights = np.asarray(filters, np.float64)
    if isinstance(spec.contraction, Dense):
        total = np.einsum("...c,ck->...k", merged, weights)
    elif spec.layout is Layout.NCHW:
        total = _convolve(spec, merged.transpose(NHWC_AXES), weights.transpose(HWIO_AXES)).transpose(NCHW_AXES)
    else:
        total = _convolve(spec, merged, weights)
    if operands.bias is not None:
        total = total + _along_channels(spec, operands.bias, total.dtype)
    if spec.residual is not None:
        stored = cast(Array, operands.residual).astype(np.float64)
        total = total + _load(spec, spec.residual, stored, None, None, operands.residual_weight)
    return total if spec.activation is None else _activate(total, spec.activation)


def _convolve(spec: FusionSpec, merged: Array, weights: Array) -> Array:
    """Σ_{r,s,c} merged (N, H, W, C) · weights (R, S, C/groups, K), tap by tap over the placements that see the tap."""
    conv = spec.conv
    depth, filters = spec.C // conv.groups, conv.K // conv.groups
    total = np.zeros((spec.N, spec.P, spec.Q, conv.K))
    for r in range(conv.R):
        for s in range(conv.S):
            p, h = _placements(r, spec.H, spec.P, conv.stride[0], conv.dilation[0], conv.padding[0][0])
            q, w = _placements(s, spec.W, spec.Q, conv.stride[1], conv.dilation[1], conv.padding[1][0])
            for group in range(conv.groups):
                c = slice(group * depth, (group + 1) * depth)
                k = slice(group * filters, (group + 1) * filters)
                total[:, p, q, k] += np.einsum("nhwc,ck->nhwk", merged[:, h, w, c], weights[r, s, :, k])
    return total


def _placements(
    tap: int, size: int, placements: int, stride: int, dilation: int, pad_before: int
) -> tuple[slice, slice]:
    """The outputs for which `tap` falls inside the map along one axis, and the inputs it falls on."""
    offset = tap * dilation - pad_before
    first = max(0, -(offset // stride))
    stop = max(first, min(placements, (size - 1 - offset) // stride + 1))
    return slice(first, stop), slice(first * stride + offset, max(0, (stop - 1) * stride + offset + 1), stride)


def _round_into(out: Array, values: Array) -> None:
    """Store float64 values with one rounding to the dtype of `out`."""
    if out.dtype.name == "bfloat16":
        # ml_dtypes goes through float32 and would round twice. Rounding to odd first leaves the second one right
        # (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
        nearest = values.astype(np.float32)
        inexact = np.isfinite(values) & (nearest != values)
        odd = np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)
        values = (odd.view(np.uint32) | inexact).view(np.float32)
    out[...] = values.astype(out.dtype)


def _activate(x: Array, activation: Activation) -> Array:
    """`activation` of x, computed in float64 and rounded once to the dtype of x."""
    result = np.empty_like(x)
    _round_into(result, ACTIVATIONS[activation.name](x.astype(np.float64), *activation.parameters))
    return result


def _relu6(x: Array) -> Array:
    return np.clip(x, 0.0, 6.0)


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))  # never overflows
    return np.where(x < 0, small, 1.0) / (1.0 + small)


def _leaky_relu(x: Array, slope: float) -> Array:
    return np.where(x < 0, x * slope, x)


def _gelu(x: Array) -> Array:
    # Φ(x) = erfc(−x/√2)/2, not (1 + erf(x/√2))/2: the latter cancels for negative x.
    tail = np.frompyfunc(lambda value: math.erfc(-value / math.sqrt(2.0)), 1, 1)(x)
    return 0.5 * x * np.asarray(tail, np.float64)


# As Keras and PyTorch define them; maximum and clip hand NaN on.
ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "relu6": _relu6,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "hardswish": lambda x: x * (_relu6(x + 3.0) / 6.0),
    "hardsigmoid": lambda x: _relu6(x + 3.0) / 6.0,
    "gelu": _gelu,
}
