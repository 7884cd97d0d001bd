"""Networks by name, as the command line takes them: ``resnet50``, ``torchvision:NAME``, ``timm:NAME``.

Each comes back in stock form, in eval mode, with the input shape it expects.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastnets.models import create_model, example_inputs, input_size, list_models
from fastnets.models.checkpoint import load_weights

SOURCES = ("torchvision", "timm")

Inputs = torch.Tensor | tuple[torch.Tensor, ...]
"""What a network's forward takes: one tensor, or several."""


class UnknownNetwork(ValueError):
    """No network has this name; the message suggests near ones."""


class MissingPackage(RuntimeError):
    """The name asks for a package that is not installed."""


@dataclass
class Network:
    """A stock network ready to be measured.

    ``input_shape`` is of one sample, C, H, W of an image; ``weights`` says where its values are from;
    ``images`` [N, C, H, W] are what it is run on, or None for random inputs; ``examples`` draws those, as
    ``models.example_inputs`` does, or None for images.
    """

    name: str
    model: nn.Module
    input_shape: tuple[int, ...]
    weights: str
    images: torch.Tensor | None = None
    examples: Callable[..., tuple[torch.Tensor, ...]] | None = None

    def inputs(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> Inputs:
        """A batch: the network's images [N, C, H, W], repeated as needed, or seeded random inputs: standard
        normal, or token ids, which keep their own dtype.

        One tensor, or a tuple where the network takes several.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.images is not None:
            drawn = (self.images[torch.arange(batch_size) % len(self.images)],)
        elif self.examples is not None:
            drawn = self.examples(batch_size, generator=generator)
        else:
            drawn = (torch.randn(batch_size, *self.input_shape, generator=generator),)
        moved = tuple(t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype) for t in drawn)
        return moved if len(moved) > 1 else moved[0]


def arguments(x: Inputs) -> tuple[torch.Tensor, ...]:
    """The inputs as a forward's positional arguments."""
    return (x,) if isinstance(x, torch.Tensor) else tuple(x)


def first(x: Inputs) -> torch.Tensor:
    """The first input, for what all share: the device and the size of the batch."""
    return arguments(x)[0]


def describe(x: Inputs) -> str:
    """Shapes and dtypes in words: ``8×3×224×224 torch.float32``."""
    return " and ".join(f"{'×'.join(map(str, t.shape))} {t.dtype}" for t in arguments(x))


def map_inputs(change: Callable[[torch.Tensor], torch.Tensor], x: Inputs) -> Inputs:
    """The inputs with ``change`` made to those of floating point; token ids stay as they are."""
    return pytree.tree_map(lambda t: change(t) if t.is_floating_point() else t, x)


def split_name(spec: str) -> tuple[str, str]:
    """``"timm:resnet18"`` to ``("timm", "resnet18")``; a plain name belongs to ``"fastnets"``."""
    source, colon, name = spec.partition(":")
    if not colon:
        return "fastnets", spec
    if source not in SOURCES:
        known = ", ".join(f"{known}:NAME" for known in SOURCES)
        raise UnknownNetwork(f"{spec!r}: {source!r} is not a source of networks; use NAME, {known}")
    return source, name


def _package(source: str) -> Any:
    try:
        return importlib.import_module(source)
    except ImportError as error:
        raise MissingPackage(
            f"{source}:NAME: cannot import {source} ({error}); pip install 'fastnets[vision]'"
        ) from error


def list_names(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern; ``torchvision:PATTERN`` and ``timm:PATTERN`` list those libraries."""
    source, pattern = split_name(pattern)
    pattern = pattern or "*"
    if source == "fastnets":
        return list(list_models(pattern))
    if source == "timm":
        _package("timm")
        return [f"timm:{name}" for name in importlib.import_module("timm").list_models(pattern)]
    names = _package("torchvision").models.list_models(module=_package("torchvision").models)
    return [f"torchvision:{name}" for name in sorted(fnmatch.filter(names, pattern))]


def refuse_unknown(spec: str) -> None:
    """Raise :class:`UnknownNetwork`, with near names, unless ``spec`` names a network."""
    source, name = split_name(spec)
    known = list_names(f"{source}:*" if source != "fastnets" else "*")
    if spec in known:
        return
    if source == "timm" and f"timm:{name.partition('.')[0]}" in known:
        return  # timm's names may carry a tag of the weights
    near = difflib.get_close_matches(spec, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "no name is near it."
    raise UnknownNetwork(f"unknown network {spec!r}: {hint} `fastnets list` prints all names.")


def load(
    spec: str,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    img_size: int | None = None,
    seed: int = 0,
) -> Network:
    """Build the stock network ``spec`` names, on the CPU in float32 and in eval mode.

    ``weights`` is a checkpoint's path; ``pretrained`` asks torchvision or timm for their own weights, which
    they download. Without either the values are random, seeded, and batch norms get statistics and affine
    values as a trained network has them (:func:`settle_batch_norms`), so that an accuracy check has
    something to check.

    Raises :class:`UnknownNetwork`, :class:`MissingPackage`, or what reading the weights raises.
    """
    source, name = split_name(spec)
    if weights is not None and pretrained:
        raise ValueError("--weights and --pretrained exclude each other: both name the values to load")
    if img_size is not None and img_size < 1:
        raise ValueError(f"--img-size {img_size}: an image has at least one pixel")
    refuse_unknown(spec)
    torch.manual_seed(seed)
    builder = {"fastnets": _from_fastnets, "torchvision": _from_torchvision, "timm": _from_timm}[source]
    model, shape = builder(name, num_classes, weights, pretrained)
    if img_size is not None:
        if len(shape) != 3:
            raise ValueError(f"--img-size {img_size}: {spec} takes no images, but inputs of shape {shape}")
        shape = (shape[0], img_size, img_size)
    model.eval()
    if weights is None and not pretrained:
        settle_batch_norms(model, shape, seed=seed)
    origin = (
        str(weights) if weights is not None else ("pretrained" if pretrained else f"random (seed {seed})")
    )
    examples = functools.partial(example_inputs, name) if source == "fastnets" and img_size is None else None
    return Network(spec, model, shape, origin, examples=examples)


def _from_fastnets(
    name: str, num_classes: int | None, weights: str | Path | None, pretrained: bool
) -> tuple[nn.Module, tuple[int, ...]]:
    if pretrained:
        raise ValueError(
            f"{name}: fastnets ships no weights; use --weights FILE, or torchvision:{name} --pretrained"
        )
    choice = {} if num_classes is None else {"num_classes": num_classes}
    return create_model(name, weights=weights, **choice), input_size(name)


def _from_torchvision(
    name: str, num_classes: int | None, weights: str | Path | None, pretrained: bool
) -> tuple[nn.Module, tuple[int, int, int]]:
    models = _package("torchvision").models
    default = models.get_model_weights(name).DEFAULT
    choice: dict[str, Any] = {"weights": default if pretrained else None}
    if num_classes is not None and not pretrained:
        choice["num_classes"] = num_classes
    if name in ("googlenet", "inception_v3") and not pretrained:
        choice["init_weights"] = True
    model = models.get_model(name, **choice)
    size = getattr(default.transforms(), "crop_size", [224])
    if weights is not None:
        load_weights(model, weights, name=name)
    return model, (3, size[0], size[0])


def _from_timm(
    name: str, num_classes: int | None, weights: str | Path | None, pretrained: bool
) -> tuple[nn.Module, tuple[int, int, int]]:
    timm = _package("timm")
    choice = {} if num_classes is None else {"num_classes": num_classes}
    model = timm.create_model(name, pretrained=pretrained, **choice)
    if weights is not None:
        load_weights(model, weights, name=name)
    return model, tuple(model.pretrained_cfg["input_size"])


def settle_batch_norms(model: nn.Module, input_shape: tuple[int, ...], *, seed: int = 0) -> None:
    """Give the batch norms of an untrained network values that a mistake in folding or fusing would show up
    in.

    Weights are drawn from [0.5, 1.5], biases from [-0.3, 0.3], and running statistics are those of one
    seeded batch of eight images passed through in training mode, so that activations neither vanish nor
    explode with depth. The network comes back in the mode it was in. A network without batch norm is left
    alone.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    generator = torch.Generator().manual_seed(seed)
    was_training = {module: module.training for module in model.modules()}
    momentum = {norm: norm.momentum for norm in norms}
    with torch.no_grad():
        for norm in norms:
            if norm.affine:
                norm.weight.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
                norm.bias.copy_(0.6 * torch.rand(norm.num_features, generator=generator) - 0.3)
            if norm.track_running_stats:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean of what passes, here one batch
                norm.train()
        model(torch.randn(8, *input_shape, generator=generator))
    for norm in norms:
        norm.momentum = momentum[norm]
        if norm.track_running_stats:
            norm.num_batches_tracked.zero_()
    for module, mode in was_training.items():
        module.training = mode
