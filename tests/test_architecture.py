"""The structure of the package, checked from its source: who imports whom, where compiler flags live, what is said.

Runs no kernel. Each check is a function from source text to violations, and is itself tried on a text that violates it.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fusionops
from fusionops import cpu

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fusionops"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")])
SOURCES = [*MODULES, *TESTS, *sorted(ROOT.glob("examples/*.py"))]
LINES_MAX = 400

PUBLIC = {"fusionops", "ops", "blocks", "cost", "device", "errors", "kernel", "problems", "spec", "testing"}
BACKEND = {"address", "spec", "kernel", "device", "errors", "axes", "refusals"}

# What each module may import of ours; a folder is one row. A module without a row fails: add the row with the module.
MAY_IMPORT = {
    "errors": set(),
    "address": set(),
    "device": set(),
    "spec": {"errors"},
    "axes": {"spec"},
    "refusals": {"spec"},
    "kernel": {"spec", "device", "errors"},
    "cost": {"spec", "device", "errors"},
    "reference": {"spec", "kernel"},
    "cpu": BACKEND | {"cpu"},
    "gpu": BACKEND | {"gpu"},
    "binding": {"spec", "address", "kernel", "errors", "binding"},
    "dispatch": BACKEND | {"cost", "binding", "reference", "cpu", "gpu"},
    "perform": {"address", "binding", "dispatch", "kernel"},
    "ops": {
        "perform",
        "spec",
        "kernel",
        "cost",
        "binding",
        "dispatch",
        "errors",
        "fusionops",
    },  # fusionops: its version, for info
    "blocks": {"ops"},
    "problems": {"spec", "problems"},
    "testing": {"spec", "kernel", "device", "reference", "cost", "problems"},
    "compare": PUBLIC | {"compare", "cpu", "gpu"},  # cpu, gpu: the probes of the machine it reports times and shares of
    "fusionops": {"ops", "binding", "spec", "errors", "kernel"},
}
ONLY_IN = {"numba": "cpu", "llvmlite": "cpu", "cupy": "gpu"}
COMPILERS = {"njit", "jit", "cfunc", "vectorize", "guvectorize", "generated_jit", "stencil"}

KERNEL_NAME = re.compile(
    r"(cpu|gpu)\.(?P<merge>add|concat)(_(?P<contraction>conv|dense))?_(?P<direction>fprop|dgrad|wgrad)"
    r"_(?P<algorithm>stream|direct|gemm|igemm|winograd|depthwise|grouped|commuted|dots)(_(?P<target>sm80|sm90|amx))?_(?P<dtype>f16|bf16|f32|f64|any)"
)
# An ignored check names what it ignores and, in the same line, why.
BARE_IGNORE = re.compile(r"#\s*noqa(?!: [A-Z]+\d+(, [A-Z]+\d+)*  ?\S)|#\s*type:\s*ignore(?!\[[\w, -]+\]  # \S)")
TOLERANCE = re.compile(r"\b(atol|rtol|decimal|rel|abs)\s*=\s*[\d(]|(allclose|isclose|almost_equal|approx)\(")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Import:
    """One imported name, dotted; `deferred` when it happens inside a function."""

    name: str
    line: int
    deferred: bool

    @property
    def ours(self) -> str | None:
        """The row of MAY_IMPORT it belongs to, None for a library of somebody else."""
        package, *rest = self.name.split(".")
        if package != "fusionops":
            return None
        return rest[0] if rest and rest[0] in MAY_IMPORT else "fusionops"


def imports(text: str) -> Iterator[Import]:
    """Every import of a module, those by importlib with a literal name included."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names):
                yield from (Import(alias.name, node.lineno, deferred) for alias in names)
            case ast.ImportFrom(module, names, level):
                assert level == 0, f"line {node.lineno}: relative import"
                yield from (Import(f"{module}.{alias.name}", node.lineno, deferred) for alias in names)
            case ast.Call(ast.Name(function) | ast.Attribute(_, function), [ast.Constant(str(name)), *_]):
                if function in ("import_module", "__import__"):
                    yield Import(name, node.lineno, deferred)
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(text), False)


def row(module: str) -> str:
    """The row of MAY_IMPORT for a file, given by its path relative to the package."""
    first = Path(module).parts[0]
    return "fusionops" if first == "__init__.py" else first.removesuffix(".py")


def import_violations(module: str, text: str) -> list[str]:
    found = []
    here = row(module)
    for item in imports(text):
        library = item.name.split(".")[0]
        if item.ours is not None and item.ours not in MAY_IMPORT[here]:
            found.append(f"{module}:{item.line}: {here} must not import {item.ours}")
        elif item.ours == "fusionops" != here and here != "compare" and not item.deferred:
            found.append(f"{module}:{item.line}: the package is not complete yet while {here} is imported")
        if ONLY_IN.get(library, here) != here:
            found.append(f"{module}:{item.line}: {library} only inside {ONLY_IN[library]}/")
        if library == "cupy" and not item.deferred:
            found.append(f"{module}:{item.line}: cupy only inside functions")
    return found


def compiler_violations(module: str, text: str) -> list[str]:
    """Uses of a Numba compiler outside the file that holds the flags."""
    if module == "cpu/jit.py":
        return []
    found = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Attribute(ast.Name("numba"), name) if name in COMPILERS:
                found.append(f"{module}:{node.lineno}: numba.{name} outside cpu/jit.py")
            case ast.ImportFrom("numba", names):
                bare = COMPILERS & {alias.name for alias in names}
                found += [f"{module}:{node.lineno}: {name} outside cpu/jit.py" for name in sorted(bare)]
    return found


def print_violations(module: str, text: str) -> list[str]:
    if row(module) == "compare":
        return []
    return [
        f"{module}:{node.lineno}: print"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def swallowed_errors(module: str, text: str) -> list[str]:
    return [
        f"{module}:{node.lineno}: an error is swallowed"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or isinstance(node.body[0], ast.Pass))
    ]


def bare_ignores(module: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [f"{module}:{number}: an ignore without a reason" for number, line in lines if BARE_IGNORE.search(line)]


def bare_tolerances(module: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [
        f"{module}:{number}: a tolerance without a reason: {line.strip()}"
        for number, line in lines
        if TOLERANCE.search(line) and "# " not in line
    ]


CHECKS = (import_violations, compiler_violations, print_violations, swallowed_errors, bare_ignores)


@pytest.mark.parametrize("path", MODULES, ids=relative)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_module_keeps_the_rules(check, path):
    assert check(str(path.relative_to(PACKAGE)), path.read_text()) == []


@pytest.mark.parametrize(
    ("check", "module", "text"),
    [
        (import_violations, "cpu/direct.py", "from fusionops.gpu import module"),
        (import_violations, "cpu/direct.py", "from fusionops import dispatch"),
        (import_violations, "gpu/igemm.py", "def run():\n    import fusionops.cpu.gemm"),
        (import_violations, "gpu/igemm.py", "import cupy"),
        (import_violations, "cpu/direct.py", "def run():\n    import cupy"),
        (import_violations, "binding.py", "def bind():\n    from numba import types"),
        (import_violations, "spec.py", "import fusionops"),
        (import_violations, "spec.py", "import importlib\nimportlib.import_module('fusionops.cpu')"),
        (import_violations, "ops.py", "from fusionops import cpu"),
        (import_violations, "ops.py", "from fusionops import __version__"),
        (import_violations, "compare/cli.py", "from fusionops import dispatch"),
        (compiler_violations, "cpu/direct.py", "import numba\n@numba.njit\ndef f(): ..."),
        (compiler_violations, "cpu/direct.py", "from numba import cfunc"),
        (print_violations, "binding.py", "print('x')"),
        (swallowed_errors, "binding.py", "try:\n    f()\nexcept ImportError:\n    pass"),
        (swallowed_errors, "binding.py", "try:\n    f()\nexcept:\n    g()"),
        (bare_ignores, "binding.py", "x = 1  # noqa" + ": E501"),
        (bare_ignores, "binding.py", "x = 1  # noqa"),
        (bare_ignores, "binding.py", "x = f()  # type: ignore"),
        (bare_ignores, "binding.py", "x = f()  # type: ignore[no-untyped-call]"),
        (bare_tolerances, "test_x.py", "np.testing.assert_allclose(x, y)"),  # a text to be refused
        (bare_tolerances, "test_x.py", "assert_equal(x, y, rtol=1e-3)"),  # a text to be refused
    ],
)
def test_check_sees_what_it_forbids(check, module, text):
    assert len(check(module, text)) == 1


@pytest.mark.parametrize(
    ("check", "module", "text"),
    [
        (import_violations, "dispatch.py", "def backend():\n    from fusionops import cpu, gpu, reference"),
        (import_violations, "gpu/module.py", "def compile():\n    import cupy"),
        (import_violations, "compare/cli.py", "import fusionops as fo\nfrom fusionops.compare import report"),
        (bare_ignores, "binding.py", "x = f()  # type: ignore[no-untyped-call]  # numba has no types"),
        (bare_ignores, "binding.py", "x = 1  # noqa" + ": E741 the field's own letter"),
    ],
)
def test_check_lets_pass_what_it_should(check, module, text):
    assert check(module, text) == []


def test_every_module_has_a_row():
    assert {row(str(path.relative_to(PACKAGE))) for path in MODULES} <= set(MAY_IMPORT)


def test_only_dispatch_and_the_program_that_measures_both_name_both_backends():
    names = {"cpu", "gpu"}
    assert [module for module, allowed in MAY_IMPORT.items() if names <= allowed] == ["dispatch", "compare"]
    assert "cpu" not in MAY_IMPORT["gpu"]
    assert "gpu" not in MAY_IMPORT["cpu"]


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_tolerances_have_reasons(path):
    assert bare_tolerances(relative(path), path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_is_about_one_subject(path):
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_says_what_it_is(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None
    assert text.splitlines()[0].endswith((".", ":", ";", ",")) or len(text.splitlines()) > 1


@pytest.mark.parametrize("kernel", cpu.KERNELS, ids=lambda kernel: kernel.name)
def test_kernel_name_follows_the_grammar(kernel):
    assert KERNEL_NAME.fullmatch(kernel.name)


@pytest.mark.parametrize(
    "name", ["cpu.fast_conv", "cpu.add_conv_direct_f32", "tpu.add_fprop_stream_f32", "cpu.add_fprop_v2_f32"]
)
def test_grammar_refuses(name):
    assert KERNEL_NAME.fullmatch(name) is None


def test_kernel_names_are_unique():
    names = [kernel.name for kernel in cpu.KERNELS]
    assert len(set(names)) == len(names)


def python(program: str, **environment: str) -> str:
    """What a fresh interpreter prints for a program."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return done.stdout.strip()


def test_import_brings_in_neither_numba_nor_cupy():
    program = "import sys, fusionops; print(sorted({'numba', 'llvmlite', 'cupy'} & set(sys.modules)))"
    assert python(program) == "[]"


def test_import_works_without_numba_and_cupy():
    program = (
        "import sys; sys.modules.update(numba=None, llvmlite=None, cupy=None); import fusionops; print('imported')"
    )
    assert python(program) == "imported"


def test_import_is_cheap():
    """Less than 50 ms over NumPy, of processor time, the least of some: what else the machine does only adds to it.

    A virtual machine may run at half its speed for minutes, so the time is that of one which imports some modules of
    the standard library in 0.064 s of processor time; where they take 0.1 s, fusionops takes 0.04 to 0.06 s. They are
    imported last, as they bring modules that fusionops imports too.
    """
    program = (
        "import time, numpy; start = time.process_time(); import fusionops; middle = time.process_time();"
        "import email.message, http.client, tarfile, unittest.mock, xml.dom.minidom;"
        "print(middle - start, time.process_time() - middle)"
    )
    python(program, PYTHONDONTWRITEBYTECODE="")  # a first import that may write byte code
    ours_s, others_s = (
        min(times) for times in zip(*(map(float, python(program).split()) for _ in range(25)), strict=True)
    )
    assert ours_s < 0.050 * max(1.0, others_s / 0.064)


FUNCTIONS = [name for name in fusionops.__all__ if inspect.isfunction(getattr(fusionops, name))]
OPS = [name for name in FUNCTIONS if re.fullmatch(r"(add|concat)(_\w+)?", name)]
SHARED = {"sources", "out", "backend"}  # described once, at the top of ops.py


def described(name: str) -> set[str]:
    """Arguments that the docstring of a function names, or one that it refers to for every other argument."""
    text = inspect.getdoc(getattr(fusionops, name))
    words = set(re.findall(r"\w+", text))
    other = re.search(r"Every other argument[^.]* are those of `(\w+)`", text)
    return words | described(other[1]) if other else words


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_opens_with_a_promise_and_names_every_argument(name):
    function = getattr(fusionops, name)
    promise = inspect.getdoc(function).split("\n\n")[0]
    assert promise.endswith(".")
    assert set(inspect.signature(function).parameters) - {"arguments", "options"} - SHARED <= described(name)


@pytest.mark.parametrize("name", OPS)
def test_docstring_of_op_has_its_headings(name):
    text = inspect.getdoc(getattr(fusionops, name))
    parts = {
        "an equation": r"^    y.* = ",
        "the sources": r"^sources {2,}\S",
        "the result": r"^returns {2,}\S",
        "numerics": r"^Numerics:|and the numerics are those of",
        "errors": r"^Raises SpecError",
        "a source": r'", (19|20)\d\d',
        "an example": r"^>>> ",
    }
    assert [part for part, pattern in parts.items() if not re.search(pattern, text, re.MULTILINE)] == []


def test_there_are_six_ops():
    assert set(OPS) == {"add", "concat", "add_conv", "concat_conv", "add_dense", "concat_dense"}
