"""Options in the forms a user may write them, brought into one; knows neither arrays nor their shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from fusionops.binding.messages import complaint, spelled
from fusionops.errors import SpecError, SpecTypeError
from fusionops.spec import ACTIVATIONS, Activation, Layout

EXTENT_LIMIT = 2**31 - 1  # no stride, dilation, padding or factor is larger, so that their products fit 64 bits
LEAKY_SLOPE = 0.01  # of a plain "leaky_relu": the default of PyTorch and ONNX (Keras has 0.2 and 0.3 in two places)
MODES = ("nearest",)
NORMALIZATIONS = ("relu", "softmax")
PRECISIONS = ("tf32",)

Pair = tuple[int, int]
Padding = str | tuple[Pair, Pair]

_ACTIVATIONS = {name: Activation(name, (LEAKY_SLOPE,) if name == "leaky_relu" else ()) for name in ACTIVATIONS}
_ALIASES = {"swish": "silu", "leakyrelu": "leaky_relu", "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid"}


def integer(op: str, name: str, value: Any, least: int) -> int:
    """A whole number in [least, EXTENT_LIMIT]; True and 1.0 are not whole numbers here."""
    if type(value) is int and least <= value <= EXTENT_LIMIT:
        return value
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise SpecTypeError(complaint(op, f"{name} is {spelled(value)}, needs an integer"))
    if number < least:
        raise SpecError(complaint(op, f"{name} is {number}, needs at least {least}"))
    if number > EXTENT_LIMIT:
        raise SpecError(complaint(op, f"{name} is {number}, needs at most {EXTENT_LIMIT}"))
    return number


def pair(op: str, name: str, value: Any, least: int = 1) -> Pair:
    """One whole number for both axes, or (rows, columns)."""
    if type(value) is int and least <= value <= EXTENT_LIMIT:
        return value, value
    if not isinstance(value, (tuple, list)):
        number = integer(op, name, value, least)
        return number, number
    if len(value) != 2:
        raise SpecError(complaint(op, f"{name} is {spelled(value)}, needs one integer or two, not {len(value)}"))
    return integer(op, f"{name}[0]", value[0], least), integer(op, f"{name}[1]", value[1], least)


def padding(op: str, value: Any) -> Padding:
    """ "valid", "same", or ((top, bottom), (left, right)) from an int, (rows, columns) or the pairs themselves."""
    if isinstance(value, str):
        if value.lower() in ("valid", "same"):
            return value.lower()
        allowed = '"valid", "same", an int, (rows, columns) or ((top, bottom), (left, right))'
        raise SpecError(complaint(op, f"padding is {spelled(value)}, needs {allowed}"))
    if isinstance(value, (tuple, list)) and len(value) == 4:
        hint = "((top, bottom), (left, right)) gives each side its own"
        raise SpecError(complaint(op, f"padding is {spelled(value)}, needs two entries, not 4", hint=hint))
    if not (isinstance(value, (tuple, list)) and any(isinstance(side, (tuple, list)) for side in value)):
        rows, columns = pair(op, "padding", value, 0)
        return (rows, rows), (columns, columns)
    if len(value) != 2:
        raise SpecError(complaint(op, f"padding is {spelled(value)}, needs two pairs, not {len(value)} entries"))
    return pair(op, "padding[0]", value[0], 0), pair(op, "padding[1]", value[1], 0)


def activation(op: str, name: str, value: Any) -> Activation | None:
    """None, a name, or a name with its parameter such as ("leaky_relu", 0.2)."""
    if value is None:
        return None
    if isinstance(value, str):
        if value in _ACTIVATIONS:
            return _ACTIVATIONS[value]
        guess = _ALIASES.get(value.lower(), value.lower())
        hint = f'"{guess}" is the name here' if guess in _ACTIVATIONS else "None leaves the sum as it is"
        known = ", ".join(f'"{known}"' for known in ACTIVATIONS)
        raise SpecError(complaint(op, f"{name} is {spelled(value)}, needs None or one of {known}", hint=hint))
    if not isinstance(value, (tuple, list)):
        hint = f'pass a name: {name}="relu"'
        raise SpecTypeError(complaint(op, f"{name} is {spelled(value)}, needs None, a name or a pair", hint=hint))
    if len(value) != 2 or value[0] != "leaky_relu":
        only = 'the only pair is ("leaky_relu", slope)'
        raise SpecError(complaint(op, f"{name} is {spelled(value)}, which takes no parameter; {only}"))
    slope = number(op, f"the slope of {name}", value[1])
    if not np.isfinite(slope):
        raise SpecError(complaint(op, f"the slope of {name} is {slope}, needs a finite number"))
    return Activation("leaky_relu", (slope + 0.0,))  # −0 and 0 are one slope


def number(op: str, name: str, value: Any) -> float:
    """A real number, not a bool; arrays only if they hold one number and have no axes."""
    if type(value) is float:
        return value
    kind = value.dtype.kind if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else ""
    if type(value) is int or kind in tuple("iuf") or getattr(getattr(value, "dtype", None), "name", "") == "bfloat16":
        return float(value)
    raise SpecTypeError(complaint(op, f"{name} is {spelled(value)}, needs a real number"))


def layout(op: str, value: Any) -> Layout:
    """ "NHWC" or "NCHW"."""
    if value in ("NHWC", "NCHW") if isinstance(value, str) else False:
        return Layout(value)
    framework = {"channels_last": "NHWC", "channels_first": "NCHW"}
    hint = f'"{framework[value]}" is the name here' if isinstance(value, str) and value in framework else ""
    error = SpecError if isinstance(value, str) else SpecTypeError
    raise error(complaint(op, f'layout is {spelled(value)}, needs "NHWC" or "NCHW"', hint=hint))


def choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    """None or one of `allowed`."""
    if value is None or (isinstance(value, str) and value in allowed):
        return value
    error = SpecError if isinstance(value, str) else SpecTypeError
    known = ", ".join(f'"{known}"' for known in allowed)
    raise error(complaint(op, f"{name} is {spelled(value)}, needs None or one of {known}"))


def flag(op: str, name: str, value: Any) -> bool:
    """True or False, and nothing that merely has a truth value."""
    if type(value) is bool:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise SpecTypeError(complaint(op, f"{name} is {spelled(value)}, needs True or False"))


def rounded_activation(activation: Activation | None, dtype: np.dtype[Any]) -> Activation | None:
    """`activation` with its parameter in the dtype of the data, so that every backend computes with the same number."""
    if activation is None or not activation.parameters:
        return activation
    with np.errstate(over="ignore"):
        return Activation(activation.name, tuple(float(dtype.type(value)) for value in activation.parameters))


def bind_backend(op: str, value: Any, known: tuple[str, ...]) -> str | None:
    """The argument `backend`; which ones there are is told by whoever knows them."""
    return choice(op, "backend", value, known)


def bind_threads(value: Any) -> int:
    """The argument of `set_num_threads`; how many the machine has is the backend's to know."""
    return integer("set_num_threads", "n", value, 1)


def bind_op(asker: str, value: Any, known: dict[str, Callable[..., Any]]) -> str:
    """The name of an op, from the op itself or its name."""
    name = value if isinstance(value, str) else getattr(value, "__name__", "")
    if name in known and (value is known[name] or isinstance(value, str)):
        return str(name)
    error = SpecError if isinstance(value, str) else SpecTypeError
    raise error(complaint(asker, f"op is {spelled(value)}, needs one of {', '.join(known)}, or its name"))
