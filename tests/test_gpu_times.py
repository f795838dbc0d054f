"""The layers that gpu_check.py times, computed on the host: their ways agree; and what is said of the figures."""

from __future__ import annotations

import functools
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import fake_cupy as cp
import numpy as np
import pytest
from gpu_on_host import HostRuntime
from gpu_stand_in import usable_gpu

import fusionops as fo
from fusionops.gpu import module

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_times
from gpu_times import LAYERS, Inputs, Row

# One layer of each kind: a merge, a small map, several sources, upsampling, groups, a residual, a dense layer.
KINDS = (
    "unet256_l1", "unet256_l1_up", "fpn_p3_out", "densenet_b2_l7", "resnet_l2", "mobilenet_depthwise", "lstm_1024",
)  # fmt: skip
SMALL = [
    Row(replace(layer, size=(6, 8) if layer.size else (), K=max(24, layer.groups)), merge, 2, "float32")
    for layer in LAYERS
    if layer.name in KINDS
    for merge in layer.merges
]


# The ops on the backend that compiles nothing.
OPS = {name: functools.partial(getattr(fo, name), backend="reference")
       for name in ("add", "concat", "add_conv", "concat_conv", "concat_dense", "explain")}  # fmt: skip
REFERENCE = types.SimpleNamespace(**OPS, Source=fo.Source, prepack=fo.prepack)


DEVICE_MS = gpu_times.device_ms


def integers(seed: int) -> np.ndarray:
    """Whose sums are exact, so that the reference, which does not round a merged map, has the bits of a stored one."""
    return np.random.default_rng(seed).integers(-4, 5, gpu_times.BLOCK).astype(np.float32)


def once(run) -> float:
    run()
    return 2.0


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr(gpu_times, "device_ms", once)
    monkeypatch.setattr(gpu_times, "fo", REFERENCE)
    monkeypatch.setattr(gpu_times, "BLOCK", 1009)
    monkeypatch.setattr(gpu_times, "_block", integers)
    with module.use(HostRuntime()):
        yield


def test_every_kind_of_layer_is_timed():
    assert set(KINDS) <= {layer.name for layer in LAYERS}
    assert len({str(row) for row in gpu_times.rows()}) == len(list(gpu_times.rows()))


@pytest.mark.parametrize("row", SMALL, ids=str)
def test_the_materialised_way_computes_the_same(row, monkeypatch):
    monkeypatch.setattr(gpu_times, "without_torch", lambda: "it is left out")
    facts = gpu_times.time_row(row)
    stores = len(row.layer.channels) > 1 or row.layer.residual
    assert ("materialised_ms" in facts) == stores
    assert facts.get("same_bits", True)
    assert not gpu_times.wrong_rows({str(row): facts})
    assert "torch_ms" not in facts
    inputs = Inputs(row)
    inputs.fused()
    inputs.materialised()
    # A residual is added to what was rounded before: two roundings more.
    np.testing.assert_array_max_ulp(inputs.out + 64, inputs.stored + 64, 0 if "same_bits" in facts else 2)
    assert np.isfinite(inputs.out).all()


def test_the_work_of_a_row():
    row = next(row for row in gpu_times.rows() if str(row) == "unet256_l4 concat bfloat16 8")
    assert round(row.gflop, 1) == 77.3  # as in the table of docs/gpu-kernels.md
    row = next(row for row in gpu_times.rows() if row.layer.name == "mobilenet_depthwise" and row.N == 8)
    assert round(row.gflop * 1e9) == 2 * 8 * 56 * 56 * 128 * 9


def test_streams_are_compared_with_the_library():
    facts = gpu_times.time_stream(1 << 16, "float32")
    assert facts["same_bits"]
    assert round(facts["add_gbs"] / facts["copy_gbs"], 9) == 1.5


def test_a_stream_that_writes_other_bits_is_noticed(monkeypatch):
    def wrong(sources, out):
        fo.add(sources, out=out, backend="reference")
        out[3, 5] += 1

    monkeypatch.setattr(gpu_times, "fo", types.SimpleNamespace(add=wrong, concat=REFERENCE.concat))
    facts = gpu_times.time_stream(1 << 16, "float32")
    assert gpu_times.wrong_rows({"stream": facts}) == ["times, stream: other bits than without fusion"]


@pytest.mark.torch
@pytest.mark.parametrize("row", SMALL, ids=str)
def test_torch_computes_the_same(row):
    facts = gpu_times.time_row(row)
    assert facts["torch_ms"] == 2.0
    assert not gpu_times.wrong_rows({str(row): facts})


@pytest.mark.torch
def test_a_result_that_is_not_torchs_is_noticed(monkeypatch):
    fused = Inputs.fused

    def wrong(self):
        fused(self)
        self.out[0, 0] *= 1.01

    monkeypatch.setattr(Inputs, "fused", wrong)
    facts = gpu_times.time_row(SMALL[0])
    first, second = gpu_times.wrong_rows({"a row": facts})
    assert first == "times, a row: other bits than without fusion"
    assert "from torch, bound 8e-06" in second


@pytest.mark.torch
def test_figures_of_fusionops_outlive_an_error_of_torch(monkeypatch):
    def fail(row):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(gpu_times, "torch_call", fail)
    facts = gpu_times.time_row(SMALL[0])
    assert facts["fused_ms"] == 2.0
    assert gpu_times.wrong_rows({"a row": facts}) == [
        "times, a row: torch failed: RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"
    ]


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(gpu_times, "without_torch", lambda: None)
    monkeypatch.setattr(gpu_times, "without_compiled", lambda: "there is no C compiler")
    assert gpu_times.compiled() == []
    monkeypatch.setattr(gpu_times, "without_compiled", lambda: None)
    assert len(gpu_times.compiled()) == len(list(gpu_times.rows()))


@pytest.mark.torch
def test_bfloat16_reaches_torch():
    array = gpu_times.numbers((3, 700), "bfloat16", 1)
    found = gpu_times.tensor(array)
    assert str(found.dtype) == "torch.bfloat16"
    np.testing.assert_array_equal(found.float().numpy(), array.astype(np.float32))
    assert (array.reshape(-1)[1009:] == array.reshape(-1)[: 2100 - 1009]).all()


@pytest.mark.torch
def test_every_row_is_compiled_anew_for_its_shapes(monkeypatch):
    import torch
    import torch._dynamo

    said = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: said.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda call, **options: said.append(options) or call)
    assert gpu_times.time_compiled(SMALL[0]) == {"torch_compiled_ms": 2.0}
    assert said == ["reset", {"dynamic": False}]


@pytest.mark.torch
def test_what_torch_may_do_is_stated():
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = False, True, True
    said = gpu_times.prepare()
    assert said["TF32 allowed"] == {"cudnn": False, "cuda.matmul": False}
    assert said["cudnn.benchmark"]
    assert (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32) == (True, False, False)
    assert {"torch", "cuda", "cudnn", "memory format", "compiled"} <= said.keys()


def test_times_are_the_devices(monkeypatch):
    calls = []

    def run():
        calls.append(time.perf_counter())
        cp.enqueue(3_000_000)

    gpu_times._clock.cache_clear()
    with usable_gpu(monkeypatch):
        assert round(DEVICE_MS(run), 6) == 3.0
    gpu_times._clock.cache_clear()
    assert len(calls) >= 2 + gpu_times.ROUNDS


def test_without_torch_the_report_says_so(monkeypatch):
    monkeypatch.setattr(gpu_times, "without_torch", lambda: "it is left out")
    assert gpu_times.prepare()["torch"] == "it is left out"
    assert gpu_times.compiled() == []
    assert len(gpu_times.timed()) == 6 + len(list(gpu_times.rows()))


@pytest.mark.parametrize(
    ("facts", "is_wrong"),
    [
        ({"dtype": "bfloat16", "relative_l2": 0.0155}, False),
        ({"dtype": "bfloat16", "relative_l2": 0.016}, True),
        ({"dtype": "float16", "relative_l2": 0.016}, True),
        ({"dtype": "float32", "relative_l2": 9e-6}, True),
        ({"dtype": "float32", "relative_l2": float("nan")}, True),
        ({"dtype": "float32", "same_bits": False}, True),
        ({"tflops": 700.0}, False),
    ],
)
def test_rows_are_judged(facts, is_wrong):
    assert bool(gpu_times.wrong_rows({"a row": facts})) == is_wrong


def test_the_summary_takes_the_better_of_torch():
    hopper = {"kernel": "gpu.concat_conv_fprop_igemm_sm90_bf16", "gflop": 700.0, "N": 8}
    found = {
        "stream float32 1": {"copy_gbs": 4000.0, "add_gbs": 3800.0, "concat_gbs": 3600.0},
        "cublas bfloat16": {"tflops": 700.0},
        "a 8": hopper | {"fused_ms": 1.0, "torch_ms": 3.0, "materialised_ms": 2.0},
        "b 1": hopper | {"fused_ms": 1.0, "torch_ms": 2.0, "kernel": "gpu.concat_conv_fprop_igemm_f32", "N": 1},
    }
    said = gpu_times.summary(found, {"a 8": {"torch_compiled_ms": 0.5}})
    assert said["share_of_copy"]["stream float32 1"] == {"add": 0.95, "concat": 0.9}
    assert said["torch_over_fused"]["geometric_mean"] == 1.0
    assert said["torch_over_fused"]["least"] == ["a 8", 0.5]
    assert said["materialised_over_fused"]["most"] == ["a 8", 2.0]
    assert said["share_of_cublas"] == {
        "rows": 1, "geometric_mean": 1.0, "least": ["a 8", 1.0], "most": ["a 8", 1.0],
    }  # fmt: skip
    assert said["rows_with_compiled"] == {"batch 8": 1, "batch 32": 0, "batch 1": 0}
    assert gpu_times.summary({}, {})["torch_over_fused"] == {"rows": 0}
