"""Independent oracles: what Keras, ONNX Runtime and SciPy answer to the same question, on data that rounds.

Both sides round, so two right answers lie within twice the bound of one. Says nothing about speed.
"""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "numpy"  # read when keras is imported

import keras
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.signal import correlate

import fusionops as fo
from fusionops.binding import bind_conv, bind_dense
from fusionops.spec import ACTIVATIONS
from fusionops.testing import error_bound

# Keras' variables have no copy keyword yet, of which NumPy 2 complains whenever one is read.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

BIND = {"add_conv": bind_conv, "concat_conv": bind_conv, "add_dense": bind_dense, "concat_dense": bind_dense}


def assert_agrees(theirs, op: str, sources, filters, bias=None, **options) -> None:
    """`op` of fusionops gives `theirs`, within twice the bound of the spec it binds to."""
    ours, theirs = getattr(fo, op)(sources, filters, bias, **options), np.asarray(theirs)
    call = BIND[op](op, sources, filters, bias, **options)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert np.count_nonzero(ours) > ours.size / 4
    bound = 2 * error_bound(call.judgement.spec, call.operands).reshape(ours.shape)
    assert (np.abs(ours.astype(np.float64) - theirs) <= bound).all()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


# Keras: the layers of its guide to merging, then what they leave out.

MERGES = {"add": keras.layers.Add, "concat": keras.layers.Concatenate}
every_merge = pytest.mark.parametrize("merge", MERGES)


def keras_answer(merge: str, layer: keras.layers.Layer, sources, prologue=()):
    """(what the model answers, filters, bias); prologue: a layer for each source, or None."""
    inputs = [keras.Input(source.shape[1:]) for source in sources]
    loaded = [layer(tensor) for layer, tensor in zip(prologue, inputs, strict=True)] if prologue else inputs
    model = keras.Model(inputs, layer(MERGES[merge]()(loaded)))
    filters, bias = layer.get_weights()
    bias = np.linspace(-1, 1, bias.size, dtype=bias.dtype)
    layer.set_weights([filters, bias])
    return model(list(sources)), filters, bias


@every_merge
def test_keras_merge_then_dense(rng, merge):
    x, y = normal(rng, 5, 32), normal(rng, 5, 32)
    expected, matrix, bias = keras_answer(merge, keras.layers.Dense(64, activation="relu"), [x, y])
    assert matrix.shape == (32 if merge == "add" else 64, 64)
    assert_agrees(expected, f"{merge}_dense", [x, y], matrix, bias, activation="relu")


@every_merge
def test_keras_merge_then_convolution(rng, merge):
    x, y = normal(rng, 1, 128, 128, 64), normal(rng, 1, 128, 128, 64)
    layer = keras.layers.Conv2D(64, 3, padding="same", activation="relu")
    expected, filters, bias = keras_answer(merge, layer, [x, y])
    assert filters.shape == (3, 3, 64 if merge == "add" else 128, 64)
    assert_agrees(expected, f"{merge}_conv", [x, y], filters, bias, padding="same", activation="relu")


@every_merge
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "valid"},
        {"padding": "same", "stride": 2},
        {"padding": "same", "stride": (3, 1)},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "dilation": (1, 3)},
        {"padding": "same", "groups": 3},
        {"padding": "same", "groups": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("taps", [3, (2, 4), (1, 5)], ids=str)
def test_keras_convolutions(rng, merge, options, taps):
    """'same' with even filters and strides is where frameworks differ: the odd zero goes to the end."""
    x, y = normal(rng, 2, 14, 17, 12), normal(rng, 2, 14, 17, 12)
    layer = keras.layers.Conv2D(
        24,
        taps,
        padding=options["padding"],
        strides=options.get("stride", 1),
        dilation_rate=options.get("dilation", 1),
        groups=options.get("groups", 1),
    )
    expected, filters, bias = keras_answer(merge, layer, [x, y])
    assert_agrees(expected, f"{merge}_conv", [x, y], filters, bias, **options)


@every_merge
def test_keras_upsampling_before_the_merge(rng, merge):
    x, y = normal(rng, 2, 6, 10, 7), normal(rng, 2, 3, 5, 7)
    layer = keras.layers.Conv2D(9, 3, padding="same", activation="relu")
    prologue = (keras.layers.Identity(), keras.layers.UpSampling2D(2))
    expected, filters, bias = keras_answer(merge, layer, [x, y], prologue)
    sources = [x, fo.Source(y, upsample=2)]
    assert_agrees(expected, f"{merge}_conv", sources, filters, bias, padding="same", activation="relu")


KERAS_ACTIVATIONS = {
    "relu": keras.activations.relu,
    "relu6": keras.activations.relu6,
    "leaky_relu": lambda x: keras.activations.leaky_relu(x, negative_slope=0.2),
    "sigmoid": keras.activations.sigmoid,
    "tanh": keras.activations.tanh,
    "silu": keras.activations.silu,
    "hardswish": keras.activations.hard_swish,
    "hardsigmoid": keras.activations.hard_sigmoid,
    "gelu": lambda x: keras.activations.gelu(x, approximate=False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_mean_what_they_mean_in_keras(name):
    x = np.linspace(-12, 12, 4801, dtype=np.float32)
    ours = fo.add([x], activation=("leaky_relu", 0.2) if name == "leaky_relu" else name)
    theirs = np.asarray(KERAS_ACTIVATIONS[name](x))
    assert theirs.dtype == np.float32
    # Either formula takes at most 8 steps, on numbers that do not exceed 1 + |x|.
    assert (np.abs(ours - theirs) <= 16 * 2.0**-24 * (1 + np.abs(x))).all()


# ONNX Runtime: channels first.


def onnx_answer(nodes, constants: dict[str, np.ndarray], **inputs: np.ndarray) -> np.ndarray:
    """The value called "y" of a graph of `nodes`."""
    graph = helper.make_graph(
        nodes,
        "peer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], inputs)[0]


ONNX_MERGES = {
    "add": helper.make_node("Add", ["a", "b"], ["m"]),
    "concat": helper.make_node("Concat", ["a", "b"], ["m"], axis=1),
}


@every_merge
@pytest.mark.parametrize(
    ("attributes", "options"),
    [
        ({"pads": [1, 1, 1, 1]}, {"padding": 1}),
        ({"pads": [2, 0, 1, 3]}, {"padding": ((2, 1), (0, 3))}),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 3]}, {"padding": "same", "stride": (2, 3)}),
        ({"dilations": [2, 1], "group": 2}, {"dilation": (2, 1), "groups": 2}),
        ({"pads": [1, 1, 1, 1], "group": 8}, {"padding": 1, "groups": 8}),
    ],
    ids=["symmetric", "asymmetric", "same_upper", "dilated_groups", "depthwise"],
)
def test_onnx_merge_then_convolution(rng, merge, attributes, options):
    x, y = normal(rng, 2, 8, 9, 11), normal(rng, 2, 8, 9, 11)
    depth = (8 if merge == "add" else 16) // options.get("groups", 1)
    filters, bias = normal(rng, 16, depth, 3, 3), normal(rng, 16)
    nodes = [
        ONNX_MERGES[merge],
        helper.make_node("Conv", ["m", "w", "c"], ["s"], **attributes),
        helper.make_node("Relu", ["s"], ["y"]),
    ]
    expected = onnx_answer(nodes, {"w": filters, "c": bias}, a=x, b=y)
    assert_agrees(expected, f"{merge}_conv", [x, y], filters, bias, layout="NCHW", activation="relu", **options)


@every_merge
def test_onnx_resize_before_the_merge_and_residual_after(rng, merge):
    x, small, residual = normal(rng, 1, 8, 12, 10), normal(rng, 1, 8, 6, 5), normal(rng, 1, 16, 12, 10)
    filters, bias = normal(rng, 16, 8 if merge == "add" else 16, 3, 3), normal(rng, 16)
    nodes = [
        helper.make_node(
            "Resize",
            ["b_small", "", "scales"],
            ["b"],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        ONNX_MERGES[merge],
        helper.make_node("Conv", ["m", "w", "c"], ["s"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["s", "z"], ["t"]),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    scales = np.float32([1, 1, 2, 2])
    expected = onnx_answer(nodes, {"w": filters, "c": bias, "scales": scales}, a=x, b_small=small, z=residual)
    sources = [x, fo.Source(small, upsample=2)]
    assert_agrees(
        expected,
        f"{merge}_conv",
        sources,
        filters,
        bias,
        padding=1,
        residual=residual,
        activation="relu",
        layout="NCHW",
    )


@every_merge
def test_onnx_merge_then_pointwise_convolution(rng, merge):
    x, y = normal(rng, 2, 8, 9, 11), normal(rng, 2, 8, 9, 11)
    filters = normal(rng, 33, 8 if merge == "add" else 16, 1, 1)
    nodes = [ONNX_MERGES[merge], helper.make_node("Conv", ["m", "w"], ["y"])]
    expected = onnx_answer(nodes, {"w": filters}, a=x, b=y)
    assert_agrees(expected, f"{merge}_conv", [x, y], filters, layout="NCHW")


# SciPy: the definition of a correlation, in float64.


@pytest.mark.parametrize("mode", ["valid", "same", "full"])
def test_scipy_correlate(rng, mode):
    x, y = normal(rng, 1, 9, 10, 3, dtype="float64"), normal(rng, 1, 9, 10, 4, dtype="float64")
    filters = normal(rng, 3, 5, 7, 6, dtype="float64")
    merged = np.concatenate([x, y], axis=3)[0]
    planes = [
        sum(correlate(merged[..., c], filters[..., c, k], mode, method="direct") for c in range(7)) for k in range(6)
    ]
    padding = {"valid": 0, "same": (1, 2), "full": (2, 4)}[mode]
    assert_agrees(np.stack(planes, axis=-1)[None], "concat_conv", [x, y], filters, padding=padding)
