"""PROBLEMS: the table of problems that tests, plans and benchmarks share, each named after the edge it stands on.

Holds specs and the names of the kernels that must take them; no arrays, no expected values, nothing that runs.
"""

from __future__ import annotations

from collections.abc import Iterator

from fusionops.problems.rewritten import REWRITTEN
from fusionops.problems.rows import (
    ADD,
    CONCAT,
    GEMM,
    NO_PAD,
    QUARTER_LEAKY,
    RELU,
    Part,
    Problem,
    conv,
    conv_both,
    dense,
    in_dtype,
    in_float64,
    in_nchw,
    join,
)
from fusionops.spec import ACTIVATIONS, Activation, Merge

__all__ = [
    "CONVS",
    "DENSES",
    "JOINS",
    "PROBLEMS",
    "QUARTER_LEAKY",
    "RELU",
    "REWRITTEN",
    "Part",
    "Problem",
    "conv",
    "dense",
    "in_dtype",
    "in_float64",
    "in_nchw",
    "join",
]

F32 = ("f32", "any")

JOINS = (
    join("one_number", ADD, (), (), streams=("any",)),
    join("one_element", ADD, (1,), (1,), streams=F32),
    join("lanes_minus_one", ADD, (15,), (15,), streams=F32),
    join("lanes", ADD, (16,), (16,), streams=F32),
    join("lanes_plus_one", ADD, (17,), (17,), streams=F32),
    join("chunk_plus_one", ADD, (3, 4099), (3, 4099), streams=F32),
    join("one_source", ADD, (5, 7), streams=F32),
    join("five_sources", ADD, *[(3, 5, 6, 7)] * 5, streams=F32),
    join("sixty_four_sources", ADD, *[(2, 33)] * 64, streams=F32),
    join("float16", ADD, (5, 33), (5, 33), (5, 33), dtypes="float16"),
    join("broadcast_rows_and_columns", ADD, (4, 1), (1, 5), (3, 1, 1)),
    join("broadcast_number", ADD, (4, 5), ()),
    join("rank_six", ADD, (2, 1, 3, 2, 1, 5), (2, 1, 3, 2, 1, 5), streams=F32),
    join("int8_wraps", ADD, (9, 9), (9, 9), (9, 9), dtypes="int8"),
    join("uint8_wraps", ADD, (9, 9), (9, 9), dtypes="uint8"),
    join("int64", ADD, (9, 9), (9, 9), dtypes="int64"),
    join("bool_is_or", ADD, (9, 9), (9, 9), dtypes="bool"),
    join("int64_and_float32", ADD, (9, 9), (9, 9), dtypes=("int64", "float32"), dtype="float64"),
    join("int8_wraps_before_float32", ADD, *[(9, 9)] * 3, dtypes=("int8", "int8", "float32"), dtype="float32"),
    join("scalar_weight", ADD, (3, 4, 5), (3, 4, 5), part=Part(5, weight="scalar"), streams=("f32",)),
    join("vector_weight", ADD, (3, 4, 5), (3, 4, 5), part=Part(5, weight="vector"), streams=("f32",)),
    join("upsampled", ADD, (2, 6, 10, 33), (2, 3, 5, 33), part=Part(33, upsample=(2, 2)), streams=("f32",)),
    join("upsampled_unevenly", ADD, (1, 6, 10, 3), (1, 2, 5, 3), part=Part(3, upsample=(3, 2)), streams=("f32",)),
    join("upsampled_and_weighted", ADD, (1, 4, 6, 7), (1, 2, 3, 7), part=Part(7, (2, 2), "vector"), streams=("f32",)),
    *(
        join(name, ADD, (5, 41), (5, 41), activation=Activation(name), streams=("f32",))
        for name in ACTIVATIONS
        if name != "leaky_relu"
    ),
    join("leaky_relu", ADD, (5, 41), (5, 41), activation=QUARTER_LEAKY, streams=("f32",)),
    join("last_axis", CONCAT, (2, 3, 5), (2, 3, 7), axis=2),
    join("first_axis", CONCAT, (2, 3, 5), (1, 3, 5), axis=0),
    join("middle_axis", CONCAT, (2, 3, 5), (2, 1, 5), axis=1),
    join("one_dimension", CONCAT, (17,), (3,)),
    join("one_source", CONCAT, (2, 3, 5), axis=1),
    join("unequal_sources", CONCAT, (1, 5, 6, 3), (1, 5, 6, 40), (1, 5, 6, 1), axis=3),
    join("sixty_four_sources", CONCAT, *[(2, 3, 1 + i % 5) for i in range(64)], axis=2),
    join("source_without_channels", CONCAT, (2, 3, 5), (2, 3, 0), (2, 3, 4), axis=2),
    join("rank_six", CONCAT, (2, 1, 3, 2, 1, 5), (2, 1, 3, 4, 1, 5), axis=3),
    join("float64", CONCAT, (5, 33), (5, 2), dtypes="float64", axis=1),
    join("float16", CONCAT, (5, 33), (5, 2), dtypes="float16", axis=1),
    join("uint8", CONCAT, (5, 33), (5, 2), dtypes="uint8", axis=1),
    join("bool", CONCAT, (5, 33), (5, 2), dtypes="bool", axis=1),
    join("int64_and_float32", CONCAT, (9, 9), (9, 9), dtypes=("int64", "float32"), dtype="float64"),
    join("upsampled", CONCAT, (1, 6, 10, 5), (1, 3, 5, 3), axis=3, part=Part(3, upsample=(2, 2))),
    join("upsampled_unevenly", CONCAT, (1, 6, 10, 5), (1, 2, 5, 3), axis=3, part=Part(3, upsample=(3, 2))),
    join("wide_rows", CONCAT, (3, 4099), (3, 17), axis=1),
)

DENSES = (
    dense("one_row", ADD, (32, 32), 64, rows=1, activation=RELU, source="Keras guide: Add, then Dense"),
    dense("one_row", CONCAT, (32, 32), 64, rows=1, activation=RELU, source="Keras guide: Concatenate, then Dense"),
    dense("one_channel", ADD, (1, 1), 5),
    dense("one_channel", CONCAT, (1, 1), 5),
    dense("one_filter", ADD, (9, 9), 1),
    dense("one_filter", CONCAT, (9, 5), 1),
    dense("one_source", ADD, (9,), 17),
    dense("one_source", CONCAT, (9,), 17),
    dense("five_sources", ADD, (9,) * 5, 17),
    dense("unequal_sources", CONCAT, (3, 40, 1), 17),
    dense("sixty_four_sources", CONCAT, [1 + i % 5 for i in range(64)], 17),
    dense("tile_plus_one", ADD, (33, 33), 65, rows=31),
    dense("tile_plus_one", CONCAT, (16, 17), 65, rows=29),
    dense("tile_minus_one", CONCAT, (16, 15), 63, rows=13),
    dense("many_rows", ADD, (5, 5), 8, rows=1031),
    dense("many_rows", CONCAT, (5, 6), 8, rows=1031),
    dense("long_reduction", ADD, (1500, 1500), 20, rows=3),
    dense("long_reduction", CONCAT, (1500, 20), 20, rows=3),
    dense("many_filters", CONCAT, (10, 10), 1300, rows=5),
    dense("weighted", ADD, (Part(9, weight="scalar"), Part(9, weight="vector")), 17),
    dense("residual", ADD, (9, 9), 17, residual=Part(17), activation=RELU),
    dense("residual", CONCAT, (9, 7), 17, residual=Part(17, weight="scalar"), activation=RELU),
    dense("without_bias", CONCAT, (9, 7), 17, bias=False),
    dense("gelu", CONCAT, (9, 7), 17, activation=Activation("gelu")),
)

DEPTHWISE = ("depthwise", "direct")

CONVS = (
    *conv_both("one_pixel", 8, 8, 1, 1, H=1, W=1, algorithms=GEMM),
    *conv_both("one_pixel_in_the_padding", 8, 8, H=1, W=1),
    *conv_both("one_channel_one_filter", 1, 1),
    *conv_both("odd_channels", 5, 7),
    *conv_both("lanes_plus_one", 17, 17),
    *conv_both("tile_minus_one", 8, 63, H=3, W=13),
    *conv_both("tile", 16, 64, H=3, W=14),
    *conv_both("tile_plus_one", 16, 65, H=3, W=15),
    *conv_both("narrow_tile_plus_one", 8, 33, H=2, W=7),
    *conv_both("half_tile", 8, 32, H=2, W=12),
    *conv_both("one_column", 6, 10, H=19, W=1),
    *conv_both("one_row", 6, 10, H=1, W=19),
    *conv_both("wide_map", 4, 9, H=3, W=211),
    *conv_both("tall_map", 4, 9, H=211, W=3),
    *conv_both("many_tiles", 4, 9, H=33, W=47),
    *conv_both("many_filters", 4, 300, H=3, W=4),
    *conv_both("batch", 6, 10, N=3),
    *conv_both("valid", 6, 10, padding=NO_PAD),
    *conv_both("asymmetric_pad", 6, 10, N=2, H=7, W=9, padding=((1, 0), (0, 2))),
    *conv_both("pad_beyond_the_filter", 6, 10, H=3, W=4, padding=((4, 3), (3, 5))),
    *conv_both("even_filter", 6, 10, 2, 4),
    *conv_both("filter_larger_than_map", 6, 10, 5, 7, H=2, W=3),
    *conv_both("seven_by_seven", 3, 10, 7, 7, H=9, W=9),
    *conv_both("one_by_nine", 5, 10, 1, 9, H=4, W=12),
    *conv_both("nine_by_one", 5, 10, 9, 1, H=12, W=4),
    *conv_both("stride_two_same", 6, 10, H=8, W=9, stride=(2, 2)),
    *conv_both("stride_three_same", 6, 10, H=8, W=10, stride=(3, 3)),
    *conv_both("stride_of_rows_only", 6, 10, H=8, W=9, stride=(2, 1)),
    *conv_both("stride_beyond_the_filter", 6, 10, 1, 1, H=7, W=8, stride=(3, 2), padding=NO_PAD),
    *conv_both("dilated", 6, 10, H=8, W=9, dilation=(2, 2)),
    *conv_both("dilated_columns_strided", 6, 10, H=8, W=15, stride=(2, 2), dilation=(1, 3)),
    *conv_both("two_groups", 6, 10, groups=2),
    *conv_both("pointwise", 17, 33, 1, 1, H=5, W=7, algorithms=GEMM),
    *conv_both("pointwise_tile_plus_one", 16, 65, 1, 1, N=2, H=3, W=43, algorithms=GEMM),
    *conv_both("pointwise_padded", 6, 10, 1, 1, padding=((1, 1), (0, 1))),
    *conv_both("pointwise_groups", 6, 10, 1, 1, groups=2),
    *conv_both("without_bias", 6, 10, bias=False),
    *conv_both("residual", 6, 10, residual=Part(10), activation=RELU),
    *conv_both("residual_upsampled", 6, 10, H=6, W=8, residual=Part(10, upsample=(2, 2))),
    *conv_both("residual_weighted", 6, 10, residual=Part(10, weight="vector"), bias=False),
    *conv_both("pointwise_residual", 6, 10, 1, 1, residual=Part(10, (5, 3), "scalar"), algorithms=GEMM),
    *(conv(name, ADD, (6, 6), 21, activation=Activation(name)) for name in ACTIVATIONS if name != "leaky_relu"),
    conv("leaky_relu", CONCAT, (6, 6), 21, activation=QUARTER_LEAKY),
    conv("pointwise_silu", CONCAT, (6, 6), 21, 1, 1, activation=Activation("silu"), algorithms=GEMM),
    conv("one_source", ADD, (7,), 10),
    conv("one_source", CONCAT, (7,), 10),
    conv("five_sources", ADD, (3,) * 5, 10),
    conv("five_sources", CONCAT, (3, 8, 1, 17, 2), 10),
    conv("sixty_four_sources", ADD, (2,) * 64, 5),
    conv("sixty_four_sources", CONCAT, [1 + i % 3 for i in range(64)], 5, source="DenseNet keeps 64 maps in a block"),
    conv("pointwise_sixty_four_sources", CONCAT, [1 + i % 3 for i in range(64)], 5, 1, 1, algorithms=GEMM),
    conv("unequal_sources", CONCAT, (3, 40, 1), 7),
    conv("pointwise_unequal_sources", CONCAT, (3, 40, 1), 7, 1, 1, algorithms=GEMM),
    conv("group_across_two_sources", CONCAT, (3, 5), 6, groups=2),
    conv("four_groups_of_three_sources", CONCAT, (1, 6, 5), 8, groups=4),
    conv("depthwise_multiplier", CONCAT, (3, 5), 24, groups=8),
    conv("depthwise", ADD, (6, 6), 6, groups=6, algorithms=DEPTHWISE),
    conv("depthwise", CONCAT, (3, 40), 43, groups=43, algorithms=DEPTHWISE),
    conv("depthwise_many_channels", CONCAT, (130, 9), 139, groups=139, H=9, W=37, algorithms=DEPTHWISE),
    conv("depthwise_five_by_five", ADD, (33, 33), 33, 5, 5, H=7, W=9, groups=33, algorithms=DEPTHWISE),
    conv("depthwise_strided", ADD, (19, 19), 19, H=8, W=9, stride=(2, 2), groups=19, algorithms=DEPTHWISE),
    conv("depthwise_dilated", CONCAT, (9, 8), 17, N=2, H=8, W=9, dilation=(2, 3), groups=17, algorithms=DEPTHWISE),
    conv("depthwise_residual", ADD, (32,), 32, groups=32, residual=Part(32), activation=RELU, algorithms=DEPTHWISE),
    conv("long_reduction", ADD, (600, 600), 20, H=3, W=3),
    conv("long_reduction", CONCAT, (700, 100), 20, H=3, W=3),
    conv("upsampled", ADD, (9, Part(9, upsample=(2, 2))), 10, H=6, W=8, source="FPN, top-down step"),
    conv("upsampled", CONCAT, (9, Part(5, upsample=(2, 2))), 10, H=6, W=8, source="U-Net, decoder step"),
    conv("upsampled_unevenly", CONCAT, (Part(3, upsample=(3, 2)), Part(4, upsample=(1, 4))), 10, H=6, W=8),
    conv("upsampled_everywhere", ADD, (Part(3, upsample=(2, 2)), Part(3, upsample=(4, 4))), 10, H=8, W=8),
    conv("upsampled_strided", CONCAT, (4, Part(5, upsample=(2, 2))), 10, H=6, W=8, stride=(2, 2)),
    conv("pointwise_upsampled", CONCAT, (9, Part(5, upsample=(2, 2))), 10, 1, 1, H=6, W=8, algorithms=GEMM),
    conv("weighted", ADD, (Part(9, weight="scalar"), Part(9, weight="vector"), 9), 10, source="BiFPN, fast fusion"),
    conv("weighted_upsampled", ADD, (Part(9, (2, 2), "vector"), Part(9, weight="scalar")), 10, H=6, W=8),
    conv("pointwise_weighted", ADD, (Part(9, weight="scalar"), Part(9, weight="vector")), 10, 1, 1, algorithms=GEMM),
    conv("return_sum", ADD, (7, 7, 7), 10, N=2, return_sum=True),
    conv("return_sum_valid", ADD, (7, 7), 10, padding=NO_PAD, return_sum=True),
    conv("return_sum_strided", ADD, (7, 7), 10, 1, 1, H=7, W=8, stride=(3, 3), padding=NO_PAD, return_sum=True),
    conv("return_sum_upsampled", ADD, (9, Part(9, (2, 2), "scalar")), 10, H=6, W=8, return_sum=True),
    conv("pointwise_return_sum", ADD, (7, 7), 70, 1, 1, return_sum=True, algorithms=GEMM),
    conv(
        "normalised",
        CONCAT,
        (Part(9, scale=True, shift=True, activation=RELU), 5),
        10,
        algorithms=(),
        source="DenseNet",
    ),
    conv(
        "shift_meets_padding",
        ADD,
        (Part(9, shift=True), Part(9, (5, 2), "vector", True, True, RELU)),
        10,
        algorithms=(),
    ),
)

# Of every way in which elements are loaded, merged, packed and stored, one problem or two.
NARROW_NAMES = (
    *(f"add_{name}" for name in ("lanes_plus_one", "chunk_plus_one", "five_sources", "scalar_weight", "vector_weight")),
    *(f"add_{name}" for name in ("upsampled", "upsampled_unevenly", "upsampled_and_weighted", "relu", "gelu")),
    *("concat_unequal_sources", "concat_upsampled", "concat_wide_rows"),
    *("add_dense_one_row", "concat_dense_tile_plus_one", "add_dense_many_rows", "concat_dense_long_reduction"),
    *("add_dense_weighted", "add_dense_residual", "concat_dense_residual", "concat_dense_many_filters"),
    *(f"{merge}_conv_{name}" for merge in Merge for name in ("odd_channels", "tile_plus_one", "many_tiles", "batch")),
    *(f"{merge}_conv_{name}" for merge in Merge for name in ("stride_two_same", "two_groups", "pointwise", "residual")),
    *(f"{merge}_conv_{name}" for merge in Merge for name in ("depthwise", "upsampled", "residual_upsampled")),
    *(f"{merge}_conv_{name}" for merge in Merge for name in ("pointwise_tile_plus_one", "residual_weighted")),
    *("add_conv_five_sources", "add_conv_weighted", "add_conv_weighted_upsampled", "add_conv_return_sum"),
    *("add_conv_depthwise_strided", "concat_conv_depthwise_many_channels"),
    *("add_conv_silu", "concat_conv_leaky_relu", "add_conv_pointwise_return_sum", "concat_conv_pointwise_upsampled"),
    *(f"{merge}_conv_winograd_{name}" for merge in Merge for name in ("tile_plus_one", "whole_blocks", "residual")),
    *("add_conv_winograd_weighted", "concat_conv_winograd_upsampled", "add_conv_winograd_return_sum"),
)


def _narrow() -> Iterator[Problem]:
    """Problems in float16 and bfloat16, convolutions in both layouts."""
    plain = {problem.name: problem for problem in (*JOINS, *DENSES, *CONVS, *REWRITTEN)}
    for name in NARROW_NAMES:
        for dtype in ("float16", "bfloat16"):
            problem = in_dtype(plain[name], dtype)
            yield problem
            if "_conv_" in name:
                yield in_nchw(problem)


PROBLEMS = (
    *JOINS,
    *(in_float64(problem) for problem in JOINS if "cpu.add_fprop_stream_f32" in problem.kernels),
    *DENSES,
    *map(in_float64, DENSES),
    *CONVS,
    *map(in_nchw, CONVS),
    *map(in_float64, CONVS),
    *REWRITTEN,
    *map(in_nchw, REWRITTEN),
    *_narrow(),
    *(in_float64(problem) for problem in REWRITTEN if "cpu.concat_conv_fprop_commuted_f32" in problem.kernels),
)
