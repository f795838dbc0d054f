"""From what a user passes to what a kernel takes: the only place that judges input, and the only one that may copy it.

Chooses no kernel, allocates no result, computes nothing of it. Each op is read in the same order: arrays (`Intake`),
options, a judgement of shapes and dtypes that is cached, `out`, and only then copies of what a kernel cannot take.
NumPy and CuPy arrays are judged alike, by what they say of themselves.
"""

from fusionops.binding.call import Call, Judgement, judge_backend
from fusionops.binding.conv import bind_conv
from fusionops.binding.cuda import borrow_with
from fusionops.binding.dense import bind_dense
from fusionops.binding.filters import bind_filters
from fusionops.binding.merge import bind_merge
from fusionops.binding.options import bind_backend, bind_op, bind_threads
from fusionops.binding.repeated import reaches, sight, with_own_dtypes
from fusionops.binding.sources import Source

__all__ = [
    "Call",
    "Judgement",
    "Source",
    "bind_backend",
    "bind_conv",
    "bind_dense",
    "bind_filters",
    "bind_merge",
    "bind_op",
    "bind_threads",
    "borrow_with",
    "judge_backend",
    "reaches",
    "sight",
    "with_own_dtypes",
]
