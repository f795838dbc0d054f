"""Named problems of real networks: the merge, its maps and what follows it, with the work each was taken from.

Shapes only; builds no arrays and runs nothing. A name is a stable id: it joins the results of different days.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusionops.spec import Merge

ADD, CONCAT = Merge.ADD, Merge.CONCAT


@dataclass(frozen=True, slots=True)
class Map:
    """One source: C channels of H × W pixels, before upsampling.

    border   pixels around the map in the array it is cropped from; 0 is an array of its own
    """

    C: int
    H: int = 1
    W: int = 1
    upsample: int = 1
    border: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """One merge of a network and the contraction after it.

    merge       as the network merges
    K           filters; None for a merge that is not contracted
    kernel      (R, S); None for a dense layer over the channels
    weights     whether the sources carry weights, normalised as relu(w) / (Σ relu(w) + 1e-4)
    residual    the map added to the result before the activation
    network     the network and layer, with its source
    """

    name: str
    merge: Merge
    maps: tuple[Map, ...]
    K: int | None = None
    kernel: tuple[int, int] | None = (3, 3)
    network: str = ""
    N: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: str | int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] = "same"
    activation: str | None = None
    weights: bool = False
    residual: Map | None = None
    dtype: str = "float32"
    layout: str = "NHWC"

    @property
    def is_dense(self) -> bool:
        return self.K is not None and self.kernel is None

    @property
    def channel_axis(self) -> int:
        return 1 if self.layout == "NCHW" and not self.is_dense else -1

    @property
    def filter_axis(self) -> int:
        """Axis of the filters that runs along the merged channels."""
        return 0 if self.is_dense else 1 if self.layout == "NCHW" else 2

    def filter_shape(self, merge: Merge) -> tuple[int, ...]:
        """In the layout of the maps; () where nothing is contracted."""
        C = self.maps[0].C if merge is ADD else sum(m.C for m in self.maps)
        if self.K is None:
            return ()
        if self.kernel is None:
            return C, self.K
        return (self.K, C, *self.kernel) if self.layout == "NCHW" else (*self.kernel, C, self.K)

    def filter_block(self, merge: Merge) -> tuple[slice, ...]:
        """Where the filters of a merge lie in those of the CONCAT: an ADD takes the first block."""
        return tuple(slice(extent) for extent in self.filter_shape(merge))

    @property
    def merges(self) -> tuple[Merge, ...]:
        """The merges that these maps can be compared with; one where channels differ or only one has a meaning."""
        either = len(self.maps) > 1 and len({m.C for m in self.maps}) == 1 and not self.weights
        if self.K is None:
            either = either and all(m.upsample == 1 for m in self.maps)
        return (ADD, CONCAT) if either else (self.merge,)

    @property
    def ways_differ(self) -> bool:
        """Whether the materialised way stores any map that the fused way does not."""
        stored = any(m.upsample > 1 for m in self.maps) and len(self.maps) > 1
        return stored or self.residual is not None or (self.K is not None and len(self.maps) > 1)


def _pair(C: int, side: int, *, border: int = 0) -> tuple[Map, Map]:
    """An upsampled map and the skip connection of its size, cropped from a larger one where `border` says so."""
    return Map(C, side, side), Map(C, side, side, border=border)


def _unet(pixels: int, level: int, *, upsampled: bool = False) -> Workload:
    """Level 1 is the full resolution, with 64 channels; each level below halves the side and doubles the channels."""
    C, side = 64 << (level - 1), pixels >> (level - 1)
    maps = (Map(C, side // 2, side // 2, upsample=2), Map(C, side, side)) if upsampled else _pair(C, side)
    name = f"unet{pixels}_l{level}" + "_up" * upsampled
    network = f"{UNET}, level {level}, same padding, {pixels} px"
    return Workload(name, CONCAT, maps, C, network=network, activation="relu")


def _unet_valid(level: int, side: int, skip: int) -> Workload:
    C = 64 << (level - 1)
    return Workload(
        f"unet_valid_l{level}",
        CONCAT,
        _pair(C, side, border=(skip - side) // 2),
        C,
        network=f"{UNET}, figure 1, level {level}: skip of {skip} px cropped to {side} px",
        padding="valid",
        activation="relu",
    )


def _resnet(level: int, C: int, side: int) -> Workload:
    residual = Map(4 * C, side, side)
    network = f"ResNet-50, last 1×1 of conv{level}_x + shortcut; {TORCHVISION}/resnet.py"
    return Workload(
        f"resnet_l{level}", ADD, (Map(C, side, side),), 4 * C, (1, 1), network, activation="relu", residual=residual
    )


def _densenet(block: int, layer: int, start: int, side: int) -> Workload:
    maps = (Map(start, side, side),) + (Map(32, side, side),) * (layer - 1)
    network = f"DenseNet-121, block {block}, layer {layer}, 1×1; {TORCHVISION}/densenet.py"
    return Workload(f"densenet_b{block}_l{layer}", CONCAT, maps, 128, (1, 1), network, activation="relu")


def _fpn_out(level: int, H: int, W: int) -> Workload:
    network = f"FPN on ResNet-50, 800×1344, P{level}: top-down sum and its 3×3; {FPN}"
    maps = (Map(256, H // 2, W // 2, upsample=2), Map(256, H, W))
    return Workload(f"fpn_p{level}_out", ADD, maps, 256, network=network)


def _fpn_lateral(level: int, C: int, H: int, W: int) -> Workload:
    network = f"FPN on ResNet-50, 800×1344, C{level}: lateral 1×1 + upsampled map from above; {FPN}"
    above = Map(256, H // 2, W // 2, upsample=2)
    return Workload(f"fpn_lateral_p{level}", ADD, (Map(C, H, W),), 256, (1, 1), network, residual=above)


def _fpn_sum(level: int, H: int, W: int) -> Workload:
    network = f"FPN on ResNet-50, 800×1344, P{level}: the top-down sum alone; {FPN}"
    maps = (Map(256, H // 2, W // 2, upsample=2), Map(256, H, W))
    return Workload(f"fpn_upadd_p{level}", ADD, maps, network=network)


def _yolo(version: str, node: str, first: Map, second: Map, K: int, config: str) -> Workload:
    network = f"YOLOv{version}s neck, 640 px, {node}: 1×1 after the concat; {config}"
    name = f"yolov{version}s_{node}"
    return Workload(name, CONCAT, (first, second), K, (1, 1), network, activation="silu")


def _rcf(stage: int, C: int, count: int, H: int, W: int) -> Workload:
    network = f"RCF, stage {stage}: Σ of 1×1 → 21, which is a concat into one 1×1; {RCF}"
    return Workload(f"rcf_s{stage}", CONCAT, (Map(C, H, W),) * count, 21, (1, 1), network)


def _lstm(units: int, N: int, setting: str) -> Workload:
    network = f"LSTM gates, [x, h] · W; Hochreiter and Schmidhuber, 1997; {setting}"
    return Workload(f"lstm_{units}", CONCAT, (Map(units), Map(units)), 4 * units, None, network, N=N)


KERAS = "Keras, keras.io/api/layers/merging_layers, then"
UNET = "U-Net, Ronneberger et al., arXiv 1505.04597"
FPN = "pytorch/vision ops/feature_pyramid_network.py"
TORCHVISION = "pytorch/vision models"
YOLOV8 = "ultralytics cfg/models/v8/yolov8.yaml"
YOLOV5 = "ultralytics models/yolov5s.yaml"
RCF = "yun-liu/RCF-PyTorch models.py"
HED = "HED, fusion of five side outputs; s9xie/hed examples/hed/train_val.prototxt"
BIFPN = "google/automl efficientdet/efficientdet_arch.py"
HRNET = "HRNet-Image-Classification cls_hrnet.py, W32"

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("keras_dense", CONCAT, (Map(32), Map(32)), 64, None, f"{KERAS} Dense(64)", N=256, activation="relu"),
        Workload("keras_conv", CONCAT, _pair(64, 128), 64, network=f"{KERAS} Conv2D(64, 3)", activation="relu"),
        *(_unet(256, level) for level in (4, 3, 2, 1)),
        *(_unet(256, level, upsampled=True) for level in (2, 1)),
        *(_unet(512, level) for level in (4, 3, 2, 1)),
        _unet_valid(4, 56, 64),
        _unet_valid(3, 104, 136),
        _unet_valid(2, 200, 280),
        _unet_valid(1, 392, 568),
        _fpn_out(4, 50, 84),
        _fpn_out(3, 100, 168),
        _fpn_out(2, 200, 336),
        _fpn_lateral(4, 1024, 50, 84),
        _fpn_lateral(3, 512, 100, 168),
        _fpn_lateral(2, 256, 200, 336),
        _fpn_sum(4, 50, 84),
        _fpn_sum(3, 100, 168),
        _fpn_sum(2, 200, 336),
        _resnet(2, 64, 56),
        _resnet(3, 128, 28),
        _resnet(4, 256, 14),
        _resnet(5, 512, 7),
        _densenet(1, 6, 64, 56),
        _densenet(2, 7, 128, 28),
        _densenet(2, 12, 128, 28),
        _densenet(3, 24, 256, 14),
        _densenet(4, 16, 512, 7),
        _yolo("8", "p4_td", Map(512, 20, 20, upsample=2), Map(256, 40, 40), 256, YOLOV8),
        _yolo("8", "p3_td", Map(256, 40, 40, upsample=2), Map(128, 80, 80), 128, YOLOV8),
        _yolo("8", "p4_bu", Map(128, 40, 40), Map(256, 40, 40), 256, YOLOV8),
        _yolo("8", "p5_bu", Map(256, 20, 20), Map(512, 20, 20), 512, YOLOV8),
        _yolo("5", "p4_td", Map(256, 20, 20, upsample=2), Map(256, 40, 40), 128, YOLOV5),
        _yolo("5", "p3_td", Map(128, 40, 40, upsample=2), Map(128, 80, 80), 64, YOLOV5),
        _rcf(1, 64, 2, 480, 320),
        _rcf(2, 128, 2, 240, 160),
        _rcf(3, 256, 3, 120, 80),
        _rcf(4, 512, 3, 60, 40),
        _rcf(5, 512, 3, 59, 39),
        Workload("hed_fuse", CONCAT, (Map(1, 480, 320),) * 5, 1, (1, 1), HED, activation="sigmoid"),
        _lstm(256, 1, "one step, batch 1"),
        _lstm(650, 20, "medium model of Zaremba et al., arXiv 1409.2329"),
        _lstm(1024, 64, "batch 64"),
        Workload(
            "bifpn_p3",
            ADD,
            (Map(64, 32, 32, upsample=2), Map(64, 64, 64)),
            network=f"EfficientDet-D0, P3 of a BiFPN, before its separable convolution; {BIFPN}",
            activation="silu",
            weights=True,
        ),
        Workload(
            "bifpn_p4_bu",
            ADD,
            (Map(64, 32, 32),) * 3,
            network=f"EfficientDet-D0, P4 of a BiFPN on the way up: three maps; {BIFPN}",
            activation="silu",
            weights=True,
        ),
        Workload(
            "hrnet_w32_fuse",
            ADD,
            (Map(32, 56, 56), Map(32, 28, 28, upsample=2), Map(32, 14, 14, upsample=4), Map(32, 7, 7, upsample=8)),
            network=f"HRNet, fusion of four branches at the highest resolution; {HRNET}",
            activation="relu",
        ),
        Workload("stream_4mb", ADD, _pair(64, 128), network="the maps of keras_conv, merged and stored"),
        Workload("stream_64mb", ADD, _pair(64, 512), network="maps larger than a last-level cache"),
    )
}
