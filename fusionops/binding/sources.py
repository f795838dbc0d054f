"""Sources: the maps of one call and what is done to each while it is loaded; knows no merge and no contraction.

Splits them into arrays, keys (all that a spec depends on, hashable) and parameters (numbers and vectors, which only a
kernel needs).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from fusionops.binding import cuda, options
from fusionops.binding.arrays import Array, DType, Intake, IsPlain, Shape
from fusionops.binding.messages import complaint, spelled
from fusionops.binding.weights import (
    Parameter,
    normalized,
    read_parameter,
    read_weight,
    read_weights,
    settled,
    settled_weight,
    shape_of,
)
from fusionops.errors import SpecError, SpecTypeError
from fusionops.kernel import Operands
from fusionops.spec import Activation, SourceSpec


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One input map, and what is done to it while it is loaded, in this order:

        p = weight · act(scale · upsample(array) + shift)

    array      a map; of rank 4 where it is upsampled
    upsample   an integer factor, or one for H and one for W
    mode       "nearest": every pixel is repeated
    scale, shift   vectors (C,), such as a folded batch normalisation
    activation     as in the ops
    weight     a number, or a vector (C,)

    Numerics: every product and sum is rounded to the dtype of the data by itself, so that the fused result has the
    bits of the unfused one; numbers and vectors are rounded to that dtype first.
    Judged by the op that it is passed to, which raises SpecError or SpecTypeError. Only backend="reference" takes
    scale, shift and activation yet; the others raise UnsupportedError.
    Repetition is what UpSampling2D of Keras and interpolate of PyTorch do under the same name.

    >>> import numpy as np
    >>> import fusionops as fo
    >>> small = np.array([1.0, 2.0]).reshape(1, 1, 2, 1)
    >>> fo.add([fo.Source(small, upsample=2, weight=10)]).reshape(2, 4)
    array([[10., 10., 20., 20.],
           [10., 10., 20., 20.]])
    """

    array: Any
    _: KW_ONLY
    upsample: Any = 1
    mode: str = "nearest"
    scale: Any = None
    shift: Any = None
    activation: Any = None
    weight: Any = None


class Prologue(NamedTuple):
    """What a spec has to know of a prologue. Of parameters it is the shape: () is a number, (C,) a vector."""

    upsample: tuple[int, int] = (1, 1)
    mode: str = "nearest"
    scale: Shape | None = None
    shift: Shape | None = None
    activation: Activation | None = None
    weight: Shape | None = None


PLAIN = Prologue()

Key = tuple[Shape, DType, Prologue | None]  # None stands for PLAIN, and costs less to look up


class Loaded(NamedTuple):
    """One source, taken apart; parameters are not yet of the dtype of the data."""

    array: Array
    prologue: Prologue = PLAIN
    scale: Parameter = None
    shift: Parameter = None
    weight: Parameter = None

    @property
    def key(self) -> Key:
        return self.array.shape, self.array.dtype, None if self.prologue == PLAIN else self.prologue


# Weights, scales and shifts of all sources, one each, None where a source has none.
Parameters = tuple[tuple[Parameter, ...], tuple[Parameter, ...], tuple[Parameter, ...]]


def plain_sources(sources: Any, is_plain: IsPlain) -> tuple[tuple[Array, ...], tuple[Key, ...]] | None:
    """The arrays and keys of sources that kernels take as they are, upsampled or not, the usual case; else None.

    An upsampled source among two took 60 µs more of a call before it was looked for here.
    """
    if type(sources) is not list and type(sources) is not tuple:
        return None
    arrays: list[Array] = []
    keys: list[Key] = []
    for array in sources:
        prologue = None
        if type(array) is Source:
            if array.weight is not None or not is_stated(array):
                return None
            prologue, array = _UPSAMPLED[array.upsample], array.array
        if not is_plain(array):
            return None
        arrays.append(array)
        keys.append((array.shape, array.dtype, prologue))
    return (tuple(arrays), tuple(keys)) if arrays else None


# Prologues of sources that are upsampled and nothing else: by the factors of networks, up to 16 of HED. Others are
# judged at each call.
_UPSAMPLED = {1: None, **{factor: Prologue((factor, factor)) for factor in range(2, 17)}}


def is_stated(source: Source) -> bool:
    """Whether numbers say all that is done to it: how often it is repeated, and what it weighs."""
    return (
        type(source.upsample) is int
        and source.upsample in _UPSAMPLED
        and source.mode == "nearest"
        and source.scale is source.shift is source.activation is None
        and (source.weight is None or is_short(source.weight))
    )


def is_short(value: Any) -> bool:
    """A Python number that is spelled in some digits; an int may have more than Python is willing to spell."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def read_sources(
    intake: Intake, sources: Any, weights: Any, normalize: Any
) -> tuple[tuple[Array, ...], tuple[Key, ...], Parameters]:
    """The arrays of all sources, their keys and their parameters."""
    if not isinstance(sources, (list, tuple)):
        is_one = isinstance(sources, (np.ndarray, Source)) or cuda.is_cuda(sources)
        hint = "pass a list, also for one source: [x]" if is_one else ""
        problem = f"sources is {spelled(sources)}, needs a list or tuple of arrays"
        raise SpecTypeError(complaint(intake.op, problem, hint=hint))
    if not sources:
        raise SpecError(complaint(intake.op, "sources is empty, needs at least one array"))
    loaded = [read_source(intake, f"sources[{i}]", source) for i, source in enumerate(sources)]
    for i, weight in enumerate(read_weights(intake, weights, len(loaded))):
        if weight is None:
            continue
        source = loaded[i]
        if source.weight is not None:
            problem = f"sources[{i}] has a weight of its own and weights[{i}]"
            raise SpecError(complaint(intake.op, problem, hint=f"leave one out: weights[{i}] may be None"))
        prologue = Prologue(*source.prologue[:-1], shape_of(weight))  # _replace takes three times as long
        loaded[i] = Loaded(source.array, prologue, source.scale, source.shift, weight)
    if normalize is not None:
        numbers = normalized(intake.op, [source.weight for source in loaded], normalize)
        loaded = [source._replace(weight=number) for source, number in zip(loaded, numbers, strict=True)]
    weights, scales, shifts = zip(*((s.weight, s.scale, s.shift) for s in loaded), strict=True)
    return tuple(s.array for s in loaded), tuple(s.key for s in loaded), (weights, scales, shifts)


def settle_parameters(intake: Intake, operands: Operands, dtype: DType) -> None:
    """Round numbers and vectors to the dtype of the data, and make vectors contiguous."""
    with np.errstate(all="ignore"):  # beyond the dtype is infinite
        operands.weights = tuple(settled_weight(intake, value, dtype) for value in operands.weights)
        operands.scales = tuple(settled(intake, value, dtype) for value in operands.scales)
        operands.shifts = tuple(settled(intake, value, dtype) for value in operands.shifts)
        operands.residual_weight = settled_weight(intake, operands.residual_weight, dtype)


def read_source(intake: Intake, name: str, value: Any) -> Loaded:
    """An array or a Source, taken apart."""
    if not isinstance(value, Source):
        return Loaded(intake.array(name, value))
    op = intake.op
    if isinstance(value.array, Source):
        raise SpecTypeError(complaint(op, f"{name} is a Source of a Source, needs an array inside"))
    if value.mode not in options.MODES:
        allowed = ", ".join(f'"{mode}"' for mode in options.MODES)
        raise SpecError(complaint(op, f"{name}.mode is {spelled(value.mode)}, needs one of {allowed}"))
    array = intake.array(name, value.array)
    upsample = options.pair(op, f"{name}.upsample", value.upsample)
    scale, shift = (read_parameter(intake, f"{name}.{role}", getattr(value, role)) for role in ("scale", "shift"))
    weight = read_weight(intake, f"{name}.weight", value.weight)
    activation = options.activation(op, f"{name}.activation", value.activation)
    shapes = [None if parameter is None else shape_of(parameter) for parameter in (scale, shift, weight)]
    prologue = Prologue(upsample, value.mode, shapes[0], shapes[1], activation, shapes[2])
    return Loaded(array, prologue, scale, shift, weight)


def source_spec(op: str, name: str, key: Key, dtype: DType, channel_axis: int) -> SourceSpec:
    """The source as the spec states it; its vectors must be as long as its channel axis."""
    shape, prologue = key[0], key[2] or PLAIN
    for role in ("scale", "shift", "weight"):
        vector = getattr(prologue, role)
        if vector is None or (vector == () and role == "weight"):
            continue
        channels = shape[channel_axis : channel_axis + 1 or None]
        if vector != channels:
            kind = "a number" if vector == () else f"a vector {vector}"
            problem = f"{role} of {name} is {kind}, needs one entry for each channel: {channels or 'none'}"
            raise SpecError(complaint(op, problem, arrays=[(name, shape, key[1])]))
    return SourceSpec(
        shape,
        dtype.name,
        upsample=prologue.upsample,
        mode=prologue.mode,
        scale=prologue.scale is not None,
        shift=prologue.shift is not None,
        activation=options.rounded_activation(prologue.activation, dtype),
        weight=None if prologue.weight is None else "scalar" if prologue.weight in ((), (1,)) else "vector",
    )
