"""Calls on CuPy arrays from end to end: who runs them, where results are made, in which kind they are given back.

There is no GPU: fake_cupy stands for CuPy, and a kernel that leaves the work to the reference for the gpu backend.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

import fake_cupy as cp
import fake_torch
import numpy as np
import pytest
from fake_torch import Tensor

import fusionops as fo
from fusionops import dispatch, reference
from fusionops.dispatch import ReferenceConfig
from fusionops.kernel import Filters, Kernel, Operands


def host(value):
    """What a kernel on the host may read and write in place of an operand."""
    match value:
        case cp.ndarray():
            return value._memory
        case Filters():
            return host(value.array)
        case tuple():
            return tuple(map(host, value))
    return value


@dataclass
class Gpu:
    """Stands for the module `fusionops.gpu`; remembers the devices that kernels run on."""

    unusable: tuple[str, ...] = ()
    ran_on: list[int] = field(default_factory=list)
    borrowed: int = 0

    @property
    def KERNELS(self):
        def unsupported(spec):
            return ("precision is tf32",) if spec.precision else ()

        def plan(spec, device):
            assert device == "the device"
            return replace(ReferenceConfig(), scratch_bytes=100, shared_bytes=7)

        return (Kernel("gpu.pretended", unsupported, plan, self.run),)

    def run(self, spec, config, operands, out):
        self.ran_on.append(cp.cuda.runtime.getDevice())
        roles = {role: host(getattr(operands, role)) for role in Operands.__slots__}
        reference.run(spec, Operands(**roles), host(out))

    def device(self, number):
        assert not self.unusable
        return "the device"

    def reasons_unusable(self, number=0):
        return self.unusable

    machine_reasons = reasons_unusable

    def facts(self):
        return {"cupy": cp.__version__}

    empty = staticmethod(cp.empty)

    def on_device_of(self, array):
        return array.device

    def borrow(self, array):
        self.borrowed += 1
        return cp.from_dlpack(array)


def forget():
    dispatch.backend.cache_clear()
    dispatch.choose.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    pretended = Gpu()
    monkeypatch.setitem(sys.modules, "cupy", cp)
    monkeypatch.setitem(sys.modules, "fusionops.gpu", pretended)
    monkeypatch.setattr(fo, "gpu", pretended, raising=False)
    forget()
    yield pretended
    forget()


RNG = np.random.default_rng(3)


def integers(*shape):
    return RNG.integers(-4, 5, shape).astype(np.float32)


X, Y, VECTOR = integers(1, 6, 6, 4), integers(1, 6, 6, 4), integers(4)
F, F8, B, Z = integers(3, 3, 4, 5), integers(3, 3, 8, 5), integers(5), integers(1, 4, 4, 5)
M, M8, W = integers(4, 5), integers(8, 5), integers(1, 6, 6, 5)

# Every op with every kind of array argument: called with what turns an array into one of a side.
CALLS = {
    "add": lambda on: fo.add([on(X), on(Y), 2.0], weights=[0.5, on(VECTOR), None], activation="relu"),
    "add_upsampled": lambda on: fo.add([fo.Source(on(X), upsample=2), fo.Source(on(Y), upsample=2)]),
    "concat": lambda on: fo.concat([on(X)[:, ::-1], on(Y)], axis=2),
    "add_conv": lambda on: fo.add_conv([on(X), on(Y)], on(F), on(B), residual=on(Z), weights=[[1, 2, 3, 4], 2]),
    "concat_conv": lambda on: fo.concat_conv([on(X), on(Y)], fo.prepack(on(F8)), on(B), stride=2),
    "add_dense": lambda on: fo.add_dense([on(X), on(Y)], fo.prepack(on(M)), on(B), residual=on(W)),
    "concat_dense": lambda on: fo.concat_dense([on(X)[:, ::-1], on(Y)], on(M8)),
}  # fmt: skip


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("name", CALLS)
def test_result_is_a_cupy_array_where_the_arrays_are(gpu, name, device):
    def on(array):
        with cp.cuda.Device(device):
            return cp.asarray(array)

    result = CALLS[name](on)
    assert type(result) is cp.ndarray
    assert result.device.id == device
    assert gpu.ran_on == [device]
    expected = CALLS[name](np.asarray)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(cp.asnumpy(result), expected)


def test_out_and_the_sum_are_on_the_device_too(gpu):
    with cp.cuda.Device(1):
        x, f, out = cp.asarray(X), cp.asarray(F), cp.empty((1, 4, 4, 5), np.float32)
    y, merged = fo.add_conv([x, x], f, return_sum=True, out=out)
    assert y is out
    assert (type(merged), merged.device.id) == (cp.ndarray, 1)
    np.testing.assert_array_equal(cp.asnumpy(merged), X + X)
    np.testing.assert_array_equal(cp.asnumpy(out), fo.add_conv([X, X], F))


def test_staged_result_is_copied_where_out_is(gpu):
    with cp.cuda.Device(1):
        memory = cp.asarray(np.ones((3, 5), np.float32))
    out = memory[1:]
    assert fo.add([memory[:2], memory[:2]], out=out) is out
    np.testing.assert_array_equal(cp.asnumpy(memory)[:, 0], [1, 2, 2])


def test_empty_result_starts_no_kernel(gpu):
    assert fo.add_conv([cp.asarray(X[:0])], cp.asarray(F)).shape == (0, 4, 4, 5)
    assert gpu.ran_on == []


# Backends


def test_backend_follows_the_arrays(gpu):
    x = cp.asarray(X)
    assert fo.explain("add", [x]).backend == "gpu"
    assert fo.explain("add", [x], backend="gpu").kernel == "gpu.pretended"
    assert fo.explain("add", [X]).backend == "cpu"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_other_backends_do_not_take_gpu_arrays(gpu, name):
    x, out = cp.asarray(X), cp.asarray(Y)
    for call in (fo.add, lambda *args, **kwargs: fo.cost("add", *args, **kwargs)):
        with pytest.raises(fo.SpecTypeError) as caught:
            call([x, x], out=out, backend=name)
        assert str(caught.value) == (
            f'add: backend is "{name}", but the arrays are on a GPU; nothing is transferred unasked\n'
            "hint: cupy.asnumpy(x) brings one to NumPy; backend=None runs them where they are"
        )
    np.testing.assert_array_equal(cp.asnumpy(out), Y)


def test_gpu_backend_does_not_take_numpy_arrays(gpu):
    for call in (fo.add, lambda *args, **kwargs: fo.explain("add", *args, **kwargs)):
        with pytest.raises(fo.SpecTypeError) as caught:
            call([X, Y], backend="gpu")
        assert str(caught.value) == (
            'add: backend is "gpu", but the arrays are NumPy\'s; nothing is transferred unasked\n'
            "hint: cupy.asarray(x) brings one to the GPU; backend=None runs them where they are"
        )


def test_unusable_gpu_says_why_before_anything_else(gpu):
    gpu.unusable = ("there is no NVIDIA driver", "it rains")
    for call in (lambda: fo.add([cp.asarray(X)]), lambda: fo.add([X], backend="gpu"), lambda: fo.add([Tensor(X)])):
        forget()
        with pytest.raises(fo.BackendError) as caught:
            call()
        assert str(caught.value) == (
            "the gpu backend cannot be used\n"
            "  gpu: there is no NVIDIA driver\n"
            "  gpu: it rains\n"
            "hint: the cpu backend runs the same calls on NumPy arrays"
        )


def test_refusal_names_the_gpus_kernels(gpu):
    with pytest.raises(fo.UnsupportedError) as caught:
        fo.add_conv([cp.asarray(X)], cp.asarray(F), precision="tf32")
    assert str(caught.value).splitlines() == [
        "no gpu kernel can run add_conv fprop float32 N1 H6 W6 C(4) K5 R3 S3",
        "  gpu.pretended: precision is tf32",
        "hint: the cpu backend runs the same calls on NumPy arrays",
    ]


def test_info_lists_the_gpu_with_its_reasons(gpu):
    gpu.unusable = ("there is no NVIDIA driver",)
    forget()
    report = fo.info()
    assert dict(report.backends)["gpu"] == ("there is no NVIDIA driver",)
    assert ["gpu", "unusable:", "there", "is", "no", "NVIDIA", "driver"] in map(str.split, str(report).splitlines())
    assert report.facts["cupy"] == cp.__version__


# Reports


def test_explanation_is_of_the_gpu(gpu):
    x = cp.asarray(X)
    explained = fo.explain("add_conv", [x, x], cp.asarray(F), cp.asarray(np.tile(B, 2))[::2])
    assert (explained.backend, explained.kernel) == ("gpu", "gpu.pretended")
    assert explained.copies == ("bias: not contiguous",)
    assert "runs on  gpu: gpu.pretended\n" in str(explained)
    assert gpu.ran_on == []


def test_cost_is_of_the_gpu(gpu):
    x = cp.asarray(X)
    counted = fo.cost("add_conv", [x, x], cp.asarray(F))
    assert counted.scratch_bytes == 107
    assert replace(counted, scratch_bytes=0, peak_bytes=0).params == fo.cost("add_conv", [X, X], F).params


# Memory


def test_no_room_for_a_result_is_a_memory_error_with_its_bytes(gpu, monkeypatch):
    monkeypatch.setattr(cp.cuda.memory, "limit", 500)
    x = cp.asarray(X)
    with pytest.raises(MemoryError) as caught:
        fo.add([x, x])
    assert str(caught.value) == (
        f"add: the GPU has no room for {X.nbytes + 107} bytes for results and scratch memory\n"
        "  add fprop float32 (1, 6, 6, 4) + (1, 6, 6, 4)\n"
        f"Out of memory allocating {X.nbytes} bytes"
    )
    assert isinstance(caught.value.__cause__, cp.cuda.memory.OutOfMemoryError)


def test_no_room_for_the_sum_leaves_out_untouched(gpu, monkeypatch):
    x, f, out = cp.asarray(X), cp.asarray(F), cp.asarray(Z)
    monkeypatch.setattr(cp.cuda.memory, "limit", 500)
    with pytest.raises(MemoryError, match=rf"no room for {X.nbytes + 107} bytes"):
        fo.add_conv([x, x], f, return_sum=True, out=out)
    np.testing.assert_array_equal(cp.asnumpy(out), Z)
    assert gpu.ran_on == []


# Other libraries


@pytest.fixture
def torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch)


def test_tensors_come_back_as_tensors(gpu, torch):
    x, f = Tensor(cp.asarray(X)), Tensor(cp.asarray(F))
    y, merged = fo.add_conv([x, x], f, return_sum=True)
    assert (type(y), type(merged), gpu.borrowed) == (Tensor, Tensor, 3)
    np.testing.assert_array_equal(cp.asnumpy(y.array), fo.add_conv([X, X], F))
    np.testing.assert_array_equal(cp.asnumpy(merged.array), X + X)


def test_out_of_any_kind_is_returned(gpu, torch):
    x, memory = cp.asarray(X), cp.asarray(Y)
    out = Tensor(memory)
    assert fo.add([x, x], out=out) is out
    np.testing.assert_array_equal(cp.asnumpy(memory), X + X)
    assert fo.add([Tensor(x), x], out=memory) is memory
