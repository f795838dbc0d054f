"""How a problem is written down: one row of the tables. Holds no tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusionops.spec import Activation, Conv2d, Dense, FusionSpec, Layout, Merge, SourceSpec, same_padding

ADD, CONCAT = Merge.ADD, Merge.CONCAT
RELU = Activation("relu")
QUARTER_LEAKY = Activation("leaky_relu", (0.25,))  # a slope that loses no bit of a small integer
NO_PAD = ((0, 0), (0, 0))
GEMM = ("gemm", "direct")  # a 1×1 filter at stride 1 without padding: a matrix product over the pixels


@dataclass(frozen=True, slots=True)
class Problem:
    """A spec with a name, the kernels that must take it (narrower support is a loss), and where it comes from."""

    name: str
    spec: FusionSpec
    kernels: tuple[str, ...]
    source: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a row: its channels and its prologue. An int in a row is a part without prologue."""

    C: int
    upsample: tuple[int, int] = (1, 1)
    weight: str | None = None
    scale: bool = False
    shift: bool = False
    activation: Activation | None = None

    def spec(self, shape: tuple[int, ...]) -> SourceSpec:
        return SourceSpec(
            shape,
            "float32",
            upsample=self.upsample,
            scale=self.scale,
            shift=self.shift,
            activation=self.activation,
            weight=self.weight,
        )


def conv(
    name: str,
    merge: Merge,
    channels: Sequence[int | Part],
    K: int,
    R: int = 3,
    S: int = 3,
    *,
    N: int = 1,
    H: int = 5,
    W: int = 6,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Part | None = None,
    algorithms: tuple[str, ...] = ("direct",),
    strict: bool = True,
    source: str = "",
    **epilogue: Any,
) -> Problem:
    """A merge and a convolution, NHWC, over H × W pixels after upsampling; padding None is 'same'."""

    def stored(part: Part, H: int, W: int) -> SourceSpec:
        h, w = H // part.upsample[0], W // part.upsample[1]
        assert (h * part.upsample[0], w * part.upsample[1]) == (H, W), f"{name}: {part} cannot fill {H} × {W} pixels"
        return part.spec((N, h, w, part.C))

    if padding is None:
        padding = (
            same_padding(H, R, stride=stride[0], dilation=dilation[0]),
            same_padding(W, S, stride=stride[1], dilation=dilation[1]),
        )
    spec = FusionSpec(
        merge,
        tuple(stored(part if isinstance(part, Part) else Part(part), H, W) for part in channels),
        Conv2d(K, R, S, stride, padding, dilation, groups),
        strict=strict,
        **{"bias": True} | epilogue,
    )
    if residual is not None:
        spec = replace(spec, residual=stored(residual, spec.P, spec.Q))
    names = tuple(f"cpu.{merge}_conv_fprop_{algorithm}_f32" for algorithm in algorithms)
    return Problem(f"{merge}_conv_{name}", spec, names, source)


def conv_both(name: str, C: int, K: int, *args: Any, **options: Any) -> Iterator[Problem]:
    """Two sources of C channels, added and concatenated."""
    for merge in (ADD, CONCAT):
        yield conv(name, merge, (C, C), K, *args, **options)


def dense(
    name: str,
    merge: Merge,
    channels: Sequence[int | Part],
    K: int,
    *,
    rows: int = 7,
    residual: Part | None = None,
    dots: bool = False,
    source: str = "",
    **epilogue: Any,
) -> Problem:
    """A merge and a matrix product over `rows` rows."""
    spec = FusionSpec(
        merge,
        tuple(
            part.spec((rows, part.C)) if isinstance(part, Part) else Part(part).spec((rows, part)) for part in channels
        ),
        Dense(K),
        residual=None if residual is None else residual.spec((rows, K)),
        strict=True,
        **{"bias": True} | epilogue,
    )
    names = tuple(f"cpu.{merge}_dense_fprop_{algorithm}_f32" for algorithm in ["dots"] * dots + ["gemm"])
    return Problem(f"{merge}_dense_{name}", spec, names, source)


def join(
    name: str,
    merge: Merge,
    *shapes: tuple[int, ...],
    dtypes: str | Sequence[str] = "float32",
    dtype: str | None = None,
    axis: int = 0,
    activation: Activation | None = None,
    part: Part | None = None,
    streams: tuple[str, ...] = ("any",),
) -> Problem:
    """A merge without contraction; `part` is the prologue of the last source, `dtype` that of the result."""
    each = [dtypes] * len(shapes) if isinstance(dtypes, str) else dtypes
    sources = [SourceSpec(shape, dtype) for shape, dtype in zip(shapes, each, strict=True)]
    if part is not None:
        sources[-1] = replace(part.spec(shapes[-1]), dtype=each[-1])
    spec = FusionSpec(merge, tuple(sources), dtype=dtype or each[0], axis=axis, activation=activation)
    return Problem(f"{merge}_{name}", spec, tuple(f"cpu.{merge}_fprop_stream_{stream}" for stream in streams))


def in_nchw(problem: Problem) -> Problem:
    """The same convolution with its maps channels first."""

    def moved(source: SourceSpec) -> SourceSpec:
        n, h, w, c = source.shape
        return replace(source, shape=(n, c, h, w))

    spec = problem.spec
    residual = None if spec.residual is None else moved(spec.residual)
    spec = replace(spec, layout=Layout.NCHW, sources=tuple(map(moved, spec.sources)), residual=residual)
    return replace(problem, name=f"{problem.name}_nchw", spec=spec)


def in_dtype(problem: Problem, dtype: str) -> Problem:
    """The same problem in another floating dtype, pinned to the kernels for that."""
    spec, suffix = problem.spec, {"float16": "f16", "bfloat16": "bf16", "float64": "f64"}[dtype]
    sources = tuple(replace(source, dtype=dtype) for source in spec.sources)
    residual = None if spec.residual is None else replace(spec.residual, dtype=dtype)
    spec = replace(spec, dtype=dtype, sources=sources, residual=residual)
    kernels = tuple(name.replace("_f32", f"_{suffix}") for name in problem.kernels)
    return replace(problem, name=f"{problem.name}_{suffix}", spec=spec, kernels=kernels)


def tiled(problem: Problem) -> Problem:
    """The same contraction without strict=True, pinned to the kernel that multiplies tiles of bfloat16 as well."""
    algorithm = "gemm" if isinstance(problem.spec.contraction, Dense) else "direct"
    kind = "dense" if algorithm == "gemm" else "conv"
    kernels = (f"cpu.{problem.spec.merge}_{kind}_fprop_{algorithm}_amx_bf16", *problem.kernels)
    return replace(problem, name=f"{problem.name}_tiled", spec=replace(problem.spec, strict=False), kernels=kernels)


def in_float64(problem: Problem) -> Problem:
    return in_dtype(problem, "float64")
