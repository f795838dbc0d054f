"""Adds of rows wherever they lie: upsampled, broadcast, cropped, short and long, through the caches and around them."""

from __future__ import annotations

import numpy as np
import pytest

import fusionops as fo
from fusionops.cpu import add_task, stream
from fusionops.spec import Activation, FusionSpec, Merge, SourceSpec

CHANNELS = (1, 3, 8, 16, 17, 33, 64, 100, 130, 256)


def random_source(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray | fo.Source:
    n, h, w, c = shape
    kind = rng.choice(["plain", "upsampled", "broadcast", "cropped", "reversed", "apart"])
    if kind == "upsampled":
        factor = (int(rng.integers(1, 3)), int(rng.choice([1, 2, 4])))
        stored = rng.standard_normal((n, h // factor[0], w // factor[1], c)).astype(dtype)
        return fo.Source(stored, upsample=factor)
    if kind == "broadcast":
        return rng.standard_normal((1, 1, 1, c)).astype(dtype)
    larger = rng.standard_normal((n, h + 1, w + 2, 2 * c)).astype(dtype)
    if kind == "apart":
        return larger[:, 1:, 2:, ::2]
    return larger[:, 1:, -3::-1, :c] if kind == "reversed" else larger[:, 1:, 2:, :c].copy() if kind == "plain" else (
        larger[:, 1:, 1:-1, :c]
    )  # fmt: skip


def random_weight(rng: np.random.Generator, channels: int, dtype: str) -> object:
    kind = rng.choice(["none", "number", "vector"])
    if kind == "vector":
        return rng.standard_normal(channels).astype(dtype)
    return float(rng.standard_normal()) if kind == "number" else None


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("way", ["through", "around"])
def test_rows_wherever_they_lie(way, dtype, seed, request):
    """Bit for bit, and nothing beside the output is written."""
    if way == "around":
        request.getfixturevalue("around")
    rng = np.random.default_rng(seed)
    for _ in range(25):
        shape = int(rng.integers(1, 3)), 2 * int(rng.integers(1, 4)), 4 * int(rng.integers(1, 5)), rng.choice(CHANNELS)
        n, h, w, c = map(int, shape)
        sources = [rng.standard_normal((n, h, w, c)).astype(dtype)]
        sources += [random_source(rng, (n, h, w, c), dtype) for _ in range(rng.integers(0, 4))]
        weights = [random_weight(rng, c, dtype) for _ in sources] if rng.integers(2) else None
        activation = [None, "relu", "relu6", ("leaky_relu", 0.25)][rng.integers(4)]
        expected = fo.add(sources, weights=weights, activation=activation, backend="reference")
        item, nbytes = expected.itemsize, expected.nbytes
        start = 64 + (int(rng.integers(64 // item)) * item if rng.integers(8) else int(rng.integers(64)))
        memory = np.full(nbytes + 192, 7, np.uint8)
        out = memory[start : start + nbytes].view(dtype).reshape(expected.shape)
        fo.add(sources, weights=weights, activation=activation, out=out)
        assert out.tobytes() == expected.tobytes(), (shape, [type(x) for x in sources], weights, activation, start)
        assert (memory[:start] == 7).all()
        assert (memory[start + nbytes :] == 7).all()


@pytest.mark.parametrize("factor", [2, 4, 5])
@pytest.mark.parametrize("channels", [3, 20, 33, 100])
@pytest.mark.parametrize("way", ["through", "around"])
def test_runs_that_begin_within_a_repeated_pixel(way, channels, factor, request):
    """Lines of more pixels than are added at once, whose number is no multiple of the factor."""
    if way == "around":
        request.getfixturevalue("around")
    rng = np.random.default_rng(5)
    x = rng.standard_normal((1, 2, 100 * factor, channels)).astype(np.float32)
    coarse = rng.standard_normal((1, 2, 100, channels)).astype(np.float32)
    expected = x + coarse.repeat(factor, axis=2)
    found = fo.add([x, fo.Source(coarse, upsample=(1, factor))])
    assert found.tobytes() == expected.tobytes()


def test_rows_that_tasks_share():
    """Vectors of weights are read from where a part of a row begins."""
    rng = np.random.default_rng(3)
    x, y, weights = rng.standard_normal((3, 200001)), rng.standard_normal((3, 200001)), rng.standard_normal(200001)
    for dtype in ("float32", "float64", "float16"):
        sources, w = [x.astype(dtype), y.astype(dtype)], weights.astype(dtype)
        found = fo.add(sources, weights=[w, 0.5], activation="relu")
        assert found.tobytes() == fo.add(sources, weights=[w, 0.5], activation="relu", backend="reference").tobytes()


@pytest.mark.parametrize("upsample", [1, 2])
def test_weights_of_channels_that_do_not_lie_side_by_side(upsample):
    rng = np.random.default_rng(4)
    x, coarse = rng.standard_normal((2, 5, 6, 40)), rng.standard_normal((2, 5, 6 // upsample, 40 // upsample))
    filters, weights = rng.standard_normal((3, 5, 1, 1)), [rng.standard_normal(5), rng.standard_normal(5)]
    sources = [x, fo.Source(coarse, upsample=upsample)]
    options = {"layout": "NCHW", "weights": weights, "return_sum": True}
    _, found = fo.add_conv(sources, filters, **options)
    assert found.tobytes() == fo.add_conv(sources, filters, backend="reference", **options)[1].tobytes()


@pytest.mark.parametrize("channels", [16, 20, 300])
@pytest.mark.usefixtures("around")
def test_in_place(channels):
    """Lines that two rows share are written when the second is; what it reads is still what it was."""
    x = np.random.default_rng(1).standard_normal((2, 6, 8, channels)).astype(np.float32)
    coarse = np.random.default_rng(2).standard_normal((2, 3, 4, channels)).astype(np.float32)
    expected = x + coarse.repeat(2, 1).repeat(2, 2)
    assert fo.add([x, fo.Source(coarse, upsample=2)], out=x) is x
    np.testing.assert_array_equal(x, expected)


def words_of(channels: int, activation: str | None = None, count: int = 2, upsampled: bool = True) -> np.ndarray:
    shape = (1, 64, 64, channels)
    coarse = SourceSpec((1, 32, 32, channels), "float32", (2, 2)) if upsampled else SourceSpec(shape, "float32")
    sources = (SourceSpec(shape, "float32"), *[coarse] * (count - 1))
    spec = FusionSpec(Merge.ADD, sources, activation=Activation(activation) if activation else None)
    config = stream.StreamConfig(span=1 << 16, nontemporal=True, flops=1.0)
    strides = [np.empty(source.shape, "f4").strides for source in sources]
    return np.array(stream.add_block(spec, config, tuple(strides), np.empty(shape, "f4").strides)[0])


def test_how_rows_are_added():
    assert words_of(64)[add_task.WAY] == add_task.SUMS
    assert words_of(64, "relu6")[add_task.WAY] == add_task.RUNS
    assert words_of(64, "silu")[add_task.WAY] == add_task.GENERAL
    assert words_of(64, count=70)[add_task.WAY] == add_task.GENERAL  # sources that no table holds
    assert [words_of(c)[add_task.AT_ONCE] for c in (2, 64, 127, 128, 256)] == [512, 16, 8, 1, 1]
    assert words_of(64, upsampled=False)[add_task.DEPTH] == 1  # neither needs rows
    assert [words_of(c)[add_task.STORES] for c in (8, 16)] == [add_task.AROUND, add_task.WOVEN]
    for channels in (2, 64, 127):  # what is gathered has room
        for count in (2, 3, 40, 64):
            rows = words_of(channels, count=count)[add_task.AT_ONCE]
            assert rows == 1 or rows * channels * 4 * (count - 1) <= add_task.GATHER_BYTES
