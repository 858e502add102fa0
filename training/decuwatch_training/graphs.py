"""The backbone as ONNX graphs with a free row count, and ONNX Runtime as a denoiser beside PyTorch's."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import onnx
import onnxruntime
import onnxslim
import torch
from onnx.external_data_helper import convert_model_to_external_data
from torch import Tensor, nn

from decuwatch_training.backbone import Backbone
from decuwatch_training.errors import TrainingError

OPSET = 17
SINGLE_FILE_LIMIT = 2_000_000_000
"""Protobuf holds at most 2 GB; larger graphs keep their weights in a file beside them."""
UNET_NAMES = {"latent": "latent", "timestep": "timestep", "context": "context", "output": "prediction"}
DECODER_NAMES = {"latent": "latent", "output": "image"}


class _Float32Outside(nn.Module):
    """A half-precision network whose inputs and outputs are float32; the timestep is not halved."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        halved = [tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor for tensor in inputs]
        return cast(Tensor, self.network(*halved)).float()


def export_unet(backbone: Backbone, tokens: int, path: Path, precision: str) -> list[Path]:
    """Write latent [N,C,H,W], timestep [N], context [N,T,D] -> prediction [N,C,H,W]. Returns the files.

    The timestep is int64, or float32 of a flow.
    """
    last = backbone.schedule.train_timesteps - 1
    inputs = (
        torch.randn(2, *backbone.latent_shape),
        backbone.schedule.times(torch.tensor([min(981, last), min(1, last)])),
        torch.randn(2, tokens, backbone.context_dim),
    )
    return _export(backbone.denoiser, inputs, ["latent", "timestep", "context"], "prediction", path, precision)


def export_conditioned(network: nn.Module, backbone: Backbone, pooled: int, path: Path) -> list[Path]:
    """Write ``export_unet``'s graph with a pooled vector [N,pooled] and a guidance [N] as further inputs."""
    inputs = (
        torch.randn(2, *backbone.latent_shape),
        torch.tensor([981, 1]),
        torch.randn(2, 1, backbone.context_dim),
        torch.randn(2, pooled),
        torch.rand(2),
    )
    names = ["latent", "timestep", "context", "pooled_projections", "guidance"]
    return _export(network, inputs, names, "prediction", path, "fp32")


def export_decoder(backbone: Backbone, path: Path, precision: str) -> list[Path]:
    """Write latent [N,C,H,W], unscaled, -> image [N,C',H',W']; returns the files written."""
    return _export(
        backbone.autoencoder, (torch.randn(2, *backbone.latent_shape),), ["latent"], "image", path, precision
    )


def export_classifier(network: nn.Module, shape: tuple[int, int, int], path: Path) -> list[Path]:
    """Write a judge: image [N,C,H,W] -> logits [N,outputs]; returns the files written."""
    return _export(network, (torch.randn(2, *shape),), ["image"], "logits", path, "fp32")


def _export(
    network: nn.Module, inputs: tuple[Tensor, ...], names: list[str], output: str, path: Path, precision: str
) -> list[Path]:
    device = next(network.parameters()).device
    exported: nn.Module = network.eval()
    if precision == "fp16":
        exported = _Float32Outside(network.half())  # traced where it is: a CPU takes minutes for a large one
        inputs = tuple(tensor.to(device) for tensor in inputs)
    else:
        network.cpu()
    raw = path.with_suffix(".raw")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # The TorchScript exporter: its graph for these networks is plainer than the newer one's, and N is free in
            # every node.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                exported,
                inputs,
                str(raw),
                input_names=names,
                output_names=[output],
                opset_version=OPSET,
                dynamo=False,
                do_constant_folding=True,
                dynamic_axes={name: {0: "N"} for name in [*names, output]},
            )
        model = onnx.load(str(raw))
    finally:
        if precision == "fp16":
            network.float()
        network.to(device)
        for left in raw.parent.glob(f"{raw.name}*"):
            left.unlink()
    if model.ByteSize() <= SINGLE_FILE_LIMIT:
        model = cast(
            onnx.ModelProto, onnxslim.slim(model)
        )  # folds the shape arithmetic, which halves the number of nodes
    model.producer_name, model.producer_version = "decuwatch-train", ""
    model.graph.ClearField("value_info")
    if model.ByteSize() <= SINGLE_FILE_LIMIT:
        onnx.save(model, str(path))
        return [path]
    beside = path.with_suffix(".onnx.data")
    convert_model_to_external_data(model, all_tensors_to_one_file=True, location=beside.name, size_threshold=1024)
    onnx.save(model, str(path))
    return [path, beside]


class Graph:
    """An exported graph on ONNX Runtime's CPU provider."""

    def __init__(self, path: Path, names: Mapping[str, str], threads: int | None = None) -> None:
        """Open the graph. ``names`` has its inputs in the order of the call, and its ``output``.

        Raises TrainingError if ONNX Runtime refuses the file, or if the graph's inputs and output have other names.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as err:  # onnxruntime's errors share no public base class
            raise TrainingError(f"{path}: ONNX Runtime cannot read this graph: {err}") from err
        order = UNET_NAMES if "context" in names else names  # a manifest may have them in another order
        self.inputs = [names[role] for role in order if role != "output"]
        self.output = names["output"]
        found = {value.name for value in self.session.get_inputs()}
        if found != set(self.inputs):
            raise TrainingError(f"{path}: inputs {sorted(found)}, the manifest's graph names {sorted(self.inputs)}")
        outputs = [value.name for value in self.session.get_outputs()]
        if self.output not in outputs:
            raise TrainingError(f"{path}: outputs {sorted(outputs)}, the manifest's graph names {self.output!r}")

    def __call__(self, *inputs: Tensor) -> Tensor:
        feeds = {name: tensor.contiguous().numpy() for name, tensor in zip(self.inputs, inputs, strict=True)}
        return torch.from_numpy(self.session.run([self.output], feeds)[0])
