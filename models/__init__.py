"""The reference architectures, each in plain torch.nn, by name through ``create_model`` and ``list_models``.

Where torchvision has the network, names and shapes in ``state_dict`` are torchvision's, so its checkpoints
load.
"""

from fastnets.models.alexnet import AlexNet, AlexNet2012, alexnet, alexnet_2012
from fastnets.models.checkpoint import CheckpointError, KeyStyle, load_weights, read_checkpoint
from fastnets.models.dynamic_depth import StochasticDepth, blocks_to_skip
from fastnets.models.lenet import LeNet5, LeNet5Original, lenet5, lenet5_1998, lenet5_relu
from fastnets.models.mobilenet import MobileNetV2, mobilenet_v2
from fastnets.models.nin import NetworkInNetwork, nin, nin_teaching
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
from fastnets.models.vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from fastnets.models.vision_transformer import (
    VisionTransformer,
    dinov2_s_14,
    vit_b_16,
    vit_b_32,
    vit_h_14,
    vit_l_16,
    vit_s_16,
    vit_ti_16,
)

__all__ = [
    "VGG",
    "AlexNet",
    "AlexNet2012",
    "CheckpointError",
    "KeyStyle",
    "LeNet5",
    "LeNet5Original",
    "MobileNetV2",
    "NetworkInNetwork",
    "ResNet",
    "StochasticDepth",
    "VisionTransformer",
    "alexnet",
    "alexnet_2012",
    "blocks_to_skip",
    "create_model",
    "dinov2_s_14",
    "input_size",
    "lenet5",
    "lenet5_1998",
    "lenet5_relu",
    "list_models",
    "load_weights",
    "mobilenet_v2",
    "nin",
    "nin_teaching",
    "read_checkpoint",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
    "vit_b_32",
    "vit_h_14",
    "vit_l_16",
    "vit_s_16",
    "vit_ti_16",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
