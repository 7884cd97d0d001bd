"""The reference architectures, each in plain torch.nn, by name through ``create_model`` and ``list_models``.

Where torchvision has the network, names and shapes in ``state_dict`` are torchvision's, so its checkpoints
load; where only timm has it, timm's.
"""

from fastnets.models.alexnet import AlexNet, AlexNet2012, alexnet, alexnet_2012
from fastnets.models.bert import BertEncoder, minilm_l6
from fastnets.models.checkpoint import CheckpointError, KeyStyle, load_weights, read_checkpoint
from fastnets.models.convnext import (
    ConvNeXt,
    ConvNeXtTimm,
    convnext_base,
    convnext_large,
    convnext_small,
    convnext_tiny,
    convnext_xlarge,
)
from fastnets.models.densenet import DenseNet, densenet121, densenet161, densenet169, densenet201
from fastnets.models.dynamic_depth import StochasticDepth, blocks_to_skip
from fastnets.models.efficientnet import (
    EfficientNet,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
    efficientnet_v2_s,
)
from fastnets.models.efficientnet_lite import EfficientNetLite, efficientnet_lite0
from fastnets.models.eva import Eva02, eva02_b_14
from fastnets.models.feature_pyramid import ResNetFPN, resnet18_fpn, resnet50_fpn, resnet101_fpn
from fastnets.models.googlenet import GoogLeNet, GoogLeNetOutputs, googlenet, googlenet_2014
from fastnets.models.inception import InceptionOutputs, InceptionV3, inception_v3
from fastnets.models.lenet import LeNet5, LeNet5Original, lenet5, lenet5_1998, lenet5_relu
from fastnets.models.llama import KeyValueCache, LlamaDecoder, llama_small
from fastnets.models.mnasnet import MNASNet, mnasnet0_5, mnasnet1_0
from fastnets.models.mobilenet import MobileNetV2, mobilenet_v2
from fastnets.models.mobilenet_v1 import MobileNetV1, mobilenet_v1
from fastnets.models.mobilenet_v3 import MobileNetV3, mobilenet_v3_large, mobilenet_v3_small
from fastnets.models.nin import NetworkInNetwork, nin, nin_teaching
from fastnets.models.registry import create_model, example_inputs, input_size, list_models, register_model
from fastnets.models.regnet import RegNet, regnet_x_400mf, regnet_y_400mf
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
from fastnets.models.shufflenet import ShuffleNetV2, shufflenet_v2_x0_5, shufflenet_v2_x1_0
from fastnets.models.squeezenet import SqueezeNet, squeezenet1_0, squeezenet1_1
from fastnets.models.swin import SwinTransformer, swin_t
from fastnets.models.transformer import (
    TimeSeriesTransformer,
    Transformer,
    time_series_transformer,
    transformer,
    transformer_encoder,
    transformer_encoder_prenorm,
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
    "BertEncoder",
    "CheckpointError",
    "ConvNeXt",
    "ConvNeXtTimm",
    "DenseNet",
    "EfficientNet",
    "EfficientNetLite",
    "Eva02",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "InceptionOutputs",
    "InceptionV3",
    "KeyStyle",
    "KeyValueCache",
    "LeNet5",
    "LeNet5Original",
    "LlamaDecoder",
    "MNASNet",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3",
    "NetworkInNetwork",
    "RegNet",
    "ResNet",
    "ResNetFPN",
    "ShuffleNetV2",
    "SqueezeNet",
    "StochasticDepth",
    "SwinTransformer",
    "TimeSeriesTransformer",
    "Transformer",
    "VisionTransformer",
    "alexnet",
    "alexnet_2012",
    "blocks_to_skip",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "convnext_xlarge",
    "create_model",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "dinov2_s_14",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_lite0",
    "efficientnet_v2_s",
    "eva02_b_14",
    "example_inputs",
    "googlenet",
    "googlenet_2014",
    "inception_v3",
    "input_size",
    "lenet5",
    "lenet5_1998",
    "lenet5_relu",
    "list_models",
    "llama_small",
    "load_weights",
    "minilm_l6",
    "mnasnet0_5",
    "mnasnet1_0",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "nin",
    "nin_teaching",
    "read_checkpoint",
    "register_model",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet18_fpn",
    "resnet34",
    "resnet50",
    "resnet50_fpn",
    "resnet101",
    "resnet101_fpn",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_t",
    "time_series_transformer",
    "transformer",
    "transformer_encoder",
    "transformer_encoder_prenorm",
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
