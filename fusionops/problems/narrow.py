"""Which problems are posed in float16 and bfloat16 as well: one or two of every way to load, merge, pack and store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fusionops.problems.rows import Problem, in_dtype, in_nchw, tiled
from fusionops.spec import Merge

JOINS = (
    "add_lanes_plus_one",
    "add_chunk_plus_one",
    "add_five_sources",
    "add_scalar_weight",
    "add_vector_weight",
    "add_upsampled",
    "add_upsampled_unevenly",
    "add_upsampled_and_weighted",
    "add_relu",
    "add_gelu",
    "concat_unequal_sources",
    "concat_upsampled",
    "concat_wide_rows",
)
DENSES = (
    "add_dense_one_row",
    "add_dense_many_rows",
    "add_dense_weighted",
    "add_dense_residual",
    "concat_dense_tile_plus_one",
    "concat_dense_long_reduction",
    "concat_dense_residual",
    "concat_dense_many_filters",
)
# Of both merges
CONVS = (
    "odd_channels",
    "tile_plus_one",
    "many_tiles",
    "batch",
    "stride_two_same",
    "two_groups",
    "residual",
    "residual_upsampled",
    "residual_weighted",
    "upsampled",
    "depthwise",
    "pointwise",
    "pointwise_tile_plus_one",
    "grouped",
    "grouped_multiplier",
    "winograd_tile_plus_one",
    "winograd_whole_blocks",
    "winograd_residual",
    "winograd_5x5_odd_map",
    "winograd_7x7_strided",
)
# Of one
OTHER_CONVS = (
    "add_conv_depthwise_strided",
    "add_conv_five_sources",
    "add_conv_pointwise_return_sum",
    "add_conv_return_sum",
    "add_conv_silu",
    "add_conv_weighted",
    "add_conv_weighted_upsampled",
    "add_conv_winograd_return_sum",
    "add_conv_winograd_weighted",
    "concat_conv_depthwise_many_channels",
    "concat_conv_grouped_sources_across_groups",
    "concat_conv_leaky_relu",
    "concat_conv_pointwise_upsampled",
    "concat_conv_winograd_upsampled",
)

# Of every way in which tiles of pixels, channels and filters end; without strict=True, which tiles cannot keep.
TILED = (
    "odd_channels",
    "tile_plus_one",
    "many_tiles",
    "wide_map",
    "tall_map",
    "batch",
    "valid",
    "asymmetric_pad",
    "pad_beyond_the_filter",
    "even_filter",
    "dilated",
    "dilated_columns_strided",
    "stride_two_same",
    "stride_of_rows_only",
    "stride_beyond_the_filter",
    "upsampled",
    "long_reduction",
    "many_filters",
    "pointwise",
    "pointwise_tile_plus_one",
)
OTHER_TILED = (
    "add_conv_gelu",
    "add_conv_residual_upsampled",
    "add_conv_return_sum",
    "add_conv_weighted",
    "concat_conv_pointwise_residual",
    "concat_conv_pointwise_upsampled",
    "concat_conv_unequal_sources",
    *DENSES,
)


def narrow(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Problems of the table in narrow dtypes, convolutions in both layouts."""
    table = {problem.name: problem for problem in problems}

    def convs(names: Iterable[str]) -> Iterator[str]:
        return (f"{merge}_conv_{name}" for merge in Merge for name in names)

    posed = [
        in_dtype(table[name], dtype)
        for name in (*JOINS, *DENSES, *convs(CONVS), *OTHER_CONVS)
        for dtype in ("float16", "bfloat16")
    ]
    posed += [tiled(in_dtype(table[name], "bfloat16")) for name in (*convs(TILED), *OTHER_TILED)]
    for problem in posed:
        yield problem
        if "_conv_" in problem.name:
            yield in_nchw(problem)
