"""Public calls on CuPy arrays, from end to end: the real backend and its CUDA C, executed on the host.

fake_cupy stands for CuPy; what the cpu backend gives for the same numbers is what these calls are held to.
"""

from __future__ import annotations

from dataclasses import replace

import fake_cupy as cp
import numpy as np
import pytest
from gpu_stand_in import forget, usable_gpu

import fusionops as fo
from fusionops.device import A100, H200
from fusionops.gpu import stream


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    with usable_gpu(monkeypatch) as runtime:
        yield runtime


def integers(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


X, Y, SMALL = integers(2, 6, 8, 9), integers(2, 6, 8, 9, seed=1), integers(2, 3, 4, 5, seed=2)
F, G, B = integers(3, 3, 9, 7, seed=3), integers(3, 3, 14, 7, seed=4), integers(7, seed=5)
MATRIX, D = integers(9, 4, seed=6), integers(3, 3, 1, 9, seed=7)

CALLS = {
    "add": lambda a: fo.add([a(X), a(Y)], weights=[2, 3], activation="relu"),
    "add_of_integers": lambda a: fo.add([a(X.astype(np.int8)), a(Y.astype(np.int8))]),
    "add_broadcast": lambda a: fo.add([a(X), a(Y[:, :1]), 2.0]),
    "concat": lambda a: fo.concat([a(X), a(Y)], axis=1),
    "concat_upsampled": lambda a: fo.concat([a(X), fo.Source(a(SMALL), upsample=2)]),
    "add_conv": lambda a: fo.add_conv([a(X), a(Y)], a(F), a(B), padding="same", strict=True),
    "concat_conv": lambda a: fo.concat_conv(
        [a(X), fo.Source(a(SMALL), upsample=2)], a(G), a(B), stride=2, activation="relu", strict=True
    ),
    "prepacked": lambda a: fo.add_conv([a(X)], fo.prepack(a(F)), padding=1, strict=True),
    "nchw": lambda a: fo.add_conv(
        [a(X.transpose(0, 3, 1, 2))], a(F.transpose(3, 2, 0, 1)), layout="NCHW", strict=True
    ),
    "depthwise": lambda a: fo.add_conv([a(X), a(Y)], a(D), groups=9, padding="same", activation="relu"),
    "add_dense": lambda a: fo.add_dense([a(X), a(Y)], a(MATRIX)),
    "float16_on_tensor_cores": lambda a: fo.concat_dense(
        [a(X.astype(np.float16)), a(Y.astype(np.float16))], a(np.concatenate([MATRIX, MATRIX]).astype(np.float16))
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_give_what_the_cpu_gives(call):
    """Integers, so that every order of a sum gives the same bits."""
    expected, result = call(lambda array: array), call(cp.asarray)
    assert type(result) is cp.ndarray
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(cp.asnumpy(result), expected)


def test_out_and_the_sum_are_written_where_they_are_asked_for(runtime):
    out = cp.asarray(np.zeros((2, 4, 6, 7), np.float32))
    y, merged = fo.add_conv([cp.asarray(X), cp.asarray(Y)], cp.asarray(F), out=out, return_sum=True)
    assert y is out
    np.testing.assert_array_equal(cp.asnumpy(y), fo.add_conv([X + Y], F))
    np.testing.assert_array_equal(cp.asnumpy(merged), X + Y)
    assert [name.split("<")[0] for name in runtime.launched] == ["add_fprop_stream", "conv_fprop_igemm"]


def test_explain_names_the_kernel_of_the_gpu():
    half = [cp.asarray(X.astype(np.float16))] * 2
    filters = cp.asarray(integers(3, 3, 9, 16, dtype=np.float16))
    assert fo.explain("add_conv", half, filters).kernel == "gpu.add_conv_fprop_igemm_sm80_f16"
    assert fo.explain("add_conv", half, filters, strict=True).kernel == "gpu.add_conv_fprop_igemm_f16"
    single = [cp.asarray(X)] * 2
    assert fo.explain("add_conv", single, cp.asarray(integers(3, 3, 9, 16))).kernel == "gpu.add_conv_fprop_igemm_f32"
    tf32 = fo.explain("add_conv", single, cp.asarray(integers(3, 3, 9, 16)), precision="tf32")
    assert tf32.kernel == "gpu.add_conv_fprop_igemm_sm80_f32"
    with pytest.raises(fo.UnsupportedError, match="precision is tf32, which is for float32, and dtype is float16"):
        fo.explain("add_conv", half, filters, precision="tf32")
    assert fo.explain("add", half).kernel == "gpu.add_fprop_stream_f16"
    few = cp.asarray(F.astype(np.float16))
    assert fo.explain("add_conv", half, few).kernel == "gpu.add_conv_fprop_igemm_f16"


@pytest.mark.parametrize(
    ("dtype", "groups", "depth", "algorithm"),
    [
        (np.float32, 64, 1, "grouped"),
        (np.float16, 64, 1, "grouped"),
        (np.float32, 16, 4, "grouped"),
        (np.float16, 16, 4, "grouped"),
        (np.float32, 1, 64, "igemm"),
        (np.float32, 2, 64, "igemm"),
        (np.float16, 2, 64, "igemm"),
        (np.float16, 9, 1, "grouped"),
    ],
)
def test_groups_of_few_filters_have_a_kernel_of_their_own(dtype, groups, depth, algorithm):
    """And groups of many have none: their matrix products fill a tile."""
    x = cp.asarray(integers(1, 8, 8, groups * depth, dtype=dtype))
    filters = cp.asarray(integers(3, 3, depth, groups * depth, dtype=dtype))
    chosen = fo.explain("add_conv", [x, x], filters, groups=groups).kernel
    assert chosen.startswith(f"gpu.add_conv_fprop_{algorithm}_")


@pytest.mark.parametrize("kept", [False, True])
def test_wide_sixteen_bit_maps_run_on_hopper(runtime, kept):
    """Filters are packed for each call, or once."""
    x, y = integers(1, 5, 6, 64, dtype=np.float16), integers(1, 5, 6, 60, dtype=np.float16)
    f = integers(3, 3, 124, 40, dtype=np.float16)
    sources, filters = [cp.asarray(x), cp.asarray(y)], cp.asarray(f)
    filters = fo.prepack(filters) if kept else filters
    for _ in range(2):
        result = fo.concat_conv(sources, filters, padding="same")
        expected = fo.concat_conv([x, y], f, padding="same", strict=True)  # of whole numbers, to the bit
        np.testing.assert_array_equal(cp.asnumpy(result), expected)
    assert {name.split("<")[0] for name in runtime.launched} == {"conv_fprop_igemm_sm90"}
    assert fo.explain("concat_conv", sources, filters).kernel == "gpu.concat_conv_fprop_igemm_sm90_f16"


@pytest.mark.parametrize(
    ("capability", "compiler", "reason"),
    [((8, 0), (13, 0), "has compute capability 8.0, needs 9.0"), ((9, 0), (12, 8), "compiler is 12.8, needs 12.9")],
)
def test_hopper_is_not_taken_for_granted(runtime, monkeypatch, capability, compiler, reason):
    monkeypatch.setitem(cp.PROFILES, 0, replace(H200, capability=capability))
    monkeypatch.setattr(cp.cuda.nvrtc, "getVersion", lambda: compiler)
    forget()
    x, f = cp.asarray(integers(1, 5, 6, 64, dtype=np.float16)), cp.asarray(integers(1, 1, 64, 64, dtype=np.float16))
    explained = fo.explain("add_conv", [x], f)
    assert explained.kernel == "gpu.add_conv_fprop_igemm_sm80_f16"
    assert reason in str(dict(explained.others)["gpu.add_conv_fprop_igemm_sm90_f16"])


@pytest.mark.parametrize("first", [0, 1])
def test_each_gpu_has_plans_of_its_own(runtime, monkeypatch, first):
    """One of Hopper beside an A100, whichever is used first; and one that is too old beside a good one."""
    monkeypatch.setitem(cp.PROFILES, 1, A100)
    monkeypatch.setitem(cp.PROFILES, 2, replace(H200, capability=(7, 5)))
    forget()
    x, f = integers(1, 5, 6, 64, dtype=np.float16), integers(1, 1, 64, 64, dtype=np.float16)
    for number in (first, 1 - first):
        with cp.Device(number):
            here, filters = cp.asarray(x), cp.asarray(f)
        runtime.launched.clear()
        fo.add_conv([here], filters)
        assert [name.split("<")[0] for name in runtime.launched] == [f"conv_fprop_igemm_{('sm90', 'sm80')[number]}"]
        assert f"igemm_{('sm90', 'sm80')[number]}_f16" in fo.explain("add_conv", [here], filters).kernel
    with cp.Device(2):
        old = cp.asarray(x)
    with pytest.raises(fo.BackendError, match=r"has compute capability 7\.5, needs 8\.0"):
        fo.add([old, old])


def test_a_launch_that_fails_is_explained(runtime, monkeypatch):
    def fail(source, name):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    x = cp.asarray(X)
    monkeypatch.setattr(runtime, "function", fail)
    with pytest.raises(fo.BackendError, match=r"(?s)add_fprop_stream<float.* failed on .*ILLEGAL.*FUSIONOPS_SYNC=1"):
        fo.add([x, x])


def test_a_failure_is_known_by_name_when_launches_are_waited_for(runtime, monkeypatch):
    fo.add([cp.asarray(X), cp.asarray(Y)])
    assert runtime.waited == 0
    monkeypatch.setenv("FUSIONOPS_SYNC", "1")
    fo.add([cp.asarray(X), cp.asarray(Y)])
    assert runtime.waited == 1

    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(runtime, "wait", fail)
    with pytest.raises(fo.BackendError, match=r"add_fprop_stream<float.*> failed on .* illegal memory access"):
        fo.add([cp.asarray(X), cp.asarray(Y)])


def test_an_empty_map_launches_nothing(runtime):
    empty = cp.asarray(np.zeros((0, 6, 8, 9), np.float32))
    assert fo.add_conv([empty], cp.asarray(F)).shape == (0, 4, 6, 7)
    assert runtime.launched == []


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("long", [(1 << 16) - 1, 1 << 16, (1 << 16) + 5])
def test_rows_of_a_concat_may_be_long(runtime, rows, long):
    """Of words of 16 bytes; a block that begins in one row ends in the next."""
    x, y = (np.arange(rows * words * 4, dtype=np.uint32).reshape(rows, -1) for words in (long, 3))
    result = fo.concat([cp.asarray(x), cp.asarray(y), cp.asarray(x)], axis=1)
    assert runtime.launched == ["concat_fprop_stream<Run<u64, 2>, 4>"]
    np.testing.assert_array_equal(cp.asnumpy(result), np.concatenate([x, y, x], axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_more_elements_than_32_bits_count_are_added_one_by_one(runtime, monkeypatch, dtype):
    """By the kernel that counts in 64 bits, which a small sum takes where few runs are too many."""
    monkeypatch.setattr(stream, "FEW_RUNS", 1)
    stream.prepare_add.cache_clear()
    x, y = integers(2, 6, 8, 9, dtype=dtype), integers(2, 3, 4, 9, dtype=dtype, seed=1)
    result = fo.add([cp.asarray(x), fo.Source(cp.asarray(y), upsample=2)])
    stream.prepare_add.cache_clear()
    assert [name.split(", ")[2] for name in runtime.launched] == ["u64"]
    np.testing.assert_array_equal(cp.asnumpy(result), fo.add([x, fo.Source(y, upsample=2)]))
