"""Random calls: whatever Hypothesis composes from the options of an op, the CPU and the reference agree exactly.

Every value is a small integer, so the two differ only where one of them is wrong. A failure found here becomes a named
problem of the table that the kernels are tested on.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import fusionops as fo

extents = st.integers(1, 6)
factors = st.sampled_from([1, 1, 1, 2, 3])
activations = st.sampled_from([None, "relu", "relu6", ("leaky_relu", 0.5)])
dtypes = st.sampled_from([np.float32, np.float64])


class Draw:
    """Integer arrays of drawn memory layouts."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        self.dtype = data.draw(dtypes)

    def __call__(self, strategy):
        return self.data.draw(strategy)

    def array(self, *shape):
        """Contiguous, transposed in memory, sliced from a larger one, reversed, or read-only."""
        steps = [self(st.sampled_from([1, 1, -1, 2])) for _ in shape]
        order = self(st.permutations(range(len(shape))))
        memory = self.rng.integers(-3, 4, [abs(steps[d]) * shape[d] for d in order]).astype(self.dtype)
        view = memory.transpose(np.argsort(order))[(..., *(slice(None, None, step) for step in steps))]
        view.flags.writeable = self(st.booleans())
        return view

    def weight(self, channels):
        return self(st.sampled_from([None, None, 2, -1.5, self.array(channels)]))

    def optional(self, *shape):
        return self.array(*shape) if self(st.booleans()) else None


def agree(op, *arguments, **options):
    """The CPU's result is the reference's, also into an `out` full of something else."""
    expected = op(*arguments, **options, backend="reference")
    results = expected if isinstance(expected, tuple) else (expected,)
    out = np.full_like(results[0], np.nan)
    for actual in (op(*arguments, **options), op(*arguments, **options, out=out)):
        pairs = zip(actual if isinstance(actual, tuple) else (actual,), results, strict=True)
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(out, results[0])


@settings(max_examples=60)
@given(st.data())
def test_convolutions(data):
    draw = Draw(data)
    layout = draw(st.sampled_from(["NHWC", "NCHW"]))
    is_add = draw(st.booleans())
    N, R, S = draw(st.integers(0, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups, per_group, K = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 20))
    stride, dilation = (draw(st.tuples(st.integers(1, most), st.integers(1, most))) for most in (3, 2))
    padding = draw(st.one_of(st.just("same"), st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2)))
    H, W = draw(st.integers(7, 14)), draw(st.integers(7, 14))
    C, K = groups * per_group, groups * -(-K // groups)

    def maps(h, w, channels):
        return draw.array(N, h, w, channels) if layout == "NHWC" else draw.array(N, channels, h, w)

    def source(channels):
        factor = draw(st.sampled_from([f for f in (1, 2, 3) if H % f == 0 and W % f == 0]))
        return fo.Source(maps(H // factor, W // factor, channels), upsample=factor, weight=draw.weight(channels))

    if is_add:
        sources = [source(C) for _ in range(draw(st.integers(1, 3)))]
    else:
        cuts = sorted(draw(st.sets(st.integers(1, C - 1), max_size=3))) if C > 1 else []
        sources = [source(b - a) for a, b in zip([0, *cuts], [*cuts, C], strict=True)]
    filters = draw.array(R, S, per_group, K) if layout == "NHWC" else draw.array(K, per_group, R, S)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    options |= {"bias": draw.optional(K), "activation": draw(activations), "strict": draw(st.booleans())}
    op = fo.add_conv if is_add else fo.concat_conv
    if draw(st.booleans()):
        residual = np.asarray(op(sources, filters, **options, backend="reference"))
        options["residual"] = fo.Source(draw.array(*residual.shape), weight=draw.weight(K))
    if is_add and draw(st.booleans()):
        options["return_sum"] = True
    if draw(st.booleans()):
        filters = fo.prepack(filters, layout=layout)
    agree(op, sources, filters, **options)


@settings(max_examples=40)
@given(st.data())
def test_dense_layers(data):
    draw = Draw(data)
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    channels = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    is_add = draw(st.booleans())
    if is_add:
        channels = [channels[0]] * len(channels)
    K = draw(st.integers(1, 70))
    sources = [fo.Source(draw.array(*lead, C), weight=draw.weight(C)) for C in channels]
    matrix = draw.array(channels[0] if is_add else sum(channels), K)
    options = {"bias": draw.optional(K), "residual": draw.optional(*lead, K), "activation": draw(activations)}
    agree(fo.add_dense if is_add else fo.concat_dense, sources, matrix, **options)


@settings(max_examples=60)
@given(st.data())
def test_sums(data):
    draw = Draw(data)
    shape = draw(st.lists(extents, max_size=5))

    def source():
        own = [draw(st.sampled_from([1, extent])) for extent in shape][draw(st.integers(0, len(shape))) :]
        return fo.Source(draw.array(*own), weight=draw.weight(own[-1]) if own else None)

    agree(fo.add, [source() for _ in range(draw(st.integers(1, 6)))], activation=draw(activations))


@settings(max_examples=40)
@given(st.data())
def test_upsampled_sums(data):
    draw = Draw(data)
    N, h, w, C = (draw(extents) for _ in range(4))
    up_h, up_w = draw(factors), draw(factors)
    small = fo.Source(draw.array(N, h, w, C), upsample=(up_h, up_w), weight=draw.weight(C))
    agree(fo.add, [draw.array(N, h * up_h, w * up_w, C), small, draw.array(C)], activation=draw(activations))
