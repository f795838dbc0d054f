"""Calls that were made before: what tells one from another, and what of a call is new each time.

A call of plain NumPy arrays is decided by the roles, shapes, strides and dtypes of its arrays and by its options: its
key. In a call whose key was judged before, only the addresses are new, with which arrays may overlap or be misaligned.
Weights are not part of it: calls that have some are judged each time.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from fusionops.address import addresses
from fusionops.binding.arrays import Array
from fusionops.binding.call import Call
from fusionops.binding.sources import Source, is_upsampled_alone
from fusionops.kernel import Filters

Key = tuple[Any, ...]

_ndarray = np.ndarray
_look = attrgetter("shape", "strides", "dtype")

# Options that are compared by value, those of a type with those of the same type: 1 == True, but they are judged apart.
_COMPARED = {int, str, bool, type(None)}
_NUMBERS = {int, float}  # which the tuples of options may hold too, such as ("leaky_relu", 0.2)


def sight(
    op: str, sources: Any, others: tuple[Any, ...], out: Any, options: dict[str, Any]
) -> tuple[Key, list[int]] | None:
    """The key of a call and the addresses of its arrays (sources, others, out); None where it is judged each time.

    others   filters, bias and residual, where the op has them; None where there are none

    In the key each argument has a place of its own: first what kind of array it is, or that there is none, then, of all
    that are arrays, what they look like.
    """
    if type(sources) is not list and type(sources) is not tuple:
        return None
    values = (*options.values(),)
    types: Any = (*map(type, values),)
    if not _COMPARED.issuperset(types):
        if not all(type(value) in _COMPARED or _is_exact(value) for value in values):
            return None
        types = repr(values)
    kinds: list[Any] = [*map(type, sources)]
    arrays: list[Array] = [*sources]
    if kinds.count(_ndarray) < len(kinds):
        for i, source in enumerate(sources):
            if type(source) is Source and type(source.array) is _ndarray and is_upsampled_alone(source):
                kinds[i], arrays[i] = source.upsample, source.array
            elif type(source) is not _ndarray:
                return None
    for other in others:
        if type(other) is _ndarray:
            kinds.append(_ndarray)
            arrays.append(other)
        elif other is None:
            kinds.append(None)
        elif type(other) is Filters:
            kinds.append(other.kind)
        else:
            return None
    if out is not None:
        if type(out) is not _ndarray or not out.flags.writeable:
            return None
        arrays.append(out)
    return (op, values, types, out is None, len(sources), *kinds, *map(_look, arrays)), addresses(arrays)


def _is_exact(value: Any) -> bool:
    """A tuple of values whose `repr` tells them apart."""
    return type(value) is tuple and all(
        type(item) in _COMPARED or type(item) in _NUMBERS or _is_exact(item) for item in value
    )


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


def reaches(call: Call, target: Array, places: list[int]) -> Reaches | None:
    """Of the arrays of a call that writes `target`; None where they are not as sighted, or addresses are not all."""
    judgement, operands = call.judgement, call.operands
    arrays = operands.arrays(target)
    alignments = {array.dtype.alignment for array in arrays}
    if call.home != "cpu" or call.copies or call.returns is not None or judgement.mixed or len(alignments) > 1:
        return None
    numbers = (operands.residual_weight, *operands.weights, *operands.scales, *operands.shifts)
    if any(number is not None for number in numbers) or addresses(arrays) != places:
        return None
    *inputs, out = (_reach(array, target, call.op == "add") for array in arrays)
    return Reaches(tuple(inputs), out, alignments.pop())


def _reach(array: Array, out: Array, elementwise: bool) -> Reach:
    walks = [(extent - 1) * step for extent, step in zip(array.shape, array.strides, strict=True)]
    high = sum(walk for walk in walks if walk > 0) + array.itemsize if array.size else 0
    alike = elementwise and (array.shape, array.strides, array.dtype) == (out.shape, out.strides, out.dtype)
    return Reach(sum(walk for walk in walks if walk < 0), high, alike)


def admits(known: Reaches, places: list[int]) -> bool:
    """Whether a call with a known key may run with arrays at these addresses."""
    inputs, (low, high, _), alignment = known
    bits = to = places[-1]
    first, last = to + low, to + high
    for (low, high, alike), start in zip(inputs, places):  # noqa: B905  the last address is out's
        bits |= start
        if first < start + high and start + low < last and not (alike and start == to):
            return False
    return bits % alignment == 0
