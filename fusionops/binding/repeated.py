"""Calls that were made before: what tells one from another, and what of a call is new each time.

A call of plain NumPy arrays is decided by its op, options and roles, the key; and by the shapes, strides and dtypes of
its arrays, which a backend's guards compare. Where both were judged before only the addresses are new, with which
arrays may overlap or be misaligned. Weights that are numbers are part of the key; calls with others are judged each
time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionops.address import address
from fusionops.binding.arrays import Array
from fusionops.binding.call import Call
from fusionops.binding.sources import Source, is_short, is_stated
from fusionops.kernel import Filters, Reach, Reaches

Key = tuple[Any, ...]

_ndarray = np.ndarray

_SPELLED = {str, bool, type(None)}  # which tuples and lists among the options may hold beside numbers
# Options that are compared by value, those of a type with those of the same type: 1 == True, but they are judged apart.
_COMPARED = {int, *_SPELLED}


def sight(
    op: str, sources: Any, others: tuple[Any, ...], out: Any, options: dict[str, Any]
) -> tuple[Key, list[Array]] | None:
    """The key of a call and its arrays (out, sources, others); None where it is judged each time.

    others   filters, bias and residual, where the op has them; None where there are none

    In the key each argument has a place of its own: what kind of array it is, or that there is none. The shape of the
    first source is there too: of a network's calls of one kind few share it.
    """
    if (type(sources) is not list and type(sources) is not tuple) or (out is not None and type(out) is not _ndarray):
        return None
    values = (*options.values(),)
    types: tuple[Any, ...] = (*map(type, values),)
    if not _COMPARED.issuperset(types):
        if not all(kind in _COMPARED or _is_exact(value) for kind, value in zip(types, values, strict=True)):
            return None
        types = tuple([kind if kind in _COMPARED else repr(value) for kind, value in zip(types, values, strict=True)])
        values = tuple([value if type(value) in _COMPARED else None for value in values])
    kinds: list[Any] = [*map(type, sources)]
    arrays: list[Array] = [*sources] if out is None else [out, *sources]
    start = len(arrays) - len(kinds)
    if kinds.count(_ndarray) < len(kinds):
        for i, source in enumerate(sources):
            if type(source) is Source and type(source.array) is _ndarray and is_stated(source):
                kinds[i], arrays[start + i] = (source.upsample, repr(source.weight)), source.array
            elif type(source) is not _ndarray:
                return None
    if not kinds:
        return None
    first = arrays[start]
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
    return (op, values, types, first.shape, out is None, len(sources), *kinds), arrays


def _is_exact(value: Any, levels: int = 2) -> bool:
    """A tuple or list of values whose `repr` tells them apart, such as ("leaky_relu", 0.2) or ((1, 1), (0, 2))."""
    return (type(value) is tuple or type(value) is list) and all(
        is_short(item) or type(item) in _SPELLED or (levels > 1 and _is_exact(item, levels - 1)) for item in value
    )


def with_own_dtypes(arrays: list[Array]) -> list[Array] | None:
    """The arrays with the dtype objects that NumPy has one of each; None where one has a dtype of no such kind.

    What tells calls apart compares objects, and unpickled arrays have equal dtypes of their own.
    """
    own = [np.dtype(array.dtype.type) for array in arrays]
    if any(dtype != array.dtype for dtype, array in zip(own, arrays, strict=True)):
        return None
    return [array if dtype is array.dtype else array.view(dtype) for dtype, array in zip(own, arrays, strict=True)]


def reaches(call: Call, target: Array, sighted: list[Array]) -> Reaches | None:
    """Of the arrays of a call that writes `target`; None where they are not as sighted, or addresses are not all.

    sighted   the inputs, without `out`
    """
    judgement, operands = call.judgement, call.operands
    *inputs, _ = arrays = operands.arrays(target)
    alignments = {array.dtype.alignment for array in arrays}
    if call.home != "cpu" or call.returns is not None or judgement.mixed or len(alignments) > 1:
        return None
    others = (operands.residual_weight, *operands.scales, *operands.shifts)
    if any(other is not None for other in others) or not all(type(w) in (float, type(None)) for w in operands.weights):
        return None
    if [*map(address, inputs)] != [*map(address, sighted)]:
        return None
    *reach, out = (_reach(array, target, call.op == "add") for array in arrays)
    return Reaches(tuple(reach), out, alignments.pop())


def _reach(array: Array, out: Array, elementwise: bool) -> Reach:
    if not array.size:
        return Reach(0, 0, alike=True)
    walks = [(extent - 1) * step for extent, step in zip(array.shape, array.strides, strict=True)]
    high = sum(walk for walk in walks if walk > 0) + array.itemsize
    alike = elementwise and (array.shape, array.strides, array.dtype) == (out.shape, out.strides, out.dtype)
    return Reach(sum(walk for walk in walks if walk < 0), high, alike)
