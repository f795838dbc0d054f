"""Weights, scales and shifts: numbers and vectors as users write them, normalised and rounded to the dtype of the data.

Knows no maps: whether a vector is as long as a map has channels is judged where the map's shape is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionops.binding import cuda, options
from fusionops.binding.arrays import Array, DType, Intake, Shape
from fusionops.binding.messages import complaint, spelled
from fusionops.errors import SpecError, SpecTypeError

# Keeps the sum of rectified weights away from zero. Tan, Pang and Le, "EfficientDet", 2020, section 3.3.
RELU_EPSILON = 1e-4

_ON_GPU = "float(x) reads it, and waits for what the GPU is doing"  # which is why binding does not

Parameter = float | Array | None


def shape_of(parameter: float | Array) -> Shape:
    """() of a number, (C,) of a vector."""
    return () if isinstance(parameter, float) else parameter.shape


def read_parameter(intake: Intake, name: str, value: Any) -> Parameter:
    """A number, or a vector (C,) of real numbers."""
    if value is None:
        return None
    if isinstance(value, (float, int, np.generic)):
        return options.number(intake.op, name, value)
    if not isinstance(value, (list, tuple)) and getattr(value, "ndim", 0) == 0 and not cuda.is_cuda(value):
        return options.number(intake.op, name, value)
    vector = intake.array(name, value)
    if vector.ndim != 1:
        problem = f"{name} has shape {vector.shape}, needs a number or a vector (C,)"
        raise SpecError(complaint(intake.op, problem, hint="" if vector.ndim else _ON_GPU))
    if vector.dtype.kind == "b":
        raise SpecTypeError(complaint(intake.op, f"{name} holds bools, needs real numbers"))
    return vector


def read_weight(intake: Intake, name: str, value: Any) -> Parameter:
    """As `read_parameter`, but no vector of one number on a GPU: see `settled_weight`."""
    weight = read_parameter(intake, name, value)
    if isinstance(weight, float) or weight is None:
        return weight
    if weight.shape == (1,) and cuda.is_cupy(weight):
        raise SpecTypeError(complaint(intake.op, f"{name} is one number on a GPU, needs the number", hint=_ON_GPU))
    return weight


def read_weights(intake: Intake, weights: Any, count: int) -> list[Parameter]:
    """One weight for each of `count` sources; None where a source has none."""
    if weights is None:
        return [None] * count
    if not (isinstance(weights, (list, tuple)) or _has_rows(weights)):
        problem = f"weights is {spelled(weights)}, needs a list with one number or vector (C,) for each source"
        raise SpecTypeError(complaint(intake.op, problem))
    if len(weights) != count:
        problem = f"weights has {len(weights)} entries, needs one for each of {count} sources"
        raise SpecError(complaint(intake.op, problem))
    return [read_weight(intake, f"weights[{i}]", weight) for i, weight in enumerate(weights)]


def _has_rows(weights: Any) -> bool:
    return getattr(weights, "ndim", 0) > 0 and (isinstance(weights, np.ndarray) or cuda.is_cuda(weights))


def normalized(op: str, weights: list[Parameter], normalize: Any) -> list[float]:
    """Weights that share out 1 among the sources, in float64.

    relu      max(w_i, 0) / (Σ max(w, 0) + 1e-4)
    softmax   exp(w_i) / Σ exp(w)
    """
    how = options.choice(op, "normalize", normalize, options.NORMALIZATIONS)
    if not all(isinstance(weight, float) for weight in weights):
        problem = f'normalize="{how}" needs a number as weight of every source; vectors and None cannot be normalised'
        raise SpecError(complaint(op, problem, hint=f"weights={[1.0] * len(weights)} weighs all sources alike"))
    values = np.array(weights, np.float64)
    with np.errstate(all="ignore"):
        if how == "relu":
            rectified = np.maximum(values, 0.0)
            shares = rectified / (rectified.sum() + RELU_EPSILON)
        else:
            exponentials = np.exp(values - values.max())
            shares = exponentials / exponentials.sum()
    return [float(share) for share in shares]


def settled_weight(intake: Intake, weight: Parameter, dtype: DType) -> Parameter:
    """As `settled`, but the vector of a single channel is a number, which also broadcasts with it."""
    if isinstance(weight, np.ndarray) and weight.shape == (1,):
        return float(weight.astype(dtype)[0])
    return settled(intake, weight, dtype)


def settled(intake: Intake, parameter: Parameter, dtype: DType) -> Parameter:
    """`parameter` in the dtype of the data: a Python float, or a contiguous vector where the data is."""
    if parameter is None:
        return None
    if isinstance(parameter, float):
        return float(dtype.type(parameter))
    return intake.placed(parameter.astype(dtype, order="C", copy=False))
