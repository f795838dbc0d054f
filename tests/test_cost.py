"""The cost model against figures worked out by hand, and the laws it must keep on every problem of the table."""

import dataclasses
import doctest
import inspect
from fractions import Fraction
from operator import attrgetter

import pytest

from fusionops.cost import Cost, add_over_concat, analyse, other_merge
from fusionops.errors import SpecError
from fusionops.problems import PROBLEMS
from fusionops.spec import Conv2d, Dense, FusionSpec, Merge, SourceSpec

SAME = ((1, 1), (1, 1))
KIB = 1024
MIB = 1024 * KIB

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=attrgetter("name"))


def nhwc(*shape, **prologue):
    return SourceSpec(shape, "float32", **prologue)


def counts(measured):
    return tuple(getattr(measured, name) for name in Cost.__slots__)


def test_doctests():
    module = inspect.getmodule(analyse)  # `fusionops.cost` is the public function of that name
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 5) == (0, True)


def test_keras_conv_by_hand():
    """Two maps of 128×128×64 into 64 filters of 3×3, with a bias."""
    maps, conv = (nhwc(1, 128, 128, 64),) * 2, Conv2d(64, 3, 3, padding=SAME)
    add = analyse(FusionSpec(Merge.ADD, maps, conv, bias=True), scratch_bytes=1000)
    concat = analyse(FusionSpec(Merge.CONCAT, maps, conv, bias=True), scratch_bytes=1000)
    add_params, concat_params = 36_864 + 64, 73_728 + 64
    assert counts(add) == (
        add_params,
        1_048_576,
        1_207_959_552,
        8 * MIB + 4 * add_params,
        4 * MIB,
        1000,
        1000,
    )
    assert counts(add.materialised) == (
        add_params,
        1_048_576,
        1_207_959_552,
        12 * MIB + 4 * add_params,
        8 * MIB,
        1000,
        4 * MIB + 1000,
    )
    assert counts(concat) == (concat_params, 0, 2_415_919_104, 8 * MIB + 4 * concat_params, 4 * MIB, 1000, 1000)
    assert counts(concat.materialised) == (
        concat_params,
        0,
        2_415_919_104,
        16 * MIB + 4 * concat_params,
        12 * MIB,
        1000,
        8 * MIB + 1000,
    )


def test_dense_by_hand():
    concat = analyse(FusionSpec(Merge.CONCAT, (nhwc(256, 32), nhwc(256, 32)), Dense(64), bias=True))
    assert (concat.params, concat.flops) == (64 * 64 + 64, 2 * 256 * 64 * 64)
    assert concat.bytes_read == 4 * (2 * 256 * 32 + 4160)
    assert concat.bytes_written == 4 * 256 * 64
    assert concat.materialised.bytes_moved - concat.bytes_moved == 2 * 4 * 256 * 64


def test_upsampled_map_is_stored_and_read_by_the_materialised_way():
    """FPN: 2×3 upsampled to 4×6, 8 channels, added to a map of 4×6; 192 elements each, 768 bytes."""
    maps = (nhwc(1, 2, 3, 8, upsample=(2, 2)), nhwc(1, 4, 6, 8))
    fused = analyse(FusionSpec(Merge.ADD, maps, Conv2d(5, 3, 3, padding=SAME)))
    assert fused.bytes_read == 192 + 768 + 4 * 9 * 8 * 5
    assert fused.bytes_written == 4 * 4 * 6 * 5
    assert fused.materialised.bytes_read == fused.bytes_read + 2 * 768
    assert fused.materialised.bytes_written == fused.bytes_written + 2 * 768
    assert fused.materialised.peak_bytes == 2 * 768


def test_merge_without_contraction_stores_only_upsampled_maps():
    maps = (nhwc(1, 2, 3, 8, upsample=(2, 2)), nhwc(1, 4, 6, 8))
    fused = analyse(FusionSpec(Merge.ADD, maps))
    assert counts(fused) == (0, 192, 0, 192 + 768, 768, 0, 0)
    assert counts(fused.materialised) == (0, 192, 0, 192 + 2 * 768, 2 * 768, 0, 768)
    plain = analyse(FusionSpec(Merge.ADD, maps[1:] * 3))
    assert plain.merge_flops == 2 * 192
    assert counts(plain) == counts(plain.materialised)


def test_one_plain_source_has_nothing_to_store():
    fused = analyse(FusionSpec(Merge.ADD, (nhwc(1, 4, 6, 8),), Conv2d(5, 3, 3)), scratch_bytes=7)
    assert counts(fused) == counts(fused.materialised)
    assert fused.merge_flops == 0


def test_one_upsampled_source_is_stored_once():
    fused = analyse(FusionSpec(Merge.ADD, (nhwc(1, 2, 3, 8, upsample=(2, 2)),), Conv2d(5, 3, 3)))
    assert fused.materialised.bytes_moved - fused.bytes_moved == 2 * 768
    resize = analyse(FusionSpec(Merge.ADD, (nhwc(1, 2, 3, 8, upsample=(2, 2)),)))
    assert counts(resize) == counts(resize.materialised)


def test_returned_sum_is_a_result_not_extra_memory():
    maps, conv = (nhwc(1, 4, 6, 8),) * 2, Conv2d(5, 1, 1)
    without = analyse(FusionSpec(Merge.ADD, maps, conv))
    fused = analyse(FusionSpec(Merge.ADD, maps, conv, return_sum=True))
    assert fused.bytes_written == without.bytes_written + 768
    assert fused.materialised.bytes_moved == fused.bytes_moved + 768  # read again; it is written either way
    assert fused.materialised.peak_bytes == 0


def test_residual_of_the_materialised_way_is_a_pass_of_its_own():
    """ResNet's block end: 120 results, 480 bytes; the pass reads and rewrites them."""
    spec = FusionSpec(Merge.ADD, (nhwc(1, 4, 6, 8),), Conv2d(5, 1, 1), residual=nhwc(1, 4, 6, 5))
    fused = analyse(spec)
    assert fused.bytes_read == 768 + 480 + 4 * 40
    assert fused.materialised.bytes_moved == fused.bytes_moved + 2 * 480
    assert fused.materialised.peak_bytes == 0
    upsampled = analyse(dataclasses.replace(spec, residual=nhwc(1, 2, 3, 5, upsample=(2, 2))))
    assert upsampled.materialised.bytes_moved == upsampled.bytes_moved + 4 * 480
    assert upsampled.materialised.peak_bytes == 480


def test_prologue_vectors_count_as_parameters_and_one_operation_an_element():
    batch_norm = nhwc(1, 4, 6, 8, scale=True, shift=True)
    weighted = nhwc(1, 4, 6, 8, weight="vector"), nhwc(1, 4, 6, 8, weight="scalar")
    fused = analyse(FusionSpec(Merge.ADD, (batch_norm, *weighted), Conv2d(5, 1, 1)))
    assert fused.params == 40 + 16 + 8 + 1
    assert fused.merge_flops == (2 + 2 + 2) * 192  # two additions, scale and shift, two weights


def test_groups_divide_parameters_and_flops():
    maps = (nhwc(1, 4, 6, 8),)
    whole, grouped = (analyse(FusionSpec(Merge.ADD, maps, Conv2d(8, 3, 3, groups=g))) for g in (1, 4))
    assert (whole.params, grouped.params) == (576, 144)
    assert whole.flops == 4 * grouped.flops == 2 * (2 * 4) * 8 * 9 * 8


def test_dtypes_count_by_their_bytes():
    single, double = (
        analyse(FusionSpec(Merge.CONCAT, (SourceSpec((2, 3), dtype),) * 2, Dense(4), dtype=dtype))
        for dtype in ("float32", "float64")
    )
    assert double.bytes_moved == 2 * single.bytes_moved
    assert double.flops == single.flops


def test_intensity_and_roofline():
    fused = analyse(FusionSpec(Merge.ADD, (nhwc(4, 8),), Dense(16)))
    moved = 4 * (32 + 128 + 64)
    assert fused.intensity == 2 * 4 * 8 * 16 / moved
    assert fused.roofline_s(peak_flops=1.0, bandwidth=1e9) == 1024.0
    assert fused.roofline_s(peak_flops=1e12, bandwidth=1.0) == moved
    assert analyse(FusionSpec(Merge.ADD, (nhwc(0, 8),))).intensity == 0.0


def test_cost_is_frozen():
    fused = analyse(FusionSpec(Merge.ADD, (nhwc(4, 8),), Dense(16)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        fused.params = 1


@pytest.mark.parametrize("sources", [2, 3, 5])
def test_add_needs_one_nth_of_concat(sources):
    spec = FusionSpec(Merge.CONCAT, (nhwc(1, 4, 6, 8),) * sources, Conv2d(5, 3, 3))
    ratio = add_over_concat(spec)
    assert ratio.params == ratio.merged_bytes == Fraction(1, sources)
    assert ratio == add_over_concat(other_merge(spec))
    contraction, sums = 2 * 2 * 4 * 5 * 9 * 8, (sources - 1) * 192
    assert ratio.flops == Fraction(contraction + sums, sources * contraction)


def test_empty_batch_costs_the_same_either_way():
    ratio = add_over_concat(FusionSpec(Merge.CONCAT, (nhwc(0, 4, 6, 8),) * 2, Conv2d(5, 3, 3)))
    assert (ratio.flops, ratio.merged_bytes) == (1, 1)


def test_other_merge_refuses_what_cannot_be_compared():
    with pytest.raises(SpecError, match="3, 40 channels cannot be added"):
        other_merge(FusionSpec(Merge.CONCAT, (nhwc(1, 4, 6, 3), nhwc(1, 4, 6, 40)), Conv2d(5, 3, 3)))
    with pytest.raises(SpecError, match="no filters"):
        other_merge(FusionSpec(Merge.ADD, (nhwc(4, 6),) * 2))


@every_problem
def test_fusing_never_moves_more_nor_needs_more_memory(problem):
    fused = analyse(problem.spec, scratch_bytes=100)
    other = fused.materialised
    assert fused.bytes_read <= other.bytes_read
    assert fused.bytes_written <= other.bytes_written
    assert fused.peak_bytes == 100 <= other.peak_bytes
    assert (fused.params, fused.flops) == (other.params, other.flops)


@every_problem
def test_materialised_traffic_is_the_sum_of_its_passes(problem):
    """The same figure from another side: each pass is a problem of its own, and their traffic adds up."""
    spec = problem.spec
    passes, maps = [], []
    for source in spec.sources:
        shape = source.upsampled_shape(spec.layout)
        if source.upsample != (1, 1) and len(spec.sources) > 1:
            alone = dataclasses.replace(source, weight=None, scale=False, shift=False, activation=None)
            passes.append(FusionSpec(Merge.ADD, (alone,), dtype=source.dtype, layout=spec.layout))
            source = dataclasses.replace(source, shape=shape, upsample=(1, 1))
        maps.append(source)
    merge = FusionSpec(spec.merge, tuple(maps), dtype=spec.dtype, layout=spec.layout, axis=spec.channel_axis)
    if spec.contraction is None:
        passes.append(merge)
    else:
        merged = SourceSpec(spec.merged_shape, spec.dtype)
        if len(maps) == 1 and maps[0].is_plain:
            merged = maps[0]
        else:
            passes.append(merge)
        passes.append(dataclasses.replace(spec, sources=(merged,), residual=None, return_sum=False))
        if spec.residual is not None:
            result = SourceSpec(spec.out_shape, spec.dtype)
            residual = spec.residual
            if residual.upsample != (1, 1):
                alone = dataclasses.replace(residual, weight=None)
                passes.append(FusionSpec(Merge.ADD, (alone,), dtype=spec.dtype, layout=spec.layout))
                shape = residual.upsampled_shape(spec.layout)
                residual = dataclasses.replace(residual, shape=shape, upsample=(1, 1))
            axis = spec.channel_axis
            passes.append(FusionSpec(Merge.ADD, (result, residual), dtype=spec.dtype, layout=spec.layout, axis=axis))
    expected = [analyse(each) for each in passes]
    unfused = analyse(spec).materialised
    assert unfused.bytes_read == sum(each.bytes_read for each in expected)
    assert unfused.bytes_written == sum(each.bytes_written for each in expected)
    assert unfused.params == sum(each.params for each in expected)
    assert unfused.contraction_flops == sum(each.contraction_flops for each in expected)
