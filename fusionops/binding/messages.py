"""How an error about what the user passed is worded; decides nothing about what is wrong.

op: argument, value and limit
  sources[0]: (2, 7, 9, 16) float32     sources[1]: (2, 14, 9, 24) float32
hint: the next step
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType

import numpy as np

LISTED = 6  # arrays that one message lists; the rest is counted

Labelled = tuple[str, tuple[int, ...], "np.dtype[np.generic]"]


def complaint(op: str, problem: str, *, arrays: Iterable[Labelled] = (), hint: str = "") -> str:
    """The text of an error: what is wrong, the arrays involved, the next step."""
    listed = [f"{name}: {shape} {dtype.name}" for name, shape, dtype in arrays]
    if len(listed) > LISTED:
        listed[LISTED:] = [f"and {len(listed) - LISTED} more"]
    lines = [f"{op}: {problem}"]
    if listed:
        lines.append("  " + "     ".join(listed))
    if hint:
        lines.append(f"hint: {hint}")
    return "\n".join(lines)


def spelled(value: object) -> str:
    """`value` as a message shows it: arrays by shape and dtype, literals as they are typed, the rest by kind."""
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} {value.dtype}"
    if not isinstance(value, (str, int, float, complex, tuple, list, np.generic, NoneType)):
        kind = type(value)
        library = kind.__module__.partition(".")[0]
        return f"a {kind.__name__}" if library == "builtins" else f"a {library}.{kind.__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
