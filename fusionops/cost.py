"""What a merge costs, counted from its description: parameters, FLOPs, bytes moved, extra memory, roofline seconds.

Of the fused way and of the materialised way it replaces. Runs and times nothing and knows no kernel: how much scratch
a kernel needs is told to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from fusionops.errors import SpecError
from fusionops.spec import ITEM_BYTES, Dense, FusionSpec, Layout, Merge, SourceSpec

if TYPE_CHECKING:
    from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one way to compute a merge.

    params             numbers the op reads besides maps: filters, bias, and the weights, scales and shifts of sources
    merge_flops        additions of an ADD, and one operation per element for each weight, scale and shift
    contraction_flops  two per multiply-add
    bytes_read, bytes_written   traffic with memory if every array is read or written once, from end to end
    scratch_bytes      working memory of the kernel
    peak_bytes         the most memory in use at one time besides sources, parameters and results; includes the scratch
    """

    params: int
    merge_flops: int
    contraction_flops: int
    bytes_read: int
    bytes_written: int
    scratch_bytes: int
    peak_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations of merge and contraction; bias, residual and activation are not counted."""
        return self.merge_flops + self.contraction_flops

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOPs per byte moved; 0 where nothing moves."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0

    def roofline_s(self, peak_flops: float, bandwidth: float) -> float:
        """Seconds that a machine of `peak_flops` FLOP/s and `bandwidth` bytes/s cannot beat with these counts.

        Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
        architectures", Communications of the ACM 52(4), 2009.

        >>> cost = Cost(0, 0, 800, bytes_read=30, bytes_written=10, scratch_bytes=0, peak_bytes=0)
        >>> cost.roofline_s(peak_flops=100.0, bandwidth=10.0)
        8.0
        """
        return max(self.flops / peak_flops, self.bytes_moved / bandwidth)


@dataclass(frozen=True, slots=True)
class FusedCost(Cost):
    """The cost of the fused way; `materialised` is that of the way that stores every map in between."""

    materialised: Cost


@dataclass(frozen=True, slots=True)
class AddOverConcat:
    """What adding some sources costs, as exact fractions of what concatenating them costs."""

    params: Fraction
    flops: Fraction
    bytes_moved: Fraction
    merged_bytes: Fraction


def analyse(spec: FusionSpec, *, scratch_bytes: int = 0) -> FusedCost:
    """Count what a forward pass of `spec` costs, fused and materialised.

        params            = R·S·C/groups·K (+ K for a bias) + weights, scales and shifts
        contraction_flops = 2·N·P·Q·K·R·S·C/groups
        merge_flops       = N·H·W·C·(sources − 1) for an ADD, 0 for a CONCAT,
                            plus one per element for each weight, scale and shift

    Every tap counts, also one that falls on padding: so do the frameworks' own counters. The fused way reads each
    source, parameter and residual once and writes each result once. The materialised way moves more: it stores every
    upsampled map and the merged map, reads them again, and adds a residual in a pass of its own, in place over the
    result of the contraction. A merged map that is asked for (`return_sum`) is a result. Repacked filters and rows
    read twice by neighbouring tiles are not counted.

    scratch_bytes   working memory of the kernel that would run, 0 if unknown

    >>> from fusionops.spec import Conv2d
    >>> maps = (SourceSpec((1, 128, 128, 64), "float32"),) * 2
    >>> conv = Conv2d(K=64, R=3, S=3, padding=((1, 1), (1, 1)))
    >>> add = analyse(FusionSpec(Merge.ADD, maps, conv, bias=True))
    >>> add.params == 3 * 3 * 64 * 64 + 64, add.merge_flops == 128 * 128 * 64
    (True, True)
    >>> concat = analyse(FusionSpec(Merge.CONCAT, maps, conv, bias=True))
    >>> concat.contraction_flops == 2 * add.contraction_flops == 2 * 128 * 128 * 64 * 3 * 3 * 128, concat.merge_flops
    (True, 0)
    >>> (concat.materialised.bytes_moved - concat.bytes_moved) / 2**20, concat.materialised.peak_bytes / 2**20
    (16.0, 8.0)
    """
    inputs = spec.sources if spec.residual is None else (*spec.sources, spec.residual)
    counts = {
        "params": _params(spec),
        "merge_flops": _merge_flops(spec),
        "contraction_flops": _contraction_flops(spec),
        "scratch_bytes": scratch_bytes,
    }
    read_bytes = sum(_bytes(source.shape, source.dtype) for source in inputs)
    read_bytes += counts["params"] * ITEM_BYTES[spec.dtype]
    written_bytes = _bytes(spec.out_shape, spec.dtype) + spec.return_sum * _bytes(spec.merged_shape, spec.dtype)
    between = _between(spec)
    materialised = Cost(
        **counts,
        bytes_read=read_bytes + between.reread_bytes,
        bytes_written=written_bytes + between.stored_bytes,
        peak_bytes=max(between.merge_bytes, between.contraction_bytes + scratch_bytes, between.residual_bytes),
    )
    return FusedCost(
        **counts,
        bytes_read=read_bytes,
        bytes_written=written_bytes,
        peak_bytes=scratch_bytes,
        materialised=materialised,
    )


def other_merge(spec: FusionSpec) -> FusionSpec:
    """The same sources merged the other way before the same number of filters: ADD for CONCAT, CONCAT for ADD.

    Raises SpecError where `spec` does not contract, or its sources cannot be added.
    """
    if spec.contraction is None:
        raise SpecError(f"{spec} has no filters, so add and concat have different results and no common measure")
    if spec.merge is Merge.ADD:
        return replace(spec, merge=Merge.CONCAT, return_sum=False)
    if len(set(spec.channels)) > 1:
        channels = ", ".join(map(str, spec.channels))
        raise SpecError(f"sources of {channels} channels cannot be added: an add needs equal channels")
    return replace(spec, merge=Merge.ADD)


def add_over_concat(spec: FusionSpec) -> AddOverConcat:
    """What ADD costs of what CONCAT costs for the sources of `spec`, both fused; `spec` is either of the two.

    An add is a concat with tied blocks of filters, so for n sources it needs 1/n of the filters, of the multiply-adds
    and of the merged map. The bias, the sum itself and the results keep the other fractions above that.

    >>> from fusionops.spec import Conv2d
    >>> maps = (SourceSpec((1, 128, 128, 64), "float32"),) * 2
    >>> ratio = add_over_concat(FusionSpec(Merge.ADD, maps, Conv2d(K=64, R=3, S=3)))
    >>> str(ratio.params), str(ratio.merged_bytes), round(float(ratio.flops), 4)
    ('1/2', '1/2', 0.5004)

    Raises SpecError as `other_merge` does.
    """
    other = other_merge(spec)
    add, concat = (spec, other) if spec.merge is Merge.ADD else (other, spec)
    add_cost, concat_cost = analyse(add), analyse(concat)
    return AddOverConcat(
        params=_ratio(add_cost.params, concat_cost.params),
        flops=_ratio(add_cost.flops, concat_cost.flops),
        bytes_moved=_ratio(add_cost.bytes_moved, concat_cost.bytes_moved),
        merged_bytes=_ratio(math.prod(add.merged_shape), math.prod(concat.merged_shape)),
    )


class _Between(NamedTuple):
    """Bytes of the maps that the materialised way stores between its passes."""

    stored_bytes: int
    reread_bytes: int
    merge_bytes: int  # alive while the merge runs, and so on
    contraction_bytes: int
    residual_bytes: int


def _between(spec: FusionSpec) -> _Between:
    # One source is upsampled by the same pass that weights it; without contraction that pass writes the result.
    merges = len(spec.sources) > 1
    upsampled = sum(_upsampled_bytes(spec, source) for source in spec.sources) if merges else 0
    contracts = spec.contraction is not None and (merges or not spec.sources[0].is_plain)
    merged = _bytes(spec.merged_shape, spec.dtype) if contracts else 0
    stored = 0 if spec.return_sum else merged
    residual = out = 0
    if spec.residual is not None:
        residual, out = _upsampled_bytes(spec, spec.residual), _bytes(spec.out_shape, spec.dtype)
    return _Between(
        stored_bytes=upsampled + stored + residual + out,
        reread_bytes=upsampled + merged + residual + out,
        merge_bytes=upsampled + stored,
        contraction_bytes=stored,
        residual_bytes=residual,
    )


def _params(spec: FusionSpec) -> int:
    filters = 0 if spec.contraction is None else math.prod(spec.filter_shape) + spec.bias * spec.conv.K
    inputs = spec.sources if spec.residual is None else (*spec.sources, spec.residual)
    return filters + sum(_source_params(spec, source) for source in inputs)


def _source_params(spec: FusionSpec, source: SourceSpec) -> int:
    channels_last = spec.layout is Layout.NHWC or isinstance(spec.contraction, Dense)
    channels = source.shape[-1 if channels_last else 1] if source.shape else 1
    weight = {None: 0, "scalar": 1, "vector": channels}[source.weight]
    return weight + (source.scale + source.shift) * channels


def _contraction_flops(spec: FusionSpec) -> int:
    if spec.contraction is None:
        return 0
    gemm_m, gemm_n, gemm_k = spec.gemm
    return 2 * gemm_m * gemm_n * gemm_k * spec.conv.groups


def _merge_flops(spec: FusionSpec) -> int:
    additions = math.prod(spec.merged_shape) * (len(spec.sources) - 1) if spec.merge is Merge.ADD else 0
    inputs = spec.sources if spec.residual is None else (*spec.sources, spec.residual)
    return additions + sum(
        math.prod(source.upsampled_shape(spec.layout)) * (source.scale + source.shift + (source.weight is not None))
        for source in inputs
    )


def _upsampled_bytes(spec: FusionSpec, source: SourceSpec) -> int:
    return 0 if source.upsample == (1, 1) else _bytes(source.upsampled_shape(spec.layout), source.dtype)


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def _ratio(part: int, whole: int) -> Fraction:
    """part / whole; 1 if there is nothing of either, as in an empty batch."""
    from fractions import Fraction  # with decimal, a twentieth of the time that importing fusionops takes

    return Fraction(part, whole) if whole else Fraction(1)
