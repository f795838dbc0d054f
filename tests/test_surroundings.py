"""Hostile surroundings: threads, forks, caches nobody can write or that are damaged, other processors, Ctrl-C.

Each test is a process of its own, so that a crash or a hang is a failure and not the end of the suite.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import fusionops

TIMEOUT_S = 180  # a cold start compiles everything that the ops below use

# Every op on integers, so that there is one right answer; large enough to be worth a second thread, small enough to be
# called often.
OPS = """
import sys, threading, warnings
import numpy as np
import fusionops as fo

warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)  # is what is tested here
rng = np.random.default_rng(1)

def integers(*shape):
    return rng.integers(-4, 5, shape).astype(np.float32)

x, y, small = integers(1, 48, 48, 8), integers(1, 48, 48, 8), integers(1, 24, 24, 8)
rows, wide = integers(500, 64), integers(500, 600)
filters, pointwise, matrix = integers(3, 3, 16, 20), integers(1, 1, 8, 128), integers(128, 64)

OPS = {
    "add": lambda backend: fo.add([wide, wide, wide], backend=backend),
    "add_upsampled": lambda backend: fo.add([x, fo.Source(small, upsample=2, weight=2.0)], backend=backend),
    "concat": lambda backend: fo.concat([wide, rows], backend=backend),
    "add_conv": lambda backend: fo.add_conv([x, y], filters[:, :, :8], padding="same", backend=backend),
    "add_pointwise": lambda backend: fo.add_conv([x, y], pointwise, activation="relu", backend=backend),
    "concat_conv": lambda backend: fo.concat_conv([x, y], filters, backend=backend),
    "add_dense": lambda backend: fo.add_dense([rows, rows], matrix[:64], backend=backend),
    "concat_dense": lambda backend: fo.concat_dense([rows, rows], matrix, backend=backend),
}
EXPECTED = {name: op("reference") for name, op in OPS.items()}

def check(times=1, names=tuple(OPS)):
    for _ in range(times):
        for name in names:
            np.testing.assert_array_equal(OPS[name]("cpu"), EXPECTED[name], err_msg=name)

def rewritten():
    # what Winograd's kernels run, whose products are no integers
    for taps in (2, 3, 5):
        fo.add_conv([np.ones((1, 32, 32, 64), np.float32)], np.ones((taps, taps, 64, 64), np.float32), padding="same")

def in_threads(count, times):
    failures = []
    def work():
        try:
            check(times)
        except BaseException as error:
            failures.append(error)
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
"""

# A user's own parallel code, which starts numba's threads; fusionops has threads of its own beside them.
NEIGHBOUR = """
import numba
import numpy as np

@numba.njit(parallel=True)
def count(values):
    for i in numba.prange(values.size):
        values[i] += 1

def work():
    values = np.zeros(10_000)
    count(values)
    assert (values == 1).all()
    return numba.threading_layer()
"""

LAYERS = [
    pytest.param("workqueue"),
    pytest.param("omp", marks=pytest.mark.omp),
    pytest.param("tbb", marks=pytest.mark.tbb),
]
every_layer = pytest.mark.parametrize("layer", LAYERS)


class Process:
    """Starts scripts that find the texts above as modules `ops` and `neighbour`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "ops.py").write_text(OPS)
        (folder / "neighbour.py").write_text(NEIGHBOUR)
        package = str(Path(fusionops.__file__).parent.parent)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
        self.environment["PYTHONPATH"] = os.pathsep.join([str(folder), package])
        if "NUMBA_CACHE_DIR" in os.environ:
            self.environment["NUMBA_CACHE_DIR"] = os.environ["NUMBA_CACHE_DIR"]

    def start(self, script: str, **environment: str | None) -> subprocess.Popen[str]:
        path = self.folder / f"script_{len(list(self.folder.glob('script_*')))}.py"
        path.write_text(textwrap.dedent(script))
        settings = {**self.environment, **environment}
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(path)],
            env={name: value for name, value in settings.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> str:
        """What it printed; fails if it failed, crashed or hung."""
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"still running after {TIMEOUT_S} s\n{out}\n{err}")
        assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{err}"
        return out

    def run(self, script: str, **environment: str | None) -> str:
        return self.finish(self.start(script, **environment))


@pytest.fixture
def process(tmp_path) -> Process:
    return Process(tmp_path)


@every_layer
def test_eight_python_threads(process, layer):
    """From the very first call on, so that they also compile at once, beside a user's own parallel code."""
    out = process.run(
        """
        import sys
        import neighbour, ops
        print(neighbour.work())
        sys.setswitchinterval(1e-5)
        ops.fo.set_num_threads(2)
        ops.in_threads(8, times=100)
        neighbour.work()
        """,
        NUMBA_THREADING_LAYER=layer,
        NUMBA_NUM_THREADS="2",
    )
    assert out.split() == [layer]


@every_layer
def test_fork_after_use(process, layer):
    """Numba's OpenMP would kill the child at its next parallel loop; ops must run there all the same."""
    process.run(
        """
        import os
        import neighbour, ops
        neighbour.work()
        ops.fo.set_num_threads(2)
        ops.check()
        child = os.fork()
        if child == 0:
            ops.check(3)
            assert len(os.listdir("/proc/self/task")) > 1, "the child computes alone"
            ops.in_threads(2, times=2)
            grandchild = os.fork()
            if grandchild == 0:
                ops.check()
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
        ops.check(3)
        neighbour.work()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
        NUMBA_THREADING_LAYER=layer,
        NUMBA_NUM_THREADS="2",
    )


def test_fork_while_another_thread_computes(process):
    """The child inherits the locks as the other thread held them, and none of the threads."""
    process.run(
        """
        import os, signal, threading
        import ops
        ops.fo.set_num_threads(2)
        ops.check()
        done = threading.Event()
        def work():
            while not done.is_set():
                ops.check(names=("concat_conv", "add"))
        thread = threading.Thread(target=work)
        thread.start()
        statuses = []
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                ops.check(names=("concat_conv", "add"))
                os._exit(0)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        done.set()
        thread.join()
        assert statuses == [0] * 20, statuses
        """
    )


def test_more_threads_than_processors(process):
    """Tasks that no thread has begun are done by the caller: a worker that does not run holds nobody up."""
    process.run(
        """
        import os
        import ops
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        for count in (1, 2, 33, 3, 1, 8):
            ops.fo.set_num_threads(count)
            ops.check(3)
        """
    )


def test_kernels_from_the_cache_come_without_the_compiler(process):
    """A first call loads machine code and not numba's tables of types, which a user's own code still gets."""
    process.run("import ops; ops.check(); ops.rewritten()")
    process.run(
        """
        import sys
        import ops
        ops.check()
        ops.rewritten()
        assert "numba.np.arraymath" not in sys.modules, "something was compiled, or loaded as if it were to be"
        import neighbour
        neighbour.work()
        ops.check()
        """
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(process, method):
    process.run(
        f"""
        import multiprocessing
        import ops
        if __name__ == "__main__":
            ops.check()
            context = multiprocessing.get_context("{method}")
            children = [context.Process(target=ops.check, args=(2,)) for _ in range(2)]
            for child in children:
                child.start()
            for child in children:
                child.join()
            assert [child.exitcode for child in children] == [0, 0]
        """
    )


def test_cache_that_cannot_be_written(process):
    """Below a regular file nothing can be created, not even by root."""
    nowhere = process.folder / "a file"
    nowhere.write_text("")
    process.run(
        """
        import ops
        ops.check(names=("add", "add_conv"))
        """,
        NUMBA_CACHE_DIR=str(nowhere / "numba"),
        XDG_CACHE_HOME=str(nowhere / "cache"),
        HOME=str(nowhere / "home"),
    )


# Little, because it is compiled again for each kind of damage.
USE_CACHE = """
import ops
ops.np.testing.assert_array_equal(ops.fo.add([ops.rows, ops.rows]), ops.rows + ops.rows)
"""


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory) -> Path:
    """A cache that one process has filled."""
    cache = tmp_path_factory.mktemp("cache")
    Process(tmp_path_factory.mktemp("process")).run(USE_CACHE, NUMBA_CACHE_DIR=str(cache))
    assert {".nbi", ".nbc"} <= {path.suffix for path in cache.rglob("*")}
    return cache


def emptied(content: bytes) -> bytes:
    return b""


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def scrambled(content: bytes) -> bytes:
    return bytes(byte ^ 0x5A for byte in content)


DAMAGES = [(".nbi", emptied), (".nbi", truncated), (".nbi", scrambled), (".nbc", emptied), (".nbc", truncated)]


@pytest.mark.parametrize(("suffix", "damage"), DAMAGES)
def test_damaged_cache_is_rebuilt(process, warm_cache, suffix, damage):
    cache = process.folder / "cache"
    files = [path for path in warm_cache.rglob("*") if path.is_file()]
    for path in files:
        copy = cache / path.relative_to(warm_cache)
        copy.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        copy.write_bytes(damage(content) if path.suffix == suffix else content)
        os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    process.run(USE_CACHE, NUMBA_CACHE_DIR=str(cache))
    rebuilt = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb?")}
    process.run(USE_CACHE, NUMBA_CACHE_DIR=str(cache))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb?")} == rebuilt, "the rebuilt cache is not used"


def test_two_processes_compile_at_once(process):
    fresh = str(process.folder / "cache")
    both = [process.start(USE_CACHE, NUMBA_CACHE_DIR=fresh) for _ in range(2)]
    for one in both:
        process.finish(one)
    process.run(USE_CACHE, NUMBA_CACHE_DIR=fresh)


def test_generic_processor(process):
    out = process.run(
        """
        import ops
        ops.check()
        import numba
        print(numba.config.CPU_NAME, repr(numba.config.CPU_FEATURES))
        """,
        NUMBA_CPU_NAME="generic",
        NUMBA_CPU_FEATURES="",
    )
    assert out.split() == ["generic", "''"]


def test_interrupt_leaves_the_process_usable(process):
    """A call of some 5 TFLOP, interrupted: the signal is noticed long before its end, and later calls are right."""
    child = process.start(
        """
        import signal
        import time
        import ops
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started ignoring it
        ops.check()
        ops.fo.set_num_threads(2)
        large, taps = ops.np.ones((1, 256, 256, 256), "f4"), ops.np.ones((25, 25, 256, 256), "f4")
        out = ops.np.zeros((1, 256, 256, 256), "f4")
        print("ready", flush=True)
        try:
            ops.fo.add_conv([large], taps, padding="same", out=out)
        except KeyboardInterrupt:
            print(time.monotonic(), flush=True)
        assert not out.all(), "the call was not in the middle"
        ops.check(2)
        ops.in_threads(2, times=2)
        print("usable")
        """
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(1.0)  # a 5 TFLOP call takes longer than that wherever this runs, also where this process has to wait
    interrupted = time.monotonic()
    child.send_signal(signal.SIGINT)
    noticed, usable = process.finish(child).split()
    assert usable == "usable"
    assert float(noticed) - interrupted < 2.0
