"""What is known of this machine and its compiler, gathered once; and filling the cache ahead of time."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numba

from fusionops.cpu import (
    add_task,
    amx,
    amx_task,
    concat_task,
    conv,
    depthwise,
    dots_task,
    epilogue,
    gemm_task,
    grouped,
    guard,
    jit,
    outer_task,
    planes_task,
    prologue,
    threads,
    winograd_task,
)
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.target import target
from fusionops.cpu.tiling import ends_in_half, register_tiles
from fusionops.cpu.transform import TAPS
from fusionops.device import KIB, MIB, CpuDevice

# Where the operating system does not tell: what every server core of the last ten years has at least.
DEFAULT_CACHES = (32 * KIB, 512 * KIB, 8 * MIB)


def _cache_sizes() -> tuple[int, int, int]:
    """(L1 data, L2, L3) of the first core in bytes, from Linux's sysfs; the defaults elsewhere."""
    sizes = dict(zip((1, 2, 3), DEFAULT_CACHES, strict=True))
    units = {"K": KIB, "M": MIB}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                sizes[int(level)] = int(size[:-1]) * units[size[-1]]
        except (OSError, KeyError, ValueError):
            continue  # one unreadable entry leaves that level at its default
    return sizes[1], sizes[2], sizes[3]


@functools.cache
def device() -> CpuDevice:
    """This host, as the plans see it."""
    here = target()
    return CpuDevice(
        f"{here.machine} {here.vector_bytes * 8} bit", here.vector_bytes, here.vector_registers, here.fma,
        *_cache_sizes(), threads.available_threads(),
    )  # fmt: skip


def reasons_unusable() -> tuple[str, ...]:
    """Every reason why kernels cannot run here; numba supports the platform or could not have been imported."""
    return ()


def facts() -> dict[str, object]:
    """What a report of a problem or a timing should say of this machine."""
    return {
        "processor": _processor_name(),
        "device": device(),
        "threads": threads.get_num_threads(),
        "cores": os.cpu_count(),
        "numba": numba.__version__,
        "kernel cache": jit.cache_directory() or "none: no writable directory",
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def warmup(progress: Callable[[int, int, str], None] | None = None) -> None:
    """Compiles every kernel for this host, so that later processes load them from the cache.

    progress   called with (done, total, what comes next)
    """
    steps: list[tuple[str, Callable[[], object]]] = [("threads", threads.prepare), ("guards", guard.prepare)]
    for name, form in FORMATS.items():
        for what, make in {
            "filter packing": conv.pack_task,
            "store": epilogue.tile_scatterer,
        }.items():
            steps.append((f"{what} {name}", functools.partial(make, form.bits, form.stored)))
        for kind, is_plain in (("plain", True), ("any", False)):
            finish = functools.partial(epilogue.tile_finisher, form.bits, form.stored, is_plain)
            load = functools.partial(prologue.tile_loader, form.bits, form.bits, form.stored, is_plain)
            steps += [
                (f"{kind} epilogue {name}", finish),
                (f"{kind} tile load {name}", load),
            ]
        for kind, way in (("plain", add_task.SUMS), ("contiguous", add_task.RUNS), ("any", add_task.GENERAL)):
            add = functools.partial(add_task.add_task, form.bits, form.stored, way)
            steps.append((f"{kind} add {name}", add))
        if form.bits == winograd_task.BITS:
            steps += [
                (
                    f"winograd filters {name} {taps}x{taps}",
                    functools.partial(winograd_task.pack_task, form.stored, taps),
                )
                for taps in TAPS
            ]
    for bits in (32, 64):
        name = f"float{bits}"
        for mr, nv in register_tiles(device()):
            if bits == winograd_task.BITS:
                steps.append((f"winograd {name} {mr}x{nv}", functools.partial(winograd_task.winograd_task, mr, nv)))
            for half in {False, ends_in_half(1, bits // 8, nv, device())}:
                tile = f"{name} {mr}x{nv}" + (" and half" if half else "")
                steps += [
                    (f"convolution {tile}", functools.partial(conv.conv_task, bits, mr, nv, half)),
                    (f"product {tile}", functools.partial(gemm_task.gemm_task, bits, mr, nv, half)),
                ]
        pixels = min(grouped.MOST_PIXELS, next(mr for mr, nv in register_tiles(device()) if nv == 1))
        for half in {False, ends_in_half(1, bits // 8, 1, device())}:
            groups = functools.partial(conv.conv_task, bits, pixels, 1, half, gaps=True)
            steps.append((f"groups {name} {pixels}x1" + (" and half" if half else ""), groups))
        steps.append((f"product {name} few pixels", functools.partial(outer_task.outer_task, bits)))
        steps.append((f"product {name} few filters", functools.partial(planes_task.planes_task, bits)))
        steps.append((f"dot products {name}", functools.partial(dots_task.dots_task, bits)))
        tiles = {depthwise.register_tile(size, device()) for size in (1, 1 << 20)}
        steps += [
            (f"depthwise {name} {mr}x{nv}", functools.partial(depthwise.depthwise_task, bits, mr, nv))
            for mr, nv in tiles
        ]
    steps.append(("winograd inputs", winograd_task.transform_inputs_task))
    steps.append(("winograd outputs around the caches", winograd_task.store_around_task))
    steps += [
        (f"winograd outputs {taps}x{taps}", functools.partial(winograd_task.transform_outputs_task, taps))
        for taps in TAPS
    ]
    if amx.without_tiles() is None:
        stored = FORMATS["bfloat16"].stored
        steps.append(("tiles of bfloat16", amx_task.amx_task))
        steps.append(("filter packing for tiles", amx_task.pack_task))
        for kind, is_plain in (("plain", True), ("any", False)):
            load = functools.partial(prologue.tile_loader, 32, stored, stored, is_plain)
            steps.append((f"{kind} tile load for tiles", load))
    steps.append(("concat", concat_task.concat_task))
    for done, (what, compile_it) in enumerate(steps):
        if progress:
            progress(done, len(steps), what)
        compile_it()
    if progress:
        progress(len(steps), len(steps), "done")
