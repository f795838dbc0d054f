"""An `add_conv` on fake CuPy arrays, and every argument of it that can be an array."""

from __future__ import annotations

import fake_cupy as cp
import numpy as np

import fusionops as fo
from fusionops.binding import Call, bind_conv


def full(*shape, dtype=np.float32, device=0):
    with cp.cuda.Device(device):
        return cp.asarray(np.ones(shape, dtype))


X, F, B, Z = full(1, 6, 6, 4), full(3, 3, 4, 5), full(5), full(1, 4, 4, 5)
USUAL = {"sources": [X, X], "filters": F, "bias": B, "residual": Z, "out": full(1, 4, 4, 5)}

# Of each argument: its shape, and what of a usual call it replaces.
ARGUMENTS = {
    "sources[0]": ((1, 6, 6, 4), lambda a: {"sources": [a, X]}),
    "sources[1]": ((1, 6, 6, 4), lambda a: {"sources": [X, fo.Source(a)]}),
    "filters": ((3, 3, 4, 5), lambda a: {"filters": a}),
    "bias": ((5,), lambda a: {"bias": a}),
    "residual": ((1, 4, 4, 5), lambda a: {"residual": a}),
    "weights[1]": ((4,), lambda a: {"weights": [1.0, a]}),
    "sources[0].scale": ((4,), lambda a: {"sources": [fo.Source(X, scale=a)]}),
    "sources[0].shift": ((4,), lambda a: {"sources": [fo.Source(X, shift=a)]}),
    "sources[0].weight": ((4,), lambda a: {"sources": [fo.Source(X, weight=a)]}),
    "residual.weight": ((5,), lambda a: {"residual": fo.Source(Z, weight=a)}),
    "out": ((1, 4, 4, 5), lambda a: {"out": a}),
}


def shape_of(name: str) -> tuple[int, ...]:
    return ARGUMENTS[name][0]


def bound_with(name: str, array: object) -> Call:
    """The call with `array` for one argument."""
    return bind_conv("add_conv", **USUAL | ARGUMENTS[name][1](array))
