"""An op from its arguments to its result: bound and run, or run again as it was run before.

A call like one that was made before, without copies, is neither judged nor planned again: its arrays' addresses go into
the block that its kernel then reads. `binding` says which calls may do that and what their arrays must be like, the
backend's guards tell whether they are, `dispatch` has chosen.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionops import dispatch
from fusionops.address import address
from fusionops.binding import Call, reaches, sight, with_own_dtypes
from fusionops.kernel import NEW, Array, Filters, Guards

# Keys that are remembered, of which a network has some hundred; and calls of a key, which are compared one by one, 7 ns
# each where the first extent differs.
KEPT, KEPT_OF_A_KEY = 1024, 16


@dataclass(frozen=True, slots=True, eq=False)
class Repeated:
    """How calls with equal keys and arrays that look the same run again.

    shape, dtype   of the result as the caller sees it
    place          of the block's words that is for the result's address
    is_kept        whether the filters are packed once
    """

    launch: Callable[[array[int], Filters | None], None]
    shape: tuple[int, ...]
    dtype: Any
    place: int
    is_kept: bool


_REPEATED: dict[tuple[Any, ...], Guards] = {}
_WEIGHED_ONCE: set[tuple[Any, ...]] = set()  # keys of calls with weights: those that are learned never come again


def _remember(key: tuple[Any, ...], call: Call, arrays: list[Array], result: Any) -> None:
    """Keeps how a call that has just run would run again; that it is judged each time, if there is no shorter way.

    Of a call with weights, which the key holds, when it has run twice.
    """
    judgement, operands, has_out = call.judgement, call.operands, call.out is not None
    make, own = dispatch.backend(call.home, 0).guards, with_own_dtypes(arrays)  # arrays of NumPy alone are sighted
    if make is None or own is None:
        return
    if key not in _WEIGHED_ONCE and any(weight is not None for weight in operands.weights):
        if len(_WEIGHED_ONCE) >= KEPT:
            _WEIGHED_ONCE.clear()
        _WEIGHED_ONCE.add(key)
        return
    if len(_REPEATED) >= KEPT:
        _REPEATED.clear()
    guards = _REPEATED.get(key)
    if guards is None or len(guards) >= KEPT_OF_A_KEY:
        _REPEATED[key] = guards = make()
    kernel, config = dispatch.planned(judgement, call.home, 0)
    if config is not None and not judgement.spec.return_sum:
        target = result.reshape(judgement.spec.out_shape) if call.target is None else call.target
        known = reaches(call, target, own[has_out:])
        replay = (
            kernel.replay(judgement.spec, config, operands.strides(target), operands.weights)
            if known is not None
            else None
        )
        if known is not None and replay is not None:
            is_kept = operands.kept_filters is not None
            repeated = Repeated(replay.launch, judgement.shape, judgement.dtype, replay.places[-1], is_kept)
            guards.add(own, has_out, known, replay, repeated)
            return
    guards.add(own, has_out, None, None, None)


def perform(
    bind: Callable[..., Call],
    op: str,
    sources: Any,
    others: tuple[Any, ...],
    out: Any,
    requested: str | None,
    options: dict[str, Any],
) -> Any:
    """The result of an op: as `run` of what `bind` makes of the arguments, or the same in fewer steps.

    others   the arguments after sources: none, or filters, bias and residual
    """
    sighted = sight(op, sources, others, out, options) if requested is None else None
    if sighted is None:
        return dispatch.run(bind(op, sources, *others, out=out, **options), requested)
    key, arrays = sighted
    guards, known = _REPEATED.get(key), NEW
    if guards is not None:
        known, block = guards.find(arrays)
        if known == NEW and (own := with_own_dtypes(arrays)) is not None:
            known, block = guards.find(own)
        if type(known) is Repeated:
            result = out
            if out is None:
                result = np.empty(known.shape, known.dtype)
                block[known.place] = address(result)
            known.launch(block, others[0] if known.is_kept else None)
            return result
    call = bind(op, sources, *others, out=out, **options)
    result = dispatch.run(call, None)
    if known == NEW and not call.copies:  # which the next of that kind may not need
        _remember(key, call, arrays, result)
    return result
