"""What users compose: fused ops, modules, and the rewriting of whole networks."""

from fastnets.fused.batch_norm import bn_add_act
from fastnets.fused.conv import conv_bn_act
from fastnets.fused.layers import BNAct, ConvAct, ConvBNAct, ConvBNAddAct

__all__ = ["BNAct", "ConvAct", "ConvBNAct", "ConvBNAddAct", "bn_add_act", "conv_bn_act"]
