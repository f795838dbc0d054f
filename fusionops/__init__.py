"""Merge feature maps by add or concat and convolve them, without ever storing the merged map."""

from fusionops.errors import BackendError, FusionError, SpecAxisError, SpecError, SpecTypeError, UnsupportedError
from fusionops.kernel import Filters
from fusionops.ops import (
    Source,
    add,
    add_conv,
    add_dense,
    concat,
    concat_conv,
    concat_dense,
    cost,
    explain,
    info,
    prepack,
    set_num_threads,
    warmup,
)

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Filters",
    "FusionError",
    "Source",
    "SpecAxisError",
    "SpecError",
    "SpecTypeError",
    "UnsupportedError",
    "__version__",
    "add",
    "add_conv",
    "add_dense",
    "concat",
    "concat_conv",
    "concat_dense",
    "cost",
    "explain",
    "info",
    "prepack",
    "set_num_threads",
    "warmup",
]
