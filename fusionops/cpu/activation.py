"""Activations on vectors: the pointwise functions of the epilogue as IR. No memory access.

float32 uses polynomials of its own; float64 asks the C library lane by lane. NaN goes through every one of them as NaN.
Coefficients: least squares on Chebyshev nodes, reweighted towards the smallest relative error; the error of each fit
stands beside it in units of 2⁻²⁴, before the rounding of its evaluation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from llvmlite import ir

from fusionops.cpu.simd import Lanes
from fusionops.spec import ACTIVATIONS, Activation

CODES = {name: code for code, name in enumerate((None, *ACTIVATIONS))}
RELUS = (None, "relu", "relu6", "leaky_relu")  # compile in a fraction of the time of the others

EXP = (0.0013950486219892861, 0.008368887862961194, 0.041666205873330545, 0.16666518851553988, 0.5000000095165485)
"""(eʳ − 1 − r) / r² for |r| ≤ ln(2)/2: 0.05."""
TANH = (-0.005704990413033368, 0.020639090660598325, -0.05373971628060454, 0.13331442215052802, -0.3333328194278464)
"""(tanh(x)/x − 1) / x² as a polynomial in x² for |x| ≤ 0.625: 0.07."""
ERFC_SCALE = 0.4
ERFC = (-0.009369915031236157, 0.03982965495182228, -0.04060857220532594, -0.0437865959236927, 0.08082992696628451,
        -0.02197422254289922, 0.08571635990114478, 0.07878697725635762, 0.10501230247989923, 0.11272128971946903,
        0.11284279349067121)  # fmt: skip
"""exp(u²)·erfc(u) / (2t) as a polynomial in t = 1 / (1 + 0.4·u) for 0 ≤ u ≤ 10.2: 0.03. Its coefficients are small, so
that Horner's rule adds 2 units; with a scale of 0.33 they alternate around 0.3 and it adds 4."""
PHI = (-7.654304228936482e-06, 0.00011348663640520229, -0.001186330207262605, 0.009973323526447565,
       -0.06649035994441721, 0.39894228011871163)  # fmt: skip
"""(Φ(x) − 1/2) / x as a polynomial in x² for |x| ≤ 1: 0.01."""
ERFC_END = 14.4  # x = √2·u beyond which x·Φ(x) rounds to 0

LN2_HIGH, LN2_LOW = 0.693359375, -2.1219444005469057e-04  # their sum is ln 2; n·LN2_HIGH is exact for |n| < 2¹⁵


def exp(v: Lanes, x: ir.Value) -> ir.Value:
    """eˣ: n = round(x / ln 2), eˣ = 2ⁿ·e^(x − n·ln 2); 2ⁿ in two factors, so that subnormal results are right."""
    if v.bits == 64:
        return v.each_lane("exp", x)
    b = v.b
    x = b.select(v.below(x, v.constant(-104.0)), v.constant(-104.0), x)  # e⁻¹⁰⁴ rounds to 0, e⁸⁹ to infinity
    x = b.select(v.below(v.constant(89.0), x), v.constant(89.0), x)
    n = v.round(b.fmul(x, v.constant(1 / math.log(2))))
    r = v.multiply_add(n, v.constant(-LN2_HIGH), x)
    r = v.multiply_add(n, v.constant(-LN2_LOW), r)
    mantissa = b.fadd(v.multiply_add(b.fmul(r, r), v.polynomial(r, EXP), r), v.constant(1.0))
    is_number = b.fcmp_ordered("ord", n, n)  # converting NaN to an integer is undefined
    power = b.fptosi(b.select(is_number, n, v.constant(0.0)), v.int)
    half = b.ashr(power, v.integers(1))

    def power_of_two(k: ir.Value) -> ir.Value:
        return b.bitcast(b.shl(b.add(k, v.integers(127)), v.integers(23)), v.type)

    return b.fmul(b.fmul(mantissa, power_of_two(half)), power_of_two(b.sub(power, half)))


def sigmoid(v: Lanes, x: ir.Value) -> ir.Value:
    """1 / (1 + e⁻ˣ), as e⁻|ˣ| over the same for x < 0, where e⁻ˣ would overflow."""
    one = v.constant(1.0)
    e = exp(v, v.b.fneg(v.absolute(x)))
    return v.b.fdiv(v.b.select(v.below(x, v.constant(0.0)), e, one), v.b.fadd(one, e))


def tanh(v: Lanes, x: ir.Value) -> ir.Value:
    """A polynomial near 0, where 1 − 2/(e²ˣ + 1) would cancel."""
    if v.bits == 64:
        return v.each_lane("tanh", x)
    b = v.b
    size, square = v.absolute(x), b.fmul(x, x)
    near = v.multiply_add(b.fmul(x, square), v.polynomial(square, TANH), x)
    one = v.constant(1.0)
    far = b.fsub(one, b.fdiv(v.constant(2.0), b.fadd(exp(v, b.fadd(size, size)), one)))
    return v.copysign(b.select(v.below(size, v.constant(0.625)), near, far), x)  # −0 stays −0


def gelu(v: Lanes, x: ir.Value) -> ir.Value:
    """x·Φ(x), Φ the normal distribution: Φ(−|x|) = erfc(|x|/√2)/2 keeps its relative accuracy; Φ(|x|) = 1 − Φ(−|x|).

    Around 0, where erfc's errors would be those of a number near 1, a polynomial.
    """
    b = v.b
    if v.bits == 64:
        u = b.fmul(x, v.constant(-math.sqrt(0.5)))
        return b.fmul(x, b.fmul(v.constant(0.5), v.each_lane("erfc", u)))
    size = v.absolute(x)
    size = b.select(v.below(v.constant(ERFC_END), size), v.constant(ERFC_END), size)
    u = b.fmul(size, v.constant(math.sqrt(0.5)))
    t = b.fdiv(v.constant(1.0), v.multiply_add(u, v.constant(ERFC_SCALE), v.constant(1.0)))
    square = b.fmul(size, size)
    # What rounding took from x², which e^(−x²/2) would multiply by x²/2: Dekker's product, exact with and without FMA.
    high = b.bitcast(b.and_(b.bitcast(size, v.int), v.integers(-(1 << 12))), v.type)
    low = b.fsub(size, high)
    lost = b.fsub(b.fmul(high, high), square)
    lost = b.fadd(b.fadd(lost, b.fmul(v.constant(2.0), b.fmul(high, low))), b.fmul(low, low))
    half = v.constant(-0.5)
    power = exp(v, b.fmul(half, square))
    power = v.multiply_add(b.fmul(half, lost), power, power)
    tail = b.fmul(b.fmul(t, v.polynomial(t, ERFC)), power)
    far = b.select(v.below(x, v.constant(0.0)), tail, b.fsub(v.constant(1.0), tail))
    near = v.multiply_add(x, v.polynomial(b.fmul(x, x), PHI), v.constant(0.5))
    return b.fmul(x, b.select(v.below(size, v.constant(1.0)), near, far))


def clamp(v: Lanes, x: ir.Value, high: float) -> ir.Value:
    """x limited to [0, high]; NaN stays."""
    x = relu(v, x)
    return v.b.select(v.below(v.constant(high), x), v.constant(high), x)


def relu(v: Lanes, x: ir.Value) -> ir.Value:
    return v.b.select(v.below(x, v.constant(0.0)), v.constant(0.0), x)


def hardsigmoid(v: Lanes, x: ir.Value) -> ir.Value:
    """relu6(x + 3) / 6."""
    return v.b.fdiv(clamp(v, v.b.fadd(x, v.constant(3.0)), 6.0), v.constant(6.0))


def code(activation: Activation | None) -> int:
    """The number by which a params block names an activation."""
    return CODES[activation.name if activation else None]


def is_plain(activation: Activation | None) -> bool:
    """Whether it is none, or one of the relus."""
    return activation is None or activation.name in RELUS


def relu_terms(v: Lanes, code: ir.Value, slope: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What makes `any_relu` the one of RELUS with this code: the factor of negatives, the least and the largest result.

    code, slope   an int64, and a vector that only leaky_relu reads
    """
    b = v.b

    def among(*names: str) -> ir.Value:
        found = [b.icmp_signed("==", code, ir.Constant(code.type, CODES[name])) for name in names]
        return functools.reduce(b.or_, found)

    return (
        b.select(among("leaky_relu"), slope, v.constant(1.0)),
        b.select(among("relu", "relu6"), v.constant(0.0), v.constant(-math.inf)),
        b.select(among("relu6"), v.constant(6.0), v.constant(math.inf)),
    )


def any_relu(v: Lanes, x: ir.Value, terms: tuple[ir.Value, ir.Value, ir.Value]) -> ir.Value:
    """What `apply` makes of x, bit for bit, without code for each of RELUS."""
    factor, least, largest = terms
    x = v.b.select(v.below(x, v.constant(0.0)), v.b.fmul(x, factor), x)
    x = v.b.select(v.below(x, least), least, x)
    return v.b.select(v.below(largest, x), largest, x)


def apply(name: str | None, v: Lanes, x: ir.Value, slope: ir.Value) -> ir.Value:
    """The activation called `name`; `slope` is a vector that only leaky_relu reads."""
    functions: dict[str | None, Callable[[], ir.Value]] = {
        None: lambda: x,
        "relu": lambda: relu(v, x),
        "relu6": lambda: clamp(v, x, 6.0),
        "leaky_relu": lambda: v.b.select(v.below(x, v.constant(0.0)), v.b.fmul(x, slope), x),
        "sigmoid": lambda: sigmoid(v, x),
        "tanh": lambda: tanh(v, x),
        "silu": lambda: v.b.fmul(x, sigmoid(v, x)),
        "hardswish": lambda: v.b.fmul(x, hardsigmoid(v, x)),
        "hardsigmoid": lambda: hardsigmoid(v, x),
        "gelu": lambda: gelu(v, x),
    }
    return functions[name]()
