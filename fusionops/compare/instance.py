"""A workload with arrays, and the two ways to compute it: fused, and with every map in between stored.

Measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fusionops as fo
from fusionops import gpu
from fusionops.compare.workloads import Map, Workload
from fusionops.errors import BackendError
from fusionops.gpu.module import runtime
from fusionops.spec import Merge

Array = Any  # NumPy's or CuPy's, as the backend has it
Fill = Callable[[tuple[int, ...], str], Array]

NHWC_AXES = (0, 2, 3, 1)  # shows an NCHW map as NHWC


def normal_numbers(seed: int = 0) -> Fill:
    rng = np.random.default_rng(seed)

    def fill(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
        drawn = np.float32 if dtype == "float16" else np.dtype(dtype).type  # NumPy draws no narrower ones
        return rng.standard_normal(shape, drawn).astype(dtype, copy=False)

    return fill


def small_integers(seed: int = 0) -> Fill:
    """Integers in [-4, 4], whose float32 sums are exact in any order as long as 16 · terms · sources < 2²⁴."""
    rng = np.random.default_rng(seed)
    return lambda shape, dtype: rng.integers(-4, 5, shape, np.int8).astype(dtype)


def library(backend: str | None) -> Any:
    """The array library of a backend: CuPy or NumPy. Raises BackendError where there is no GPU to use."""
    if backend != "gpu":
        return np
    if reasons := gpu.reasons_unusable():
        raise BackendError(f"the gpu backend cannot be used here: {'; '.join(reasons)}")
    return runtime().arrays


def to_backend(array: np.ndarray[Any, Any], backend: str | None) -> Array:
    """The array where a backend takes it: copied for a GPU, whatever its dtype means to CuPy."""
    arrays = library(backend)
    return array if arrays is np else arrays.asarray(array.view(f"u{array.itemsize}")).view(array.dtype)


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """The numbers of an array, which is copied if it lies on a GPU."""
    if isinstance(array, np.ndarray):
        return array
    return np.asarray(library("gpu").asnumpy(array.view(f"u{array.itemsize}"))).view(array.dtype)


def explain(workload: Workload, merge: Merge, backend: str | None = None) -> Any:
    """What the fused way would run, and what both ways cost. Judges the workload; allocates none of its arrays."""
    arrays = library(backend)

    def shape_only(shape: tuple[int, ...], dtype: str) -> Array:
        """Zeros that take no memory: every element is the same one."""
        return arrays.broadcast_to(arrays.zeros((), dtype), shape)

    instance = Instance(workload, shape_only, backend)
    instance.filters[merge] = shape_only(workload.filter_shape(merge), workload.dtype)
    op, arguments, options = instance.call(merge)
    return fo.explain(op, *arguments, **options)


def build(workload: Workload, fill: Fill, backend: str | None = None) -> Instance:
    """A workload with numbers. Raises SpecError and the like before it allocates anything."""
    results = {merge: explain(workload, merge, backend).spec for merge in workload.merges}
    instance = Instance(workload, fill, backend)
    filters = instance.arrays.asarray(fill(workload.filter_shape(Merge.CONCAT), workload.dtype))
    for merge, spec in results.items():
        if workload.K is not None:
            block = filters[workload.filter_block(merge)]
            instance.filters[merge] = fo.prepack(block, layout=workload.layout)
        instance.outs[merge] = instance.arrays.empty(spec.out_shape, workload.dtype)
        instance.outs[merge].fill(0)
    return instance


class Instance:
    """The arrays of a workload: every merge and way computes from the same maps; so does every backend.

    arrays    the library they are of, in whose memory the numbers of `fill` are put
    filters   of an ADD are the first block of those of the CONCAT; packed beforehand, as weights that stay the same are
    outs      one result for each merge, in memory that the process already holds
    """

    def __init__(self, workload: Workload, fill: Fill, backend: str | None) -> None:
        self.workload = workload
        self.backend = backend
        self.arrays = library(backend)
        self.maps = [self._map(fill, m) for m in workload.maps]
        self.residual = None if workload.residual is None else self._map(fill, workload.residual)
        self.bias = None if workload.K is None else self.arrays.asarray(fill((workload.K,), workload.dtype))
        self.weights = [1.0 / (1 + i) for i in range(len(self.maps))] if workload.weights else None
        self.filters: dict[Merge, Any] = {}
        self.outs: dict[Merge, Array] = {}

    def _map(self, fill: Fill, m: Map) -> Array:
        N, dtype = self.workload.N, self.workload.dtype
        if self.workload.is_dense:
            return self.arrays.asarray(fill((N, m.C), dtype))
        H, W = m.H + 2 * m.border, m.W + 2 * m.border
        rows, columns = slice(m.border, m.border + m.H), slice(m.border, m.border + m.W)
        if self.workload.layout == "NCHW":
            return self.arrays.asarray(fill((N, m.C, H, W), dtype))[:, :, rows, columns]
        return self.arrays.asarray(fill((N, H, W, m.C), dtype))[:, rows, columns]

    def fused(self, merge: Merge) -> None:
        op, arguments, options = self.call(merge)
        getattr(fo, op)(*arguments, **options, out=self.outs[merge])

    def call(self, merge: Merge) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """Op, arguments and options of the fused way."""
        sources = [self._source(array, m) for array, m in zip(self.maps, self.workload.maps, strict=True)]
        if self.workload.K is None:
            return self._merge_call(merge, sources)
        options = self._contraction_options()
        if self.residual is not None:
            assert self.workload.residual is not None
            options["residual"] = self._source(self.residual, self.workload.residual)
        arguments = (sources, self.filters[merge], self.bias)
        return self._contraction_name(merge), arguments, options | {"activation": self.workload.activation}

    def materialised(self, merge: Merge) -> None:
        """Each box in a pass of its own: upsample, merge, contract, add the residual."""
        workload, out = self.workload, self.outs[merge]
        maps = [self._upsampled(array, m) for array, m in zip(self.maps, workload.maps, strict=True)]
        if workload.K is None:
            op, arguments, options = self._merge_call(merge, maps)
            getattr(fo, op)(*arguments, **options, out=out)
            return
        merged = maps[0]
        if len(maps) > 1:
            op, arguments, options = self._merge_call(merge, maps)
            merged = getattr(fo, op)(*arguments, **options)
        contract = getattr(fo, self._contraction_name(merge))
        activation = {} if workload.residual else {"activation": workload.activation}
        contract([merged], self.filters[merge], self.bias, **self._contraction_options(), **activation, out=out)
        if self.residual is not None:
            assert workload.residual is not None
            above = self._upsampled(self.residual, workload.residual)
            fo.add([out, above], activation=workload.activation, out=out, backend=self.backend)

    def _contraction_name(self, merge: Merge) -> str:
        return f"{merge}_{'dense' if self.workload.is_dense else 'conv'}"

    def _contraction_options(self) -> dict[str, Any]:
        workload = self.workload
        if workload.is_dense:
            return {"backend": self.backend}
        convolution = {"stride": workload.stride, "padding": workload.padding, "layout": workload.layout}
        return convolution | {"backend": self.backend}

    def _merge_call(self, merge: Merge, sources: list[Any]) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        options: dict[str, Any] = {"backend": self.backend}
        if merge is Merge.CONCAT:
            return "concat", (sources,), options | {"axis": self.workload.channel_axis}
        if self.workload.K is None:
            options |= {"activation": self.workload.activation}
        if self.weights is not None:
            options |= {"weights": self.weights, "normalize": "relu"}
        return "add", (sources,), options

    def _source(self, array: Array, m: Map) -> Any:
        return array if m.upsample == 1 else fo.Source(array, upsample=m.upsample)

    def _upsampled(self, array: Array, m: Map) -> Array:
        """The map in full size, in its own layout; `add` upsamples NHWC maps, so NCHW is shown to it as one."""
        if m.upsample == 1:
            return array
        if self.workload.layout == "NHWC":
            return fo.add([fo.Source(array, upsample=m.upsample)], backend=self.backend)
        N, C, H, W = array.shape
        full = self.arrays.empty((N, C, H * m.upsample, W * m.upsample), array.dtype)
        source = fo.Source(array.transpose(NHWC_AXES), upsample=m.upsample)
        fo.add([source], out=full.transpose(NHWC_AXES), backend=self.backend)
        return full
