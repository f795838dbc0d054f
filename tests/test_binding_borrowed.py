"""Arrays of other libraries on a GPU: borrowed without a copy, given back in the caller's kind, or refused.

Looks at bound calls; no kernel runs. There is no GPU: fake_cupy stands for CuPy, fake_torch for PyTorch.
"""

from __future__ import annotations

import sys
import types

import fake_cupy as cp
import fake_torch
import numpy as np
import pytest
from cuda_calls import ARGUMENTS, B, F, X, bound_with, full, shape_of
from fake_torch import Tensor

import fusionops as fo
from fusionops.binding import bind_conv, bind_merge, cuda


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    """CuPy and PyTorch seem to be imported, and the gpu backend to lend."""
    monkeypatch.setitem(sys.modules, "cupy", cp)
    monkeypatch.setitem(sys.modules, "torch", fake_torch)

    def borrow(value):
        return cp.from_dlpack(value) if hasattr(value, "__dlpack__") else cp.asarray(value)

    monkeypatch.setattr(cuda, "_borrow", borrow)


class Interface:
    """An array that has nothing but `__cuda_array_interface__`."""

    def __init__(self, array):
        self.__cuda_array_interface__ = array.__cuda_array_interface__


def host(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("lent", [Tensor, lambda a: Tensor(a, 13), Interface], ids=["dlpack", "managed", "interface"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arrays_of_other_libraries_are_borrowed_without_a_copy(name, lent):
    array = full(*shape_of(name))
    call = bound_with(name, lent(array))
    operands = call.operands
    reached = [*operands.sources, operands.filters, operands.bias, operands.residual, *operands.weights]
    reached += [*operands.scales, *operands.shifts, operands.residual_weight, call.out]
    assert array.data.ptr in [reached.data.ptr for reached in reached if isinstance(reached, cp.ndarray)]
    assert (call.home, call.copies) == ("gpu", ())


def test_results_are_of_the_first_sources_kind():
    x = full(3)
    assert bind_merge("add", [x, Tensor(x)]).returns is None
    assert bind_merge("add", [Interface(x), Tensor(x)]).returns is None
    given = bind_merge("add", [Tensor(x), x]).returns(x)
    assert (type(given), given.array) == (Tensor, x)
    assert type(bind_merge("add", [1.5, Tensor(x), x]).returns(x)) is Tensor
    assert type(bind_conv("add_conv", [Tensor(X)], F).returns(x)) is Tensor
    assert bind_conv("add_conv", [X], F, Tensor(B)).returns is None


def test_out_is_returned_itself_once_its_library_waits_for_it():
    out = Tensor(full(3))
    call = bind_merge("add", [full(3)], out=out)
    assert call.target is call.out
    assert (call.returns(call.out), call.out.lent_times) == (out, 1)
    assert call.returns(other := full(3)) is other
    interface = Interface(full(3))
    call = bind_merge("add", [full(3)], out=interface)
    assert call.returns(call.out) is interface


def test_kinds_may_be_mixed_on_one_gpu():
    with pytest.raises(fo.SpecTypeError, match=r"GPU arrays \(sources\[1\]\) and NumPy arrays \(sources\[0\]\)"):
        bind_merge("add", [host(3), Tensor(full(3))])
    with pytest.raises(fo.SpecError, match=r"GPU 1 \(sources\[1\]\)"):
        bind_merge("add", [Tensor(full(3)), Tensor(full(3, device=1))])


def test_tensors_that_are_not_on_a_gpu_are_turned_away():
    with pytest.raises(fo.SpecTypeError, match=r"sources\[0\] is a torch Tensor, needs a NumPy array\nhint: pass x\."):
        bind_merge("add", [Tensor(host(3), device_type=1)])
    with pytest.raises(fo.SpecTypeError, match="needs a NumPy array or a CuPy array"):
        bind_merge("add", [host(3)], out=Tensor(host(3), device_type=1))


def test_tensor_without_memory_is_turned_away(monkeypatch):
    def refuse(tensor):
        raise ValueError("Unknown device type meta for Dlpack")

    monkeypatch.setattr(Tensor, "__dlpack_device__", refuse)
    with pytest.raises(fo.SpecTypeError, match="is a torch Tensor"):
        bind_merge("add", [Tensor(full(3))])


@pytest.mark.parametrize("error", [BufferError, RuntimeError, TypeError, ValueError])
def test_what_cannot_be_borrowed_says_why(monkeypatch, error):
    def refuse(tensor, **options):
        raise error("requires gradient, use tensor.detach()")

    monkeypatch.setattr(Tensor, "__dlpack__", refuse)
    with pytest.raises(fo.SpecTypeError, match=r"which CuPy cannot borrow: requires gradient, use tensor.detach\(\)"):
        bind_merge("add", [Tensor(full(3))])


def test_immutable_arrays_cannot_be_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(Array=Tensor))
    monkeypatch.setitem(sys.modules, "jax.numpy", types.SimpleNamespace(from_dlpack=Tensor))
    with pytest.raises(fo.SpecTypeError, match=r"out is a fake_torch\.Tensor, which cannot be written"):
        bind_merge("add", [full(3)], out=Tensor(full(3)))
    assert type(bind_merge("add", [Tensor(full(3))]).returns(full(3))) is Tensor
