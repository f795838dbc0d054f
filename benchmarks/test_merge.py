"""Add against concat, fused and materialised, on layers of known networks, on each backend; NumPy where it has the op.

Every arm is proved before it is timed: exactly on integers at sampled positions, and bit for bit against the fused one.
"""

from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import pytest
from sampling import assert_exact

from fusionops.compare import measure
from fusionops.compare.instance import build, normal_numbers
from fusionops.compare.measure import FUSED, MATERIALISED, Arm
from fusionops.compare.workloads import WORKLOADS
from fusionops.spec import Merge

NUMPY = "numpy"
NAMES = (
    "keras_dense",
    "keras_conv",
    "unet256_l4",
    "unet256_l3",
    "unet256_l2",
    "unet256_l1",
    "unet256_l2_up",
    "unet256_l1_up",
    "fpn_p4_out",
    "fpn_p3_out",
    "fpn_upadd_p3",
    "resnet_l2",
    "resnet_l4",
    "densenet_b2_l7",
    "yolov8s_p4_td",
    "yolov8s_p3_td",
    "stream_4mb",
    "stream_64mb",
)


def ways(workload, backend):
    yield FUSED
    if workload.ways_differ:
        yield MATERIALISED
    if workload.K is None and backend == "cpu":
        yield NUMPY


ARMS = [
    (name, merge, way, backend)
    for name in NAMES
    for backend in ("cpu", "gpu")
    for merge in WORKLOADS[name].merges
    for way in ways(WORKLOADS[name], backend)
]
PARAMETERS = [pytest.param(*arm, id="-".join(arm), marks=pytest.mark.gpu if arm[-1] == "gpu" else ()) for arm in ARMS]
EXACT = ("relu", None)


def numpy_merge(instance, merge):
    """The same merge in NumPy alone, into the same array."""
    maps = [
        array if m.upsample == 1 else array.repeat(m.upsample, axis=1).repeat(m.upsample, axis=2)
        for array, m in zip(instance.maps, instance.workload.maps, strict=True)
    ]
    if merge is Merge.ADD:
        np.add(*maps, out=instance.outs[merge])
    else:
        np.concatenate(maps, axis=-1, out=instance.outs[merge])


RUNS = {
    FUSED: lambda instance, merge: instance.fused(merge),
    MATERIALISED: lambda instance, merge: instance.materialised(merge),
    NUMPY: numpy_merge,
}


@lru_cache(maxsize=1)
def instance_of(name, backend):
    """The arrays of a workload; only the latest are kept."""
    return build(WORKLOADS[name], normal_numbers(), backend)


def arm_of(name, merge, way, backend):
    instance = instance_of(name, backend)
    arms = {(arm.merge, arm.way): arm for arm in measure.arms(instance)}
    fused = arms[merge, FUSED]
    if way == NUMPY:
        return Arm(merge, NUMPY, partial(numpy_merge, instance, merge), fused.out, NUMPY, fused.cost.materialised)
    return arms[merge, way]


@pytest.mark.benchmark(min_rounds=5, max_time=0.4, disable_gc=True)
@pytest.mark.parametrize(("name", "merge", "way", "backend"), PARAMETERS)
def test_merge(record, name, merge, way, backend):
    workload = WORKLOADS[name]
    exact = workload if workload.activation in EXACT else replace(workload, activation=None)
    assert_exact(exact, merge, lambda instance: RUNS[way](instance, merge), backend)
    arm = arm_of(name, merge, way, backend)
    assert measure.differences([arm_of(name, merge, FUSED, backend), arm]) == []
    record(workload, arm, measure.allocated_peak(arm).traced)
