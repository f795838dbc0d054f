"""The runtime that executes the GPU backend's CUDA C on the host, on NumPy arrays, for the tests of kernels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from host_cuda.module import HostModule

from fusionops.gpu import igemm, mma, module, stream
from fusionops.gpu.params import CAPACITIES

SYMBOLS = {stream.SOURCE: stream.SYMBOLS, igemm.SOURCE: igemm.SYMBOLS, mma.SOURCE: mma.SYMBOLS}


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

    def wait(self) -> None:
        self.waited += 1
