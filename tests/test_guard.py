"""Guards: which arrays they take for those of a call made before, and the block they fill for them."""

from __future__ import annotations

import gc
import importlib.util
import pickle
import shutil
import sys
from array import array as array_of_words
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionops import address
from fusionops.cpu import jit
from fusionops.cpu.guard import Guards
from fusionops.kernel import JUDGED, NEW, Reach, Reaches, Replay


class Stated:
    """What a record of guards is made of, for one input and, with `has_out`, an output like it."""

    def __init__(self, array: np.ndarray, block_words: int, *, has_out: bool = False, alike: bool = False) -> None:
        self.arrays, self.has_out = [array] * (1 + has_out), has_out
        first, last = np.lib.array_utils.byte_bounds(array)
        reach = Reach(first - array.ctypes.data, last - array.ctypes.data, alike)
        self.reaches = Reaches((reach,), reach, array.dtype.alignment)
        self.replay = Replay(array_of_words("q", range(block_words)), (1, block_words - 1), lambda block, filters: None)

    def add_to(self, guards: Guards, kept: Any) -> None:
        guards.add(self.arrays, self.has_out, self.reaches, self.replay, kept)


def test_a_block_has_the_words_of_its_call_and_the_addresses_of_its_arrays():
    guards, short, long = Guards(), np.zeros((2, 3)), np.zeros((3, 2))
    Stated(short, 4, has_out=True).add_to(guards, "short")
    Stated(long, 9, has_out=True).add_to(guards, "long")
    Stated(np.zeros((1, 6)), 4, has_out=True).add_to(guards, "last")  # shorter than the longest
    out, x = np.zeros((2, 3)), np.zeros((2, 3))
    kept, block = guards.find([out, x])
    assert (kept, block[:4].tolist()) == ("short", [0, x.ctypes.data, 2, out.ctypes.data])
    out, x = np.zeros((3, 2)), np.zeros((3, 2))
    kept, block = guards.find([out, x])
    assert (kept, block.tolist()) == ("long", [0, x.ctypes.data, *range(2, 8), out.ctypes.data])


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((3, 2)),  # extents
        np.zeros((2, 3), order="F"),  # strides
        np.zeros((2, 6))[:, ::2],
        np.zeros((2, 3), np.int64),  # of as many bytes
        np.zeros((2, 3), ">f8"),
        np.zeros(6),
        np.zeros((1, 2, 3)),
        np.zeros(()),
    ],
)
def test_arrays_that_look_different_are_new(other):
    guards = Guards()
    Stated(np.zeros((2, 3)), 4).add_to(guards, "kept")
    assert guards.find([np.zeros((2, 3))])[0] == "kept"
    assert guards.find([other])[0] == NEW


def test_arrays_that_lie_elsewhere_than_a_call_may_have_them_are_judged():
    guards, memory = Guards(), np.zeros(100)
    Stated(memory[:10], 4, has_out=True).add_to(guards, "kept")
    found = [guards.find([memory[20:30], memory[first : first + 10]])[0] for first in (9, 10, 11, 20, 29, 30, 31)]
    assert found == [JUDGED if 10 < first < 30 else "kept" for first in (9, 10, 11, 20, 29, 30, 31)]
    frozen = memory[20:30]
    frozen.flags.writeable = False
    assert guards.find([frozen, memory[:10]])[0] == JUDGED
    assert guards.find([memory[20:30], frozen + 1])[0] == "kept"
    odd = np.zeros(81, np.uint8)[1:].view(np.float64)
    assert guards.find([memory[20:30], odd])[0] == JUDGED
    in_place = Guards()
    Stated(memory[:10], 4, has_out=True, alike=True).add_to(in_place, "kept")
    assert in_place.find([memory[20:30], memory[20:30]])[0] == "kept"
    assert in_place.find([memory[20:30], memory[21:31]])[0] == JUDGED


def test_arrays_that_run_backwards_lie_before_their_address():
    """Bytes of a reversed array are below it: what begins behind out may reach into it, and the other way round."""
    for forwards, backwards in ((0, 1), (1, 0), (1, 1)):
        guards, memory = Guards(), np.zeros(100)
        looks = [memory[40:50][:: -1 if turned else 1] for turned in (forwards, backwards)]
        stated = Stated(memory[:10], 4, has_out=True)
        stated.arrays = looks
        reach = [Reach(-72, 8, False) if turned else Reach(0, 80, False) for turned in (forwards, backwards)]
        stated.reaches = Reaches((reach[1],), reach[0], 8)
        stated.add_to(guards, "kept")
        for first in (29, 30, 31, 40, 49, 50, 51):
            x = memory[first : first + 10][:: -1 if backwards else 1]
            assert guards.find([looks[0], x])[0] == ("kept" if abs(first - 40) >= 10 else JUDGED)


def test_what_a_record_points_to_lives_as_long_as_the_record():
    guards, x = Guards(), pickle.loads(pickle.dumps(np.zeros((2, 3))))  # whose dtype is its own
    stated = Stated(x, 4)
    dtype, block = x.dtype, stated.replay
    before = sys.getrefcount(dtype), sys.getrefcount(block)
    stated.add_to(guards, "kept")
    del stated, x
    gc.collect()
    assert sys.getrefcount(dtype) > before[0] - 1  # the array's is gone, the guards' has come
    assert sys.getrefcount(block) == before[1]


@pytest.mark.parametrize(
    ("word", "other"),
    [("DATA", "DTYPE"), ("NDIM", "FLAGS"), ("EXTENTS", "STRIDES"), ("STRIDES", "EXTENTS"), ("DTYPE", "DATA"),
     ("FLAGS", "NDIM"), ("LIST_LENGTH", "LIST_ITEMS")],
)  # fmt: skip
def test_what_lies_elsewhere_in_an_array_is_noticed(word, other, monkeypatch):
    assert address._headers_are_known()
    monkeypatch.setattr(address, word, getattr(address, other))
    assert not address._headers_are_known()


def test_addresses_are_asked_for_where_nobody_knows_where_they_lie(monkeypatch):
    monkeypatch.setattr(address, "HEADERS_ARE_KNOWN", False)
    monkeypatch.setattr(address, "_MEMORY", None)
    x = np.zeros((3, 4))[1:]
    assert address.address(x) == x.ctypes.data


@pytest.mark.parametrize("source", ["address.py", "cpu/guard.py"])
def test_kernels_are_compiled_anew_when_what_they_are_made_of_changes(source, tmp_path):
    """Guards hold constants of the contract, which lies outside the backend."""
    package = tmp_path / "fusionops"
    shutil.copytree(Path(jit.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        found = importlib.util.spec_from_file_location("jit_of_a_copy", package / "cpu" / "jit.py")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module.source_digest()

    before = digest()
    assert before == jit.source_digest()
    with (package / source).open("a") as file:
        file.write("# changed\n")
    assert digest() != before
