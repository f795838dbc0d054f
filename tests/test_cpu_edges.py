"""Edges of the CPU backend that were found by breaking it: odd memory, far-reaching filters, interrupted threads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusionops as fo
from fusionops.address import address
from fusionops.cpu import KERNELS, amx, commuted, device, gemm, jit, outer_products, stream, threads, winograd
from fusionops.cpu.tiling import (
    MANY_ROUNDS,
    SCRATCH_LIMIT,
    balanced,
    even_tile,
    lowest_tile,
    plan,
    rows_of,
    shorter_tile,
    tiles_of,
)
from fusionops.device import AVX2_LAPTOP, AVX512_SERVER, CPU_PROFILES, CpuDevice
from fusionops.problems import conv
from fusionops.spec import FusionSpec, Merge, SourceSpec

LARGE = 1 << 20  # float32 elements of an output that many tasks store


def test_outputs_go_around_the_caches_where_no_near_one_holds_them():
    def sizes(device: CpuDevice) -> list[int]:
        """MiB of the sums of two maps that go around."""
        specs = {n: FusionSpec(Merge.ADD, (SourceSpec((n << 18,), "float32"),) * 2) for n in (3, 4, 5, 6, 64)}
        return [n for n, spec in specs.items() if stream.goes_around(spec, device)]

    assert sizes(AVX512_SERVER) == [4, 5, 6, 64]  # a cache behind a mesh
    assert sizes(AVX2_LAPTOP) == [6, 64]  # 16 MiB


@pytest.mark.parametrize("taps", [1, 3])
def test_a_small_map_is_cut_for_four_cores(taps):
    spec = conv("small", Merge.ADD, (64, 64), 256, taps, taps, H=6, W=6).spec
    for profile in CPU_PROFILES:
        tiling = (gemm.plan if taps == 1 else plan)(spec, profile)
        assert -(-tiling.blocks // tiling.task_blocks) >= 4
    assert plan(conv("one", Merge.ADD, (64,), 1, H=6, W=6).spec, AVX2_LAPTOP).task_blocks == 1


def test_depth_does_not_depend_on_the_batch():
    """Here the scratch memory of a task decides it, and a larger batch leaves each task more filters."""
    for profile in CPU_PROFILES:
        specs = (conv("far", Merge.ADD, (16,), 512, 2, 2, N=N, H=246, W=266, padding=((0, 0), (0, 0)),
                      dilation=(245, 265)).spec for N in (1, 2, 4))  # fmt: skip
        assert len({plan(spec, profile).depth for spec in specs}) == 1


@pytest.mark.usefixtures("around")
def test_concat_into_reversed_channels_around_the_caches():
    side = int(np.sqrt(LARGE))
    sources = [np.full((1, side, side, 1), i + 1, np.float32) for i in range(3)]
    out = np.zeros((1, side, side, 3), np.float32)[..., ::-1]
    assert fo.concat(sources, out=out) is out
    np.testing.assert_array_equal(out, np.concatenate(sources, -1))


@pytest.mark.usefixtures("around")
def test_concat_into_rows_that_interleave_around_the_caches():
    rows = LARGE // 6 + 1
    base = np.zeros(rows * 12, np.float32)
    out = np.lib.stride_tricks.as_strided(base, (rows, 2, 3), (24, 24 * rows + 12, 4))
    sources = [np.full((rows, 1, 3), i + 1, np.float32) for i in range(2)]
    fo.concat(sources, axis=1, out=out)
    np.testing.assert_array_equal(out, np.concatenate(sources, 1))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shortest", [1, 64])
@pytest.mark.parametrize("way", ["around", "through"])
def test_concat_of_runs_of_any_length(dtype, shortest, way, request):
    """Lines that one run fills, that two or three share, at any place in a line of the output and of the sources."""
    if way == "around":
        request.getfixturevalue("around")
    rng = np.random.default_rng(5)
    for _ in range(60):
        rows, size = rng.integers(1, 70), np.dtype(dtype).itemsize
        widths = rng.integers(-(-shortest // size), 200, rng.integers(1, 6))
        sources = [
            rng.integers(0, 99, (rows, width + 3)).astype(dtype)[:, rng.integers(4) :][:, :width] for width in widths
        ]
        start, nbytes = 64 + int(rng.integers(16)) * size, int(rows * widths.sum()) * size
        memory = np.full(nbytes + 256, 7, np.uint8)
        out = memory[start : start + nbytes].view(dtype).reshape(rows, -1)
        fo.concat(sources, axis=1, out=out)
        np.testing.assert_array_equal(out, np.concatenate(sources, axis=1))
        assert (memory[:start] == 7).all()
        assert (memory[start + nbytes :] == 7).all()


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.usefixtures("around")
def test_add_into_an_unaligned_output_around_the_caches(offset):
    x = np.arange(2 * LARGE, dtype=np.float32)
    memory = np.zeros(x.nbytes + 64, np.uint8)
    out = memory[offset : offset + x.nbytes].view(np.float32)
    fo.add([x, x], out=out)
    np.testing.assert_array_equal(out, x + x)
    assert not memory[:offset].any()
    assert not memory[offset + x.nbytes :].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.usefixtures("around")
def test_add_around_the_caches_wherever_the_output_begins(dtype):
    """Also within a line: a vector of a narrow dtype is half of one."""
    x = np.arange(1, 203).astype(dtype)
    for start in range(64, 128, x.itemsize):
        for count in (1, 7, 16, 31, 33, len(x)):
            memory = np.zeros(2048, np.uint8)
            memory = memory[-address(memory) % 64 :]
            out = memory[start : start + count * x.itemsize].view(dtype)
            fo.add([x[:count], x[:count]], out=out)
            np.testing.assert_array_equal(out, x[:count] + x[:count])
            assert not memory[:start].any()
            assert not memory[start + out.nbytes :].any()


def test_a_field_of_a_record_as_output():
    records = np.zeros(100, [("value", "f4"), ("other", "u2")])
    records["other"] = 7
    x = np.arange(100, dtype=np.float32)
    fo.add([x, x], out=records["value"])
    np.testing.assert_array_equal(records["value"], x + x)
    assert (records["other"] == 7).all()
    fo.add_dense([x[:, None]], np.ones((1, 1), np.float32), out=records["value"][:, None])
    np.testing.assert_array_equal(records["value"], x)
    assert (records["other"] == 7).all()


@pytest.mark.parametrize("op", [fo.add_dense, fo.concat_dense])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("filters", [1, 10, 97, 1040])
@pytest.mark.parametrize("kept", [False, True], ids=["raw", "packed"])
def test_few_rows_have_the_bits_of_many(op, dtype, filters, kept):
    """Sums of outer products, whichever rows the batch is split into; 611 and 1222 channels are several chunks."""
    rng = np.random.default_rng(6)
    rows = outer_products.MOST_PIXELS + 1
    x, y = (rng.standard_normal((rows, 611)).astype(dtype) for _ in range(2))
    residual = rng.standard_normal((rows, filters)).astype(dtype)
    matrix = rng.standard_normal((611 * (1 if op is fo.add_dense else 2), filters)).astype(dtype)
    if kept:
        matrix = fo.prepack(matrix)
    bias = rng.standard_normal(filters).astype(dtype)

    def run(part):
        return op([x[part], y[part]], matrix, bias, residual=residual[part], activation="silu")

    together = run(slice(None))
    for first in (0, 3):
        for count in (1, 2, 3, 4, 7, outer_products.MOST_PIXELS - 3):
            part = slice(first, first + count)
            np.testing.assert_array_equal(run(part), together[part])


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("channels", [40, 1100])
def test_register_tiles_of_two_heights(layout, channels):
    """Any number of pixels: tall tiles, shorter ones, and a last one that begins earlier; one chunk and several."""
    rng = np.random.default_rng(8)
    filters = rng.integers(-4, 5, (1, 1, channels, 68)).astype(np.float32)  # whole blocks, and a part of one
    bias = rng.integers(-4, 5, 68).astype(np.float32)
    many = range(outer_products.MOST_PIXELS + 1, outer_products.MOST_PIXELS + 32)
    for images, pixels in (*((1, count) for count in many), *((30, count) for count in range(1, 8))):
        maps = [rng.integers(-4, 5, (images, 1, pixels, channels)).astype(np.float32) for _ in range(2)]
        maps[1] = maps[1][:, :, :1] if images > 1 else maps[1]  # repeated: then a task has the pixels of one image
        residual = rng.integers(-900, 900, (images, 1, pixels, 68)).astype(np.float32)
        expected, given = np.maximum((maps[0] + maps[1]) @ filters[0, 0] + bias + residual, 0), filters
        if layout == "NCHW":
            *maps, residual, expected = (
                np.ascontiguousarray(array.transpose(0, 3, 1, 2)) for array in (*maps, residual, expected)
            )
            given = filters.transpose(3, 2, 0, 1)
        maps[1] = fo.Source(maps[1], upsample=(1, pixels)) if images > 1 else maps[1]
        options = {"residual": residual, "activation": "relu", "layout": layout}
        np.testing.assert_array_equal(fo.add_conv(maps, given, bias, **options), expected)


@given(st.integers(0, 400), st.sampled_from([2, 6, 9, 14, 18]), st.booleans())
def test_register_tiles_hold_all_rows_and_little_more(rows, mr, is_low):
    short, low = shorter_tile(mr), lowest_tile(mr) if is_low else 0
    tall_tiles, short_tiles, low_tiles = tiles_of(rows, mr, short, low)
    assert tall_tiles * mr + short_tiles * short + low_tiles * low == rows_of(rows, mr, low)
    extras = [n * short + lows * low for n in range(rows + 1) for lows in range(2 if low else 1)]
    least = min(-(-max(0, rows - extra) // mr) * mr + extra for extra in extras)
    assert rows <= rows_of(rows, mr, low) == least <= -(-rows // mr) * mr
    assert low_tiles <= (low > 0)


def test_register_tiles_of_three_heights():
    assert (tiles_of(49, 6, 4, 0), tiles_of(4, 14, 8, 4), tiles_of(32, 14, 8, 4)) == ((7, 2, 0), (0, 0, 1), (2, 0, 1))
    assert [lowest_tile(mr) for mr in (2, 6, 9, 14, 18)] == [0, 0, 0, 4, 5]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_few_pixels_of_a_map(layout):
    """A 1×1 convolution of a 3×4 map with an upsampled source, to channels that lie side by side or apart."""
    rng = np.random.default_rng(7)
    coarse, fine = rng.integers(-4, 5, (1, 3, 2, 40)), rng.integers(-4, 5, (1, 3, 4, 40))
    filters, bias = rng.integers(-4, 5, (1, 1, 40, 70)).astype(np.float32), np.ones(70, np.float32)
    expected = (np.repeat(coarse, 2, axis=2) + fine) @ filters[0, 0] + bias
    maps = [array.astype(np.float32) for array in (coarse, fine)]
    if layout == "NCHW":
        maps = [np.ascontiguousarray(array.transpose(0, 3, 1, 2)) for array in maps]
        filters, expected = filters.transpose(3, 2, 0, 1), expected.transpose(0, 3, 1, 2)
    result = fo.add_conv([fo.Source(maps[0], upsample=(1, 2)), maps[1]], filters, bias, layout=layout)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reach", [7, 3000, 60_000])
def test_dilation_beyond_the_map(reach, dtype):
    """Only the taps that land in the map are loaded, so the memory of a call does not grow with the reach."""
    rng = np.random.default_rng(0)
    x = rng.integers(-4, 5, (2, 9, 11, 3)).astype(dtype)
    filters = rng.integers(-4, 5, (3, 3, 3, 5)).astype(dtype)
    options = {"dilation": reach, "padding": reach}
    expected = fo.add_conv([x], filters, **options, backend="reference")
    np.testing.assert_array_equal(fo.add_conv([x], filters, **options), expected)
    spec = conv("", Merge.ADD, (3,), 5, 3, 3, H=9, W=11, dilation=(reach, reach), padding=((reach, reach),) * 2).spec
    assert plan(spec, device()).scratch_bytes <= SCRATCH_LIMIT


def test_tiles_are_left_to_vectors_where_taps_reach_far():
    """A tile of few pixels already fills the scratch memory: 512 channels under taps that are 31 pixels apart."""
    x, filters = np.ones((1, 40, 40, 512), "bfloat16"), np.ones((3, 3, 512, 4), "bfloat16")
    explained = fo.explain("add_conv", [x], filters, dilation=31, padding=31)
    assert explained.kernel == "cpu.add_conv_fprop_direct_bf16"
    reason = dict(explained.others)["cpu.add_conv_fprop_direct_amx_bf16"][-1]
    assert "reach so far" in reason or reason == amx.without_tiles()


def test_a_worker_whose_start_was_interrupted_does_no_harm(monkeypatch):
    """The thread lives although `grow` never heard of it: no two threads may share scratch memory."""
    rng = np.random.default_rng(0)
    x, filters = rng.random((1, 96, 96, 32), np.float32), rng.random((3, 3, 32, 32), np.float32)
    expected = fo.add_conv([x], filters)
    monkeypatch.setattr(threads, "_POOL", None)
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    with threads.num_threads(4):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fo.add_conv([x], filters)
        for _ in range(50):
            np.testing.assert_array_equal(fo.add_conv([x], filters), expected)
    threads._POOL.stop()


def test_calls_go_on_with_the_threads_there_are(monkeypatch):
    x = np.ones((1, 96, 96, 32), np.float32)
    filters = np.ones((3, 3, 32, 32), np.float32)
    expected = fo.add_conv([x], filters)
    monkeypatch.setattr(threads, "_POOL", None)

    def refused(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with threads.num_threads(4):
        np.testing.assert_array_equal(fo.add_conv([x], filters), expected)


def test_kernels_that_cannot_be_kept_are_run_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(jit, "cache_directory", lambda: str(tmp_path))
    calls = []

    def make(cache):
        calls.append(cache)
        if cache:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "compiled"

    assert jit._compile(make) == "compiled"
    assert calls == [True, True, False]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("band_bytes", [1, 3 * 20 * 40 * 4, 2 * 14 * 20 * 40 * 4])
def test_bands_of_products_do_not_change_bits(layout, band_bytes, monkeypatch):
    """Bands of one row, of three rows and a rest, of two images and a rest."""
    rng = np.random.default_rng(7)
    coarse, fine = rng.standard_normal((3, 14, 20, 33), np.float32), rng.standard_normal((3, 28, 40, 9), np.float32)
    filters, bias = rng.standard_normal((1, 1, 42, 40), np.float32), rng.standard_normal(40, np.float32)
    if layout == "NCHW":
        coarse, fine, filters = coarse.transpose(0, 3, 1, 2), fine.transpose(0, 3, 1, 2), filters.transpose(3, 2, 0, 1)

    def run():
        call = [fo.Source(coarse, upsample=2), fine], filters, bias
        assert "commuted" in fo.explain(fo.concat_conv, *call, activation="silu", layout=layout).kernel
        return fo.concat_conv(*call, activation="silu", layout=layout)

    whole = run()
    monkeypatch.setattr(commuted, "BAND_BYTES", band_bytes)
    np.testing.assert_array_equal(run(), whole)


@pytest.mark.parametrize(
    ("cores", "pixels", "limit", "mr", "parts", "tile"),
    [
        (2, 432, 66, 6, 1, 54),  # 8 tasks for 7
        (2, 3136, 246, 6, 1, 224),  # 14 for 13, which the two cores share
        (4, 3136, 246, 6, 1, 196),  # 16
        (4, 3136, 246, 14, 1, 196),
        (2, 196, 66, 6, 2, 66),  # 8 tasks would take two cores longer, not four
        (4, 196, 66, 6, 2, 49),
        (2, 10000, 256, 6, 1, 250),  # many tasks stay as they are
        (2, 5, 256, 6, 4, 5),
        (2, 1, 6, 6, 1, 1),
    ],
)
def test_tiles_of_products_are_cut_so_that_cores_wait_least(cores, pixels, limit, mr, parts, tile):
    device = replace(AVX2_LAPTOP, cores=cores)
    assert even_tile(pixels, balanced(pixels, limit), mr, parts, device) == tile


@given(st.integers(1, 64), st.integers(1, 5000), st.integers(1, 300), st.integers(1, 24), st.integers(1, 40))
def test_cores_do_not_take_longer_with_tiles_cut_for_them(cores, pixels, limit, mr, parts):
    most = balanced(pixels, limit)
    tile = even_tile(pixels, most, mr, parts, replace(AVX2_LAPTOP, cores=cores))
    assert 1 <= tile <= most

    def rounds(extent: int) -> int:
        tasks = -(-pixels // extent) * parts
        return -(-tasks // cores) * rows_of(extent, mr)

    assert rounds(tile) <= rounds(most)
    assert tile == most or -(-pixels // most) * parts < MANY_ROUNDS * cores


@pytest.mark.parametrize(("cores", "tasks"), [(1, 2), (2, 2), (4, 4), (16, 15)])
def test_a_small_convolution_has_about_as_many_tasks_as_there_are_cores(cores, tasks):
    """49 tiles and 8 blocks of filters: each task loads its patches again, so more tasks than cores cost."""
    spec = conv("small", Merge.ADD, (128,), 128, 3, 3, H=28, W=28, padding=((1, 1), (1, 1))).spec
    tiling = winograd.plan(spec, replace(AVX2_LAPTOP, cores=cores))
    assert -(-49 // tiling.tiles) * -(-tiling.blocks // tiling.task_blocks) == tasks


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("pixels", [4, 28])
def test_the_number_of_cores_changes_no_order_of_sums(taps, pixels):
    """The channels of a chunk, which decide it, are the same."""
    spec = conv("sums", Merge.ADD, (300,), 128, taps, taps, H=pixels, W=pixels, padding=((taps // 2,) * 2,) * 2).spec
    for kernel in (kernel for kernel in KERNELS if not kernel.unsupported(spec)):
        for profile in CPU_PROFILES:
            depths = {kernel.plan(spec, replace(profile, cores=cores)).depth for cores in (1, 2, 3, 64)}
            assert len(depths) == 1, (kernel.name, profile.name)


COMPILES = """
from fusionops.cpu import device, gemm_task, winograd_task
from fusionops.cpu.tiling import register_tiles

for mr, nv in register_tiles(device()):
    for task in (winograd_task.winograd_task(mr, nv), gemm_task.gemm_task(32, mr, nv, False)):
        assert task
    print(device().vector_bytes, mr, nv)
"""


@pytest.mark.parametrize(
    ("processor", "features", "tiles"),
    [
        ("skylake-avx512", "avx512f avx512vl avx512bw avx512dq avx512cd avx2 avx fma f16c bmi bmi2", 4),
        ("haswell", "avx2 avx fma f16c bmi bmi2", 1),
    ],
)
def test_register_tiles_compile_for_other_processors(processor, features, tiles, tmp_path):
    """LLVM ends the process where a loop in assembly leaves it too few registers."""
    settings = {
        "NUMBA_CPU_NAME": processor,
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features.split()),
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(fo.__file__).parent.parent)}
    ran = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == tiles, ran.stdout
