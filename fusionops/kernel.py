"""The contract a backend signs: kernels as records, and the arrays they are handed. Chooses and computes nothing."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fusionops.spec import FusionSpec, Layout

Array = Any  # a NumPy or CuPy array; which of the two is the backend's business


class Config(Protocol):
    """How a kernel runs one problem: frozen, hashable, computed from spec and device alone."""

    @property
    def scratch_bytes(self) -> int:
        """Memory one thread needs besides its operands, bytes."""

    @property
    def shared_bytes(self) -> int:
        """Memory the whole call needs besides operands and per-thread scratch (packed filters), bytes."""

    def illegal_on(self, device: Any) -> tuple[str, ...]:
        """Every reason why `device` cannot run this config; empty means it can."""


class Filters:
    """Filters that are packed once for each kernel that wants them in an order of its own.

    Made by `fusionops.prepack`; holds a copy of the array, so later writes to the original change nothing. NumPy's is
    read-only; CuPy has no such arrays.
    """

    def __init__(self, array: Array, layout: Layout) -> None:
        self.array = array.copy()
        if hasattr(self.array.flags, "writeable"):
            self.array.flags.writeable = False
        self.layout = layout
        self.kind = (type(array), self.shape, array.dtype, layout)  # what a call with them depends on
        self._packed: dict[object, Array] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def packed(self, key: object, pack: Callable[[Array], Array]) -> Array:
        """The array in the order that `key` stands for, made by `pack` the first time it is asked for."""
        try:
            return self._packed[key]
        except KeyError:  # two threads may both pack; no lock, which a forked child might find taken
            return self._packed.setdefault(key, pack(self.array))

    def __repr__(self) -> str:
        return f"Filters({self.array.shape} {self.array.dtype} {self.layout}, packed {len(self._packed)} ways)"


Numbers = tuple[float | None, ...]  # weights that are no vectors, one of each source; () where none has one


class Strides(NamedTuple):
    """The strides of a call's arrays, in bytes; None stands for an array that is not there, or packed already."""

    sources: tuple[tuple[int, ...], ...]
    filters: tuple[int, ...] | None
    residual: tuple[int, ...] | None
    out: tuple[int, ...]


@dataclass(slots=True)
class Operands:
    """The arrays of one call, by role, in the shapes the spec states; strides are the caller's.

    weights    one per source: None, a float, or a vector (C,)
    scales, shifts   one per source: None or a vector (C,)
    filters    an array in the layout of the spec, or Filters
    residual, residual_weight   the residual source and its weight
    merged     receives the merged map when spec.return_sum
    """

    sources: tuple[Array, ...]
    weights: tuple[Any, ...] = ()
    scales: tuple[Any, ...] = ()
    shifts: tuple[Any, ...] = ()
    filters: Array | Filters | None = None
    bias: Array | None = None
    residual: Array | None = None
    residual_weight: Any = None
    merged: Array | None = None

    @property
    def kept_filters(self) -> Filters | None:
        """The filters, where they are packed once."""
        return self.filters if isinstance(self.filters, Filters) else None

    def arrays(self, out: Array) -> list[Array]:
        """Every array that a call reads, weights apart, and `out` last; filters that are packed once are none."""
        others = (self.filters, self.bias, self.residual)
        return [*self.sources, *[a for a in others if a is not None and not isinstance(a, Filters)], out]

    def strides(self, out: Array) -> Strides:
        filters = None if self.filters is None or isinstance(self.filters, Filters) else self.filters.strides
        residual = None if self.residual is None else self.residual.strides
        return Strides(tuple([source.strides for source in self.sources]), filters, residual, out.strides)


@dataclass(frozen=True, slots=True)
class Replay:
    """How a call whose weights are numbers is made again, with other arrays of the same layouts.

    words    the block that describes it, but for addresses
    places   words of the addresses: of sources, what there is of filters that are an array, bias and residual, of out
    launch(words, filters)   runs the call that a block describes; with filters that are packed once, or None
    """

    words: array[int]
    places: tuple[int, ...]
    launch: Callable[[array[int], Filters | None], None]


class Reach(NamedTuple):
    """Between which bytes from its address on an array lies, from the first to behind the last.

    alike   whether each element of the output may be written to the one at the same place of this array
    """

    low: int
    high: int
    alike: bool


class Reaches(NamedTuple):
    """What a call needs of its arrays' addresses: multiples of `alignment`, and `out` apart from the inputs."""

    inputs: tuple[Reach, ...]
    out: Reach
    alignment: int


NEW, JUDGED = -1, -2  # of arrays: of a call that was not made before; of one that is judged each time


class Guards(Protocol):
    """What a backend remembers of calls that differ in their arrays alone.

    add(arrays, has_out, reaches, replay, kept)   keeps a call; the output first of the arrays, where it is one of them
    find(arrays)   what was kept of the call whose arrays looked like these, with its block for them; or NEW or JUDGED
    """

    def add(
        self, arrays: Sequence[Array], has_out: bool, reaches: Reaches | None, replay: Replay | None, kept: Any
    ) -> None: ...

    def find(self, arrays: list[Array]) -> tuple[Any, array[int]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Kernel:
    """An implementation of a region of the family.

    unsupported(spec)   every reason it cannot run `spec` correctly, however slow: preference is dispatch's
    slow(spec, device)  every reason why a kernel further down the table is likely to run it faster
    products(spec)      multiply-adds that it forms, fill included, where these are not the definition's
    plan(spec, device)  how it would run; pure
    run(spec, config, operands, out)   writes out; validates nothing, decides nothing
    replay(spec, config, strides, weights)   a shorter way to run it again, to the same bits; None: there is none
    lacking(device)     every reason why a device cannot run it, whatever the spec; asked where the backend is usable
    """

    name: str
    unsupported: Callable[[FusionSpec], tuple[str, ...]]
    plan: Callable[[FusionSpec, Any], Config]
    run: Callable[[FusionSpec, Any, Operands, Array], None]
    slow: Callable[[FusionSpec, Any], tuple[str, ...]] = lambda spec, device: ()
    products: Callable[[FusionSpec], int] | None = None
    replay: Callable[[FusionSpec, Any, Strides, Numbers], Replay | None] = lambda spec, config, strides, weights: None
    lacking: Callable[[Any], tuple[str, ...]] = lambda device: ()

    def takes(self, spec: FusionSpec, device: Any) -> bool:
        """Whether it can run `spec` and is not slow at it."""
        return not (self.unsupported(spec) or self.lacking(device) or self.slow(spec, device))
