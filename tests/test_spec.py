"""Every derived extent of a spec against hand-computed values; runs no kernel."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest

from fusionops import spec as spec_module
from fusionops.problems import PROBLEMS, Part, conv, dense, join
from fusionops.spec import Activation, Conv2d, Dense, FusionSpec, Layout, Merge, SourceSpec, output_extent, same_padding

ADD, CONCAT = Merge.ADD, Merge.CONCAT


def test_docstring_examples():
    failures, attempted = doctest.testmod(spec_module)
    assert attempted
    assert not failures


@pytest.mark.parametrize(
    ("size", "taps", "stride", "dilation", "pads"),
    [
        (8, 3, 1, 1, (1, 1)),
        (8, 2, 1, 1, (0, 1)),
        (8, 4, 1, 1, (1, 2)),
        (9, 3, 1, 2, (2, 2)),
        (224, 3, 2, 1, (0, 1)),
        (225, 3, 2, 1, (1, 1)),
        (10, 3, 3, 1, (1, 1)),
        (9, 1, 3, 1, (0, 0)),  # the last placement ends before the map does: nothing to pad
        (1, 7, 1, 1, (3, 3)),
    ],
)
def test_same_padding(size, taps, stride, dilation, pads):
    assert same_padding(size, taps, stride=stride, dilation=dilation) == pads
    assert output_extent(size, taps, stride=stride, pad=pads, dilation=dilation) == -(-size // stride)


def test_extents_of_a_concat_conv():
    spec = conv("", CONCAT, (3, Part(5, upsample=(2, 3))), 7, 3, 5, N=2, H=8, W=9, stride=(2, 1), groups=1).spec
    assert spec.merged_shape == (2, 8, 9, 8)
    assert (spec.N, spec.H, spec.W, spec.C) == (2, 8, 9, 8)
    assert spec.channels == (3, 5)
    assert spec.sources[1].shape == (2, 4, 3, 5)
    assert spec.conv.padding == ((0, 1), (2, 2))
    assert (spec.P, spec.Q) == (4, 9)
    assert spec.out_shape == (2, 4, 9, 7)
    assert spec.filter_shape == (3, 5, 8, 7)
    assert spec.gemm == (2 * 4 * 9, 7, 3 * 5 * 8)


def test_extents_channels_first():
    sources = (SourceSpec((2, 3, 8, 9), "float32"), SourceSpec((2, 5, 4, 3), "float32", upsample=(2, 3)))
    spec = FusionSpec(CONCAT, sources, Conv2d(8, 3, 5, groups=2), layout=Layout.NCHW)
    assert spec.merged_shape == (2, 8, 8, 9)
    assert (spec.N, spec.H, spec.W, spec.C) == (2, 8, 9, 8)
    assert spec.channels == (3, 5)
    assert spec.out_shape == (2, 8, 6, 5)
    assert spec.filter_shape == (8, 4, 3, 5)
    assert spec.gemm == (2 * 6 * 5, 4, 3 * 5 * 4)


def test_extents_of_an_add_conv_count_its_channels_once():
    spec = conv("", ADD, (6, 6, 6), 4).spec
    assert spec.C == 6
    assert spec.filter_shape == (3, 3, 6, 4)


def test_extents_of_a_dense():
    spec = dense("", CONCAT, (3, 5), 7, rows=11).spec
    assert spec.merged_shape == (11, 8)
    assert spec.out_shape == (11, 7)
    assert spec.filter_shape == (8, 7)
    assert spec.gemm == (11, 7, 8)
    assert spec.conv == Conv2d(7, 1, 1)
    assert (spec.N, spec.H, spec.W) == (1, 1, 11)


def test_extents_of_a_dense_over_maps():
    source = SourceSpec((2, 4, 5, 3), "float32")
    spec = FusionSpec(ADD, (source, source), Dense(7))
    assert spec.out_shape == (2, 4, 5, 7)
    assert spec.gemm == (40, 7, 3)


@pytest.mark.parametrize(
    ("shapes", "merged"),
    [
        ([(), ()], ()),
        ([(4, 1), (1, 5), (3, 1, 1)], (3, 4, 5)),
        ([(4, 5), ()], (4, 5)),
        ([(0, 5), (1, 5)], (0, 5)),
        ([(1,), (0,)], (0,)),
    ],
)
def test_add_broadcasts_as_numpy_does(shapes, merged):
    spec = join("", ADD, *shapes).spec
    assert spec.merged_shape == spec.out_shape == merged


def test_concat_joins_along_its_axis():
    spec = join("", CONCAT, (2, 3, 5), (2, 1, 5), axis=1).spec
    assert spec.out_shape == (2, 4, 5)
    assert spec.channels == (3, 1)


def test_an_upsampled_join_reads_small_and_writes_large():
    spec = join("", ADD, (1, 6, 8, 3), (1, 3, 4, 3), part=Part(3, upsample=(2, 2))).spec
    assert spec.out_shape == (1, 6, 8, 3)
    assert not spec.sources[1].is_plain
    assert spec.sources[0].is_plain


def test_no_contraction_means_no_conv():
    with pytest.raises(TypeError, match="no contraction"):
        _ = join("", ADD, (3,), (3,)).spec.conv


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (join("", ADD, (2, 3), (3,)).spec, "add fprop float32 (2, 3) + (3,)"),
        (join("", CONCAT, (2, 3), (2, 1), axis=1).spec, "concat fprop float32 (2, 3) | (2, 1)"),
        (conv("", CONCAT, (16, 24), 8, N=2, H=7, W=9).spec, "concat_conv fprop float32 N2 H7 W9 C(16+24) K8 R3 S3"),
        (
            conv("", ADD, (4, 4), 8, N=2, H=7, W=9, stride=(2, 1), dilation=(1, 3), groups=4).spec,
            "add_conv fprop float32 N2 H7 W9 C(4=4) K8 R3 S3 stride 2x1 dilation 1x3 groups 4",
        ),
        (dense("", CONCAT, (3, 5), 7, rows=11).spec, "concat_dense fprop float32 rows 11 C(3+5) K7"),
    ],
)
def test_a_spec_reads_as_one_line(spec, text):
    assert str(spec) == text


def test_an_activation_reads_as_name_and_parameters():
    assert str(Activation("relu")) == "relu"
    assert str(Activation("leaky_relu", (0.2,))) == "leaky_relu 0.2"


def test_equal_specs_are_one_key_and_every_field_counts():
    spec = conv("", ADD, (6, 6), 4).spec
    twin = conv("", ADD, (6, 6), 4).spec
    assert spec == twin
    assert hash(spec) == hash(twin)
    different = {
        spec,
        replace(spec, merge=CONCAT),
        replace(spec, dtype="float64"),
        replace(spec, bias=False),
        replace(spec, activation=Activation("relu")),
        replace(spec, return_sum=True),
        replace(spec, strict=False),
        replace(spec, precision="tf32"),
        replace(spec, residual=SourceSpec((1, 5, 6, 4), "float32")),
        replace(spec, contraction=Conv2d(4, 3, 3)),
    }
    assert len(different) == 10


def test_problems_are_distinct():
    names = [problem.name for problem in PROBLEMS]
    assert len(set(names)) == len(names)
    assert len({problem.spec for problem in PROBLEMS}) == len(names)
