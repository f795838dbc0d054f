"""Runs the fusions inside a trained text detector on a photograph, with fusionops and with onnxruntime.

The PP-OCRv4 detector has a feature pyramid as its neck: four sums (in three of them one term is upsampled) each go
through a 3×3 convolution, and the four results, three of them upsampled, are concatenated for a last 3×3 convolution.
onnxruntime runs the whole network and hands out the maps that really arrive there. fusionops computes each of the five
sites from those, with the trained weights, in one call that stores neither an upsampled nor a concatenated map.

    pip install ".[test]" && python examples/text_detector.py

Prints a row per site and photograph; exits with 1 where a relative L2 difference exceeds `BOUND`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution

import numpy as np
import onnx
import onnxruntime
import skimage.data
import skimage.measure
import skimage.transform
from numpy.typing import NDArray

import fusionops as fo

Map = NDArray[np.float32]

BOUND = 1e-5  # relative L2 difference of two float32 results whose sums run in different orders, with room to spare
SHORT_SIDE = 736  # pixels; the detector was trained on, and its own program resizes to, images of at least this size
STRIDE = 32  # pixels; five halvings lie between the image and the coarsest map
TEXT = 0.3  # probability from which the detector's own program counts a pixel as text
PHOTOGRAPHS = ("page", "text")


# The graph


@dataclass(frozen=True)
class Site:
    """A merge and the convolution that reads it, with the batch normalisation and ReLU behind that folded in.

    sources   names of the tensors before any upsampling, and the factor each is upsampled by
    merged    name of the merged tensor, and whether anything but the convolution reads it
    output    name of the last tensor the fused call replaces
    """

    merge: str
    sources: tuple[tuple[str, int], ...]
    merged: str
    merged_is_read_again: bool
    output: str
    filters: Map
    bias: Map | None
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    activation: str | None


class Graph:
    """An ONNX graph with the three look-ups that following a tensor takes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = onnx.numpy_helper.to_array(attributes(node)["value"])

    def only_reader(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node that reads a tensor, if it is the only one and of the given type."""
        match self.readers[name]:
            case [node] if node.op_type == op_type:
                return node
        return None

    def sites(self) -> list[Site]:
        """Every add or channel concat of computed maps that a 3×3 convolution reads, in graph order."""
        return [
            self._site(merge, conv)
            for merge in self.nodes
            if merge.op_type == "Add" or (merge.op_type == "Concat" and attributes(merge)["axis"] == 1)
            if not any(name in self.constants for name in merge.input)
            for conv in self.readers[merge.output[0]]
            if conv.op_type == "Conv" and self.constants[conv.input[1]].shape[2:] == (3, 3)
        ]

    def _site(self, merge: onnx.NodeProto, conv: onnx.NodeProto) -> Site:
        options = attributes(conv)
        filters = self.constants[conv.input[1]]
        bias = self.constants[conv.input[2]] if len(conv.input) > 2 else None
        output, activation = conv.output[0], None
        if norm := self.only_reader(output, "BatchNormalization"):
            filters, bias = fold(filters, bias, self._normalisation(norm), attributes(norm).get("epsilon", 1e-5))
            output = norm.output[0]
        if relu := self.only_reader(output, "Relu"):
            output, activation = relu.output[0], "relu"
        top, left, bottom, right = options["pads"]
        return Site(
            merge=merge.op_type.lower(),
            sources=tuple(map(self._source, merge.input)),
            merged=merge.output[0],
            merged_is_read_again=len(self.readers[merge.output[0]]) > 1,
            output=output,
            filters=filters,
            bias=bias,
            stride=tuple(options["strides"]),
            padding=((top, bottom), (left, right)),
            activation=activation,
        )

    def _normalisation(self, norm: onnx.NodeProto) -> list[NDArray[np.float64]]:
        return [self.constants[name].astype(np.float64) for name in norm.input[1:5]]

    def _source(self, name: str) -> tuple[str, int]:
        """The tensor a merge input is made from, and the factor between them."""
        resize = self.producer[name]
        if resize.op_type != "Resize":
            return name, 1
        options = attributes(resize)
        rule = options["mode"], options["coordinate_transformation_mode"], options["nearest_mode"]
        n, c, h, w = self.constants[resize.input[2]].tolist()
        if rule != (b"nearest", b"asymmetric", b"floor") or (n, c) != (1, 1) or h != w or h != int(h):
            raise ValueError(f"{resize.name} is {rule} by {(n, c, h, w)}, not nearest-neighbour by a whole factor")
        return resize.input[0], int(h)


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def fold(
    filters: Map, bias: Map | None, normalisation: Sequence[NDArray[np.float64]], epsilon: float
) -> tuple[Map, Map]:
    """Filters and bias of γ·(conv(x, filters) + bias − mean)/√(variance + ε) + β; computed in float64, rounded once."""
    gamma, beta, mean, variance = normalisation
    scale = gamma / np.sqrt(variance + epsilon)
    shift = beta + ((0.0 if bias is None else bias) - mean) * scale
    return (filters * scale[:, None, None, None]).astype(np.float32), shift.astype(np.float32)


# The photograph


def detector() -> onnx.ModelProto:
    """The trained detector, read from the installed wheel without importing it: that would load OpenCV for nothing."""
    wheel = distribution("rapidocr-onnxruntime")
    model = onnx.load(str(wheel.locate_file("rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx")))
    return onnx.shape_inference.infer_shapes(model)  # cutting parts out of it takes the types of the tensors


def photograph(name: str) -> Map:
    """A photograph of scikit-image as the detector wants it: (1, 3, H, W) in [−1, 1], extents multiples of `STRIDE`."""
    grey = getattr(skimage.data, name)()
    scale = max(1.0, SHORT_SIDE / min(grey.shape))
    extents = [round(int(size * scale) / STRIDE) * STRIDE for size in grey.shape]
    image = skimage.transform.resize(grey, extents, order=1)  # bilinear, and to [0, 1]
    return np.repeat((2 * image - 1).astype(np.float32)[None, None], 3, axis=1)


def run_network(model: onnx.ModelProto, image: Map, sites: Sequence[Site]) -> tuple[Map, dict[str, Map]]:
    """The network's own output, and every tensor that enters or leaves a site, by name."""
    names = sorted({name for s in sites for name in (*(source for source, _ in s.sources), s.merged, s.output)})
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(opened.SerializeToString())
    probability, *tensors = session.run([model.graph.output[0].name, *names], {model.graph.input[0].name: image})
    return probability, dict(zip(names, tensors, strict=True))


# The two ways to run a site


def fused(site: Site, tensors: Mapping[str, Map]) -> Callable[[], tuple[Map, ...]]:
    """The site as one call of fusionops; yields the output, and the sum where the network reads it again."""
    sources = [fo.Source(tensors[name], upsample=factor) for name, factor in site.sources]
    filters = fo.prepack(site.filters, layout="NCHW")
    options = {
        "stride": site.stride, "padding": site.padding, "activation": site.activation, "layout": "NCHW",
    }  # fmt: skip
    if site.merge == "concat":
        return lambda: (fo.concat_conv(sources, filters, site.bias, **options),)
    if not site.merged_is_read_again:
        return lambda: (fo.add_conv(sources, filters, site.bias, **options),)
    return lambda: fo.add_conv(sources, filters, site.bias, return_sum=True, **options)


def materialised(model: onnx.ModelProto, site: Site, tensors: Mapping[str, Map]) -> Callable[[], list[Map]]:
    """The site as a graph of its own in onnxruntime: Resize, Add or Concat, Conv, and what follows it."""
    inputs = {name: tensors[name] for name, _ in site.sources}
    part = onnx.utils.Extractor(model).extract_model(list(inputs), outputs_of(site))
    session = onnxruntime.InferenceSession(part.SerializeToString())
    return lambda: session.run(outputs_of(site), inputs)


def outputs_of(site: Site) -> list[str]:
    return [site.output, site.merged] if site.merged_is_read_again else [site.output]


def bytes_not_stored(site: Site, tensors: Mapping[str, Map]) -> int:
    """Size of what only the materialised way stores: upsampled sources, and a merged map that nobody else reads."""
    upsampled = sum(tensors[name].nbytes * factor**2 for name, factor in site.sources if factor > 1)
    return upsampled + (0 if site.merged_is_read_again else tensors[site.merged].nbytes)


# The comparison


def relative_l2(actual: Map, expected: Map) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(actual - wide) / np.linalg.norm(wide))


def median_seconds(arms: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each arm, seconds, in interleaved rounds; pauses let the other arm's threads stop spinning."""
    times: list[list[float]] = [[] for _ in arms]
    for _ in range(rounds):
        for arm, seconds in zip(arms, times, strict=True):
            time.sleep(0.02)
            arm()
            for _ in range(3):
                start = time.perf_counter()
                arm()
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


ROW = "{:<22} {:>8} {:>10} {:>11} {:>10}   {}"


def compare(model: onnx.ModelProto, sites: Sequence[Site], name: str, rounds: int) -> float:
    """Prints the table of one photograph and returns its largest relative L2 difference."""
    image = photograph(name)
    probability, tensors = run_network(model, image, sites)
    regions = skimage.measure.label(probability[0, 0] > TEXT).max()
    print(f"\n{name}.png as {image.shape}: the detector finds {regions} regions of text")
    print(ROW.format("site", "rel. L2", "fusionops", "onnxruntime", "not stored", "sources, C@H×W and upsampling → K"))
    worst = 0.0
    for site in sites:
        ours, theirs = fused(site, tensors), materialised(model, site, tensors)
        difference = max(
            relative_l2(actual, tensors[tensor]) for tensor, actual in zip(outputs_of(site), ours(), strict=True)
        )
        ours_s, theirs_s = median_seconds([ours, theirs], rounds)
        print(ROW.format(
            site.merge + "_conv" + (", return_sum" if site.merged_is_read_again else ""),
            f"{difference:.1e}",
            f"{ours_s * 1e3:.2f} ms",
            f"{theirs_s * 1e3:.2f} ms",
            f"{bytes_not_stored(site, tensors) / 2**20:.1f} MiB",
            shapes(site, tensors),
        ))  # fmt: skip
        worst = max(worst, difference)
    return worst


def shapes(site: Site, tensors: Mapping[str, Map]) -> str:
    sources = ((tensors[name].shape, factor) for name, factor in site.sources)
    joint = " + " if site.merge == "add" else " | "
    text = joint.join(f"{c}@{h}×{w}" + (f" ×{factor}" if factor > 1 else "") for (_, c, h, w), factor in sources)
    return f"{text} → {len(site.filters)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The fusions of a text detector, by fusionops and by onnxruntime.")
    parser.add_argument("photographs", nargs="*", metavar="page|text", help="scikit-image photographs (default: both)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of three timed calls (default: 5)")
    options = parser.parse_args(arguments)
    if unknown := set(options.photographs) - set(PHOTOGRAPHS):
        parser.error(f"no photograph is called {', '.join(sorted(unknown))}; choose from {', '.join(PHOTOGRAPHS)}")
    model = detector()
    sites = Graph(model).sites()
    worst = max(compare(model, sites, name, options.rounds) for name in options.photographs or PHOTOGRAPHS)
    print(f"\nlargest relative L2 difference {worst:.1e}, bound {BOUND:.0e}")
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
