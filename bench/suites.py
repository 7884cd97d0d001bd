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


def _convolution(C: int, K: int, size: int, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(C, K, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(K), nn.ReLU())


def _perceptron(C: int) -> nn.Module:
    return nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))


def _attention(C: int, heads: int) -> nn.Module:
    return nn.TransformerEncoderLayer(C, heads, 4 * C, 0.0, "gelu", batch_first=True, norm_first=True)


# How each is built, and its input for one sample.
_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "stem 7×7": (lambda: _convolution(3, 64, 7, stride=2), (3, 224, 224)),
    "conv 3×3, 64 channels": (lambda: _convolution(64, 64, 3), (64, 56, 56)),
    "conv 3×3, 256 channels": (lambda: _convolution(256, 256, 3), (256, 14, 14)),
    "conv 1×1, 64 to 256 channels": (lambda: _convolution(64, 256, 1), (64, 56, 56)),
    "conv 1×1, 1024 to 256 channels": (lambda: _convolution(1024, 256, 1), (1024, 14, 14)),
    "depthwise 3×3, 144 channels": (lambda: _convolution(144, 144, 3, groups=144), (144, 56, 56)),
    "depthwise 3×3, 576 channels, stride 2": (lambda: _convolution(576, 576, 3, 2, 576), (576, 14, 14)),
    "grouped 3×3, 32 groups of 8": (lambda: _convolution(256, 256, 3, groups=32), (256, 28, 28)),
    "response norm, 96 channels": (lambda: nn.Sequential(nn.ReLU(), nn.LocalResponseNorm(5)), (96, 55, 55)),
    "max-pool 3×3, stride 2, 64 channels": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1)), (64, 112, 112)),
    "layer norm, 768 channels": (lambda: nn.Sequential(nn.LayerNorm(768)), (197, 768)),
    "linear + GELU + linear, 384 channels": (lambda: _perceptron(384), (197, 384)),
    "Transformer layer, 384 channels, 6 heads": (lambda: _attention(384, 6), (197, 384)),
}
SUITES = (*_NETWORKS, "layers")


def trains(suite: str) -> bool:
    """Whether the suite times steps of training."""
    return suite == "training"


def builders(suite: str, load: Callable[[str], Network], seed: int = 0) -> list[Callable[[], Network]]:
    """A builder for each network of a suite; ``load`` builds those that have a name."""
    if suite == "layers":
        return [functools.partial(_layer, name, seed) for name in _LAYERS]
    known = set(list_models())
    return [functools.partial(load, name) for name in _NETWORKS[suite] if name in known]


def names(suite: str) -> Sequence[str]:
    """What the networks of a suite are called."""
    return tuple(_LAYERS) if suite == "layers" else _NETWORKS[suite]


def _layer(name: str, seed: int) -> Network:
    """A layer with what is fused into it, dressed as a network."""
    build, shape = _LAYERS[name]
    torch.manual_seed(seed)
    model = build().eval()
    networks.settle_batch_norms(model, shape, seed=seed)
    return Network(name, model, shape, f"random (seed {seed})")
