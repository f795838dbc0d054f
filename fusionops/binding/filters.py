"""Filters of a convolution: shape, groups and mixed-up layouts, and the argument of `prepack`; packs nothing itself."""

from __future__ import annotations

from typing import Any

from fusionops.binding import options
from fusionops.binding.arrays import Intake, Shape, is_floating
from fusionops.binding.contraction import FiltersKey
from fusionops.binding.messages import Labelled, complaint
from fusionops.errors import SpecError, SpecTypeError
from fusionops.kernel import Filters
from fusionops.spec import Layout, Merge, SourceSpec

AXES = {Layout.NHWC: "(R, S, C/groups, K)", Layout.NCHW: "(K, C/groups, R, S)"}


def bind_filters(filters: Any, *, layout: Any = "NHWC") -> Filters:
    """Filters of a convolution or the matrix of a dense layer, for kernels to pack once."""
    op = "prepack"
    if isinstance(filters, Filters):
        raise SpecTypeError(complaint(op, "filters are prepacked already"))
    intake = Intake(op)
    array = intake.array("filters", filters)
    judged_layout = options.layout(op, layout)
    if array.ndim not in (2, 4):
        problem = f"filters has {array.ndim} axes, needs 4: {AXES[judged_layout]}, or 2: (channels, units)"
        raise SpecError(complaint(op, problem, arrays=[("filters", array.shape, array.dtype)]))
    if not is_floating(array.dtype):
        hint = "filters.astype(np.float32) makes one"
        raise SpecTypeError(complaint(op, f"filters has dtype {array.dtype.name}, needs a floating dtype", hint=hint))
    with intake.device:
        return Filters(intake.settle("filters", array), judged_layout)


def judge_filters(
    op: str,
    merge: Merge,
    maps: tuple[SourceSpec, ...],
    filters: FiltersKey,
    groups: int,
    layout: Layout,
    arrays: list[Labelled],
) -> tuple[int, int, int]:
    """(R, S, K) of filters that fit the merged map."""
    shape, _, packed_for = filters
    if len(shape) != 4:
        problem = f"filters has {len(shape)} axes, needs 4: {AXES[layout]}"
        raise SpecError(complaint(op, problem, arrays=arrays))
    if packed_for is not None and packed_for is not layout:
        problem = f"filters were prepacked for layout {packed_for}, the call has layout {layout}"
        raise SpecError(complaint(op, problem, arrays=arrays, hint=f'prepack(filters, layout="{layout}")'))
    R, S, depth, K = _in_order(shape, layout)
    for name, extent in (("rows R", R), ("columns S", S), ("filters K", K)):
        if extent == 0:
            raise SpecError(complaint(op, f"filters have 0 {name}, need at least one", arrays=arrays))
    channels = [source.shape[3 if layout is Layout.NHWC else 1] for source in maps]
    C = channels[0] if merge is Merge.ADD else sum(channels)
    if C % groups:
        problem = f"{_counted(merge, channels)}, not a multiple of groups={groups}"
        raise SpecError(complaint(op, problem, arrays=arrays))
    if depth * groups != C:
        of_groups = f" in each of {groups} groups" if groups > 1 else ""
        problem = f"filters take {depth} channels{of_groups}, {_counted(merge, channels)}"
        hint = _layout_hint(merge, maps, shape, groups, layout) or _other_hint(op, channels, depth * groups)
        raise SpecError(complaint(op, problem, arrays=arrays, hint=hint))
    if K % groups:
        raise SpecError(complaint(op, f"{K} filters are not a multiple of groups={groups}", arrays=arrays))
    return R, S, K


def _in_order(shape: Shape, layout: Layout) -> tuple[int, int, int, int]:
    """(R, S, C/groups, K) of a filter shape in `layout`."""
    a, b, c, d = shape
    return (a, b, c, d) if layout is Layout.NHWC else (c, d, b, a)


def _counted(merge: Merge, channels: list[int]) -> str:
    if merge is Merge.ADD or len(channels) == 1:
        return f"the sources have {channels[0]}"
    return f"the sources have {' + '.join(map(str, channels))} = {sum(channels)}"


def _layout_hint(merge: Merge, maps: tuple[SourceSpec, ...], filters: Shape, groups: int, layout: Layout) -> str:
    """Whether maps, filters or both would fit if they were meant in the other layout."""
    other = Layout.NCHW if layout is Layout.NHWC else Layout.NHWC

    def channels(order: Layout) -> int:
        extents = [source.shape[3 if order is Layout.NHWC else 1] for source in maps]
        return extents[0] if merge is Merge.ADD else sum(extents)

    def depth(order: Layout) -> int:
        return _in_order(filters, order)[2] * groups

    here = {Layout.NHWC: "HWIO", Layout.NCHW: "OIHW"}
    if depth(other) == channels(other):
        return f'maps and filters fit layout="{other}"'
    if depth(other) == channels(layout):
        axes = "(2, 3, 1, 0)" if layout is Layout.NHWC else "(3, 2, 0, 1)"
        return f"filters look like {here[other]}; layout {layout} takes {here[layout]}: filters.transpose{axes}"
    if depth(layout) == channels(other):
        axes = "(0, 2, 3, 1)" if layout is Layout.NHWC else "(0, 3, 1, 2)"
        return f"maps look like {other}; layout {layout} takes x.transpose{axes}"
    return ""


def _other_hint(op: str, channels: list[int], taken: int) -> str:
    """Whether filters of `taken` channels would fit the other merge, or more groups."""
    if op == "add_conv" and taken == sum(channels):
        return "concat_conv takes these filters"
    if op == "concat_conv" and {taken} == set(channels):
        return "add_conv takes these filters"
    C = channels[0] if op == "add_conv" else sum(channels)
    return f"groups={C // taken} would fit" if taken and C % taken == 0 else ""
