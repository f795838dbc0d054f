"""1×1 convolutions of a concatenation, commuted below its upsampling: what is upsampled is multiplied before it is.

    W · concat(up(x), z)  =  up(W_x · x) + W_z · z

The products of x are formed once for every stored pixel instead of once for every pixel it is repeated to. They are
never stored for the whole map: bands of rows of it are computed, each then added as the residual of the other product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from fusionops.cpu import dots, gemm, launch
from fusionops.cpu.block import is_pointwise
from fusionops.cpu.direct import common_reasons
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.memory import WORKSPACE
from fusionops.device import CpuDevice
from fusionops.kernel import Filters, Kernel, Operands
from fusionops.spec import ITEM_BYTES, Conv2d, FusionSpec, Layout, Merge, SourceSpec

# Of the products of a band: they stay in L2 or the last-level cache until they are added.
BAND_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class CommutedConfig:
    """How the two products of a band are cut up.

    images, rows   of the output in a band: some whole images, or some rows of one
    coarse, fine   the product of the upsampled sources, and that of the others
    """

    images: int
    rows: int
    coarse: gemm.GemmTiling
    fine: gemm.GemmTiling
    band_bytes: int

    @property
    def scratch_bytes(self) -> int:
        return max(self.coarse.scratch_bytes, self.fine.scratch_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.coarse.shared_bytes + self.fine.shared_bytes + self.band_bytes

    def illegal_on(self, device: CpuDevice) -> tuple[str, ...]:
        return self.coarse.illegal_on(device) + self.fine.illegal_on(device)


def _is_upsampled(source: SourceSpec) -> bool:
    return source.upsample != (1, 1)


def _parts(spec: FusionSpec) -> tuple[slice, slice]:
    """The upsampled sources and the others, each side by side."""
    count, upsampled = len(spec.sources), sum(map(_is_upsampled, spec.sources))
    if _is_upsampled(spec.sources[0]):
        return slice(0, upsampled), slice(upsampled, count)
    return slice(count - upsampled, count), slice(0, count - upsampled)


def _factor(spec: FusionSpec) -> tuple[int, int]:
    return max(source.upsample for source in spec.sources)


def _map_shape(spec: FusionSpec, N: int, H: int, W: int, C: int) -> tuple[int, ...]:
    return (N, H, W, C) if spec.layout is Layout.NHWC else (N, C, H, W)


@lru_cache(maxsize=512)
def _specs(spec: FusionSpec, images: int, rows: int) -> tuple[FusionSpec, FusionSpec]:
    """The two products of so many images and rows."""
    up_h, up_w = _factor(spec)
    coarse, fine = _parts(spec)

    def band(source: SourceSpec) -> SourceSpec:
        h, w = rows // source.upsample[0], spec.W // source.upsample[1]
        shape = _map_shape(spec, images, h, w, source.shape[spec.channel_axis])
        return replace(source, shape=shape, upsample=(1, 1))

    product = _map_shape(spec, images, rows // up_h, spec.W // up_w, spec.conv.K)
    added = SourceSpec(product, spec.dtype, upsample=(up_h, up_w))
    return (
        replace(spec, sources=tuple(map(band, spec.sources[coarse])), bias=False, activation=None),
        replace(spec, sources=tuple(map(band, spec.sources[fine])), residual=added),
    )


def plan(spec: FusionSpec, device: CpuDevice) -> CommutedConfig:
    """The largest bands whose products fit BAND_BYTES."""
    up_h, up_w = _factor(spec)
    row_bytes = spec.W // up_w * spec.conv.K * ITEM_BYTES[spec.dtype]
    rows = min(spec.H, up_h * max(1, BAND_BYTES // row_bytes))
    images = min(spec.N, max(1, BAND_BYTES // (row_bytes * (spec.H // up_h)))) if rows == spec.H else 1
    coarse, fine = _specs(spec, images, rows)
    return CommutedConfig(
        images=images, rows=rows, coarse=gemm.plan(coarse, device), fine=gemm.plan(fine, device),
        band_bytes=images * (rows // up_h) * row_bytes,
    )  # fmt: skip


def _bands(extent: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(extent, first + step)) for first in range(0, extent, step))


def run(spec: FusionSpec, config: CommutedConfig, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Band by band: the products of what is upsampled, then the others, to which they are added."""
    row_axis = 1 if spec.layout is Layout.NHWC else 2
    coarse, fine = _parts(spec)
    first = sum(source.shape[spec.channel_axis] for source in spec.sources[: coarse.start])
    last = first + sum(source.shape[spec.channel_axis] for source in spec.sources[coarse])
    coarse_channels, fine_channels = (first, last), (last, spec.C) if first == 0 else (0, first)
    coarse_filters, fine_filters = (
        _of_channels(operands.filters, spec.layout, *channels) for channels in (coarse_channels, fine_channels)
    )

    def band(array: Any, images: tuple[int, int], rows: tuple[int, int], up: int) -> Any:
        rest = (slice(None),) * (row_axis - 1)
        return array[(slice(*images), *rest, slice(rows[0] // up, rows[1] // up))]

    area = WORKSPACE.borrow(config.band_bytes)
    try:
        memory = np.frombuffer(area.array, spec.dtype, offset=area.start - area.array.ctypes.data,
                               count=config.band_bytes // ITEM_BYTES[spec.dtype])  # fmt: skip
        for images in _bands(spec.N, config.images):
            for rows in _bands(spec.H, config.rows):
                low, high = _specs(spec, images[1] - images[0], rows[1] - rows[0])
                product = memory[: math.prod(low.out_shape)]
                if config.fine.task is gemm.Task.PLANES:
                    product = product.reshape(low.out_shape)
                else:  # channels last in either layout, as the epilogue likes them
                    product = product.reshape(low.N, low.P, low.Q, spec.conv.K)
                    product = product if spec.layout is Layout.NHWC else product.transpose(0, 3, 1, 2)
                sources = tuple(
                    band(array, images, rows, source.upsample[0])
                    for array, source in zip(operands.sources, spec.sources, strict=True)
                )
                launch.run(gemm.ROWS, low, config.coarse,
                           Operands(sources[coarse], operands.weights[coarse], filters=coarse_filters),
                           product)  # fmt: skip
                launch.run(gemm.ROWS, high, config.fine,
                           Operands(sources[fine], operands.weights[fine], filters=fine_filters,
                                    bias=operands.bias, residual=product),
                           band(out, images, rows, 1))  # fmt: skip
    finally:
        WORKSPACE.give_back(area)


def _of_channels(filters: Any, layout: Layout, first: int, last: int) -> Any:
    """The filters of some input channels; those that are kept packed keep these too."""
    part = (..., slice(first, last), slice(None)) if layout is Layout.NHWC else (slice(None), slice(first, last))
    if isinstance(filters, Filters):
        return filters.packed(("channels", first, last), lambda array: Filters(array[part], layout))
    return filters[part]


def slow(spec: FusionSpec, device: CpuDevice) -> tuple[str, ...]:
    """Where dot products are taken: forming fewer saves little where maps are hardly multiplied."""
    if any(kernel.takes(spec, device) for kernel in dots.KERNELS):
        return ("the sums of few filters are dot products",)
    return ()


def products(spec: FusionSpec) -> int:
    """Multiply-adds of each source at its own resolution."""
    stored = (source.shape for source in spec.sources)
    return sum(math.prod(shape) for shape in stored) * spec.conv.K


def _kernel(dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, Merge.CONCAT, dtype)
        if not isinstance(spec.contraction, Conv2d):
            return (*reasons, "the contraction is not a conv2d")
        conv2d = spec.conv
        if not is_pointwise(conv2d) or conv2d.stride != (1, 1) or conv2d.groups != 1:
            reasons.append("the filter is not 1x1 with stride 1, one group and no padding")
        factors = {source.upsample for source in spec.sources} - {(1, 1)}
        changes = sum(_is_upsampled(one) != _is_upsampled(other) for one, other in pairwise(spec.sources))
        if len(factors) != 1 or changes != 1:
            reasons.append("needs sources upsampled by one factor side by side, and others beside them")
        if spec.residual is not None:
            reasons.append("there is a residual already")
        if spec.strict:
            reasons.append("strict=True forbids a sum that forms other products")
        return tuple(reasons)

    name = f"cpu.concat_conv_fprop_commuted_{FORMATS[dtype].suffix}"
    return Kernel(name, unsupported, plan, run, slow, products)


KERNELS = tuple(_kernel(dtype) for dtype, form in FORMATS.items() if not form.is_narrow)
"""Before those of `gemm` in the table: fewer products, at no more memory than a band."""
