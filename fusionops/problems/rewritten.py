"""Problems that kernels may solve by forming other products than the definition's: convolutions without strict=True."""

from __future__ import annotations

from typing import Any

from fusionops.problems.rows import ADD, CONCAT, GEMM, NO_PAD, QUARTER_LEAKY, RELU, Part, conv, conv_both
from fusionops.spec import Activation

WINOGRAD: dict[str, Any] = {"strict": False, "algorithms": ("winograd", "direct")}
COMMUTED: dict[str, Any] = {"strict": False, "algorithms": ("commuted", *GEMM)}

REWRITTEN = (
    *conv_both("winograd_one_tile", 32, 16, H=4, W=4, **WINOGRAD),
    *conv_both("winograd_one_output", 32, 5, H=3, W=3, padding=NO_PAD, **WINOGRAD),
    *conv_both("winograd_tile_plus_one", 33, 33, H=5, W=9, **WINOGRAD),
    *conv_both("winograd_tile_minus_one", 32, 31, H=7, W=3, **WINOGRAD),
    *conv_both("winograd_valid", 34, 20, H=9, W=8, padding=NO_PAD, **WINOGRAD),
    *conv_both("winograd_asymmetric_pad", 32, 10, N=2, H=7, W=9, padding=((1, 0), (0, 2)), **WINOGRAD),
    *conv_both("winograd_pad_beyond_the_filter", 32, 10, H=9, W=13, padding=((4, 0), (0, 5)), **WINOGRAD),
    *conv_both("winograd_many_tiles", 32, 9, H=33, W=47, **WINOGRAD),
    *conv_both("winograd_wide_map", 32, 9, H=5, W=211, **WINOGRAD),
    *conv_both("winograd_tall_map", 32, 9, H=211, W=5, **WINOGRAD),
    *conv_both("winograd_batch_of_odd_maps", 32, 64, N=5, H=6, W=13, **WINOGRAD),
    *conv_both("winograd_chunk_of_channels_plus_one", 65, 20, H=6, W=5, **WINOGRAD),
    *conv_both("winograd_many_channels", 300, 20, H=5, W=5, **WINOGRAD),
    *conv_both("winograd_many_filters", 32, 600, H=5, W=3, **WINOGRAD),
    *conv_both("winograd_whole_blocks", 32, 320, H=6, W=9, residual=Part(320, weight="vector"), **WINOGRAD),
    *conv_both("winograd_without_bias", 32, 10, bias=False, **WINOGRAD),
    *conv_both("winograd_residual", 32, 10, residual=Part(10), activation=RELU, **WINOGRAD),
    *conv_both("winograd_residual_upsampled", 32, 10, H=6, W=8, residual=Part(10, (2, 2), "vector"), **WINOGRAD),
    *conv_both("winograd_5x5_one_tile", 32, 10, 5, 5, H=6, W=6, padding=NO_PAD, **WINOGRAD),
    *conv_both("winograd_5x5_odd_map", 33, 21, 5, 5, N=2, H=9, W=13, **WINOGRAD),
    *conv_both("winograd_5x5_asymmetric_pad", 32, 10, 5, 5, H=9, W=8, padding=((4, 0), (1, 3)), **WINOGRAD),
    *conv_both("winograd_5x5_wide_map", 34, 33, 5, 5, H=6, W=75, residual=Part(33, weight="vector"), **WINOGRAD),
    conv("winograd_5x5_upsampled", CONCAT, (35, Part(5, (2, 2))), 10, 5, 5, H=6, W=8, **WINOGRAD),
    conv(
        "winograd_5x5_weighted",
        ADD,
        (Part(35, weight="scalar"), Part(35, (2, 2), "vector")),
        64,
        5,
        5,
        H=8,
        W=6,
        activation=RELU,
        **WINOGRAD,
    ),
    conv("winograd_gelu", CONCAT, (26, 6), 21, activation=Activation("gelu"), **WINOGRAD),
    conv("winograd_leaky_relu", ADD, (32, 32), 21, activation=QUARTER_LEAKY, **WINOGRAD),
    conv("winograd_one_source", ADD, (35,), 10, **WINOGRAD),
    conv("winograd_five_sources", ADD, (33,) * 5, 10, **WINOGRAD),
    conv("winograd_five_sources", CONCAT, (3, 8, 1, 17, 62), 10, **WINOGRAD),
    conv("winograd_upsampled", ADD, (35, Part(35, (2, 2))), 10, H=6, W=8, source="FPN, top-down step", **WINOGRAD),
    conv("winograd_upsampled", CONCAT, (35, Part(5, (2, 2))), 10, H=6, W=8, source="U-Net, decoder step", **WINOGRAD),
    conv("winograd_upsampled_unevenly", CONCAT, (Part(29, (3, 2)), Part(4, (1, 4))), 10, H=6, W=8, **WINOGRAD),
    conv("winograd_weighted", ADD, (Part(35, weight="scalar"), Part(35, (2, 2), "vector")), 9, H=8, W=6, **WINOGRAD),
    conv("commuted", CONCAT, (Part(33, (2, 2)), 40), 21, 1, 1, N=3, H=6, W=8, source="YOLOv8 neck", **COMMUTED),
    conv("commuted_last", CONCAT, (9, 31, Part(5, (3, 2)), Part(40, (3, 2))), 70, 1, 1, H=9, W=8, **COMMUTED),
    conv("commuted_weighted", CONCAT, (Part(33, (1, 2), "vector"), Part(7, weight="scalar")), 9, 1, 1, **COMMUTED),
    conv("commuted_long", CONCAT, (Part(300, (2, 2)), 290), 40, 1, 1, N=2, H=4, W=6, bias=False, **COMMUTED),
    conv("winograd_return_sum", ADD, (33, 33, 33), 10, N=2, return_sum=True, **WINOGRAD),
)
