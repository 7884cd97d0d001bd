"""What users compose: fused ops, modules, and the rewriting of whole networks."""

from fastnets.fused.attention import attention
from fastnets.fused.batch_norm import bn_add_act
from fastnets.fused.conv import conv_bn_act
from fastnets.fused.conv_pool import conv_act_pool
from fastnets.fused.cross_entropy import CrossEntropyLoss, DistillationLoss, distillation_loss
from fastnets.fused.depthwise_norm import depthwise_layer_norm
from fastnets.fused.dropout import Dropout, StochasticDepth, stochastic_depth
from fastnets.fused.excited_conv import squeeze_excite_conv_bn_act
from fastnets.fused.gated import gated_act
from fastnets.fused.group_norm import GroupNormAct, InstanceNormAct, group_norm_act
from fastnets.fused.layer_norm import (
    AddLayerNorm,
    AddRMSNorm,
    LayerNorm,
    RMSNorm,
    add_layer_norm,
    add_rms_norm,
    rms_norm,
)
from fastnets.fused.layers import BNAct, ConvAct, ConvBNAct, ConvBNAddAct
from fastnets.fused.linear import LinearAct, linear_act
from fastnets.fused.linear_chain import linear_chain
from fastnets.fused.multihead_attention import MultiheadAttention
from fastnets.fused.pool import AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, MaxPool2d
from fastnets.fused.preactivation import bn_act_conv_bn_act
from fastnets.fused.response_norm import LocalResponseNorm, local_response_norm
from fastnets.fused.response_norm_pool import local_response_norm_max_pool
from fastnets.fused.rope import apply_rope
from fastnets.fused.shortcut_conv import conv_shortcut
from fastnets.fused.shuffled_conv import conv_channel_shuffle
from fastnets.fused.squeeze_excite import SqueezeExcite
from fastnets.fused.transformer import TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AddLayerNorm",
    "AddRMSNorm",
    "AvgPool2d",
    "BNAct",
    "ConvAct",
    "ConvBNAct",
    "ConvBNAddAct",
    "CrossEntropyLoss",
    "DistillationLoss",
    "Dropout",
    "GroupNormAct",
    "InstanceNormAct",
    "LayerNorm",
    "LinearAct",
    "LocalResponseNorm",
    "MaxPool2d",
    "MultiheadAttention",
    "RMSNorm",
    "SqueezeExcite",
    "StochasticDepth",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "add_layer_norm",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "bn_act_conv_bn_act",
    "bn_add_act",
    "conv_act_pool",
    "conv_bn_act",
    "conv_channel_shuffle",
    "conv_shortcut",
    "depthwise_layer_norm",
    "distillation_loss",
    "gated_act",
    "group_norm_act",
    "linear_act",
    "linear_chain",
    "local_response_norm",
    "local_response_norm_max_pool",
    "rms_norm",
    "squeeze_excite_conv_bn_act",
    "stochastic_depth",
]
