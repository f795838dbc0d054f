"""What calls take of the GPU, measured: its time apart from the host's, its memory, and the rate at which it copies.

Judges no kernel, and computes nothing of its own. `cpu.probe` is its twin.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fusionops.errors import BackendError
from fusionops.gpu.module import runtime

Run = Callable[[], object]

BEYOND_CACHES = 256 << 20  # bytes: several times the L2 cache of any GPU
# Fills that a call is hidden behind: a launch queue has room for about a thousand commands, so none of these waits.
MOST_FILLS = 64
ATTEMPTS = 12  # doubling from one fill to the most takes 6; the others are for a host that is held up
COPIES = 9


class Times(NamedTuple):
    """Seconds of one call: of the device at work, and until the call returned, which it does without waiting."""

    device_s: float
    host_s: float


class Clock:
    """Times calls on the current stream of the current device, each by a pair of events.

    Events around a call enclose the gaps in which the device waits for the next launch as well; then they tell the
    host's time, not the device's. So the device is first given an array to fill, and the time counts only if it was
    still filling when the whole call had been launched. The array also takes the place of the operands in the caches.
    """

    def __init__(self) -> None:
        arrays = runtime().arrays
        self._ballast = arrays.empty(BEYOND_CACHES, np.uint8)
        self._begin, self._end = arrays.cuda.Event(), arrays.cuda.Event()
        self._elapsed_ms: Callable[[Any, Any], float] = arrays.cuda.get_elapsed_time
        self._fills = 1

    def __call__(self, run: Run) -> Times:
        """The times of a call that has run before. Raises BackendError where it cannot be hidden: it waits itself."""
        for _ in range(ATTEMPTS):
            for _ in range(self._fills):
                self._ballast.fill(0)
            self._begin.record()
            start = time.perf_counter()
            run()
            host_s = time.perf_counter() - start
            self._end.record()
            has_waited = self._begin.done
            self._end.synchronize()
            if not has_waited:
                return Times(self._elapsed_ms(self._begin, self._end) / 1e3, host_s)
            self._fills = min(2 * self._fills, MOST_FILLS)
        raise BackendError(
            "the GPU's time cannot be told from the host's: calls take longer to launch than "
            f"{MOST_FILLS} fills of {BEYOND_CACHES >> 20} MiB to run\nhint: unset FUSIONOPS_SYNC, which makes them wait"
        )


def pool_peak(run: Run) -> int:
    """The most memory that a call holds of CuPy's pool at a time, beside what was taken before, bytes.

    Of a call that has run before; counted in the pool's own units, of 512 bytes.
    """

    class Tally(runtime().arrays.cuda.MemoryHook):  # type: ignore[misc]  # CuPy's, which is known when it is there
        name = "fusionops"

        def __init__(self) -> None:
            self.held = self.peak = 0

        def malloc_postprocess(self, **taken: int) -> None:
            self.held += taken["mem_size"]
            self.peak = max(self.peak, self.held)

        def free_postprocess(self, **freed: int) -> None:
            self.held -= freed["mem_size"]

    with Tally() as tally:
        run()
    return int(tally.peak)


def copy_bandwidth() -> float:
    """Bytes/s read and written by the fastest of some copies of an array larger than the caches."""
    arrays, clock = runtime().arrays, Clock()
    source, target = (arrays.zeros(BEYOND_CACHES, np.uint8) for _ in range(2))
    arrays.copyto(target, source)
    return 2 * BEYOND_CACHES / min(clock(lambda: arrays.copyto(target, source)).device_s for _ in range(COPIES))
