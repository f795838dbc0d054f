"""The merging steps of known networks, each in terms of the public ops; no options beyond the network's own.

Maps are channels-last (N, H, W, C), filters (R, S, C, K), one floating dtype for all arrays of a call.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionops.ops import Source, add, add_conv, concat_conv, concat_dense


def fpn_merge(
    top_down: Any,
    lateral: Any,
    lateral_filters: Any,
    lateral_bias: Any,
    smooth_filters: Any,
    smooth_bias: Any,
    *,
    upsample: int = 2,
) -> tuple[Any, Any]:
    """One level of a feature pyramid: (merged, smoothed).

        merged = conv1×1(lateral) + up(top_down)        smoothed = conv3×3_same(merged)

    top_down   (N, H / upsample, W / upsample, K), the merged map of the coarser level; upsampled while it is added
    lateral    (N, H, W, C), a map of the backbone
    lateral_filters (1, 1, C, K), lateral_bias (K,); smooth_filters (3, 3, K, K), smooth_bias (K,)
    returns    two maps (N, H, W, K): merged goes to the next finer level, smoothed to the heads

    Numerics and errors: those of `add_conv`.
    Lin et al., "Feature Pyramid Networks for Object Detection", 2017, section 3.
    """
    merged = add_conv([lateral], lateral_filters, lateral_bias, residual=Source(top_down, upsample=upsample))
    return merged, add_conv([merged], smooth_filters, smooth_bias, padding="same")


def unet_up(skip: Any, up: Any, filters: Any, bias: Any) -> Any:
    """A step of a U-Net's expanding path: crop the skip to the upsampled map, concatenate, convolve, rectify.

        y = relu(conv_valid(concat(crop(skip), up)))

    skip       (N, H_s, W_s, C_s), at least as large as `up`; its centre is read as a view
    up         (N, H, W, C), after the up-convolution
    filters    (R, S, C_s + C, K): skip first;  bias (K,)
    returns    (N, H − R + 1, W − S + 1, K)

    Numerics and errors: those of `concat_conv`.
    Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015, section 2.
    """
    centre = [slice(None)]
    for extent, wanted in zip(np.shape(skip)[1:3], np.shape(up)[1:3], strict=False):  # ranks are judged by the op
        first = max(0, (extent - wanted) // 2)
        centre.append(slice(first, first + wanted))
    return concat_conv([skip[tuple(centre)], up], filters, bias, activation="relu")


def residual(x: Any, identity: Any, filters: Any, bias: Any) -> Any:
    """The end of a residual block: the last convolution, the identity added to it, and the rectifier after both.

        y = relu(conv_same(x) + identity)

    x          (N, H, W, C)
    identity   (N, H, W, K), the input of the block or its projection
    filters    (R, S, C, K), bias (K,): with the batch normalisation that follows folded in
    returns    (N, H, W, K)

    Numerics and errors: those of `add_conv`.
    He et al., "Deep Residual Learning for Image Recognition", 2016, section 3.2.
    """
    return add_conv([x], filters, bias, padding="same", residual=identity, activation="relu")


def dense_layer(features: Any, filters: Any, bias: Any) -> Any:
    """The bottleneck of a densely connected layer: all features so far, concatenated, through a 1×1 convolution.

        y = relu(conv1×1(concat(x_0, x_1, …)))

    features   list of maps (N, H, W, C_i), already normalised and rectified
    filters    (1, 1, C_0 + C_1 + …, K), bias (K,): with the batch normalisation that follows folded in
    returns    (N, H, W, K)

    Numerics and errors: those of `concat_conv`.
    Huang et al., "Densely Connected Convolutional Networks", 2017, section 3.
    """
    return concat_conv(features, filters, bias, activation="relu")


def lstm_cell(x: Any, h: Any, c: Any, matrix: Any, bias: Any) -> tuple[Any, Any]:
    """One step of a long short-term memory: the next (h, c).

        i, f, g, o = split(concat(x, h) · matrix + bias)
        c' = σ(f)·c + σ(i)·tanh(g)        h' = σ(o)·tanh(c')

    x          (N, inputs);  h, c (N, units)
    matrix     (inputs + units, 4·units): kernel above recurrent kernel; gates in Keras' order i, f, c (here g), o
    bias       (4·units,)
    returns    two arrays (N, units)

    Numerics: the gates are those of `concat_dense`; the update of the cell is NumPy's.
    Errors: those of `concat_dense`.
    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; the forget gate is that of Gers, Schmidhuber and
    Cummins, "Learning to Forget: Continual Prediction with LSTM", 2000.
    """
    i, f, g, o = np.split(concat_dense([x, h], matrix, bias), 4, axis=-1)
    cell = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    return _sigmoid(o) * np.tanh(cell), cell


def side_fusion(sides: Any, weights: Any) -> Any:
    """The fused output of a holistically nested edge detector: side outputs of all scales, brought to one and weighted.

        y = σ( Σ_i w_i · up_i(side_i) )

    sides      list of maps (N, H, W, C) before any sigmoid; a coarser one as Source(side, upsample=factor)
    weights    a number for each side
    returns    (N, H, W, C)

    Upsampling is by repetition; the original's is bilinear. Numerics and errors: those of `add`.
    Xie and Tu, "Holistically-Nested Edge Detection", 2015, section 3.
    """
    return add(sides, weights=weights, activation="sigmoid")


def _sigmoid(x: Any) -> Any:
    """1 / (1 + e^−x), through tanh, which does not overflow."""
    return np.tanh(x * 0.5) * 0.5 + 0.5
