"""The GPU backend: kernels on CuPy arrays, in CUDA C. Importing it imports no CuPy and compiles nothing."""

from __future__ import annotations

from fusionops.gpu import grouped, igemm, mma, sm90, stream
from fusionops.gpu.host import device, facts, machine_reasons, reasons_unusable
from fusionops.gpu.module import borrow, empty, on_device_of

__all__ = ["KERNELS", "borrow", "device", "empty", "facts", "machine_reasons", "on_device_of", "reasons_unusable"]

KERNELS = (*grouped.KERNELS, *sm90.KERNELS, *mma.KERNELS, *igemm.KERNELS, *stream.KERNELS)
