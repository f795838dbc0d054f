"""Stands for the module `torch` where there is no GPU: tensors on one, as far as other libraries lend and borrow."""

from __future__ import annotations

from typing import Any, NoReturn

import fake_cupy


class Tensor:
    """A tensor on the memory of a CuPy array; of another device type of DLPack it is on no GPU."""

    def __init__(self, array: Any, device_type: int = 2) -> None:
        self.array, self.device_type = array, device_type

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, 0

    def __dlpack__(self, **options: Any) -> fake_cupy.ndarray:
        capsule: fake_cupy.ndarray = self.array.__dlpack__()
        return capsule

    @property
    def __cuda_array_interface__(self) -> NoReturn:
        raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")


def from_dlpack(array: fake_cupy.ndarray) -> Tensor:
    """In PyTorch its stream also waits for what CuPy's has been given, which is why calls are counted here."""
    array.lent_times = getattr(array, "lent_times", 0) + 1
    return Tensor(array)
