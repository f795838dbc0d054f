"""What is measured on a GPU is what is said: on a stand-in, whose times and memory are known beforehand."""

import time

import fake_cupy as cp
import pytest
from gpu_stand_in import usable_gpu

import fusionops as fo
from fusionops.gpu import probe

MILLISECOND_NS = 1_000_000


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    with usable_gpu(monkeypatch) as runtime:
        yield runtime


def test_device_time_is_that_of_the_device_and_not_of_gaps_that_the_host_leaves():
    """Two launches, 10 ms apart on the host, of 2 and 3 ms on the device."""

    def run():
        cp.enqueue(2 * MILLISECOND_NS)
        time.sleep(0.010)
        cp.enqueue(3 * MILLISECOND_NS)

    times = probe.Clock()(run)
    assert round(times.device_s * 1e9) == 5 * MILLISECOND_NS
    assert times.host_s >= 0.010


def test_host_time_does_not_wait_for_the_device():
    times = probe.Clock()(lambda: cp.enqueue(200 * MILLISECOND_NS))
    assert round(times.device_s * 1e9) == 200 * MILLISECOND_NS
    assert 0 < times.host_s < 0.2


def test_a_call_that_cannot_be_hidden_is_an_error(monkeypatch):
    monkeypatch.setattr(cp, "FILL_NS", 1000)
    with pytest.raises(fo.BackendError, match=r"cannot be told from the host's.*64 fills(.|\n)*FUSIONOPS_SYNC"):
        probe.Clock()(lambda: time.sleep(0.001))


def test_pool_peak_is_the_most_that_is_held_at_a_time():
    before = cp.empty(10_000, "u1")

    def run():
        first = cp.empty(1000, "u1")
        second = cp.empty(3000, "u1")
        del first
        third = cp.empty(513, "u1")
        return second.shape, third.shape

    assert probe.pool_peak(run) == 1024 + 3072
    assert probe.pool_peak(lambda: before[1:].shape) == 0


def test_copies_count_what_is_read_and_what_is_written():
    assert round(probe.copy_bandwidth()) == round(2 * probe.BEYOND_CACHES / (cp.COPY_NS / 1e9))
