"""Prints what the CUDA kernels take and what their plans would ask of an H200, as the tables of docs/gpu-kernels.md.

    python benchmarks/gpu_resources.py

Arithmetic and the assembler's report alone: nothing runs on a GPU. Needs the wheel nvidia-cuda-nvrtc.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import ChainMap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_on_host import SYMBOLS
from host_cuda.nvrtc import Resources, compile_cubin

from fusionops import gpu
from fusionops.cost import analyse
from fusionops.device import H200
from fusionops.gpu import grouped, igemm, mma, module, sm90, stream
from fusionops.problems import conv, dense, in_dtype, join
from fusionops.problems.rows import ADD, CONCAT, Problem
from fusionops.spec import FusionSpec

ARCHS = ("sm_80", "sm_90a")
BLOCK_RESERVES = 1024  # bytes of shared memory that every block takes besides its own
# NVIDIA's data sheet of the H200 SXM: dense FLOP/s, and bytes/s of its memory.
PEAK_FLOPS = {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12}
BANDWIDTH = 4.8e12


@functools.cache
def resources(source: str, arch: str) -> dict[str, Resources]:
    names = [name for name in SYMBOLS[source] if name.endswith(", 4>")]
    flags = (*module.FLAGS, "-ftz=true")
    workers = os.cpu_count() or 1

    def part(i: int) -> dict[str, Resources]:
        return compile_cubin(module.read_source(source), arch, flags, names[i::workers]).kernels

    with ThreadPoolExecutor(workers) as pool:
        return dict(ChainMap(*pool.map(part, range(workers))))


def shared_bytes(source: str, name: str) -> int:
    """Dynamic shared memory of a block."""
    if source == mma.SOURCE:
        kind, _, filters, _ = name.split("<")[1].split(", ")
        return mma.block_shared_bytes("float32" if kind == "float" else "float16", int(filters))
    if source == sm90.SOURCE:
        return sm90.block_shared_bytes(int(name.split(", ")[2]))
    if source in (stream.SOURCE, grouped.SOURCE):
        return 0
    dtype, _, *extents, _ = name.removeprefix("conv_fprop_igemm<").removesuffix(">").split(", ")
    return igemm.Tile(*map(int, extents)).shared_bytes(8 if dtype == "double" else 4)


def threads_of(source: str) -> int:
    return sm90.THREADS if source == sm90.SOURCE else 256


def resident_blocks(registers: int, shared: int, threads: int) -> int:
    """Of a multiprocessor of an H200."""
    by_shared = H200.shared_bytes // (shared + BLOCK_RESERVES)
    return min(H200.registers // (-(-registers // 8) * 8 * threads), H200.threads // threads, by_shared)


def kernels() -> Iterator[str]:
    yield "| kernel | registers sm_80 | sm_90a | spills | shared, KiB | blocks of an SM, H200 |"
    yield "|---|---|---|---|---|---|"
    for source in SYMBOLS:
        found = [resources(source, arch) for arch in (ARCHS[1:] if source == sm90.SOURCE else ARCHS)]
        for name in sorted(found[-1]):
            spills = sum(each[name].spill_stores + each[name].spill_loads for each in found)
            shared = shared_bytes(source, name)
            registers = [each[name].registers for each in found]
            oldest = registers[0] if len(found) > 1 else "-"
            yield (f"| `{name}` | {oldest} | {registers[-1]} | {spills} | {shared / 1024:.1f} | "
                   f"{resident_blocks(registers[-1], shared, threads_of(source))} |")  # fmt: skip


def layers() -> Iterator[Problem]:
    for name, H, C, K, taps in (
        ("keras_conv", 128, 64, 64, 3),
        ("unet256_l4", 32, 512, 512, 3),
        ("unet256_l3", 64, 256, 256, 3),
        ("unet256_l2", 128, 128, 128, 3),
        ("unet256_l1", 256, 64, 64, 3),
        ("pointwise", 56, 256, 512, 1),
    ):
        for merge in (CONCAT, ADD):
            yield conv(name, merge, (C, C), K, taps, taps, N=8, H=H, W=H, strict=False)
    for name, H, C, taps, groups in (
        ("mobilenet_depthwise", 56, 128, 3, 128),
        ("convnext_depthwise", 56, 96, 7, 96),
        ("resnext_grouped", 56, 128, 3, 32),
    ):
        yield conv(name, ADD, (C, C), C, taps, taps, N=8, H=H, W=H, groups=groups, strict=False)
    for merge in (CONCAT, ADD):
        yield dense("lstm", merge, (1024, 1024), 4096, rows=64)
        yield join("fpn_p2", merge, (8, 200, 336, 256), (8, 200, 336, 256), axis=3)


def in_format(problem: Problem, dtype: str) -> FusionSpec:
    """Of a sum in any order; what float16 asks for is what bfloat16 does."""
    spec = problem.spec if dtype in ("float32", "tf32") else in_dtype(problem, dtype).spec
    if spec.contraction is None:
        return spec
    return replace(spec, strict=False, precision="tf32" if dtype == "tf32" else None)


def plans() -> Iterator[str]:
    yield "| problem | format | kernel | GFLOP | MiB moved | tiles | rounds | an SM | arithmetic, µs | memory, µs |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for problem in layers():
        for dtype in PEAK_FLOPS:
            if dtype == "tf32" and (problem.spec.contraction is None or problem.spec.conv.groups > 1):
                continue
            spec = in_format(problem, dtype)
            able = [kernel for kernel in gpu.KERNELS if not kernel.unsupported(spec)]
            kernel = next(kernel for kernel in able if not kernel.slow(spec, H200))
            config, cost = kernel.plan(spec, H200), analyse(spec)
            launched = "– | – | –"  # a stream's blocks depend on how its arrays lie
            if spec.contraction is not None:
                name = config.symbol.format(sources=4, run=4)  # in runs where a kernel has them
                shared, threads = shared_bytes(config.source, name), threads_of(config.source)
                resident = resident_blocks(resources(config.source, "sm_90a")[name].registers, shared, threads)
                stays = kernel in sm90.KERNELS
                tiles = sm90.tiles(spec, config.filters) if stays else config.blocks
                places = config.blocks if stays else resident * H200.multiprocessors
                launched = f"{tiles} | {tiles / places:.1f} | {resident}"
            times = cost.flops / PEAK_FLOPS[dtype], cost.bytes_moved / BANDWIDTH
            yield (
                f"| {problem.name} | {dtype} | {kernel.name.removeprefix('gpu.')} | {cost.flops / 1e9:.1f} | "
                f"{cost.bytes_moved / 2**20:.1f} | {launched} | {times[0] * 1e6:.0f} | {times[1] * 1e6:.0f} |"
            )


if __name__ == "__main__":
    for table in (plans(), kernels()):
        print(*table, "", sep="\n")
