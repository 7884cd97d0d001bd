"""``fastnets.create_model``: a reference architecture by name, fused or stock."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from torch import Tensor, nn


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | PathLike | Mapping[str, Tensor] | None = None,
    fused: bool = True,
    **options: object,
) -> nn.Module:
    """A network of :func:`fastnets.list_models`, in training mode as PyTorch builds it.

    num_classes: outputs of the last layer; ``None`` keeps the network's own (1000 for the ImageNet ones).
    weights: a checkpoint's path (``.pth``, ``.pt``, ``.safetensors``) or a state dict, with torchvision's
    keys, or timm's where torchvision lacks the network (MobileNetV1, EfficientNet-Lite, DINOv2, EVA-02; ViT
    takes both), or Hugging Face's (MiniLM, Llama; Llama takes Meta's as well). fused: with fused layers
    (:func:`fastnets.optimize`); ``False`` gives plain ``torch.nn``. options: the architecture's own, such as
    ``width_mult`` of ``mobilenet_v2``.

    Raises ``ValueError`` for an unknown name, with near ones, and for weights that do not fit.
    """
    from fastnets.fused.optimize import optimize
    from fastnets.models import create_model as create_stock

    if not isinstance(fused, bool):
        raise TypeError(f"{name}: fused must be True or False, got {fused!r}")
    model = create_stock(name, num_classes=num_classes, weights=weights, **options)
    return optimize(model, inplace=True) if fused else model
