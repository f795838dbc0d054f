"""The runtime that executes the GPU backend's CUDA C on the host, on NumPy arrays, for the tests of kernels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from host_cuda.module import HostModule

from fusionops.gpu import grouped, igemm, mma, module, sm90, stream
from fusionops.gpu.params import CAPACITIES

SYMBOLS = {kernels.SOURCE: kernels.SYMBOLS for kernels in (stream, igemm, mma, grouped, sm90)}
TENSOR_MAP = np.dtype([
    ("base", "u8"), ("steps", "u8", 4), ("extents", "u4", 5), ("box", "u4", 5), ("rank", "u4"), ("bytes", "u4"),
    ("rest", "V40"),
])  # fmt: skip


@functools.cache
def _functions(source: str, sanitize: bool) -> Any:
    """The instantiations of a source, compiled together: all, or for the sanitizer, which takes long, half."""
    names = [name for name in SYMBOLS[source] if not sanitize or name.endswith(f", {CAPACITIES[0]}>")]
    code = module.read_source(source)
    return HostModule(code, host_flags(), names, sanitize=sanitize, checks_alignment=sanitize)


def host_flags() -> tuple[str, ...]:
    """The backend's own but for contraction, which the host compiler never does."""
    return tuple(flag for flag in module.FLAGS if flag != "-fmad=false")


class HostRuntime:
    """As `fusionops.gpu.module.Runtime`."""

    arrays = np

    def __init__(self, *, sanitize: bool = False) -> None:
        self.sanitize = sanitize
        self.launched: list[str] = []
        self.waited = 0

    def function(self, source: str, name: str) -> Any:
        self.launched.append(name)
        return _functions(source, self.sanitize).get_function(name)

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def tensor_map(
        self, dtype: str, address: int, extents: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...]
    ) -> bytes:
        """What primitives_sm90.cuh makes of a tensor map on the host; refuses what the driver would."""
        rank = len(extents)
        assert len(steps) == rank - 1
        assert len(box) == rank
        assert address % 16 == 0
        assert all(0 < step < 2**40 and step % 16 == 0 for step in steps)
        assert all(0 < extent < 2**32 for extent in extents)
        assert all(0 < part <= 256 for part in box)
        assert box[0] * np.dtype(dtype).itemsize == 128
        map_ = np.zeros(1, TENSOR_MAP)[0]
        map_["base"], map_["rank"], map_["bytes"] = address, rank, np.dtype(dtype).itemsize
        map_["steps"][: rank - 1], map_["extents"][:rank], map_["box"][:rank] = steps, extents, box
        return map_.tobytes()

    def wait(self) -> None:
        self.waited += 1
