"""The public functions: documentation and defaults. Nothing here judges, chooses or computes.

What all ops share. `sources` is a list of one or more arrays or `Source`s; what `np.asarray` takes is an array, also
views of any strides and read-only ones; results are plain arrays. CuPy arrays run on their GPU, on the current stream,
as do PyTorch's, which come back as such; nothing is moved unasked. `out` has exactly the shape and dtype of the result
and is returned; it may overlap inputs. `backend` is None (where the arrays are), "cpu", "gpu", or "reference" (float64,
slow). Every error is raised before anything is written: SpecError (a ValueError) or SpecTypeError (a TypeError) for
wrong input, UnsupportedError where no kernel runs it, BackendError where the machine cannot run the backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fusionops import dispatch
from fusionops.binding import Call, bind_conv, bind_dense, bind_filters, bind_merge, bind_op, bind_threads
from fusionops.binding import Source as Source  # public with the ops that take it
from fusionops.cost import FusedCost
from fusionops.dispatch import Explanation, Info
from fusionops.kernel import Filters
from fusionops.perform import perform


def add(
    sources: Any,
    *,
    weights: Any = None,
    normalize: str | None = None,
    activation: Any = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Add arrays in one pass, each upsampled and weighted on the way.

        y = act( w_0·up(x_0) + w_1·up(x_1) + … )

    sources    arrays that broadcast with each other, of any rank; Python numbers are taken as NumPy takes them
    weights    for each source a number, a vector (C,) along its last axis, or None
    normalize  None, "relu": max(w_i, 0) / (Σ max(w, 0) + 1e-4), or "softmax"; needs a number for every source
    activation  None, "relu", "relu6", "leaky_relu" (slope 0.01), "sigmoid", "tanh", "silu", "hardswish", "hardsigmoid",
                "gelu", or a pair such as ("leaky_relu", 0.2)
    returns    the broadcast shape, in the dtype NumPy gives x_0 + x_1 + …

    Numerics: NumPy's bits: a left fold, each product and sum rounded by itself, integers wrap. Weights are normalised
    in float64 and rounded to the dtype of the result. Weights, upsampling and activations need a floating result.
    Raises SpecError for shapes that do not broadcast, SpecTypeError for dtypes.
    Normalised weights: Tan, Pang and Le, "EfficientDet: Scalable and Efficient Object Detection", 2020, section 3.3.

    >>> import numpy as np
    >>> x, y = np.array([1.0, 2.0]), np.array([[10.0], [-20.0]])
    >>> add([x, y])
    array([[ 11.,  12.],
           [-19., -18.]])
    >>> add([x, y], weights=[3, 0.5], activation="relu")
    array([[ 8., 11.],
           [ 0.,  0.]])
    """
    options = {"weights": weights, "normalize": normalize, "activation": activation}
    return perform(bind_merge, "add", sources, (), out, backend, options)


def concat(sources: Any, *, axis: int = -1, out: Any = None, backend: str | None = None) -> Any:
    """Join arrays along an axis.

        y = x_0 | x_1 | …

    sources    arrays of one rank ≥ 1, of equal extents but along `axis`
    axis       negative ones count from the end; the default joins channels-last maps along their channels
    returns    the joined array, in the dtype NumPy promotes the sources to

    Numerics: NumPy's bits.
    Raises SpecError for unequal ranks or extents, SpecAxisError (also an IndexError) for an axis that is not there.
    Merging by concatenation: Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image
    Segmentation", 2015.

    >>> import numpy as np
    >>> concat([np.array([[1, 2]]), np.array([[3]])])
    array([[1, 2, 3]])
    """
    return perform(bind_merge, "concat", sources, (), out, backend, {"axis": axis})


def add_conv(
    sources: Any,
    filters: Any,
    bias: Any = None,
    *,
    stride: Any = 1,
    padding: Any = "valid",
    dilation: Any = 1,
    groups: int = 1,
    weights: Any = None,
    normalize: str | None = None,
    residual: Any = None,
    activation: Any = None,
    layout: str = "NHWC",
    strict: bool = False,
    precision: str | None = None,
    return_sum: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Convolve the sum of feature maps, without storing the sum.

        y[n,p,q,k] = act( Σ_{r,s,c} m[n, h, w, c] · f[r,s,c,k] + b[k] + z[n,p,q,k] )        m = w_0·x_0 + w_1·x_1 + …
        h = p·stride_h + r·dilation_h − pad_top        w likewise

    sources    maps (N, H, W, C), after upsampling all of one shape: nothing is broadcast; one floating dtype
    filters    (R, S, C/groups, K), or what `prepack` made of them; of the sources' dtype, as is every array below
    bias       (K,)
    stride, dilation   an int, or (rows, columns)
    padding    "valid", "same" (output ceil(H / stride); the odd zero goes to the end, as in Keras), an int,
               (rows, columns), or ((top, bottom), (left, right))
    groups     C and K are cut into as many parts that do not mix; C is depthwise
    weights, normalize, activation   as in `add`; a vector of weights runs along the channels
    residual   an array or Source (N, P, Q, K), added before the activation
    layout     "NHWC", or "NCHW": maps (N, C, H, W) and filters (K, C/groups, R, S), read as they are
    strict     form every product and keep one order of summation; otherwise rewrites that round differently are allowed
    precision  None, or "tf32" for float32 on a GPU: factors are rounded to 11 significant bits, for tensor cores
    return_sum   return (y, m) instead of y: m is needed where the sum is read again
    returns    y (N, P, Q, K); P = (H + pad_top + pad_bottom − (R − 1)·dilation_h − 1) // stride_h + 1

    Numerics: each product and sum of the merge is rounded by itself; the contraction accumulates in the dtype of the
    sources, or in float32 if that is narrower, and is then rounded once more. strict: |error| ≤
    (8 + 2√(R·S·C/groups))·u·(|m| ⋆ |f| + |b|), u half a unit in the last place of 1. Padding is skipped, not
    multiplied: an Inf at a border makes no NaN. The bits do not depend on the number of threads.
    Raises SpecError for shapes and options, SpecTypeError for dtypes; UnsupportedError for what no kernel runs.
    Sums that enter a convolution: Lin et al., "Feature Pyramid Networks for Object Detection", 2017, section 3.

    >>> import numpy as np
    >>> x = np.arange(6.0).reshape(1, 2, 3, 1)
    >>> add_conv([x, np.ones_like(x)], np.ones((1, 2, 1, 1)), np.array([100.0])).reshape(2, 2)
    array([[103., 105.],
           [109., 111.]])
    >>> y, m = add_conv([x, x], np.ones((2, 3, 1, 1)), return_sum=True)
    >>> y.item(), m.reshape(2, 3).tolist()
    (30.0, [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]])
    """
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "weights": weights,
        "normalize": normalize,
        "activation": activation,
        "layout": layout,
        "strict": strict,
        "precision": precision,
        "return_sum": return_sum,
    }
    return perform(bind_conv, "add_conv", sources, (filters, bias, residual), out, backend, options)


def concat_conv(
    sources: Any,
    filters: Any,
    bias: Any = None,
    *,
    stride: Any = 1,
    padding: Any = "valid",
    dilation: Any = 1,
    groups: int = 1,
    residual: Any = None,
    activation: Any = None,
    layout: str = "NHWC",
    strict: bool = False,
    precision: str | None = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Convolve the channel-wise concatenation of feature maps, without storing it.

        y[n,p,q,k] = act( Σ_{r,s,c} (x_0 | x_1 | …)[n, h, w, c] · f[r,s,c,k] + b[k] + z[n,p,q,k] )
        h = p·stride_h + r·dilation_h − pad_top        w likewise

    sources    maps (N, H, W, C_i), after upsampling of equal N, H and W; one floating dtype
    filters    (R, S, (C_0 + C_1 + …)/groups, K), channels ordered like the sources; or what `prepack` made of them
    returns    (N, P, Q, K)

    Every other argument, the extents and the numerics are those of `add_conv`.
    Raises SpecError for shapes and options, SpecTypeError for dtypes; UnsupportedError for what no kernel runs.
    Convolutions of concatenations: Huang et al., "Densely Connected Convolutional Networks", 2017, section 3.

    >>> import numpy as np
    >>> x, y = np.full((1, 2, 2, 1), 1.0), np.full((1, 2, 2, 2), 10.0)
    >>> concat_conv([x, y], np.ones((2, 2, 3, 1))).item()
    84.0
    >>> concat_conv([x, y], np.ones((3, 3, 3, 1)), padding="same", activation="relu6").reshape(2, 2)
    array([[6., 6.],
           [6., 6.]])
    """
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
        "layout": layout,
        "strict": strict,
        "precision": precision,
    }
    return perform(bind_conv, "concat_conv", sources, (filters, bias, residual), out, backend, options)


def add_dense(
    sources: Any,
    matrix: Any,
    bias: Any = None,
    *,
    weights: Any = None,
    normalize: str | None = None,
    residual: Any = None,
    activation: Any = None,
    precision: str | None = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Multiply the sum of arrays with a matrix, without storing the sum.

        y[…,k] = act( Σ_c (w_0·x_0 + w_1·x_1 + …)[…,c] · f[c,k] + b[k] + z[…,k] )

    sources    arrays (…, C) of one shape: nothing is broadcast; one floating dtype
    matrix     (C, K), or what `prepack` made of it; of the sources' dtype, as is every array below
    bias       (K,)
    residual   an array or Source (…, K), added before the activation
    weights, normalize, activation   as in `add`
    precision  None, or "tf32" for float32 on a GPU: factors are rounded to 11 significant bits, for tensor cores
    returns    (…, K)

    Numerics: as in `add_conv`, with a reduction of length C.
    Raises SpecError for shapes and options, SpecTypeError for dtypes; UnsupportedError for what no kernel runs.
    Sums that enter a projection: Vaswani et al., "Attention Is All You Need", 2017, section 3.5.

    >>> import numpy as np
    >>> add_dense([np.array([1.0, 2.0]), np.array([10.0, 20.0])], np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]]))
    array([11., 22., 66.])
    """
    options = {
        "weights": weights,
        "normalize": normalize,
        "activation": activation,
        "precision": precision,
    }
    return perform(bind_dense, "add_dense", sources, (matrix, bias, residual), out, backend, options)


def concat_dense(
    sources: Any,
    matrix: Any,
    bias: Any = None,
    *,
    residual: Any = None,
    activation: Any = None,
    precision: str | None = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Multiply the concatenation of arrays along their last axis with a matrix, without storing it.

        y[…,k] = act( Σ_c (x_0 | x_1 | …)[…,c] · f[c,k] + b[k] + z[…,k] )

    sources    arrays (…, C_i) with the same leading axes; one floating dtype
    matrix     (C_0 + C_1 + …, K): its rows are ordered like the sources; or what `prepack` made of it
    returns    (…, K)

    Every other argument and the numerics are those of `add_dense`.
    Raises SpecError for shapes and options, SpecTypeError for dtypes; UnsupportedError for what no kernel runs.
    Projections of concatenations: Zaremba, Sutskever and Vinyals, "Recurrent Neural Network Regularization", 2014.

    >>> import numpy as np
    >>> x, y = np.array([[1.0]]), np.array([[2.0, 3.0]])
    >>> concat_dense([x, y], np.array([[1.0], [10.0], [100.0]]), np.array([-1000.0]))
    array([[-679.]])
    """
    options = {
        "activation": activation,
        "precision": precision,
    }
    return perform(bind_dense, "concat_dense", sources, (matrix, bias, residual), out, backend, options)


def prepack(filters: Any, *, layout: str = "NHWC") -> Filters:
    """Filters that each kernel packs once, instead of in every call: for weights that stay the same.

    filters    (R, S, C/groups, K), in layout "NCHW" (K, C/groups, R, S); or the matrix (C, K) of a dense layer
    returns    an object that is accepted wherever filters or a matrix are; holds a copy, so later writes change nothing

    Numerics: the same bits as with the array itself.
    Raises SpecError for a rank or layout, SpecTypeError for a dtype.

    >>> import numpy as np
    >>> filters = prepack(np.full((1, 1, 2, 1), 2.0))
    >>> concat_conv([np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1))], filters).item()
    4.0
    """
    return bind_filters(filters, layout=layout)


def explain(op: str | Callable[..., Any], *arguments: Any, **options: Any) -> Explanation:
    """What an op would do with these arguments: kernel, config, why no other kernel, copies, cost.

    op         an op or its name: add, concat, add_conv, concat_conv, add_dense, concat_dense
    returns    an object whose `str` is a report

    Runs nothing, but judges everything: raises what the op would raise.

    >>> import numpy as np
    >>> print(explain("add", [np.ones(3), [1.0, 2.0, 3.0]], backend="reference"))
    add fprop float64 (3,) + (3,)
    runs on  reference: reference
    config   ReferenceConfig(scratch_bytes=0, shared_bytes=0)
    copies   sources[1]: a list, converted to an array
    cost     0 parameters, 3e-09 GFLOP
    moves    6.86646e-05 MiB, materialised 6.86646e-05 MiB
    peak     0 MiB extra, materialised 0 MiB
    others   none
    """
    return dispatch.explain(*_bound("explain", op, arguments, options))


def cost(op: str | Callable[..., Any], *arguments: Any, **options: Any) -> FusedCost:
    """What an op costs with these arguments, counted, not measured: parameters, FLOPs, bytes moved, memory.

    op         an op or its name: add, concat, add_conv, concat_conv, add_dense, concat_dense
    returns    params, flops, bytes_read, bytes_written, scratch_bytes, peak_bytes, …; `.materialised` is the other way

    Runs nothing, but judges everything: raises what the op would raise.

    >>> import numpy as np
    >>> x, matrix = np.ones((8, 32), np.float32), np.ones((64, 16), np.float32)
    >>> counted = cost(concat_dense, [x, x], matrix)
    >>> counted.params, counted.flops, counted.materialised.bytes_moved - counted.bytes_moved
    (1024, 16384, 4096)
    """
    return dispatch.cost(*_bound("cost", op, arguments, options))


def info() -> Info:
    """Version, backends and why one is unusable, processor, threads; `str` of it is a report.

    >>> [name for name, unusable in info().backends]
    ['cpu', 'gpu', 'reference']
    """
    from fusionops import __version__

    return dispatch.info(__version__)


def set_num_threads(n: int) -> None:
    """Use `n` threads in later calls, of every Python thread. The results have the same bits for any number."""
    dispatch.set_num_threads(bind_threads(n))


def warmup(progress: Callable[[int, int, str], None] | None = None) -> None:
    """Compile every kernel for this machine now, in some seconds; later calls and processes find them in the cache.

    progress   called with (done, total, what is compiled next)
    """
    dispatch.warmup(progress)


_OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op for op in (add, concat, add_conv, concat_conv, add_dense, concat_dense)
}
_BINDERS: dict[str, Callable[..., Call]] = {"": bind_merge, "conv": bind_conv, "dense": bind_dense}


def _bound(asker: str, op: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Call, str | None]:
    """The bound call of any op, and the backend it asks for."""
    name = bind_op(asker, op, _OPS)
    given = inspect.signature(_OPS[name]).bind(*arguments, **options)
    given.apply_defaults()
    backend = given.arguments.pop("backend")
    return _BINDERS[name.partition("_")[2]](name, **given.arguments), backend
