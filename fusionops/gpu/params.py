"""The structs by which kernels receive a call, as NumPy sees them: the twins of those in the CUDA sources.

Every field is 8 bytes wide, so that both sides lay them out alike; one struct is one kernel parameter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionops.gpu.module import runtime
from fusionops.spec import ACTIVATIONS, Activation

Struct = np.ndarray[Any, Any]  # of one element

CODES = {name: code for code, name in enumerate((None, *ACTIVATIONS))}
WEIGHT_KINDS = {None: 0, "scalar": 1, "vector": 2}
TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "float", "float64": "double"}  # of the sources
SUFFIXES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}  # of kernel names

# Sources that one launch takes: a struct of many costs each launch the transfer of all.
CAPACITIES = (4, 64)

WEIGHT = np.dtype([("kind", "i8"), ("number", "f8"), ("vector", "u8")])


def capacity(sources: int) -> int:
    """The smallest that holds so many."""
    return next(most for most in CAPACITIES if sources <= most)


def activation_code(activation: Activation | None) -> int:
    return CODES[activation.name if activation else None]


def slope(activation: Activation | None) -> float:
    return activation.parameters[0] if activation and activation.parameters else 0.0


def set_weight(field: Any, kind: str | None, weight: Any) -> None:
    """Fills a WEIGHT with a number, or the address of a vector, which lies without gaps."""
    field["kind"] = WEIGHT_KINDS[kind]
    if kind == "vector":
        field["vector"] = runtime().address(weight)
    elif kind == "scalar":
        field["number"] = weight
