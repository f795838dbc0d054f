"""What kernels say of the products they form, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

import fusionops as fo
from fusionops import cpu
from fusionops.problems import PROBLEMS


def full(*shape, dtype=np.float32):
    return np.full(shape, 1, dtype)


def test_winograd_forms_a_quarter_of_whole_tiles():
    x, f = full(1, 32, 32, 32), full(3, 3, 32, 8)
    plan = fo.explain("add_conv", [x], f, padding="same")
    assert plan.kernel == "cpu.add_conv_fprop_winograd_f32"
    assert plan.formed_flops * 4 == plan.cost.contraction_flops
    assert "forms    0.00117965 GFLOP of products, 0.25 of the definition's" in str(plan)
    strict = fo.explain("add_conv", [x], f, padding="same", strict=True)
    assert strict.formed_flops == strict.cost.contraction_flops
    assert "forms  " not in str(strict)
    odd = fo.explain("add_conv", [full(2, 33, 31, 32)], f, padding="same")
    assert odd.formed_flops == 2 * 2 * (6 * 6 + 3 * 5) * (7 * 6 + 5) * 32 * 8  # tiles of 4 outputs and of 3


def test_winograd_of_5x5_forms_36_products_of_100():
    plan = fo.explain("concat_conv", [full(1, 8, 8, 16)] * 2, full(5, 5, 32, 8), padding="same")
    assert plan.kernel == "cpu.concat_conv_fprop_winograd_f32"
    assert plan.formed_flops * 100 == plan.cost.contraction_flops * 36


@pytest.mark.parametrize(
    ("taps", "stride", "sections", "outputs"), [(2, 1, 1, 5), (4, 1, 1, 3), (5, 2, 4, 4), (7, 1, 4, 3), (7, 2, 4, 3)]
)
def test_winograd_in_sections(taps, stride, sections, outputs):
    extent = 8 * outputs
    x, f = full(1, extent * stride, extent * stride, 128), full(taps, taps, 128, 64)
    plan = fo.explain("add_conv", [x], f, padding="same", stride=stride)
    assert plan.kernel == "cpu.add_conv_fprop_winograd_f32"
    assert plan.formed_flops == 2 * 36 * sections * 8 * 8 * 128 * 64


def test_most_3x3_filters_with_steps_run_tap_by_tap():
    plan = fo.explain("add_conv", [full(1, 64, 64, 128)], full(3, 3, 128, 128), padding="same", stride=2)
    assert plan.kernel == "cpu.add_conv_fprop_direct_f32"
    assert "4 patches a tile are estimated to take" in str(plan)


def test_a_commuted_convolution_counts_sources_at_their_own_resolution():
    low, high, dot = full(1, 16, 16, 24), full(1, 32, 32, 8), full(1, 1, 32, 8)
    plan = fo.explain("concat_conv", [fo.Source(low, upsample=2), high], dot)
    assert plan.formed_flops == 2 * 8 * (16 * 16 * 24 + 32 * 32 * 8)


@pytest.mark.parametrize("kernel", [kernel for kernel in cpu.KERNELS if "amx" in kernel.name], ids=lambda k: k.name)
def test_tiles_count_what_they_are_filled_up_with(kernel):
    specs = [problem.spec for problem in PROBLEMS if kernel.name in problem.kernels]
    for spec in specs:
        M, N, K = spec.gemm
        assert kernel.products(spec) >= M * N * K
        assert kernel.products(spec) % (16 * 32) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_result_takes_no_products(dtype):
    x, rows = full(0, 4, 4, 8).astype(dtype), full(0, 8).astype(dtype)
    assert fo.explain("add_conv", [x], full(1, 1, 8, 5).astype(dtype)).formed_flops == 0
    assert fo.explain("add_dense", [rows], full(8, 4).astype(dtype)).formed_flops == 0
