"""The register tile alone against the multiply-add peak of the same minute: what no convolution can go beyond."""

from __future__ import annotations

import pytest

from fusionops.cpu import device, probe
from fusionops.cpu.tiling import register_tiles

ROUNDS = 5  # the peak and the tile in turn, each for SECONDS; the best of each counts
SECONDS = 0.05


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tile", register_tiles(device()), ids=lambda tile: f"{tile[0]}x{tile[1]}")
def test_share_of_the_peak(benchmark, tile, dtype):
    peaks, rates = [], []

    def alternate():
        peaks.append(probe.fma_peak(1, dtype, SECONDS))
        rates.append(probe.tile_rate(1, *tile, dtype, SECONDS))

    benchmark.group = f"register tile {dtype}"
    benchmark.pedantic(alternate, rounds=ROUNDS)
    benchmark.extra_info |= {"peak_flops": max(peaks), "tile_flops": max(rates), "share": max(rates) / max(peaks)}
    assert max(rates) <= 1.05 * max(peaks), "the peak is not one: it was measured while something else ran"
