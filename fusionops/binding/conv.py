"""Arguments of `add_conv` and `concat_conv`: maps, filters and windows in either layout."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from fusionops.binding import options
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
from fusionops.binding.filters import judge_filters
from fusionops.binding.messages import Labelled, complaint
from fusionops.binding.sources import Key, source_spec
from fusionops.errors import SpecError
from fusionops.spec import (
    Activation,
    Conv2d,
    FusionSpec,
    Layout,
    Merge,
    SourceSpec,
    filter_reach,
    output_extent,
    same_padding,
)

ROLE = "filters"


def bind_conv(
    op: str,
    sources: Any,
    filters: Any,
    bias: Any = None,
    residual: Any = None,
    *,
    stride: Any = 1,
    padding: Any = "valid",
    dilation: Any = 1,
    groups: Any = 1,
    weights: Any = None,
    normalize: Any = None,
    activation: Any = None,
    layout: Any = "NHWC",
    strict: Any = False,
    precision: Any = None,
    return_sum: Any = False,
    out: Any = None,
) -> Call:
    """Bind `add_conv` or `concat_conv`."""
    operands, keys, out, intake = read_operands(op, ROLE, sources, filters, bias, residual, weights, normalize, out)
    judgement = _judge_conv(
        op,
        keys,
        options.pair(op, "stride", stride),
        options.padding(op, padding),
        options.pair(op, "dilation", dilation),
        options.integer(op, "groups", groups, 1),
        options.activation(op, "activation", activation),
        options.layout(op, layout),
        options.flag(op, "strict", strict),
        options.choice(op, "precision", precision, options.PRECISIONS),
        options.flag(op, "return_sum", return_sum),
    )
    if out is not None:
        judge_out(op, out, judgement)
    if intake is not None:
        settle(intake, ROLE, operands, judgement.dtype)
    return bound(op, judgement, operands, out, intake)


@lru_cache(maxsize=CACHED_JUDGEMENTS)
def _judge_conv(
    op: str,
    keys: Keys,
    stride: options.Pair,
    padding: options.Padding,
    dilation: options.Pair,
    groups: int,
    activation: Activation | None,
    layout: Layout,
    strict: bool,
    precision: str | None,
    return_sum: bool,
) -> Judgement:
    arrays = labelled(keys, ROLE)
    sources, filters, bias, residual = keys
    dtype = judge_dtype(op, arrays)
    merge = merge_of(op)
    channel_axis = 3 if layout is Layout.NHWC else 1
    for i, key in enumerate(sources):
        _judge_rank(op, i, key, layout)
    maps = tuple(source_spec(op, f"sources[{i}]", key, dtype, channel_axis) for i, key in enumerate(sources))
    _judge_maps(op, merge, maps, layout, arrays)
    R, S, K = judge_filters(op, merge, maps, filters, groups, layout, arrays)
    size = _pixels(maps[0], layout)
    pads = _padding_of(padding, size, (R, S), stride, dilation)
    _judge_window(op, size, (R, S), stride, pads, dilation, arrays)
    judge_bias(op, bias, K, arrays)
    spec = FusionSpec(
        merge,
        maps,
        Conv2d(K, R, S, stride, pads, dilation, groups),
        dtype=dtype.name,
        layout=layout,
        bias=bias is not None,
        activation=options.rounded_activation(activation, dtype),
        strict=strict,
        precision=precision,
        return_sum=return_sum,
    )
    judge_size(op, "the result", spec.out_shape, dtype, arrays)
    judge_size(op, "the merged map", spec.merged_shape, dtype, arrays)
    addend = residual_spec(op, residual, spec.out_shape, dtype, layout, channel_axis, arrays)
    return Judgement(spec if addend is None else replace(spec, residual=addend), spec.out_shape, dtype)


def _judge_rank(op: str, i: int, key: Key, layout: Layout) -> None:
    shape, dtype, _ = key
    if len(shape) != 4:
        axes = ", ".join(layout)
        problem = f"sources[{i}] has {len(shape)} axes, needs 4: ({axes})"
        hint = f"sources[{i}][None] is a batch of one" if len(shape) == 3 else ""
        raise SpecError(complaint(op, problem, arrays=[(f"sources[{i}]", shape, dtype)], hint=hint))


def _judge_maps(op: str, merge: Merge, maps: tuple[SourceSpec, ...], layout: Layout, arrays: list[Labelled]) -> None:
    """Equal N, H and W after upsampling, for an add equal C too; nothing is broadcast."""
    first = maps[0].upsampled_shape(layout)
    axes = ("N", "H", "W", "C") if layout is Layout.NHWC else ("N", "C", "H", "W")
    for i, source in enumerate(maps):
        shape = source.upsampled_shape(layout)
        if shape[axes.index("C")] == 0:
            raise SpecError(complaint(op, f"sources[{i}] has 0 channels, needs at least one", arrays=arrays))
        for axis, extent, expected in zip(axes, shape, first, strict=True):
            if extent == expected or (axis == "C" and merge is Merge.CONCAT):
                continue
            needs = "an add needs equal N, H, W and C" if merge is Merge.ADD else "concat needs equal N, H and W"
            after = " after upsampling" if any(m.upsample != (1, 1) for m in (maps[0], source)) else ""
            problem = f"sources[{i}] has {axis}={extent}{after}, sources[0] has {axis}={expected}; {needs}"
            hint = "concat_conv takes unequal channels" if axis == "C" else ""
            if axis in "HW":
                hint = _size_hint(i, maps, layout)
            raise SpecError(complaint(op, problem, arrays=arrays, hint=hint))


def _size_hint(i: int, maps: tuple[SourceSpec, ...], layout: Layout) -> str:
    """How sources[i] and sources[0] get one size: by an integer factor if there is one, else by cropping."""
    (h, w), (first_h, first_w) = _pixels(maps[i], layout), _pixels(maps[0], layout)
    for j, small, large in ((0, (first_h, first_w), (h, w)), (i, (h, w), (first_h, first_w))):
        if 0 in small or large[0] % small[0] or large[1] % small[1]:
            continue
        up_h, up_w = (a // b * f for a, b, f in zip(large, small, maps[j].upsample, strict=True))
        factor = up_h if up_h == up_w else (up_h, up_w)
        return f"Source(x, upsample={factor}) for sources[{j}] makes them equal"
    crop_h, crop_w = min(h, first_h), min(w, first_w)
    crop = f"[:, :{crop_h}, :{crop_w}]" if layout is Layout.NHWC else f"[:, :, :{crop_h}, :{crop_w}]"
    return f"sizes are {first_h}x{first_w} and {h}x{w}; crop the larger with x{crop}, or pad the smaller"


def _pixels(source: SourceSpec, layout: Layout) -> tuple[int, int]:
    """(H, W) after upsampling."""
    shape = source.upsampled_shape(layout)
    return shape[1:3] if layout is Layout.NHWC else shape[2:4]  # type: ignore[return-value]  # maps have rank 4


def _padding_of(
    padding: options.Padding, size: options.Pair, taps: options.Pair, stride: options.Pair, dilation: options.Pair
) -> tuple[options.Pair, options.Pair]:
    if not isinstance(padding, str):
        return padding
    if padding == "valid":
        return (0, 0), (0, 0)
    rows, columns = (
        same_padding(extent, count, stride=step, dilation=spread)
        for extent, count, step, spread in zip(size, taps, stride, dilation, strict=True)
    )
    return rows, columns


def _judge_window(
    op: str,
    size: options.Pair,
    taps: options.Pair,
    stride: options.Pair,
    pads: tuple[options.Pair, options.Pair],
    dilation: options.Pair,
    arrays: list[Labelled],
) -> None:
    """The filter has at least one placement along each axis."""
    for axis, extent, count, step, pad, spread in zip("HW", size, taps, stride, pads, dilation, strict=True):
        if output_extent(extent, count, stride=step, pad=pad, dilation=spread) < 1:
            reach = filter_reach(count, spread)
            padded = f"{axis}={extent} with padding {pad[0]} + {pad[1]} is {extent + sum(pad)}"
            problem = f"the filter spans {reach} along {axis}, {padded}; the result would be empty"
            hint = 'padding="same" keeps the size' if extent else ""
            raise SpecError(complaint(op, problem, arrays=arrays, hint=hint))
