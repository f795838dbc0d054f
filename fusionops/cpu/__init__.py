"""The CPU backend: kernels in Numba, fastest first, the total kernels last. Knows no other backend."""

from __future__ import annotations

from fusionops.address import HEADERS_ARE_KNOWN
from fusionops.cpu import amx, commuted, depthwise, direct, dots, gemm, grouped, stream, winograd
from fusionops.cpu.guard import Guards
from fusionops.cpu.host import device, facts, reasons_unusable, warmup
from fusionops.cpu.probe import copy_bandwidth, fma_peak
from fusionops.cpu.threads import get_num_threads, set_num_threads

KERNELS = (
    *amx.KERNELS,
    *commuted.KERNELS,
    *depthwise.KERNELS,
    *grouped.KERNELS,
    *dots.KERNELS,
    *gemm.KERNELS,
    *winograd.KERNELS,
    *direct.KERNELS,
    *stream.KERNELS,
)

GUARDS = Guards if HEADERS_ARE_KNOWN else None  # they read arrays where `address` says

__all__ = [
    "GUARDS",
    "KERNELS",
    "copy_bandwidth",
    "device",
    "facts",
    "fma_peak",
    "get_num_threads",
    "reasons_unusable",
    "set_num_threads",
    "warmup",
]
