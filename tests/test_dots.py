"""Contractions with few filters: when sums of dot products are chosen, and that the choice changes no promised bits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import fusionops as fo
from fusionops.cpu import dots
from fusionops.cpu.tiling import SCRATCH_LIMIT
from fusionops.device import AVX2_LAPTOP, CPU_PROFILES
from fusionops.problems import conv, dense
from fusionops.spec import Merge


def maps(rng, *channels, H=9, W=20, nchw=False):
    sources = [rng.standard_normal((2, H, W, c)).astype(np.float32) for c in channels]
    return [np.ascontiguousarray(source.transpose(0, 3, 1, 2)) for source in sources] if nchw else sources


def filters(rng, C, K, R=1, S=1, nchw=False):
    f = rng.standard_normal((R, S, C, K)).astype(np.float32)
    return np.ascontiguousarray(f.transpose(3, 2, 0, 1)) if nchw else f


@pytest.mark.parametrize(
    ("channels", "K", "taps", "algorithm"),
    [
        ((32, 32), 1, 1, "dots"),
        ((32, 32), 6, 1, "dots"),
        ((32, 32), 7, 1, "gemm"),
        ((8, 8), 5, 1, "dots"),
        ((8, 8), 6, 1, "gemm"),
        ((5, 5), 1, 1, "gemm"),
        ((32, 32), 4, 3, "dots"),
        ((32, 32), 5, 3, "winograd"),
        ((8, 8), 5, 3, "dots"),
        ((2, 2), 6, 3, "direct"),
    ],
)
def test_few_filters_are_dot_products_where_they_fill_vectors(channels, K, taps, algorithm):
    rng = np.random.default_rng(7)
    plan = fo.explain("concat_conv", maps(rng, *channels), filters(rng, sum(channels), K, taps, taps), padding="same")
    assert plan.kernel == f"cpu.concat_conv_fprop_{algorithm}_f32"


@pytest.mark.parametrize(
    ("taps", "side", "dtype", "options"),
    [((3, 3), 12, np.float32, {"dilation": (2, 1)}), ((1, 7), 12, np.float32, {}), ((3, 3), 4, np.float32, {}),
     ((13, 13), 20, np.float32, {}), ((3, 3), 12, np.float64, {})],
)  # fmt: skip
def test_six_filters_are_dot_products_where_winograd_cannot_run(taps, side, dtype, options):
    rng = np.random.default_rng(7)
    x, f = (array.astype(dtype) for array in (*maps(rng, 64, H=side, W=side), filters(rng, 64, 6, *taps)))
    assert "_dots_" in fo.explain("add_conv", [x], f, padding="same", **options).kernel


def test_pixels_side_by_side_are_vectors_of_pixels():
    rng = np.random.default_rng(7)
    sources, f = maps(rng, 32, 32, nchw=True), filters(rng, 64, 2, nchw=True)
    assert "gemm" in fo.explain("concat_conv", sources, f, layout="NCHW").kernel
    assert "dots" in fo.explain("concat_conv", sources, filters(rng, 64, 2, 3, 3, nchw=True), layout="NCHW").kernel


@pytest.mark.parametrize("count", [5, 16, 17, 40])
def test_maps_of_one_channel_make_the_bits_of_their_concatenation(count):
    """Which alone are planes, and stored together are not."""
    rng = np.random.default_rng(count)
    sources, f = maps(rng, *[1] * count), filters(rng, count, 1)
    fused, stored = fo.concat_conv(sources, f), fo.concat_conv([fo.concat(sources, axis=-1)], f)
    assert fused.tobytes() == stored.tobytes()
    kinds = {fo.explain("concat_conv", given, f).kernel for given in (sources, [fo.concat(sources, axis=-1)])}
    assert kinds == {f"cpu.concat_conv_fprop_{'gemm' if count < 16 else 'dots'}_f32"}


@pytest.mark.parametrize("channels", [(16, 48), (17, 47), (3, 40, 21)])
@pytest.mark.parametrize("taps", [1, 3])
def test_sources_read_in_place_make_the_bits_of_a_merged_map(channels, taps):
    rng = np.random.default_rng(3)
    sources, f = maps(rng, *channels), filters(rng, 64, 3, taps, taps)
    expected = fo.concat_conv([np.concatenate(sources, -1)], f, padding="same")
    assert fo.concat_conv(sources, f, padding="same").tobytes() == expected.tobytes()
    apart = [np.repeat(source, 2, axis=2)[:, :, ::2] for source in sources]  # pixels that are not neighbours
    assert fo.concat_conv(apart, f, padding="same").tobytes() == expected.tobytes()
    assert fo.concat_conv(sources, fo.prepack(f), padding="same").tobytes() == expected.tobytes()
    assert fo.concat_conv(sources, f, padding="same", strict=True).tobytes() == expected.tobytes()


@pytest.mark.parametrize("K", [1, 16])
def test_a_negative_zero_does_not_depend_on_where_filters_lie(K):
    """Products that vanish leave their sign to the sum: filters of −0 are read in place and packed alike."""
    x, f = np.full((1, 1, 40, 32), -1e-30, np.float32), np.full((1, 1, 32, K), 1e-30, np.float32)
    x[..., 16:], f[:, :, 16:] = 1, -0.0
    apart = np.repeat(f, 2, axis=2)[:, :, ::2]
    results = [fo.concat_conv([x], given) for given in (f, fo.prepack(f), apart)]
    assert len({result.tobytes() for result in results}) == 1


AT_A_PAGE = """
import ctypes, mmap, numpy as np, fusionops as fo

memory = []
def at_the_end(array):
    pages = -(-array.nbytes // mmap.PAGESIZE)
    memory.append(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory[-1]))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    place = np.frombuffer(memory[-1], array.dtype, array.size, pages * mmap.PAGESIZE - array.nbytes)
    place = place.reshape(array.shape)
    place[...] = array
    return place

for taps in (1, 3):
    for width in (1, 2, 3, 5, 70):
        for channels in (16, 21, 35):
            x = at_the_end(np.ones((1, 3, width, channels), np.float32))
            f, b = at_the_end(np.ones((taps, taps, channels, 1), np.float32)), at_the_end(np.ones(1, np.float32))
            for sources in ([x], [x, x]):
                out = at_the_end(np.zeros((1, 3, width, 1), np.float32))
                fo.add_conv(sources, f, b, padding="same", out=out)
                assert out[0, 1, width // 2, 0] == 1 + len(sources) * channels * taps * min(taps, width)
"""


def test_nothing_beyond_an_array_is_read():
    """Sources, filters and results end where memory does; a process of its own, which would end there too."""
    ran = subprocess.run([sys.executable, "-c", AT_A_PAGE], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_table_has_room_for_all_runs():
    wide, tall = (conv("many", Merge.CONCAT, (16,) * sources, 1, taps, taps, H=20, W=20).spec
                  for sources, taps in ((40, 1), (2, 11)))  # fmt: skip
    assert dots.plan(wide, AVX2_LAPTOP).areas[-1] >= 40 * 24
    assert dots.plan(tall, AVX2_LAPTOP).areas[-1] >= 11 * 24


def test_a_commuted_convolution_leaves_few_filters_to_dot_products():
    rng = np.random.default_rng(5)
    low, high = maps(rng, 32, H=8, W=8), maps(rng, 32, H=16, W=16)
    for K, algorithm in ((2, "dots"), (8, "commuted")):
        plan = fo.explain("concat_conv", [fo.Source(*low, upsample=2), *high], filters(rng, 64, K))
        assert plan.kernel == f"cpu.concat_conv_fprop_{algorithm}_f32"


def test_sums_too_long_for_a_thread_are_refused_and_all_others_fit():
    kernel = next(kernel for kernel in dots.KERNELS if kernel.name == "cpu.add_dense_fprop_dots_f32")
    longest = 0
    for C in (1, 1 << 10, 1 << 14, 30_000, 1 << 15, 1 << 17):
        spec = dense("long", Merge.ADD, (C, C), 6, rows=40).spec
        if not kernel.unsupported(spec):
            longest = C
            assert all(kernel.plan(spec, profile).scratch_bytes <= SCRATCH_LIMIT for profile in CPU_PROFILES)
        else:
            assert "more than a thread may keep" in kernel.unsupported(spec)[0]
    assert 1 << 14 <= longest < 1 << 17
    spec = conv("far", Merge.ADD, (8582,), 3, 1, 11, N=2, H=147, W=696, stride=(3, 3)).spec
    assert all(kernel.plan(spec, profile).scratch_bytes <= SCRATCH_LIMIT for profile in CPU_PROFILES)


def test_the_choice_does_not_depend_on_the_batch_or_on_strict():
    for K in range(1, 7):
        posed = [conv("head", Merge.ADD, (64,), K, N=N, H=12, W=12, strict=strict).spec
                 for N in (1, 3) for strict in (True, False)]  # fmt: skip
        assert len({dots.slow(spec, AVX2_LAPTOP) for spec in posed}) == 1
