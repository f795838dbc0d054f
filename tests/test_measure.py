"""The arms of a comparison: that they compute what they say, and that their time and memory are measured as stated."""

from dataclasses import replace

import numpy as np
import pytest

import fusionops as fo
from fusionops.compare import measure, selftest
from fusionops.compare.instance import build, explain, normal_numbers, small_integers
from fusionops.compare.measure import FUSED, MATERIALISED, Arm
from fusionops.compare.workloads import WORKLOADS, Map, Workload
from fusionops.spec import Merge
from fusionops.testing import PROBLEMS, exact_operands

ADD, CONCAT = Merge.ADD, Merge.CONCAT
MIB = 2**20

by_workload = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))


def test_rounds_take_turns(monkeypatch):
    """Three arms, two rounds: each round begins with the next arm, and each turn runs its arm once untimed first."""
    monkeypatch.setattr(measure, "TURN_S", 0.0)
    calls = []
    arms = [Arm(ADD, name, lambda name=name: calls.append(name), np.empty(0), "", None) for name in "abc"]
    advanced = []
    times = measure.rounds(arms, 2, lambda: advanced.append(1))
    assert "".join(calls) == "aabbcc" + "bbccaa"
    assert [len(each) for each in times] == [2, 2, 2]
    assert all(time.seconds > 0 and time.host_s is None for each in times for time in each)
    assert len(advanced) == 6


def test_differences_sees_one_bit_and_what_was_not_written():
    out = np.zeros(4, "f4")

    def fused():
        out[:] = 1.0

    def last_bit():
        out[:] = [1, 1, np.nextafter(np.float32(1), np.float32(2)), 1]

    def nothing():
        out[:3] = 1.0

    def arms(other):
        return [Arm(ADD, FUSED, fused, out, "", None), Arm(ADD, MATERIALISED, other, out, "", None)]

    assert measure.differences(arms(fused)) == []
    assert measure.differences(arms(last_bit)) == ["add: 1 of 4 results differ, by up to 1.19e-07"]
    assert "add materialised: some results were never written" in measure.differences(arms(nothing))


def test_what_fails_on_a_gpu_is_known_by_its_arm():
    """An error of CUDA; a refusal, and whatever happens on the CPU, stay what they are."""

    def fail(error):
        def run():
            raise error

        return run

    for backend, error, expected in (
        ("gpu", RuntimeError("an illegal address"), "add fused failed on the GPU: an illegal address"),
        ("gpu", fo.UnsupportedError("no kernel"), "^no kernel"),
        ("cpu", RuntimeError("out of stack"), "^out of stack"),
    ):
        arm = Arm(ADD, FUSED, fail(error), np.zeros(3, np.float32), "", None, backend)
        with pytest.raises(RuntimeError, match=expected) as caught:
            measure.differences([arm])
        assert isinstance(caught.value, fo.BackendError) == ("failed on the GPU" in expected)


@pytest.mark.parametrize("workload", [workload for workload in WORKLOADS.values() if workload.residual is not None][:1])
def test_a_residual_of_narrow_numbers_may_be_added_to_rounded_ones(workload):
    """But to nothing further off."""
    arms = measure.arms(build(replace(workload, dtype="float16"), normal_numbers()))
    assert measure.differences(arms) == []
    spoiled = [replace(arm, run=lambda: arms[0].out.fill(1)) if arm.way == MATERIALISED else arm for arm in arms]
    assert len(measure.differences(spoiled)) == len(spoiled) // 2


def test_traced_peak_is_what_a_call_allocates():
    kept = []
    size = 5 * MIB
    assert size <= measure.traced_peak(lambda: kept.append(np.empty(size, np.uint8).size)) < size + MIB


def test_traced_peak_counts_scratch_memory_that_calls_keep():
    workload = SMALL_WORKLOADS[0]
    arm = measure.arms(build(workload, normal_numbers()))[0]
    for _ in range(2):
        assert measure.traced_peak(arm.run) >= explain(workload, arm.merge).config.scratch_bytes > 0


@pytest.mark.parametrize("merge", [ADD, CONCAT])
def test_fused_memory_is_bounded_and_the_merged_map_is_not_in_it(merge):
    """U-Net's first level, 392 × 392 × (64 + 64), whose concat is 75 MiB; in a process of its own."""
    workload = WORKLOADS["unet_valid_l1"]
    fused, stored = (
        measure.memory_peak(workload, merge, way, backend=None, threads=None) for way in (FUSED, MATERIALISED)
    )
    merged_bytes = 4 * 392 * 392 * (64 if merge is ADD else 128)
    assert fused.traced <= 12 * MIB
    assert stored.traced >= merged_bytes
    if fused.resident is not None:
        assert fused.resident <= 12 * MIB
        assert stored.resident >= merged_bytes - MIB  # the C library may have had a page or two of it already


def test_child_that_fails_says_why():
    broken = replace(WORKLOADS["keras_conv"], K=-1)
    with pytest.raises(fo.BackendError, match=r"memory of add fused failed: \w+"):
        measure.memory_peak(broken, ADD, FUSED, backend=None, threads=None)


# workloads


# Multiply-adds of one call in millions, worked out from the layers' extents.
MILLIONS = {
    ("keras_conv", CONCAT): "1208.0",
    ("keras_conv", ADD): "604.0",
    ("unet256_l1", CONCAT): "4832",
    ("unet256_l4", CONCAT): "4832",
    ("unet512_l2", CONCAT): "19327",
    ("unet_valid_l4", CONCAT): "13759",
    ("unet_valid_l1", CONCAT): "11214",
    ("fpn_p4_out", ADD): "2477",
    ("fpn_p2_out", ADD): "39636",
    ("fpn_lateral_p2", ADD): "4404",
    ("resnet_l2", ADD): "51.4",
    ("resnet_l5", ADD): "51.4",
    ("densenet_b1_l6", CONCAT): "89.9",
    ("densenet_b4_l16", CONCAT): "6.2",
    ("yolov8s_p4_td", CONCAT): "315",
    ("yolov8s_p5_bu", CONCAT): "157",
    ("yolov5s_p3_td", CONCAT): "105",
    ("lstm_256", CONCAT): "0.52",
    ("lstm_650", CONCAT): "67.6",
}


@by_workload
def test_workload_is_valid_on_every_merge(workload):
    """Judged without allocating an array; two source maps of different size would be refused."""
    assert workload.network
    assert workload.merge in workload.merges
    for merge in workload.merges:
        explained = explain(workload, merge)
        assert explained.spec.out_shape[0] == workload.N
        assert (explained.cost.bytes_moved < explained.cost.materialised.bytes_moved) == workload.ways_differ
        if (workload.name, merge) in MILLIONS:
            figure = MILLIONS[workload.name, merge]
            decimals = len(figure.partition(".")[2])
            assert f"{explained.cost.contraction_flops / 2e6:.{decimals}f}" == figure


def test_figures_name_existing_workloads():
    assert {name for name, _ in MILLIONS} <= set(WORKLOADS)


SMALL_WORKLOADS = (
    Workload("plain", CONCAT, (Map(5, 6, 8), Map(5, 6, 8)), 7, activation="relu"),
    Workload("upsampled", CONCAT, (Map(5, 3, 4, upsample=2), Map(3, 6, 8)), 7),
    Workload("nchw", CONCAT, (Map(5, 3, 4, upsample=2), Map(5, 6, 8, border=1)), 7, layout="NCHW", stride=(2, 1)),
    Workload("cropped", CONCAT, (Map(5, 6, 8), Map(5, 6, 8, border=2)), 7, padding="valid", dtype="float64"),
    Workload("dense", CONCAT, (Map(5), Map(4)), 7, None, N=3, activation="relu"),
    Workload("residual", ADD, (Map(5, 6, 8),), 7, (1, 1), residual=Map(7, 6, 8), activation="relu"),
    Workload("residual_up", ADD, (Map(5, 6, 8),), 7, (1, 1), residual=Map(7, 3, 4, upsample=2)),
    Workload("weighted", ADD, (Map(5, 3, 4, upsample=2), Map(5, 6, 8)), weights=True, activation="silu"),
    Workload("streams", ADD, (Map(5, 6, 8), Map(5, 6, 8))),
)


@pytest.mark.parametrize("workload", SMALL_WORKLOADS, ids=lambda workload: workload.name)
def test_ways_have_the_same_bits_and_the_reference_agrees(workload):
    assert measure.differences(measure.arms(build(workload, normal_numbers()))) == []
    exact = replace(workload, activation="relu", weights=False)
    computed, expected = (build(exact, small_integers(), backend) for backend in (None, "reference"))
    for merge in exact.merges:
        computed.fused(merge)
        expected.fused(merge)
        assert np.count_nonzero(expected.outs[merge]) > expected.outs[merge].size // 4
        np.testing.assert_array_equal(computed.outs[merge], expected.outs[merge])


def test_cropped_map_is_a_view_of_a_larger_one():
    cropped = build(SMALL_WORKLOADS[3], normal_numbers()).maps[1]
    assert cropped.shape == (1, 6, 8, 5)
    assert cropped.strides[1] == 12 * 5 * 8


# the self-test


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_self_test_asks_for_the_problem_it_names(problem):
    """The public call binds to the very spec, but for `strict` where the op has no such option."""
    operands = exact_operands(problem.spec, np.random.default_rng(0))
    op, arguments, options = selftest.call(problem.spec, operands)
    bound = fo.explain(op, *arguments, **options, backend="reference").spec
    if "strict" not in options:
        bound = replace(bound, strict=problem.spec.strict)
    assert bound == problem.spec
