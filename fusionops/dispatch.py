"""From a bound call to a kernel that runs it: the only module that knows that backends exist, and that chooses.

Judges nothing that a user passed; computes nothing. Backends are imported when the first call needs them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from fusionops.binding import Call, Judgement, bind_backend, borrow_with, judge_backend
from fusionops.cost import FusedCost, analyse
from fusionops.errors import BackendError, UnsupportedError
from fusionops.kernel import Array, Config, Guards, Kernel, Operands
from fusionops.spec import ITEM_BYTES, FusionSpec

# Choices that are remembered, one for each different problem.
CACHED_CHOICES = 1024

NEAREST = 5  # other kernels that a report names: those that would need the least to run the problem


@dataclass(frozen=True, slots=True)
class Backend:
    """A table of kernels, fastest first, and the device their plans are made for.

    unusable   every reason why the device cannot run them; empty means it can
    threads    how many work on a call, each with scratch memory of its own
    empty      makes an array of a shape and dtype, for a result
    on_device_of   the context of an array, in which results are made and kernels run where it is
    guards     makes what remembers calls, of one kind each; None where calls are not made again
    """

    name: str
    kernels: tuple[Kernel, ...]
    device: Any
    unusable: tuple[str, ...]
    threads: Callable[[], int]
    empty: Callable[..., Array] = np.empty
    on_device_of: Callable[[Array], AbstractContextManager[Any]] = nullcontext
    guards: Callable[[], Guards] | None = None


@dataclass(frozen=True, slots=True)
class ReferenceConfig:
    """The reference has nothing to plan, and its memory is not counted."""

    scratch_bytes: int = 0
    shared_bytes: int = 0

    def illegal_on(self, device: Any) -> tuple[str, ...]:
        return ()


def _cpu(number: int) -> Backend:
    from fusionops import cpu

    return Backend("cpu", cpu.KERNELS, cpu.device(), cpu.reasons_unusable(), cpu.get_num_threads, guards=cpu.GUARDS)


def _gpu(number: int) -> Backend:
    from fusionops import gpu

    unusable = gpu.reasons_unusable(number)
    device = None if unusable else gpu.device(number)
    return Backend("gpu", gpu.KERNELS, device, unusable, lambda: 1, gpu.empty, gpu.on_device_of)


def _reference(number: int) -> Backend:
    from fusionops import reference

    def run(spec: FusionSpec, config: ReferenceConfig, operands: Operands, out: Array) -> None:
        reference.run(spec, operands, out)

    kernel = Kernel("reference", lambda spec: (), lambda spec, device: ReferenceConfig(), run)
    return Backend("reference", (kernel,), None, (), lambda: 1)


_LOADERS = {"cpu": _cpu, "gpu": _gpu, "reference": _reference}
BACKENDS = tuple(_LOADERS)


@cache
def backend(name: str, number: int) -> Backend:
    """The backend of that name on its device of that number, imported when it is first asked for."""
    return _LOADERS[name](number)


def _usable(name: str, number: int) -> Backend:
    """The backend on a device, or a BackendError with every reason why that cannot run it."""
    chosen = backend(name, number)
    _refuse_if(name, chosen.unusable)
    return chosen


def _refuse_if(name: str, unusable: tuple[str, ...]) -> None:
    if unusable:
        reasons = "\n".join(f"  {name}: {reason}" for reason in unusable)
        raise BackendError(f"the {name} backend cannot be used\n{reasons}\n{_last_resort(name)}")


def _borrow(array: Any) -> Array:
    """Another library's array on a GPU as a CuPy array on the same memory."""
    from fusionops import gpu

    _refuse_if("gpu", gpu.machine_reasons())
    return gpu.borrow(array)


def _number(call: Call) -> int:
    """Of the device that a call's arrays lie on: of several GPUs each has plans of its own."""
    return int(call.operands.sources[0].device.id) if call.home == "gpu" else 0


borrow_with(_borrow)


def _refusals(kernel: Kernel, spec: FusionSpec, device: Any) -> tuple[str, ...]:
    """Every reason why a kernel cannot run `spec` on a device."""
    return (*kernel.unsupported(spec), *kernel.lacking(device))


def select(spec: FusionSpec, name: str, number: int) -> Kernel:
    """The kernel of backend `name` that runs `spec`: the first in its table that can and is not slow at it.

    Where all that can are slow, the first of them.

    Raises BackendError if the device cannot run the backend, UnsupportedError with every reason if no kernel can.
    """
    chosen = _usable(name, number)
    able = [kernel for kernel in chosen.kernels if not _refusals(kernel, spec, chosen.device)]
    for kernel in able:
        if not kernel.slow(spec, chosen.device):
            return kernel
    if able:
        return able[0]
    raise UnsupportedError(_refusal(spec, chosen))


@lru_cache(maxsize=CACHED_CHOICES)
def choose(spec: FusionSpec, name: str, number: int) -> tuple[Kernel, Config]:
    """The kernel that runs `spec` on a device of backend `name`, and how; remembered, as nothing else decides it."""
    kernel = select(spec, name, number)
    return kernel, kernel.plan(spec, backend(name, number).device)


def run(call: Call, requested: str | None) -> Any:
    """The result of a bound call: in `out` where there is one, else in a new array; with return_sum the sum too."""
    name = call.home if requested is None else _named(call, requested)
    number = _number(call)
    kernel, config = planned(call.judgement, name, number)
    if call.home == "cpu":
        return _run(call, kernel, config)
    chosen = backend(name, number)
    try:
        with chosen.on_device_of(call.operands.sources[0]):
            return _run(call, kernel, config, chosen.empty)
    except MemoryError as error:  # CuPy's is one
        needed = f"{_new_bytes(call, config)} bytes for results and scratch memory"
        raise MemoryError(f"{call.op}: the GPU has no room for {needed}\n  {call.judgement.spec}\n{error}") from error


def _run(call: Call, kernel: Kernel, config: Config | None, empty: Callable[..., Array] = np.empty) -> Any:
    judgement, operands, target = call.judgement, call.operands, call.target
    spec = judgement.spec
    if target is None:
        target = empty(spec.out_shape, judgement.dtype)
    if spec.return_sum:
        operands.merged = empty(spec.merged_shape, judgement.dtype)
    if config is not None:
        kernel.run(spec, config, operands, target)
    if call.out is None:
        result = target if target.shape == judgement.shape else target.reshape(judgement.shape)
    else:
        result = call.out
        if call.target is None:
            result[...] = target.reshape(judgement.shape)
    if call.returns is not None:
        result = call.returns(result)
    if not spec.return_sum:
        return result
    merged: Array = operands.merged
    return result, merged if call.returns is None else call.returns(merged)


def _new_bytes(call: Call, config: Config | None) -> int:
    """The memory that running a call takes besides the caller's arrays."""
    spec = call.judgement.spec
    shapes = [spec.out_shape] * (call.target is None) + [spec.merged_shape] * spec.return_sum
    scratch_bytes = 0 if config is None else config.scratch_bytes + config.shared_bytes
    return sum(map(math.prod, shapes)) * ITEM_BYTES[spec.dtype] + scratch_bytes


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a call would do; `str` of it is a report to read.

    spec      the problem
    backend, kernel, config   where it would run, by what, and how; an empty result needs no config
    formed_flops   of the products that the kernel forms: those of the definition; fewer in a rewrite; more where tiles
                   are filled up
    others    every other kernel of the backend, and why it is not the one: first those that could, then by reasons
    copies    what binding copied or converted before, and why
    cost      of the fused way and, in it, of the materialised one
    """

    spec: FusionSpec
    backend: str
    kernel: str
    config: Config | None
    formed_flops: int
    others: tuple[tuple[str, tuple[str, ...]], ...]
    copies: tuple[str, ...]
    cost: FusedCost

    def __str__(self) -> str:
        cost, stored = self.cost, self.cost.materialised
        others = [f"{name}: {'; '.join(reasons)}" for name, reasons in self.others[:NEAREST]]
        if self.others[NEAREST:]:
            others.append(f"and {len(self.others) - NEAREST} more, none for fewer reasons")
        lines = [
            str(self.spec),
            f"runs on  {self.backend}: {self.kernel}",
            f"config   {'none, the result is empty' if self.config is None else self.config}",
            *_listed("copies", self.copies or ("none",)),
            f"cost     {cost.params} parameters, {cost.flops / 1e9:.6g} GFLOP",
            *self._formed(),
            f"moves    {cost.bytes_moved / 2**20:.6g} MiB, materialised {stored.bytes_moved / 2**20:.6g} MiB",
            f"peak     {cost.peak_bytes / 2**20:.6g} MiB extra, materialised {stored.peak_bytes / 2**20:.6g} MiB",
            *_listed("others", tuple(others) or ("none",)),
        ]
        return "\n".join(lines)

    def _formed(self) -> list[str]:
        """What the kernel multiplies, where that is not what the definition counts."""
        counted = self.cost.contraction_flops
        if self.formed_flops == counted:
            return []
        share = self.formed_flops / counted
        return [f"forms    {self.formed_flops / 1e9:.6g} GFLOP of products, {share:.2f} of the definition's"]


def explain(call: Call, requested: str | None) -> Explanation:
    """What `run` would do with a bound call. Runs nothing; raises what `run` would raise."""
    spec = call.judgement.spec
    name, number = _named(call, requested), _number(call)
    kernel, config = planned(call.judgement, name, number)
    counted = cost(call, requested)
    formed = counted.contraction_flops if config is None or kernel.products is None else 2 * kernel.products(spec)
    chosen, last = backend(name, number), ("could run it, but stands later in the table",)
    refusals = [(other, _refusals(other, spec, chosen.device)) for other in chosen.kernels if other is not kernel]
    refusals.sort(key=lambda refusal: len(refusal[1]))
    others = tuple((other.name, reasons or other.slow(spec, chosen.device) or last) for other, reasons in refusals)
    return Explanation(spec, name, kernel.name, config, formed, others, call.copies, counted)


def cost(call: Call, requested: str | None) -> FusedCost:
    """What a bound call costs, with the scratch memory of the kernel that would run it. Runs nothing."""
    name, number = _named(call, requested), _number(call)
    _, config = planned(call.judgement, name, number)
    if config is None:
        return analyse(call.judgement.spec)
    scratch_bytes = config.scratch_bytes * backend(name, number).threads() + config.shared_bytes
    return analyse(call.judgement.spec, scratch_bytes=scratch_bytes)


@dataclass(frozen=True, slots=True)
class Info:
    """What this installation can do; `str` of it is a report to read.

    version    of fusionops
    backends   each backend, and every reason why it cannot be used here; none means it can
    facts      what is worth knowing of the machine and its libraries
    """

    version: str
    backends: tuple[tuple[str, tuple[str, ...]], ...]
    facts: dict[str, object]

    def __str__(self) -> str:
        width = max(map(len, ("fusionops", *self.facts)))
        lines = [f"{'fusionops':<{width}}  {self.version}"]
        for name, unusable in self.backends:
            lines.append(f"{name:<{width}}  {'unusable: ' + '; '.join(unusable) if unusable else 'usable'}")
        return "\n".join([*lines, *(f"{name:<{width}}  {value}" for name, value in self.facts.items())])


def info(version: str) -> Info:
    """What this installation can do; imports every backend."""
    from fusionops import cpu, gpu

    libraries = {"python": sys.version.split()[0], "numpy": np.__version__}
    facts = libraries | cpu.facts() | gpu.facts()
    unusable = {name: backend(name, 0).unusable for name in BACKENDS if name != "gpu"}
    unusable["gpu"] = gpu.reasons_unusable()  # the current one's, as are the facts
    return Info(version, tuple((name, unusable[name]) for name in BACKENDS), facts)


def set_num_threads(count: int) -> None:
    from fusionops import cpu

    cpu.set_num_threads(count)


def warmup(progress: Callable[[int, int, str], None] | None) -> None:
    from fusionops import cpu

    cpu.warmup(progress)


def _named(call: Call, requested: Any) -> str:
    """The backend that is asked for, which must be usable, and at home where the arrays are."""
    name = bind_backend(call.op, requested, BACKENDS) or call.home
    judge_backend(call, _usable(name, _number(call)).name)
    return name


def planned(judgement: Judgement, name: str, number: int) -> tuple[Kernel, Config | None]:
    """As `choose`, but an empty result is not planned: a plan may take for granted that there is something to run."""
    if 0 in judgement.shape:
        return select(judgement.spec, name, number), None
    return choose(judgement.spec, name, number)


def _refusal(spec: FusionSpec, refusing: Backend) -> str:
    lines = [f"no {refusing.name} kernel can run {spec}"]
    refusals = [(kernel.name, _refusals(kernel, spec, refusing.device)) for kernel in refusing.kernels]
    refusals.sort(key=lambda refusal: len(refusal[1]))  # those that are nearest to running it come first
    lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in refusals]
    return "\n".join([*lines, _last_resort(refusing.name)])


def _last_resort(name: str) -> str:
    """What helps where the backend does not: the others take NumPy arrays alone."""
    if name == "gpu":
        return "hint: the cpu backend runs the same calls on NumPy arrays"
    return 'hint: backend="reference" runs every valid problem, slowly'


def _listed(title: str, entries: tuple[str, ...]) -> list[str]:
    return [f"{title if i == 0 else '':<8} {entry}" for i, entry in enumerate(entries)]
