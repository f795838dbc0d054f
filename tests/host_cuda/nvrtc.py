"""CUDA C compiled to machine code without a GPU or a driver, by the NVRTC of the wheel nvidia-cuda-nvrtc.

Returns what the assembler reports of each kernel, so that a test can hold it to a budget. Runs nothing.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

WHEEL = "nvidia-cuda-nvrtc"

# The assembler's report is a sequence of paragraphs, one a kernel, that open with its name.
PARAGRAPH = re.compile(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.DOTALL)
RESOURCES = {
    "registers": re.compile(r"Used (\d+) registers"),
    "stack": re.compile(r"(\d+) bytes stack frame"),
    "spill_stores": re.compile(r"(\d+) bytes spill stores"),
    "spill_loads": re.compile(r"(\d+) bytes spill loads"),
    "shared": re.compile(r"(\d+) bytes smem"),
    "constant": re.compile(r"(\d+) bytes cmem\[0\]"),
}


class CompileError(RuntimeError):
    """NVRTC refused the source, or is not installed."""


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers of a thread; in bytes a thread's stack, a block's static shared memory."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    constant: int  # with the parameters; 0 from sm_90 on, of which the assembler does not tell


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    kernels: dict[str, Resources]  # by name expression, or by symbol where none was given
    log: str


@cache
def _nvrtc() -> ctypes.CDLL:
    try:
        files = importlib.metadata.files(WHEEL) or ()
    except importlib.metadata.PackageNotFoundError:
        raise CompileError(f"NVRTC is missing: pip install {WHEEL}") from None
    (library,) = (file.locate() for file in files if file.name.startswith("libnvrtc.so"))
    nvrtc = ctypes.CDLL(str(library))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def _call(function: str, *arguments: object) -> None:
    """A function of NVRTC; its errors, other than those of the source, are errors of this file."""
    status = getattr(_nvrtc(), function)(*arguments)
    assert status == 0, f"{function}: {_nvrtc().nvrtcGetErrorString(status).decode()}"


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, content)
    return content.raw


def _lowered(program: ctypes.c_void_p, name: str) -> str:
    symbol = ctypes.c_char_p()
    _call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(symbol))
    return symbol.value.decode()


def _resources(report: str) -> Resources:
    found = {name: pattern.search(report) for name, pattern in RESOURCES.items()}
    return Resources(**{name: int(match[1]) if match else 0 for name, match in found.items()})


def compile_cubin(source: str, arch: str, options: Sequence[str] = (), names: Sequence[str] = ()) -> Compiled:
    """Machine code for an architecture such as "sm_90a", and what its kernels take.

    options  of NVRTC, beyond -arch
    names    of templates' instantiations, as in CuPy's name_expressions
    """
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        for name in names:
            _call("nvrtcAddNameExpression", program, name.encode())
        every = [option.encode() for option in (*options, f"-arch={arch}", "--ptxas-options=-v")]
        status = _nvrtc().nvrtcCompileProgram(program, len(every), (ctypes.c_char_p * len(every))(*every))
        log = _bytes(program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise CompileError(f"{_nvrtc().nvrtcGetErrorString(status).decode()}\n{log}")
        expressions = {_lowered(program, name): name for name in names}
        kernels = {expressions.get(symbol, symbol): _resources(report) for symbol, report in PARAGRAPH.findall(log)}
        return Compiled(_bytes(program, "CUBIN"), kernels, log)
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))
