"""What ``fastnets bench --suite NAME`` runs: networks by name, or single layers dressed as networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastnets.bench import networks
from fastnets.bench.networks import Network
from fastnets.models import list_models

__all__ = ["SUITES", "builders", "trains"]

_NETWORKS = {
    "lineage": (
        *("lenet5", "alexnet", "vgg11_bn", "nin", "googlenet", "resnet18", "resnet50", "squeezenet1_1"),
        *("densenet121", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "regnet_y_400mf"),
        "vit_ti_16",
    ),
    "attention": (
        *("vit_ti_16", "vit_s_16", "vit_b_16", "dinov2_s_14", "eva02_b_14"),
        *("transformer_encoder", "transformer", "minilm_l6", "llama_small"),
    ),
    "training": ("lenet5", "resnet18", "mobilenet_v2", "resnet50"),
}
# C, K, pixels, filter, stride, groups
_CONVOLUTIONS = {
    "stem 7×7": (3, 64, 224, 7, 2, 1),
    "conv 3×3, 64 channels": (64, 64, 56, 3, 1, 1),
    "conv 3×3, 256 channels": (256, 256, 14, 3, 1, 1),
    "conv 1×1, 64 to 256 channels": (64, 256, 56, 1, 1, 1),
    "conv 1×1, 1024 to 256 channels": (1024, 256, 14, 1, 1, 1),
    "depthwise 3×3, 144 channels": (144, 144, 56, 3, 1, 144),
    "depthwise 3×3, 576 channels, stride 2": (576, 576, 14, 3, 2, 576),
    "grouped 3×3, 32 groups of 8": (256, 256, 28, 3, 1, 32),
}
SUITES = (*_NETWORKS, "layers")


def trains(suite: str) -> bool:
    """Whether the suite times steps of training."""
    return suite == "training"


def builders(suite: str, load: Callable[[str], Network], seed: int = 0) -> list[Callable[[], Network]]:
    """A builder for each network of a suite; ``load`` builds those that have a name."""
    if suite == "layers":
        return [functools.partial(_layer, name, seed) for name in _CONVOLUTIONS]
    known = set(list_models())
    return [functools.partial(load, name) for name in _NETWORKS[suite] if name in known]


def names(suite: str) -> Sequence[str]:
    """What the networks of a suite are called."""
    return tuple(_CONVOLUTIONS) if suite == "layers" else _NETWORKS[suite]


def _layer(name: str, seed: int) -> Network:
    """A convolution with batch norm and ReLU."""
    C, K, pixels, size, stride, groups = _CONVOLUTIONS[name]
    torch.manual_seed(seed)
    conv = nn.Conv2d(C, K, size, stride, size // 2, groups=groups, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(K), nn.ReLU()).eval()
    networks.settle_batch_norms(model, (C, pixels, pixels), seed=seed)
    return Network(name, model, (C, pixels, pixels), f"random (seed {seed})")
