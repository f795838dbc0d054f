"""The processor that Numba compiles for: its vector registers. Decides nothing."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import llvmlite.binding
import numba


@dataclass(frozen=True, slots=True)
class Target:
    """machine as the operating system names it; bytes of a vector register, and how many.

    fma, converts_half   whether it has instructions for x·y + z, and from float16 to float32 and back
    tiles                whether it multiplies tiles of bfloat16 (Intel's AMX)
    """

    machine: str
    vector_bytes: int
    vector_registers: int
    fma: bool
    converts_half: bool
    tiles: bool

    @property
    def is_x86(self) -> bool:
        return self.machine in ("x86_64", "amd64")


def _features() -> frozenset[str]:
    """The features that numba compiles for, which NUMBA_CPU_FEATURES can narrow."""
    if numba.config.CPU_FEATURES is not None:
        return frozenset(word[1:] for word in numba.config.CPU_FEATURES.split(",") if word.startswith("+"))
    if numba.config.CPU_NAME and llvmlite.binding.get_host_cpu_name() != numba.config.CPU_NAME:
        return frozenset()
    return frozenset(name for name, present in llvmlite.binding.get_host_cpu_features().items() if present)


@functools.cache
def target() -> Target:
    features = _features()
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return Target(machine, 16, 32, fma=True, converts_half=machine in ("aarch64", "arm64"), tiles=False)  # NEON
    if {"avx512f", "avx512vl"} <= features:
        vector_bytes, registers = 64, 32
    elif "avx2" in features:
        vector_bytes, registers = 32, 16
    else:
        vector_bytes, registers = 16, 16
    converts_half, tiles = bool({"f16c", "avx512f"} & features), {"amx-tile", "amx-bf16"} <= features
    return Target(machine, vector_bytes, registers, "fma" in features, converts_half, tiles)
