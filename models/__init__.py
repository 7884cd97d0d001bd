"""The reference architectures, each in plain torch.nn, by name through ``create_model`` and ``list_models``.

Where torchvision has the network, names and shapes in ``state_dict`` are torchvision's, so its checkpoints
load.
"""

from fastnets.models.checkpoint import CheckpointError, load_weights, read_checkpoint
from fastnets.models.lenet import LeNet5, LeNet5Original, lenet5, lenet5_1998, lenet5_relu
from fastnets.models.mobilenet import MobileNetV2, mobilenet_v2
from fastnets.models.registry import create_model, input_size, list_models, register_model
from fastnets.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "CheckpointError",
    "LeNet5",
    "LeNet5Original",
    "MobileNetV2",
    "ResNet",
    "create_model",
    "input_size",
    "lenet5",
    "lenet5_1998",
    "lenet5_relu",
    "list_models",
    "load_weights",
    "mobilenet_v2",
    "read_checkpoint",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
