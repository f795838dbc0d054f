"""A bound call: what dispatch is handed, and the rules for the array that the caller wants the result in.

Judges `out`, and whether the backend that is asked for works where the arrays are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fusionops.binding import cuda
from fusionops.binding.arrays import Array, DType, Intake, Shape, is_of_rows, is_settled
from fusionops.binding.messages import Labelled, complaint
from fusionops.errors import SpecError, SpecTypeError
from fusionops.kernel import Operands
from fusionops.spec import ITEM_BYTES, FusionSpec

# Judgements that each op keeps. One is a few kilobytes; a network has at most some hundred different ones.
CACHED_JUDGEMENTS = 1024

BYTES_LIMIT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found out from shapes, dtypes and options alone, so that an equal call need not be judged again.

    shape, dtype   of the result as the caller sees it; the spec of a dense op counts rows instead of leading axes
    mixed          whether some source has to be converted to the dtype of the result
    """

    spec: FusionSpec
    shape: Shape
    dtype: DType
    mixed: bool = False


@dataclass(slots=True)
class Call:
    """One call as binding understood it.

    op       name of the op, for messages
    out      the caller's array, which is also what the op returns, or None
    target   `out` in the shape of the spec, where a kernel may write it while it reads the inputs; else None
    copies   what binding copied or converted and why, in words
    home     the backend that works where the arrays are
    returns  gives a result back in the caller's kind of array, None where it is of that kind
    """

    op: str
    judgement: Judgement
    operands: Operands
    out: Array | None
    target: Array | None
    copies: tuple[str, ...]
    home: str = "cpu"
    returns: Callable[[Array], Any] | None = None


def judge_backend(call: Call, name: str) -> None:
    """Arrays stay where they are, so a backend that works elsewhere cannot have them."""
    if (name == "gpu") == (call.home == "gpu"):
        return
    where, hint = "NumPy's", "cupy.asarray(x) brings one to the GPU"
    if call.home == "gpu":
        where, hint = "on a GPU", "cupy.asnumpy(x) brings one to NumPy"
    problem = f'backend is "{name}", but the arrays are {where}; nothing is transferred unasked'
    raise SpecTypeError(complaint(call.op, problem, hint=f"{hint}; backend=None runs them where they are"))


def judge_size(op: str, what: str, shape: Shape, dtype: DType, arrays: Iterable[Labelled] = ()) -> None:
    """Reject arrays that no machine could address, before NumPy is asked for one."""
    if math.prod(shape) * ITEM_BYTES[dtype.name] > BYTES_LIMIT:
        problem = f"{what} of shape {shape} {dtype.name} is larger than 2**63 - 1 bytes"
        raise SpecError(complaint(op, problem, arrays=arrays))


def judge_out(op: str, out: Array, judgement: Judgement) -> None:
    """`out` must be an array of exactly the result's shape and dtype, writeable, each element in a place of its own."""
    is_numpy = isinstance(out, np.ndarray)
    if out.shape != judgement.shape:
        hint = f'{"np" if is_numpy else "cupy"}.empty({judgement.shape}, "{judgement.dtype}") fits'
        raise SpecError(complaint(op, f"out has shape {out.shape}, the result has {judgement.shape}", hint=hint))
    if out.dtype != judgement.dtype:
        problem = f"out has dtype {out.dtype}, the result has {judgement.dtype}; out is never converted"
        raise SpecTypeError(complaint(op, problem))
    flags = out.flags
    if is_numpy and not flags.writeable:
        raise SpecError(complaint(op, "out is read-only"))
    if not flags.c_contiguous and _overlaps_itself(out.shape, out.strides, out.itemsize):
        problem = f"out overlaps itself: shape {out.shape} with strides {out.strides} has elements that share memory"
        raise SpecError(complaint(op, problem, hint="pass a contiguous array"))


def bound(
    op: str,
    judgement: Judgement,
    operands: Operands,
    out: Array | None,
    intake: Intake | None,
    copies: tuple[str, ...] = (),
    *,
    elementwise: bool = False,
) -> Call:
    """The call, with the decision whether the result needs a place of its own first.

    copies        what was copied after the intake's arrays were settled
    elementwise   whether `out` may be one of the sources itself: each element of the result is written after the only
                  elements it depends on have been read
    """
    target = returns = None
    home = "cpu" if type(operands.sources[0]) is np.ndarray else "gpu"
    if intake is not None:
        returns, copies = intake.returns, intake.copies + copies
    if out is not None:
        if not (out.flags.c_contiguous or is_settled(out)):
            copies += ("out: its strides are not whole items, so the result is computed elsewhere and copied",)
        elif _overlaps_input(out, operands, elementwise):
            copies += ("out: its memory overlaps an input's, so the result is computed elsewhere and copied",)
        else:
            target = out if type(out) is np.ndarray or home == "gpu" else np.asarray(out)
            if target.shape != judgement.spec.out_shape:
                if is_of_rows(target):
                    target = target.reshape(judgement.spec.out_shape)
                else:
                    target = None
                    copies += ("out: its leading axes cannot be collapsed in place, so the result is copied into it",)
    return Call(op, judgement, operands, out, target, copies, home, returns)


def _overlaps_input(out: Any, operands: Operands, elementwise: bool) -> bool:
    arrays = operands.sources
    if operands.filters is not None:
        arrays = (*arrays, operands.filters, operands.bias, operands.residual)
    if operands.weights or operands.residual_weight is not None:
        arrays += (operands.residual_weight, *operands.weights, *operands.scales, *operands.shifts)
    if not isinstance(out, np.ndarray):
        return _overlaps_on_gpu(out, arrays, elementwise)
    owns = out.flags.owndata
    for array in arrays:
        # Two arrays that are no views share nothing, which is cheaper to see than bounds are to compare.
        if array is None or not isinstance(array, np.ndarray) or (owns and array.base is None and array is not out):
            continue
        if np.may_share_memory(out, array):
            is_same = elementwise and _is_laid_out_alike(out, array) and out.ctypes.data == array.ctypes.data
            if not is_same:
                return True
    return False


def _overlaps_on_gpu(out: Any, arrays: tuple[Any, ...], elementwise: bool) -> bool:
    for array in filter(cuda.is_cupy, arrays):
        if cuda.may_share_memory(out, array):
            is_same = elementwise and _is_laid_out_alike(out, array) and out.data.ptr == array.data.ptr
            if not is_same:
                return True
    return False


def _is_laid_out_alike(out: Any, source: Any) -> bool:
    return bool(out.shape == source.shape and out.strides == source.strides and out.dtype == source.dtype)


@lru_cache(maxsize=CACHED_JUDGEMENTS)
def _overlaps_itself(shape: Shape, strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether two elements may share memory: some axis steps less far than all finer axes together reach.

    Slices and transpositions of ordinary arrays never do; as_strided can build layouts that interleave without
    sharing, which count as overlapping.
    """
    if 0 in shape:
        return False
    reach = itemsize
    for step, extent in sorted((abs(step), extent) for step, extent in zip(strides, shape, strict=True) if extent > 1):
        if step < reach:
            return True
        reach += step * (extent - 1)
    return False
