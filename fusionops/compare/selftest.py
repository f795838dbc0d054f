"""The self-test of an installed package: the problems of `fusionops.testing` that integers make exact, on any backend.

A sum of integers is exact in any order, so a kernel has the bits of the reference or it is wrong. Needs no test runner;
the tests of the source tree go further (rounding, strides, threads, hostile surroundings).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

import fusionops as fo
from fusionops.compare.instance import to_backend, to_numpy
from fusionops.errors import UnsupportedError
from fusionops.kernel import Operands
from fusionops.spec import Activation, Conv2d, Dense, FusionSpec, SourceSpec
from fusionops.testing import EXACT_ACTIVATIONS, PROBLEMS, Problem, exact_operands, map_operands


def _is_exact(activation: Activation | None) -> bool:
    return activation is None or activation.name in EXACT_ACTIVATIONS


EXACT_PROBLEMS = tuple(problem for problem in PROBLEMS if _is_exact(problem.spec.activation))


@dataclass(frozen=True, slots=True)
class Result:
    """How one problem went.

    kernel    that ran; empty where the backend says that it cannot run the problem
    problem   what was wrong; empty where nothing was
    """

    name: str
    kernel: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {self.kernel or 'no kernel'}: {self.problem or 'exact'}"


def run(problem: Problem, backend: str) -> Result:
    """Run a problem through the public function and compare it with the reference.

    Raises BackendError where the machine cannot run the backend.
    """
    seed = zlib.crc32(problem.name.encode())
    operands = exact_operands(problem.spec, np.random.default_rng(seed))
    there = map_operands(operands, lambda array: to_backend(array, backend))
    op, arguments, options = call(problem.spec, there)
    try:
        kernel = fo.explain(op, *arguments, **options, backend=backend).kernel
    except UnsupportedError:
        return Result(problem.name, "")
    function = getattr(fo, op)
    _, given, stated = call(problem.spec, operands)
    expected = _results(function(*given, **stated, backend="reference"))
    try:
        computed = [to_numpy(array) for array in _results(function(*arguments, **options, backend=backend))]
    except Exception as failure:  # noqa: BLE001  whatever it is, it is a finding, and the other problems go on
        return Result(problem.name, kernel, f"{type(failure).__name__}: {failure}")
    for wanted, got in zip(expected, computed, strict=True):
        unequal = np.count_nonzero(wanted != got)
        if unequal:
            return Result(problem.name, kernel, f"{unequal} of {wanted.size} results differ from the reference")
    return Result(problem.name, kernel)


def _results(returned: Any) -> tuple[Any, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


def call(spec: FusionSpec, operands: Operands) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The public call that binds to `spec`: op, arguments, options."""
    vectors = operands.weights, operands.scales, operands.shifts
    sources = [
        _source(source, array, *prologue)
        for source, array, *prologue in zip(spec.sources, operands.sources, *vectors, strict=True)
    ]
    if spec.contraction is None:
        options = {"activation": _spelled(spec.activation)} if spec.merge == "add" else {"axis": spec.axis}
        return str(spec.merge), (sources,), options
    options = {"activation": _spelled(spec.activation)}
    if spec.residual is not None:
        options["residual"] = _source(spec.residual, operands.residual, operands.residual_weight, None, None)
    arguments = (sources, operands.filters, operands.bias)
    match spec.contraction:
        case Dense():
            return f"{spec.merge}_dense", arguments, options
        case Conv2d(_, _, _, stride, padding, dilation, groups):
            options |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            options |= {"layout": str(spec.layout), "strict": spec.strict}
            if spec.return_sum:
                options["return_sum"] = True
            return f"{spec.merge}_conv", arguments, options


def _source(spec: SourceSpec, array: Any, weight: Any, scale: Any, shift: Any) -> Any:
    if spec.is_plain:
        return array
    activation = _spelled(spec.activation)
    return fo.Source(array, upsample=spec.upsample, scale=scale, shift=shift, activation=activation, weight=weight)


def _spelled(activation: Activation | None) -> Any:
    """As the public functions take it."""
    if activation is None or not activation.parameters:
        return activation and activation.name
    return activation.name, *activation.parameters
