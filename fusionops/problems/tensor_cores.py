"""Problems for tensor cores, whose sums have no stated order: float16, bfloat16, and float32 with precision="tf32"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from fusionops.problems.rows import ADD, CONCAT, Part, Problem, conv, conv_both, dense, in_dtype

FORMATS = (("bfloat16", None), ("float16", None), ("float32", "tf32"))


def in_any_order(problems: Iterable[Problem], dtype: str, precision: str | None) -> Iterator[Problem]:
    """The same problems, their sums in any order."""
    for problem in problems:
        narrow = problem if dtype == "float32" else in_dtype(problem, dtype)
        name = f"{problem.name}_{precision or dtype}_any_order"
        yield replace(narrow, name=name, kernels=(), spec=replace(narrow.spec, strict=False, precision=precision))


_WHOLE_RUNS = (
    *conv_both("aligned", 64, 128, N=2, H=9, W=8),
    *conv_both("aligned_dilated", 8, 8, H=9, W=8, dilation=(2, 1), stride=(1, 2)),
    *conv_both("aligned_groups", 32, 48, groups=2),
    *conv_both("aligned_pointwise", 40, 136, 1, 1, H=13, W=11),
    conv("aligned_sources", CONCAT, (8, 40, 16, 24), 24, H=6, W=8),
    conv("aligned_upsampled", CONCAT, (24, Part(16, (2, 2))), 16, H=6, W=8),
    conv("aligned_upsampled", ADD, (24, Part(24, (2, 2)), 24), 16, H=6, W=8, residual=Part(16)),
    conv("aligned_weighted", ADD, (Part(16, weight="scalar"), Part(16, weight="vector"), 16), 24),
    dense("aligned", ADD, (64, 64), 64, rows=200),
    dense("aligned", CONCAT, (64, 32), 72, rows=133),
)
ALIGNED = tuple(problem for dtype, precision in FORMATS for problem in in_any_order(_WHOLE_RUNS, dtype, precision))
"""Whose channels are whole runs of 16 bytes: what asynchronous copies take."""
