"""Facts about a processor, as plain frozen data, so that plans can be computed and checked on any machine.

Nothing here queries a machine: each backend builds the `Device` of its host; the named profiles serve the tests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CpuDevice:
    """What the CPU kernels plan with.

    vector_bytes       width of one vector register, bytes
    vector_registers   architectural vector registers (16 on SSE and AVX2, 32 on AVX-512 and NEON)
    fma                whether a fused multiply-add is one instruction
    l1_bytes … l3_bytes   data cache of one core (L1, L2) and the share of the last level all cores see (L3), bytes
    cores              that the process may use
    """

    name: str
    vector_bytes: int
    vector_registers: int
    fma: bool
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    cores: int


KIB = 1024
MIB = 1024 * KIB

AVX512_SERVER = CpuDevice("avx512-server", 64, 32, True, 48 * KIB, 2 * MIB, 105 * MIB, 16)
AVX2_LAPTOP = CpuDevice("avx2-laptop", 32, 16, True, 32 * KIB, 512 * KIB, 16 * MIB, 8)
NEON_PHONE = CpuDevice("neon-phone", 16, 32, True, 64 * KIB, 512 * KIB, 4 * MIB, 4)
SSE2_GENERIC = CpuDevice("sse2-generic", 16, 16, False, 32 * KIB, 256 * KIB, 2 * MIB, 2)

CPU_PROFILES = (AVX512_SERVER, AVX2_LAPTOP, NEON_PHONE, SSE2_GENERIC)


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """What the GPU kernels plan with.

    capability          compute capability, (major, minor)
    multiprocessors     of the device
    registers           32-bit registers of a multiprocessor
    shared_bytes        shared memory of a multiprocessor, of which a block may use `block_shared_bytes`
    threads             resident on a multiprocessor at most
    l2_bytes            the cache that all multiprocessors share
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    registers: int
    shared_bytes: int
    block_shared_bytes: int
    threads: int
    l2_bytes: int


A100 = GpuDevice("a100", (8, 0), 108, 65536, 164 * KIB, 163 * KIB, 2048, 40 * MIB)
RTX_4090 = GpuDevice("rtx-4090", (8, 9), 128, 65536, 100 * KIB, 99 * KIB, 1536, 72 * MIB)
H100 = GpuDevice("h100", (9, 0), 132, 65536, 228 * KIB, 227 * KIB, 2048, 50 * MIB)
H200 = GpuDevice("h200", (9, 0), 132, 65536, 228 * KIB, 227 * KIB, 2048, 60 * MIB)

GPU_PROFILES = (A100, RTX_4090, H100, H200)
