"""Proves and times the GPU backend on the GPU that is here, and writes what it found as JSON.

    python benchmarks/gpu_check.py [--out FILE] [--only primitives,kernels,sanitizer,times]

primitives   every PTX primitive against NumPy's formula for it
kernels      every kernel on every problem against the reference, within the bounds of `fusionops.testing`
sanitizer    compute-sanitizer's memcheck and racecheck on some problems, in processes of their own
times        device copies; add and concat beside them; contractions beside torch: median milliseconds of the device

Exits with 1 if anything is wrong. Needs CuPy; torch and compute-sanitizer where they are installed, and says so where
they are not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # whose checks are made here
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import primitive_checks
from kernel_checks import assert_same_bits, assert_within, expected_of, rng_of

from fusionops import gpu, testing
from fusionops.device import GpuDevice
from fusionops.gpu import module, sm90
from fusionops.kernel import Kernel
from fusionops.problems import ALIGNED, ANY_ORDER, PROBLEMS, Problem

EVERY = (*PROBLEMS, *ANY_ORDER, *ALIGNED)
ROOT = Path(__file__).resolve().parent.parent
PARTS = ("primitives", "kernels", "sanitizer", "times")
SANITIZED = 40  # problems: under a sanitizer each takes a second or so
ROUNDS = 15
SECONDS = 0.02  # of the device in each round

# name, merge, N, H, W, channels of the sources, filters, taps; convolutions "same", channels last.
CONTRACTIONS = (
    ("keras_conv", 128, 128, (64, 64), 64, 3),
    ("unet256_l4", 32, 32, (512, 512), 512, 3),
    ("unet256_l3", 64, 64, (256, 256), 256, 3),
    ("unet256_l2", 128, 128, (128, 128), 128, 3),
    ("unet256_l1", 256, 256, (64, 64), 64, 3),
    ("densenet_b2_l7", 28, 28, (128, *(32,) * 6), 128, 1),
    ("yolov8s_bu", 40, 40, (128, 256), 256, 1),
    ("pointwise_512", 56, 56, (256, 256), 512, 1),
)
BATCHES = (1, 8, 32)
DTYPES = ("bfloat16", "float16", "float32")
STREAM_BYTES = (1 << 26, 1 << 28, 1 << 30)  # of each source


def cases(problems: tuple[Problem, ...] = EVERY) -> Iterator[tuple[Kernel, Problem]]:
    for problem in problems:
        for kernel in gpu.KERNELS:
            if not kernel.unsupported(problem.spec):
                yield kernel, problem


def check_case(
    kernel: Kernel,
    problem: Problem,
    device: GpuDevice,
    to_device: Callable[[Any], Any],
    to_host: Callable[[Any], Any],
) -> None:
    """Raises AssertionError where a kernel leaves the bound on random numbers, or repeats itself with other bits."""
    spec = problem.spec
    operands = testing.random_operands(spec, rng_of(problem))
    expected = expected_of(spec, operands)
    there = testing.map_operands(operands, to_device)
    results = []
    for _ in range(2):
        out = to_device(np.full(spec.out_shape, np.nan if np.dtype(spec.dtype).kind not in "iub" else 1, spec.dtype))
        if spec.return_sum:
            there.merged = to_device(np.zeros(spec.merged_shape, spec.dtype))
        kernel.run(spec, kernel.plan(spec, device), there, out)
        results.append([to_host(out), *([to_host(there.merged)] if spec.return_sum else [])])
        if kernel in sm90.KERNELS:
            for filters in sm90.FILTERS:  # other instructions, of which the host's emulation cannot tell
                kernel.run(spec, sm90.with_tile(spec, filters, device), there, out)
                assert_same_bits([to_host(out)], results[-1][:1], f"with tiles of {filters} filters")
    assert_same_bits(results[1], results[0])
    assert_within(results[0][0], expected[0], testing.error_bound(spec, operands))
    assert_same_bits(results[0][1:], expected[1:])


def to_gpu(array: np.ndarray[Any, Any]) -> Any:
    import cupy

    return cupy.asarray(_bits(array)).view(array.dtype)


def to_host(array: Any) -> np.ndarray[Any, Any]:
    host = array.view(np.uint16).get() if array.dtype.name == "bfloat16" else array.get()
    return np.asarray(host).view(array.dtype)


def _bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As another dtype of the same size, where CuPy cannot transfer the array's own."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def check_kernels(report: dict[str, Any], problems: tuple[Problem, ...] = EVERY) -> None:
    failures = {}
    count = 0
    for kernel, problem in cases(problems):
        count += 1
        try:
            check_case(kernel, problem, gpu.device(), to_gpu, to_host)
        except AssertionError as error:
            failures[f"{kernel.name} {problem.name}"] = str(error)
    report["kernels"] = {"cases": count, "failures": failures}


def check_primitives(report: dict[str, Any]) -> None:
    import cupy

    def launch_of(code: str, options: tuple[str, ...], names: tuple[str, ...]) -> primitive_checks.Launch:
        compiled = cupy.RawModule(code=code, options=options, name_expressions=names)

        def launch(name: str, blocks: int, threads: int, arguments: tuple[Any, ...], shared_bytes: int) -> None:
            function, given, copies = compiled.get_function(name), [], []
            for each in arguments:
                array = each.array if isinstance(each, primitive_checks.Boxes) else each
                if isinstance(array, np.generic):
                    given.append(array)
                    continue
                copies.append((array, cupy.asarray(_bits(array))))
                there = copies[-1][1]
                given.append(each.tensor_map(module.runtime(), there.data.ptr) if array is not each else there)
            if shared_bytes > module.BLOCK_SHARED_BYTES:
                function.max_dynamic_shared_size_bytes = shared_bytes
            function((blocks,), (threads,), tuple(given), shared_mem=shared_bytes)
            for array, there in copies:
                _bits(array)[...] = cupy.asnumpy(there)

        return launch

    try:
        primitive_checks.check_all(launch_of(primitive_checks.source(), module.FLAGS, primitive_checks.NAMES))
        if gpu.device().capability == (9, 0):
            code = primitive_checks.source(primitive_checks.HOPPER_SOURCE)
            options = module.FLAGS + module.ARCHITECTURES["sm90.cu"]
            primitive_checks.check_hopper(launch_of(code, options, primitive_checks.HOPPER_NAMES))
        report["primitives"] = {"failures": []}
    except AssertionError as error:
        report["primitives"] = {"failures": [str(error)]}


def check_with_sanitizer(report: dict[str, Any]) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        report["sanitizer"] = "compute-sanitizer is not installed"
        return
    report["sanitizer"] = {}
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--sanitized"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        tail = (done.stdout + done.stderr).strip().splitlines()[-12:]
        report["sanitizer"][tool] = {"exit": done.returncode, "tail": tail}


def device_ms(run: Callable[[], Any]) -> float:
    """Median over rounds of the device's time for a call, after a warm-up that also compiles."""
    import cupy

    run()
    cupy.cuda.runtime.deviceSynchronize()
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()

    def elapsed(calls: int) -> float:
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) / calls

    calls = max(3, int(SECONDS * 1e3 / max(1e-3, elapsed(3))))
    return statistics.median(elapsed(calls) for _ in range(ROUNDS))


def time_streams(rows: list[dict[str, Any]]) -> None:
    import cupy

    import fusionops as fo

    for size in STREAM_BYTES:
        for dtype in ("float32", "float16"):
            count = size // np.dtype(dtype).itemsize // 64
            x, y = (cupy.random.standard_normal((count, 64), "float32").astype(dtype) for _ in range(2))
            out, joined = cupy.empty_like(x), cupy.empty((count, 128), dtype)
            copied = 2 * size / device_ms(lambda x=x, out=out: cupy.copyto(out, x)) / 1e6
            added = 3 * size / device_ms(lambda x=x, y=y, out=out: fo.add([x, y], out=out)) / 1e6
            concat = 4 * size / device_ms(lambda x=x, y=y, out=joined: fo.concat([x, y], out=out)) / 1e6
            rows.append({"what": "stream", "bytes": size, "dtype": dtype, "copy_gbs": copied, "add_gbs": added,
                         "concat_gbs": concat})  # fmt: skip


def borrowed(tensor: Any) -> Any:
    """A torch tensor as a CuPy array of the same memory."""
    import cupy
    import torch

    if tensor.dtype is torch.bfloat16:
        return cupy.from_dlpack(tensor.view(torch.int16)).view(primitive_checks.FORMATS["bf16"])
    return cupy.from_dlpack(tensor)


def time_contractions(rows: list[dict[str, Any]]) -> None:
    """Fused, beside torch, which stores the merged map: eager, and compiled; channels last, TF32 off."""
    import torch
    import torch.nn.functional as F

    import fusionops as fo

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for name, H, W, channels, K, taps in CONTRACTIONS:
        for N in BATCHES:
            for dtype in DTYPES:
                for merge in ("concat", "add"):
                    each = channels if merge == "concat" else (channels[0],) * 2
                    C = sum(each) if merge == "concat" else each[0]
                    kind = getattr(torch, dtype)
                    maps = [torch.randn(N, c, H, W, device="cuda").to(kind, memory_format=torch.channels_last)
                            for c in each]  # fmt: skip
                    weight = torch.randn(K, C, taps, taps, device="cuda").mul_((C * taps * taps) ** -0.5).to(kind)
                    weight = weight.to(memory_format=torch.channels_last)
                    bias = torch.randn(K, device="cuda").to(kind)

                    def eager(maps=maps, weight=weight, bias=bias, merge=merge, taps=taps):
                        merged = torch.cat(maps, 1) if merge == "concat" else maps[0] + maps[1]
                        return F.relu(F.conv2d(merged, weight, bias, padding=taps // 2))

                    # The same memory as NHWC maps and HWIO filters.
                    sources = [borrowed(x.permute(0, 2, 3, 1)) for x in maps]
                    filters = borrowed(weight.permute(2, 3, 1, 0).contiguous())
                    vector, result = borrowed(bias), torch.empty(N, H, W, K, device="cuda", dtype=kind)
                    out = borrowed(result)
                    op = fo.concat_conv if merge == "concat" else fo.add_conv
                    options = {"padding": "same", "activation": "relu"}

                    def fused(op=op, sources=sources, filters=filters, vector=vector, options=options, out=out):
                        op(sources, filters, vector, **options, out=out)

                    row = {"what": name, "N": N, "dtype": dtype, "merge": merge, "fused_ms": device_ms(fused),
                           "torch_ms": device_ms(eager), "gflop": 2e-9 * N * H * W * C * K * taps * taps}  # fmt: skip
                    expected = eager().permute(0, 2, 3, 1).float()
                    found = result.float()
                    row["relative_l2"] = float((found - expected).norm() / expected.norm())
                    if BATCHES[-1] == N:
                        row["torch_compiled_ms"] = device_ms(torch.compile(eager))
                    row["ratio"] = min(row["torch_ms"], row.get("torch_compiled_ms", np.inf)) / row["fused_ms"]
                    rows.append(row)
                    print(row, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--sanitized", action="store_true", help="run what the sanitizer watches, and nothing else")
    arguments = parser.parse_args()
    if reasons := gpu.reasons_unusable():
        print("; ".join(reasons), file=sys.stderr)
        return 1
    if arguments.sanitized:
        report: dict[str, Any] = {}
        check_kernels(report, PROBLEMS[:: max(1, len(PROBLEMS) // SANITIZED)])
        return int(bool(report["kernels"]["failures"]))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    report = {"device": gpu.facts(), "commit": commit.stdout.strip(), "date": time.strftime("%Y-%m-%d")}
    parts = arguments.only.split(",")
    begin = time.perf_counter()
    if "primitives" in parts:
        check_primitives(report)
    if "kernels" in parts:
        check_kernels(report)
    if "sanitizer" in parts:
        check_with_sanitizer(report)
    if "times" in parts:
        report["times"] = rows = []
        time_streams(rows)
        try:
            time_contractions(rows)
        except ImportError as error:
            report["torch"] = f"not compared: {error}"
    report["seconds"] = time.perf_counter() - begin
    text = json.dumps(report, indent=1, default=str)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    failed = [report.get(part, {}).get("failures") for part in ("primitives", "kernels")]
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
