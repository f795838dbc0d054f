"""What a GPU takes for calls of fusionops, and of torch beside them: a row of facts for each. Run by gpu_check.py.

Milliseconds are the device's, medians of `fusionops.gpu.probe.Clock`: caches hold zeros, and no launch is waited for.

fused          one call; filters packed before
materialised   the merged map stored by `add` or `concat`, then the same convolution of it; a residual added after it
torch          as its users write it, eager and compiled: maps channels last, TF32 off
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  bfloat16 for NumPy
import numpy as np
from gpu_parts import Case

import fusionops as fo
from fusionops.gpu import probe
from fusionops.gpu.module import runtime

Array = Any  # of the runtime's library
BOTH, ADD, CONCAT = ("concat", "add"), ("add",), ("concat",)


@dataclass(frozen=True, slots=True)
class Layer:
    """A merge and the layer after it, a convolution of "same" padding, or, where there is no size, a dense layer.

    channels   of each source
    K          filters, of taps × taps
    size       H, W of the merged map; the first source is smaller by `upsample`
    residual   whether a map is added to the result
    """

    name: str
    merges: tuple[str, ...]
    channels: tuple[int, ...]
    K: int
    size: tuple[int, ...]
    taps: int = 1
    upsample: int = 1
    groups: int = 1
    residual: bool = False
    activation: str | None = "relu"


LAYERS = (
    Layer("keras_conv", BOTH, (64, 64), 64, (128, 128), 3),
    Layer("unet256_l4", BOTH, (512, 512), 512, (32, 32), 3),
    Layer("unet256_l3", BOTH, (256, 256), 256, (64, 64), 3),
    Layer("unet256_l2", BOTH, (128, 128), 128, (128, 128), 3),
    Layer("unet256_l1", BOTH, (64, 64), 64, (256, 256), 3),
    Layer("unet256_l1_up", CONCAT, (64, 64), 64, (256, 256), 3, upsample=2),
    Layer("fpn_p3_out", ADD, (256, 256), 256, (100, 168), 3, upsample=2, activation=None),
    Layer("densenet_b2_l7", CONCAT, (128, *(32,) * 6), 128, (28, 28)),
    Layer("yolov8s_p4_bu", CONCAT, (128, 256), 256, (40, 40), activation="silu"),
    Layer("pointwise_512", BOTH, (256, 256), 512, (56, 56)),
    Layer("resnet_l2", ADD, (64,), 256, (56, 56), residual=True),
    Layer("resnet_l4", ADD, (256,), 1024, (14, 14), residual=True),
    Layer("mobilenet_depthwise", ADD, (128, 128), 128, (56, 56), 3, groups=128),
    Layer("convnext_depthwise", ADD, (96, 96), 96, (56, 56), 7, groups=96, activation=None),
    Layer("lstm_1024", CONCAT, (1024, 1024), 4096, (), activation=None),
)
BATCHES = (8, 32, 1)  # in the order of what is worth most where time is short, as are the dtypes
DTYPES = ("bfloat16", "float16", "float32")
STREAM_BYTES = (1 << 30, 1 << 28, 1 << 26)  # of each source; shares of the copy's rate count where no cache helps
PRODUCT = 8192  # rows and columns of the matrices that show cuBLAS at its best
ROUNDS = 9
BLOCK = 1_000_003  # random numbers that arrays repeat: a prime, so that no two rows of a map are alike

# Of the relative L2 distance from torch. Each side rounds what it stores to the dtype, torch twice or three times
# (convolution, bias, residual), and cuDNN may choose Winograd, whose transforms round too: 4 units. float32: 4e-6 is
# promised in docs/numerics.md, and as much granted to torch.
BOUNDS = {"bfloat16": 4 * 2.0**-8, "float16": 4 * 2.0**-11, "float32": 8e-6}


@dataclass(frozen=True, slots=True)
class Row:
    layer: Layer
    merge: str
    N: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.layer.name} {self.merge} {self.dtype} {self.N}"

    @property
    def is_dense(self) -> bool:
        return not self.layer.size

    @property
    def C(self) -> int:
        return sum(self.layer.channels) if self.merge == "concat" else self.layer.channels[0]

    @property
    def gflop(self) -> float:
        layer = self.layer
        terms = self.C // layer.groups * layer.taps**2
        return 2e-9 * self.N * math.prod(layer.size) * layer.K * terms


def rows() -> Iterator[Row]:
    for dtype in DTYPES:
        for N in BATCHES:
            yield from (Row(layer, merge, N, dtype) for layer in LAYERS for merge in layer.merges)


def numbers(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> Array:
    """Normal numbers, made by NumPy: CuPy would need cuRAND for them."""
    library = runtime().arrays
    block = (_block(seed) * np.float32(scale)).astype(dtype)
    bits = f"u{block.itemsize}"  # CuPy cannot transfer every dtype
    there, size = library.asarray(block.view(bits)), math.prod(shape)
    flat = library.empty(size, bits)
    for start in range(0, size, BLOCK):
        flat[start : start + BLOCK] = there[: size - start]
    return flat.view(block.dtype).reshape(shape)


@functools.cache
def _block(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(BLOCK, np.float32)


class Inputs:
    """The arrays of a row: maps NHWC, or rows of a dense layer."""

    def __init__(self, row: Row) -> None:
        layer, self.row = row.layer, row

        def shape(channels: int, shrunk: int = 1) -> tuple[int, ...]:
            return (row.N, *(extent // shrunk for extent in layer.size), channels)

        ups = [layer.upsample] + [1] * (len(layer.channels) - 1)
        each = enumerate(zip(layer.channels, ups, strict=True))
        self.maps = [numbers(shape(channels, up), row.dtype, i) for i, (channels, up) in each]
        taps, terms = () if row.is_dense else (layer.taps,) * 2, row.C // layer.groups
        self.filters = numbers((*taps, terms, layer.K), row.dtype, 100, (terms * layer.taps**2) ** -0.5)
        self.bias = numbers((layer.K,), row.dtype, 101)
        self.residual = numbers(shape(layer.K), row.dtype, 102) if layer.residual else None
        empty = functools.partial(runtime().arrays.empty, dtype=self.bias.dtype)
        self.out, self.stored = (empty(shape(layer.K)) for _ in range(2))
        self.merged = empty(shape(row.C)) if len(layer.channels) > 1 else self.maps[0]
        self.before = empty(shape(layer.K)) if layer.residual else self.stored
        self.kept = fo.prepack(self.filters)
        self.sources = [fo.Source(x, upsample=up) if up > 1 else x for x, up in zip(self.maps, ups, strict=True)]
        self.options = {} if row.is_dense else {"padding": "same", "groups": layer.groups}
        self.op = f"{row.merge}_{'dense' if row.is_dense else 'conv'}"

    def fused(self) -> None:
        epilogue = {"residual": self.residual, "activation": self.row.layer.activation}
        getattr(fo, self.op)(self.sources, self.kept, self.bias, **self.options, **epilogue, out=self.out)

    def materialised(self) -> None:
        activation = self.row.layer.activation
        if len(self.maps) > 1:
            getattr(fo, self.row.merge)(self.sources, out=self.merged)
        at_once = None if self.row.layer.residual else activation
        getattr(fo, self.op)([self.merged], self.kept, self.bias, **self.options, activation=at_once, out=self.before)
        if self.row.layer.residual:
            fo.add([self.before, self.residual], activation=activation, out=self.stored)

    def kernel(self) -> str:
        return fo.explain(self.op, self.sources, self.kept, self.bias, residual=self.residual, **self.options).kernel

    def tensors(self) -> tuple[Any, ...]:
        """The same numbers as torch takes them: maps, filters, bias, residual; of maps the same memory."""
        import torch

        def seen(array: Array) -> Any:
            return tensor(array) if self.row.is_dense else tensor(array).permute(0, 3, 1, 2)

        filters = tensor(self.filters)
        if self.row.is_dense:
            filters = filters.T.contiguous()
        else:
            filters = filters.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        residual = None if self.residual is None else seen(self.residual)
        return list(map(seen, self.maps)), filters, tensor(self.bias), residual


def tensor(array: Array) -> Any:
    """As torch's, of the same memory."""
    import torch

    if array.dtype.name == "bfloat16":  # which DLPack of NumPy and CuPy may not know
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def torch_call(row: Row) -> Callable[..., Any]:
    """The layer in torch."""
    import torch
    import torch.nn.functional as F

    layer, merge, is_dense = row.layer, row.merge, row.is_dense

    def call(maps: list[Any], filters: Any, bias: Any, residual: Any) -> Any:
        first = F.interpolate(maps[0], scale_factor=layer.upsample) if layer.upsample > 1 else maps[0]
        every = [first, *maps[1:]]
        merged = torch.cat(every, 1) if merge == "concat" else functools.reduce(torch.add, every)
        if is_dense:
            y = F.linear(merged, filters, bias)
        else:
            y = F.conv2d(merged, filters, bias, padding=layer.taps // 2, groups=layer.groups)
        if residual is not None:
            y = y + residual
        return y if layer.activation is None else getattr(F, layer.activation)(y)

    return call


_clock = functools.cache(probe.Clock)


def device_ms(run: Callable[[], Any]) -> float:
    """The median over some calls, after two that compile and let cuDNN choose."""
    for _ in range(2):
        run()
    runtime().wait()
    return 1e3 * statistics.median(_clock()(run).device_s for _ in range(ROUNDS))


def same_bits(one: Array, other: Array) -> bool:
    bits = f"u{one.itemsize}"
    return bool(runtime().arrays.array_equal(one.view(bits), other.view(bits)))


def time_row(row: Row) -> dict[str, Any]:
    inputs = Inputs(row)
    facts = {"layer": row.layer.name, "merge": row.merge, "dtype": row.dtype, "N": row.N, "gflop": row.gflop,
             "kernel": inputs.kernel(), "fused_ms": device_ms(inputs.fused)}  # fmt: skip
    if len(inputs.maps) > 1 or inputs.residual is not None:
        facts["materialised_ms"] = device_ms(inputs.materialised)
        if inputs.residual is None:  # else the convolution is rounded before the sum
            facts["same_bits"] = same_bits(inputs.out, inputs.stored)
    if not without_torch():
        try:
            facts |= time_beside(row, inputs)
        except Exception as error:  # noqa: BLE001  what fusionops took is known all the same
            facts["torch_error"] = f"{type(error).__name__}: {error}"
    return facts


def time_beside(row: Row, inputs: Inputs) -> dict[str, Any]:
    """What torch takes, and how far from it the fused call's result is."""
    import torch

    call, tensors = torch_call(row), inputs.tensors()
    with torch.no_grad():
        ms = device_ms(lambda: call(*tensors))
        expected, found = call(*tensors).float(), tensor(inputs.out).float()
    expected = expected if row.is_dense else expected.permute(0, 2, 3, 1)
    return {"torch_ms": ms, "relative_l2": float((found - expected).norm() / expected.norm())}


def time_compiled(row: Row) -> dict[str, Any]:
    import torch

    torch._dynamo.reset()  # else shapes of rows before make these dynamic, or no more are compiled
    tensors = Inputs(row).tensors()
    compiled = torch.compile(torch_call(row), dynamic=False)
    with torch.no_grad():
        return {"torch_compiled_ms": device_ms(lambda: compiled(*tensors))}


def time_stream(size: int, dtype: str) -> dict[str, Any]:
    library = runtime().arrays
    count = size // np.dtype(dtype).itemsize // 64
    x, y = (numbers((count, 64), dtype, i) for i in range(2))
    out, joined = library.empty_like(x), library.empty((count, 128), x.dtype)
    facts = {"bytes": size, "dtype": dtype}
    facts["copy_gbs"] = 2e-6 * size / device_ms(lambda: library.copyto(out, x))
    facts["add_gbs"] = 3e-6 * size / device_ms(lambda: fo.add([x, y], out=out))
    facts["concat_gbs"] = 4e-6 * size / device_ms(lambda: fo.concat([x, y], out=joined))
    kept = same_bits(joined[:, :64], x) and same_bits(joined[:, 64:], y)
    return facts | {"same_bits": kept and same_bits(out, library.add(x, y))}


def time_product() -> dict[str, Any]:
    """The rate of cuBLAS, by which the kernels of wide convolutions are measured."""
    import torch

    a, b = (tensor(numbers((PRODUCT, PRODUCT), "bfloat16", i)) for i in range(2))
    out = torch.empty_like(a)
    ms = device_ms(lambda: torch.matmul(a, b, out=out))
    return {"extent": PRODUCT, "ms": ms, "tflops": 2e-9 * PRODUCT**3 / ms}


def without_torch() -> str | None:
    """Why nothing is timed beside torch; None where it is."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.version.cuda or not hasattr(runtime().arrays, "cuda") else "torch is installed without CUDA"


def without_compiled() -> str | None:
    """Why torch compiles nothing here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "there is no C compiler"


def prepare() -> dict[str, Any]:
    """Sets what torch leaves to its users, and states it."""
    facts: dict[str, Any] = {"clock": "device time of one call, caches full of zeros; median", "rounds": ROUNDS}
    if reason := without_torch():
        return facts | {"torch": reason}
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.benchmark = True
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    return facts | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "cudnn.benchmark": cudnn.benchmark,
        "TF32 allowed": {"cudnn": cudnn.allow_tf32, "cuda.matmul": matmul.allow_tf32},
        "memory format": "channels_last",
        "compiled": without_compiled() or "torch.compile, mode default, dynamic=False",
    }


def timed() -> list[Case]:
    """Copies, add and concat; a product of matrices; every row."""
    cases: list[Case] = [
        (f"stream {dtype} {size}", functools.partial(time_stream, size, dtype))
        for size in STREAM_BYTES
        for dtype in ("float32", "float16")
    ]
    product: list[Case] = [] if without_torch() else [("cublas bfloat16", time_product)]
    return [*cases, *product, *((str(row), functools.partial(time_row, row)) for row in rows())]


def compiled() -> list[Case]:
    """Every row by torch.compile, whose compiler takes seconds for each: as many as there is time for."""
    if without_torch() or without_compiled():
        return []
    return [(str(row), functools.partial(time_compiled, row)) for row in rows()]


# What the rows say.


def wrong_rows(found: dict[str, dict[str, Any]]) -> list[str]:
    wrong = []
    for name, row in found.items():
        if not row.get("same_bits", True):
            wrong.append(f"times, {name}: other bits than without fusion")
        if "torch_error" in row:
            wrong.append(f"times, {name}: torch failed: {row['torch_error']}")
        bound = BOUNDS.get(row.get("dtype", ""), 0.0)
        if not row.get("relative_l2", 0.0) <= bound:
            wrong.append(f"times, {name}: relative L2 distance {row['relative_l2']:.3g} from torch, bound {bound:.3g}")
    return wrong


def summary(found: dict[str, dict[str, Any]], compiled: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Adds to each row what compares it with others; returns what the goals are stated in."""
    rate = found.get("cublas bfloat16", {}).get("tflops")
    streams, ratios, stored, shares = {}, {}, {}, {}
    for name, row in found.items():
        if "copy_gbs" in row:
            streams[name] = {op: row[f"{op}_gbs"] / row["copy_gbs"] for op in ("add", "concat")}
        if "fused_ms" not in row:
            continue
        row |= compiled.get(name, {})
        if times := [row[arm] for arm in ("torch_ms", "torch_compiled_ms") if arm in row]:
            ratios[name] = row["ratio"] = min(times) / row["fused_ms"]
        if "materialised_ms" in row:
            stored[name] = row["materialised_ms"] / row["fused_ms"]
        row["tflops"] = row["gflop"] / row["fused_ms"]
        if rate and "sm90_bf16" in row["kernel"]:
            shares[name] = row["share_of_cublas"] = row["tflops"] / rate
    return {
        "share_of_copy": streams,
        "torch_over_fused": _spread(ratios),
        "materialised_over_fused": _spread(stored),
        "share_of_cublas": _spread(shares),
        "rows_with_compiled": {f"batch {N}": sum(name.endswith(f" {N}") for name in compiled) for N in BATCHES},
    }


def _spread(ratios: dict[str, float]) -> dict[str, Any]:
    if not ratios:
        return {"rows": 0}
    least, most = (pick(ratios, key=ratios.__getitem__) for pick in (min, max))
    return {"rows": len(ratios), "geometric_mean": statistics.geometric_mean(ratios.values()),
            "least": [least, ratios[least]], "most": [most, ratios[most]]}  # fmt: skip
