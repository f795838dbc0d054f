"""Tiles of Winograd's convolutions that keep fewer outputs than others, and do without the points of those."""

from __future__ import annotations

from dataclasses import replace

import numba
import numpy as np
import pytest
from kernel_checks import assert_same_bits, assert_within, execute_on, expected_of, with_batch

from fusionops import cpu
from fusionops.cpu import params as at
from fusionops.cpu import winograd, winograd_task
from fusionops.cpu.transform import PATCH, POINTS, TAPS, outputs_of
from fusionops.problems import conv
from fusionops.spec import FusionSpec, Merge
from fusionops.testing import error_bound, random_operands

KERNEL = next(kernel for kernel in cpu.KERNELS if kernel.name == "cpu.add_conv_fprop_winograd_f32")


def posed(taps: int, stride: int, P: int, Q: int, N: int) -> FusionSpec:
    """With P × Q outputs of 9 filters."""
    H, W = (P - 1) * stride + 1, (Q - 1) * stride + 1
    padding = ((taps // 2, (taps - 1) // 2),) * 2
    sizes = {"N": N, "H": H, "W": W, "stride": (stride, stride), "padding": padding}
    return conv("", Merge.ADD, (33,), 9, taps, taps, **sizes).spec


@pytest.mark.parametrize("outputs", [outputs_of(taps) for taps in TAPS])
@pytest.mark.parametrize("extent", range(1, 60))
def test_tiles_keep_each_output_once_and_form_the_fewest_products(outputs, extent):
    axis = winograd._axis(extent, outputs)
    kept = [axis.outputs] * axis.whole + [axis.outputs - 1] * (axis.tiles - axis.whole)
    assert len(kept) == -(-extent // outputs)
    assert all(outputs - 2 <= count <= outputs and count > 0 for count in kept)
    beyond = max(0, outputs - 2 - extent)  # a tile does without two points at most
    assert sum(kept) == extent + beyond
    taps = PATCH + 1 - outputs
    assert axis.points(taps) == extent + beyond + len(kept) * (taps - 1)


@numba.njit
def listed(params, points, first, last):
    winograd_task.list_points(params, points, first, last)


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 2, 2), (1, 5, 6), (2, 7, 7), (3, 13, 10), (2, 14, 15), (1, 1, 9)])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_points_of_outputs_that_are_not_kept_are_not_multiplied(shape, tasks):
    """As many tiles and points as `products` counts, in whatever tasks; 3×3 taps. The next point is one of them."""
    spec = posed(3, 1, *shape[1:], shape[0])
    params, table = np.zeros(at.SOURCES, np.int64), np.zeros(winograd_task.TABLE_WORDS, np.int64)
    winograd.cut(spec, KERNEL.plan(spec, cpu.device()), params, None)
    params[at.N], tiles = shape[0], int(params[at.TILES])
    count = 0
    for task in range(tasks):
        first, last = task * tiles // tasks, (task + 1) * tiles // tasks
        listed(params.ctypes.data, table.ctypes.data, first, last)
        begin, end, following = table.reshape(POINTS, -1).T
        assert np.all(begin >= 0) & np.all(begin <= end) & np.all(end <= last - first)
        needed = np.flatnonzero(end > begin)
        assert [following[point] for point in needed] == [*needed[1:], POINTS][: len(needed)]
        count += np.sum(end - begin)
    assert winograd.products(spec) == count * 33 * 9


@pytest.mark.parametrize(("taps", "stride"), [(2, 1), (3, 1), (4, 1), (5, 1), (5, 2), (7, 1)])
@pytest.mark.parametrize("rows", range(1, 14))
def test_every_width_of_a_map(taps, stride, rows):
    """The same bits from images alone, from images together, and however the work is cut up."""
    device = cpu.device()
    for columns in range(1, 14):
        together = posed(taps, stride, rows, columns, 3)
        operands = random_operands(together, np.random.default_rng([taps, rows, columns]))
        [expected] = expected_of(together, operands)
        [actual] = execute_on(device, KERNEL, together, operands)
        assert_within(actual, expected, 8 * error_bound(together, operands))  # of strict sums; a wrong point is far off
        for cores in (1, 7):
            assert_same_bits(execute_on(replace(device, cores=cores), KERNEL, together, operands), [actual])
        alone = with_batch(together, 1)
        for n in range(3):
            image = replace(operands, sources=tuple(source[n : n + 1] for source in operands.sources))
            assert_same_bits(execute_on(device, KERNEL, alone, image), [actual[n : n + 1]], f"{columns} columns")
