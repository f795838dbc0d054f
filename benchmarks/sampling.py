"""What a workload must give at some output positions, from the equation itself: the proof that precedes a timing.

Independent of the library: NumPy, one position at a time, in float64, where small integers are exact.
"""

import numpy as np

from fusionops.compare.instance import build, explain, small_integers, to_numpy
from fusionops.compare.workloads import Workload
from fusionops.spec import Merge, same_padding

POSITIONS = 12  # besides the corners
REWRITES = ("winograd", "commuted")  # in the names of kernels
QUARTER = 0.25  # of the distance of one integer from the next


def assert_exact(workload: Workload, merge: Merge, run, backend: str = "cpu") -> None:
    """`run(instance)` on a backend must write exactly what the equation says at the corners and some other positions.

    A kernel that forms other products than the equation's rounds them; it must come within a QUARTER of the integer.
    Activations that are not exact on integers are left out: the tests of the kernels bound them.
    """
    explanation = explain(workload, merge, backend)
    spec, rewrites = explanation.spec, any(word in explanation.kernel for word in REWRITES)
    instance = build(workload, small_integers(), backend)
    instance.outs[merge].fill(np.nan)
    run(instance)
    out = to_numpy(instance.outs[merge])
    numbers = instance if backend == "cpu" else build(workload, small_integers(), "cpu")  # the same, in NumPy
    rng = np.random.default_rng(1)
    extents = spec.out_shape[:-1]
    corners = [[0] * len(extents), [extent - 1 for extent in extents]]
    for position in [*corners, *(rng.integers(extents) for _ in range(POSITIONS))]:
        position = tuple(int(index) for index in position)
        actual, right = out[position], expected(numbers, merge, position)
        if rewrites:
            assert (np.abs(actual - right) <= QUARTER).all(), (workload.name, position)
        else:
            np.testing.assert_array_equal(actual, right, str((workload.name, position)))


def expected(instance, merge, position):
    """The channels of one output pixel, in float64."""
    workload = instance.workload
    if workload.K is None:
        result = pixel(instance, merge, position)
    else:
        filters = instance.filters[merge].array.astype(np.float64)
        if workload.is_dense:
            result = pixel(instance, merge, position) @ filters
        else:
            result = window(instance, merge, position, filters)
        result = result + instance.bias
    if instance.residual is not None:
        result = result + at(instance.residual, workload.residual, position)
    return np.maximum(result, 0) if workload.activation == "relu" else result


def window(instance, merge, position, filters):
    """The sum over the taps of one placement of the filters, stride 1 and same padding."""
    R, S = filters.shape[:2]
    n, p, q = position
    source = instance.workload.maps[0]
    H, W = source.H * source.upsample, source.W * source.upsample
    top, left = (same_padding(size, taps, stride=1, dilation=1)[0] for size, taps in ((H, R), (W, S)))
    total = 0
    for r in range(R):
        for s in range(S):
            h, w = p + r - top, q + s - left
            if 0 <= h < H and 0 <= w < W:
                total = total + pixel(instance, merge, (n, h, w)) @ filters[r, s]
    return total


def pixel(instance, merge, position):
    """The channels of one pixel of the merged map."""
    pixels = [at(array, m, position) for array, m in zip(instance.maps, instance.workload.maps, strict=True)]
    return sum(pixels) if merge is Merge.ADD else np.concatenate(pixels)


def at(array, m, position):
    """The channels of one pixel of a map, upsampled by repetition."""
    if len(position) == 3:
        n, h, w = position
        position = n, h // m.upsample, w // m.upsample
    return array[position].astype(np.float64)
