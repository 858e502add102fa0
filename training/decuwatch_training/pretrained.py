"""A pretrained ONNX network between the judge's two ends: what turns an image into its input, and a linear head.

    image [N, C, H, W] in [-1, 1] -> channels, size, normalization -> network -> (head) -> logits [N, outputs]

All of it is one graph with a free number of images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, compose, helper, numpy_helper, version_converter
from torch import Tensor
from tqdm import tqdm

from decuwatch_training.configuration import shorten
from decuwatch_training.data import Images
from decuwatch_training.errors import TrainingError
from decuwatch_training.graphs import OPSET

GRAY = (0.299, 0.587, 0.114)
"""ITU-R BT.601, for a network of one channel and images of three."""


@dataclass(frozen=True)
class Normalization:
    """What the network takes: (v - mean) / deviation by channel, for v in [0, 1]; one number is for all channels."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def scale_and_shift(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """a and b [1, C, 1, 1] of a x + b, which does the same to x in [-1, 1]. Raises TrainingError for a misfit."""
        arrays = []
        for name, values in (("mean", self.mean), ("std", self.deviation)):
            if len(values) not in (1, channels):
                raise TrainingError(
                    f"--{name}: {len(values)} numbers, expected 1 or {channels}, the network's channels"
                )
            arrays.append(np.broadcast_to(np.array(values, np.float64), (channels,)).reshape(1, channels, 1, 1))
        mean, deviation = arrays
        if not np.isfinite(mean).all() or not (np.isfinite(deviation).all() and (deviation > 0).all()):
            raise TrainingError(
                f"--mean {list(self.mean)}, --std {list(self.deviation)}: expected numbers, std above 0"
            )
        return (0.5 / deviation).astype(np.float32), ((0.5 - mean) / deviation).astype(np.float32)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of torchvision's networks."""


def read_network(
    path: Path, image: tuple[int, int, int], size: int | None, taken: Normalization | None
) -> onnx.ModelProto:
    """The network at ``path`` with its front: images ``image`` [C, H, W] in [-1, 1] -> its one 2-D output.

    ``size`` is the side of its input if the graph leaves that free; ``taken`` defaults to ImageNet's for three
    channels. The input of the result is ``image``. Raises TrainingError that names what is wrong with the graph.
    """
    model = _load(path)
    source, target = _input_of(model, path), _output_of(model, path)
    channels, height, width = _shape_of(source, path, size)
    if taken is None and channels == 1:
        raise TrainingError(f"{path}: an input of one channel; give --mean and --std of images in [0, 1]")
    scale, shift = (taken or IMAGENET).scale_and_shift(channels)
    for value in (source, target):
        value.type.tensor_type.shape.dim[0].ClearField("dim_value")
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    del model.graph.value_info[:]
    model = compose.add_prefix(_at_opset(model, path), "network/")
    front = _front(image, (channels, height, width), scale, shift)
    merged = _merged(front, model, ("input", f"network/{source.name}"), path)
    session = session_of(merged, path)
    _check_free(session, image, path)
    return merged


def with_head(model: onnx.ModelProto, weight: Tensor, bias: Tensor) -> onnx.ModelProto:
    """The network followed by logits = features weight^T + bias; weight [K, F], bias [K]."""
    features = model.graph.output[0].name
    nodes = [helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"], transB=1, name="head")]
    tensors = [_constant("weight", weight.numpy()), _constant("bias", bias.numpy())]
    inputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", weight.shape[1]])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", weight.shape[0]])]
    head = helper.make_graph(nodes, "head", inputs, outputs, tensors)
    return _merged(model, _model_like(model, head), (features, "features"), Path("the network"))


def with_names(model: onnx.ModelProto, output: str = "logits") -> onnx.ModelProto:
    """The graph with its output named so; its input is ``image`` already."""
    found = model.graph.output[0].name
    if found != output:
        model.graph.node.append(helper.make_node("Identity", [found], [output], name="output"))
        model.graph.output[0].name = output
    model.producer_name, model.producer_version = "decuwatch-train", ""
    return model


def session_of(model: onnx.ModelProto, path: Path) -> Any:
    """The graph on ONNX Runtime's CPU provider. Raises TrainingError with ONNX Runtime's reason."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as err:  # onnxruntime's errors share no public base class
        raise TrainingError(f"{path}: ONNX Runtime cannot run this graph: {_line(err)}") from err


def outputs_of(session: Any, images: Images, batch: int = 64, name: str = "judge") -> Tensor:
    """The graph's output for all images, float32 [n, F]. Raises TrainingError if a value is not finite."""
    parts = [
        torch.from_numpy(session.run(None, {"image": images.scaled(index).numpy()})[0])
        for index in tqdm(torch.arange(len(images)).split(batch), desc=name, unit="batch", mininterval=1.0)
    ]
    result = torch.cat(parts)
    if not bool(torch.isfinite(result).all()):
        raise TrainingError(f"the network gives values that are not finite for images of {images.source}")
    return result


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except FileNotFoundError as err:
        raise TrainingError(f"{err.filename or path}: no such file") from err
    except IsADirectoryError as err:
        raise TrainingError(f"{path}: a directory, expected an ONNX file") from err
    except Exception as err:  # protobuf's and the checker's errors share no public base class
        raise TrainingError(f"{path}: expected an ONNX graph: {_line(err)}") from err
    return model


def _at_opset(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The graph at the opset that all graphs of an ensemble have. Raises TrainingError unless it computes the same."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset == OPSET:
        return model
    try:
        converted = version_converter.convert_version(model, OPSET)
        shape = [dimension.dim_value or 2 for dimension in _input_of(model, path).type.tensor_type.shape.dim]
        before, after = (session_of(each, path) for each in (model, converted))
        feed = {before.get_inputs()[0].name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
        same = np.allclose(before.run(None, feed)[0], after.run(None, feed)[0], rtol=1e-4, atol=1e-5)
    except TrainingError:
        raise
    except Exception as err:  # the converter's and onnxruntime's errors share no public base class
        raise TrainingError(f"{path}: opset {opset} cannot be converted to {OPSET}: {_line(err)}") from err
    if not same:
        raise TrainingError(f"{path}: opset {opset} converted to {OPSET} gives other outputs; export it with {OPSET}")
    return converted


def _input_of(model: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "no input"
        raise TrainingError(f"{path}: {shorten(names)}: expected one input, images [N, C, H, W]")
    kind = inputs[0].type.tensor_type
    if kind.elem_type != TensorProto.FLOAT or len(kind.shape.dim) != 4:
        raise TrainingError(f"{path}: input {shorten(inputs[0].name)}: expected float32 images [N, C, H, W]")
    return inputs[0]


def _output_of(model: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    outputs = list(model.graph.output)
    if len(outputs) != 1:
        names = ", ".join(value.name for value in outputs)
        raise TrainingError(f"{path}: outputs {shorten(names)}: expected one, [N, features] or [N, logits]")
    kind = outputs[0].type.tensor_type
    if kind.elem_type != TensorProto.FLOAT or len(kind.shape.dim) != 2:
        raise TrainingError(f"{path}: output {shorten(outputs[0].name)}: expected float32 of two dimensions")
    return outputs[0]


def _shape_of(source: onnx.ValueInfoProto, path: Path, size: int | None) -> tuple[int, int, int]:
    """[C, H, W] of the network's input; the sides that the graph leaves free are ``size``."""
    channels, *sides = (dimension.dim_value for dimension in source.type.tensor_type.shape.dim[1:])
    if channels not in (1, 3):
        raise TrainingError(f"{path}: an input of {channels or 'any number of'} channels, expected 1 or 3")
    for side in sides:
        if not side and size is None:
            raise TrainingError(f"{path}: the graph leaves the size of its input free; give --input-size")
        if side and size not in (None, side):
            raise TrainingError(f"--input-size {size}: the input of {path} has sides {sides[0]} and {sides[1]}")
    height, width = (side or size or 0 for side in sides)
    return channels, height, width


def _front(
    image: tuple[int, int, int], wanted: tuple[int, int, int], scale: np.ndarray, shift: np.ndarray
) -> onnx.GraphProto:
    """image -> input: channels, then size (averaged first if it is halved or more, then bilinear), then scale."""
    nodes: list[onnx.NodeProto] = []
    tensors = [_constant("scale", scale), _constant("shift", shift)]
    last = "image"

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nonlocal last
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        last = output

    channels, height, width = image
    if channels < wanted[0]:
        add("Concat", [last] * wanted[0], "repeated", axis=1)
    elif channels > wanted[0]:
        tensors.append(_constant("gray weights", np.array(GRAY, np.float32).reshape(1, 3, 1, 1)))
        add("Conv", [last, "gray weights"], "gray")
    shrink = (max(1, height // wanted[1]), max(1, width // wanted[2]))
    if shrink != (1, 1):
        add("AveragePool", [last], "averaged", kernel_shape=shrink, strides=shrink)
        height, width = height // shrink[0], width // shrink[1]
    if (height, width) != wanted[1:]:
        tensors += [
            _constant("first", np.array([0], np.int64)),
            _constant("last", np.array([2], np.int64)),
            _constant("size", np.array(wanted[1:], np.int64)),
        ]
        before = last
        add("Shape", [before], "shape")
        add("Slice", ["shape", "first", "last"], "images and channels")
        add("Concat", ["images and channels", "size"], "sizes", axis=0)
        add(
            "Resize",
            [before, "", "", "sizes"],
            "resized",
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    add("Mul", [last, "scale"], "scaled")
    add("Add", [last, "shift"], "input")
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *image])]
    outputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *wanted])]
    return helper.make_graph(nodes, "front", inputs, outputs, tensors)


def _constant(name: str, values: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def _model_like(model: onnx.ModelProto, graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def _merged(
    first: onnx.GraphProto | onnx.ModelProto, second: onnx.ModelProto, joint: tuple[str, str], path: Path
) -> onnx.ModelProto:
    """Both graphs as one; ``joint`` has the name of first's output and of second's input."""
    if isinstance(first, onnx.GraphProto):
        first = _model_like(second, first)
    try:
        merged = compose.merge_models(first, second, io_map=[joint])
        versions = {entry.domain: entry.version for entry in merged.opset_import}
        del merged.opset_import[:]  # a converted graph's domain comes twice
        merged.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())
        return merged
    except Exception as err:  # onnx's checker
        raise TrainingError(f"{path}: cannot be joined with the judge's ends: {_line(err)}") from err


def _check_free(session: Any, image: tuple[int, int, int], path: Path) -> None:
    """Raise TrainingError unless two images give what each gives alone: exports often fix the number of images."""
    pair = np.random.default_rng(0).uniform(-1, 1, (2, *image)).astype(np.float32)
    try:
        both = session.run(None, {"image": pair})[0]
        alone = np.concatenate([session.run(None, {"image": pair[index : index + 1]})[0] for index in range(2)])
    except Exception as err:  # onnxruntime's errors share no public base class
        raise TrainingError(f"{path}: cannot run on one image and on two: {_line(err)}") from err
    if both.ndim != 2 or both.shape != alone.shape or not np.allclose(both, alone, rtol=1e-3, atol=1e-4):
        raise TrainingError(
            f"{path}: two images give other outputs than each alone; export it with a free number of images"
        )


def _line(err: BaseException) -> str:
    """The reason in one line; tools' errors have many."""
    return " ".join(str(err).split())[:300]
