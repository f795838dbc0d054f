"""What is computed: frozen, hashable problem descriptions with every derived extent; never how, never an array.

The two identities that fusionops exists for, with ⋆ a convolution:

    add:     (x + y) ⋆ K          =  x ⋆ K + y ⋆ K          one kernel, shared by both sources
    concat:  concat(x, y) ⋆ K     =  x ⋆ K_x + y ⋆ K_y      a kernel of its own for each source

so an add is a concat whose halves of the kernel are tied (K_x = K_y), with half its parameters and multiply-adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

ITEM_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
FLOATS = ("float16", "bfloat16", "float32", "float64")

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "hardswish", "hardsigmoid", "gelu")


class Merge(StrEnum):
    """How the sources become one map."""

    ADD = "add"
    CONCAT = "concat"


class Direction(StrEnum):
    """Forward, gradient with respect to the sources, gradient with respect to the filters."""

    FPROP = "fprop"
    DGRAD = "dgrad"
    WGRAD = "wgrad"


class Layout(StrEnum):
    """Order of the axes of maps: channels last with HWIO filters, or channels first with OIHW filters."""

    NHWC = "NHWC"
    NCHW = "NCHW"


def output_extent(size: int, taps: int, *, stride: int, pad: tuple[int, int], dilation: int) -> int:
    """Number of filter placements along one axis.

    >>> output_extent(8, 3, stride=1, pad=(0, 0), dilation=2)
    4
    >>> output_extent(224, 3, stride=2, pad=(0, 1), dilation=1)
    112
    """
    return (size + sum(pad) - filter_reach(taps, dilation)) // stride + 1


def filter_reach(taps: int, dilation: int) -> int:
    """Input positions that one placement of the filter spans along one axis, from first tap to last, inclusive."""
    return (taps - 1) * dilation + 1


def same_padding(size: int, taps: int, *, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after for an output of ceil(size / stride); the odd one goes to the end (ONNX: SAME_UPPER).

    >>> same_padding(224, 3, stride=2, dilation=1), same_padding(225, 3, stride=2, dilation=1)
    ((0, 1), (1, 1))
    """
    total = max(0, (-(-size // stride) - 1) * stride + filter_reach(taps, dilation) - size)
    return total // 2, total - total // 2


@dataclass(frozen=True, slots=True)
class Activation:
    """A pointwise function of the epilogue or prologue; `parameters` is (slope,) for leaky_relu, else empty."""

    name: str
    parameters: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.name + "".join(f" {p:g}" for p in self.parameters)


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One input map and its prologue, applied in this order: upsample, scale, shift, activation, weight.

    shape      as stored, before upsampling; axes in the order of the spec's layout
    upsample   integer factors along H and W
    mode       "nearest"
    scale, shift   whether there is a vector (C,) of each
    weight     None, "scalar" or "vector": a factor on the whole source, or one per channel
    """

    shape: tuple[int, ...]
    dtype: str
    upsample: tuple[int, int] = (1, 1)
    mode: str = "nearest"
    scale: bool = False
    shift: bool = False
    activation: Activation | None = None
    weight: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the array enters the merge as it is stored."""
        return self.upsample == (1, 1) and not (self.scale or self.shift or self.activation or self.weight)

    def upsampled_shape(self, layout: Layout) -> tuple[int, ...]:
        """Shape after upsampling; only maps of rank 4 have axes to upsample."""
        if self.upsample == (1, 1):
            return self.shape
        h = 1 if layout is Layout.NHWC else 2
        shape = list(self.shape)
        shape[h], shape[h + 1] = shape[h] * self.upsample[0], shape[h + 1] * self.upsample[1]
        return tuple(shape)


@dataclass(frozen=True, slots=True)
class Conv2d:
    """A cross-correlation with K filters of R × S taps.

    y[n,p,q,k] = Σ_{r,s,c} m[n, h, w, c] · w[r,s,c,k]
    h = p·stride_h + r·dilation_h − pad_top        w likewise
    """

    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix product over the last axis: y[…,k] = Σ_c m[…,c] · w[c,k]."""

    K: int


@dataclass(frozen=True)
class FusionSpec:
    """One problem: sources → merge → contraction → epilogue.

    dtype     of the result
    axis      along which a CONCAT without contraction joins, never negative
    layout    of maps; a spec without Conv2d has its axes as the user gave them (channels last where channels matter)
    bias      whether there is a vector (K,)
    residual  a map added before the activation
    strict    every product formed, one fixed order of summation; rewrites are not allowed
    return_sum   the merged map of an ADD is also an output
    precision    None for that of the dtype, or "tf32", which GPUs multiply in
    """

    merge: Merge
    sources: tuple[SourceSpec, ...]
    contraction: Conv2d | Dense | None = None
    dtype: str = "float32"
    layout: Layout = Layout.NHWC
    axis: int = 0
    bias: bool = False
    residual: SourceSpec | None = None
    activation: Activation | None = None
    return_sum: bool = False
    strict: bool = False
    precision: str | None = None
    direction: Direction = Direction.FPROP

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((
            self.merge, self.sources, self.contraction, self.dtype, self.layout, self.axis, self.bias, self.residual,
            self.activation, self.return_sum, self.strict, self.precision, self.direction,
        ))  # fmt: skip

    # Extents. A spec without Conv2d counts all leading axes as pixels of one row: N = H = 1.

    @cached_property
    def merged_shape(self) -> tuple[int, ...]:
        """Shape of the merged map, which a fused op never stores."""
        shapes = [source.upsampled_shape(self.layout) for source in self.sources]
        if self.merge is Merge.CONCAT:
            shape = list(shapes[0])
            shape[self.channel_axis] = sum(s[self.channel_axis] for s in shapes)
            return tuple(shape)
        rank = max(map(len, shapes))
        padded = [(1,) * (rank - len(s)) + s for s in shapes]
        return tuple(0 if 0 in extents else max(extents) for extents in zip(*padded, strict=True))

    @property
    def channel_axis(self) -> int:
        """Axis along which CONCAT joins and a contraction sums."""
        if self.contraction is None:
            return self.axis
        if isinstance(self.contraction, Dense):
            return len(self.sources[0].shape) - 1
        return 3 if self.layout is Layout.NHWC else 1

    @cached_property
    def extents(self) -> tuple[int, int, int, int]:
        """(N, H, W, C) of the merged map."""
        shape = self.merged_shape
        if not isinstance(self.contraction, Conv2d):
            return 1, 1, math.prod(shape[:-1]), shape[-1] if shape else 1
        n, h, w, c = shape if self.layout is Layout.NHWC else (shape[0], shape[2], shape[3], shape[1])
        return n, h, w, c

    @property
    def N(self) -> int:
        return self.extents[0]

    @property
    def H(self) -> int:
        return self.extents[1]

    @property
    def W(self) -> int:
        return self.extents[2]

    @property
    def C(self) -> int:
        return self.extents[3]

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """Extent of each source along the channel axis."""
        return tuple(source.shape[self.channel_axis] for source in self.sources)

    @property
    def conv(self) -> Conv2d:
        """The contraction as a convolution: a Dense is a 1×1 one. Only for specs that contract."""
        match self.contraction:
            case Conv2d():
                return self.contraction
            case Dense(K):
                return Conv2d(K, 1, 1)
        raise TypeError(f"{self} has no contraction")

    @cached_property
    def output_extents(self) -> tuple[int, int]:
        """(P, Q): filter placements along H and W."""
        if self.contraction is None:
            return self.H, self.W
        conv = self.conv
        p, q = (
            output_extent(size, taps, stride=stride, pad=pad, dilation=dilation)
            for size, taps, stride, pad, dilation in zip(
                (self.H, self.W), (conv.R, conv.S), conv.stride, conv.padding, conv.dilation, strict=True
            )
        )
        return p, q

    @property
    def P(self) -> int:
        return self.output_extents[0]

    @property
    def Q(self) -> int:
        return self.output_extents[1]

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        match self.contraction:
            case None:
                return self.merged_shape
            case Dense(K):
                return (*self.merged_shape[:-1], K)
            case Conv2d(K):
                return (self.N, self.P, self.Q, K) if self.layout is Layout.NHWC else (self.N, K, self.P, self.Q)

    @cached_property
    def filter_shape(self) -> tuple[int, ...]:
        """(R, S, C/groups, K) in NHWC, (K, C/groups, R, S) in NCHW, (C, K) for Dense."""
        if isinstance(self.contraction, Dense):
            return self.C, self.contraction.K
        conv = self.conv
        depth = self.C // conv.groups
        return (conv.R, conv.S, depth, conv.K) if self.layout is Layout.NHWC else (conv.K, depth, conv.R, conv.S)

    @cached_property
    def gemm(self) -> tuple[int, int, int]:
        """(gemm_m, gemm_n, gemm_k) of one group's equivalent matrix product; gemm_k is the length of the reduction."""
        conv = self.conv
        return self.N * self.P * self.Q, conv.K // conv.groups, conv.R * conv.S * (self.C // conv.groups)

    def __str__(self) -> str:
        """The problem in one line, as error messages and tables show it."""
        what = f"{self.merge}" + {Conv2d: "_conv", Dense: "_dense"}.get(type(self.contraction), "")
        head = f"{what} {self.direction} {self.dtype}"
        if self.contraction is None:
            joined = {Merge.ADD: " + ", Merge.CONCAT: " | "}[self.merge].join(str(s.shape) for s in self.sources)
            return f"{head} {joined}"
        mark = {Merge.ADD: "=", Merge.CONCAT: "+"}[self.merge]
        channels = mark.join(map(str, self.channels))
        conv = self.conv
        if isinstance(self.contraction, Dense):
            return f"{head} rows {self.W} C({channels}) K{conv.K}"
        text = f"{head} N{self.N} H{self.H} W{self.W} C({channels}) K{conv.K} R{conv.R} S{conv.S}"
        if conv.stride != (1, 1):
            text += f" stride {conv.stride[0]}x{conv.stride[1]}"
        if conv.dilation != (1, 1):
            text += f" dilation {conv.dilation[0]}x{conv.dilation[1]}"
        if conv.groups != 1:
            text += f" groups {conv.groups}"
        return text + ("" if self.layout is Layout.NHWC else " NCHW")
