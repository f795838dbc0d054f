"""An op from its arguments to its result: bound and run, or run again as it was run before.

A call like one that was made before, without copies, is neither judged nor planned again: its arrays' addresses go into
the block that its kernel then reads. `binding` tells calls apart and says which may do that, `dispatch` has chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionops import dispatch
from fusionops.address import address
from fusionops.binding import Call, Reaches, admits, reaches, sight
from fusionops.kernel import Replay

KEPT = 1024  # keys that are remembered: a network has at most some hundred


@dataclass(frozen=True, slots=True)
class Repeated:
    """How calls of one key run again.

    shape, dtype   of the result as the caller sees it
    is_kept        whether the filters are packed once
    """

    reaches: Reaches
    replay: Replay
    shape: tuple[int, ...]
    dtype: Any
    is_kept: bool


_NEW = object()  # a key that was not seen
_REPEATED: dict[tuple[Any, ...], Repeated | None] = {}  # None: calls of that key are judged each time


def _repeated(call: Call, addresses: list[int], result: Any) -> Repeated | None:
    """How a call that has just run would run again, if there is a shorter way."""
    judgement, operands = call.judgement, call.operands
    kernel, config = dispatch.planned(judgement, call.home, 0)  # arrays of NumPy alone are sighted
    if config is None or judgement.spec.return_sum or (call.out is not None and call.target is None):
        return None
    target = result.reshape(judgement.spec.out_shape) if call.target is None else call.target
    if call.out is None:
        addresses = [*addresses, address(result)]
    known = reaches(call, target, addresses)
    if known is None:
        return None
    replay = kernel.replay(judgement.spec, config, operands.strides(target))
    if replay is None:
        return None
    return Repeated(known, replay, judgement.shape, judgement.dtype, operands.kept_filters is not None)


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
    key, addresses = sighted
    known = _REPEATED.get(key, _NEW)
    if type(known) is Repeated:
        result = out
        if out is None:
            result = np.empty(known.shape, known.dtype)
            addresses.append(address(result))
        if admits(known.reaches, addresses):
            known.replay(addresses, others[0] if known.is_kept else None)
            return result
    call = bind(op, sources, *others, out=out, **options)
    result = dispatch.run(call, None)
    if known is _NEW and not call.copies:  # which the next of that key may not need
        if len(_REPEATED) >= KEPT:
            _REPEATED.clear()
        _REPEATED[key] = _repeated(call, addresses, result)
    return result
