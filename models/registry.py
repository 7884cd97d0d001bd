"""The models by name: ``register_model``, ``list_models``, ``create_model``."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TypeVar

from torch import Tensor, nn

from fastnets.models.checkpoint import load_weights

__all__ = ["create_model", "input_size", "list_models", "register_model"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    input_size: tuple[int, int, int]


_MODELS: dict[str, _Entry] = {}


def register_model(*, input_size: tuple[int, int, int] = (3, 224, 224)) -> Callable[[Builder], Builder]:
    """Decorates a function that builds a network; the function's name becomes the model's.

    input_size: the (C, H, W) of the images the network was designed for.
    The function takes ``num_classes`` with the network's own default, and its further options by name.
    """

    def register(build: Builder) -> Builder:
        if build.__name__ in _MODELS:
            raise ValueError(f"a model named {build.__name__!r} is registered already")
        _MODELS[build.__name__] = _Entry(build, input_size)
        return build

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern (``"resnet*"``), sorted, digits as numbers."""
    return sorted(fnmatch.filter(_MODELS, pattern), key=_natural_order)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | PathLike | Mapping[str, Tensor] | None = None,
    **options: object,
) -> nn.Module:
    """Builds a network in stock ``torch.nn``, freshly initialised or with the given weights.

    num_classes: outputs of the last layer; ``None`` keeps the network's own (1000 for the ImageNet ones, 10
    for LeNet). weights: a checkpoint's path (``.pth``, ``.pt``, ``.safetensors``) or a state dict.
    options: the architecture's own, such as ``width_mult`` of ``mobilenet_v2``.

    Raises ``ValueError`` for an unknown name, naming the near ones; ``CheckpointError`` (a ``ValueError``)
    for weights that do not fit; ``TypeError`` for an option that the architecture does not have.
    """
    build = _entry(name).build
    if num_classes is not None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"{name}: num_classes must be a positive int, got {num_classes!r}")
        options["num_classes"] = num_classes
    model = build(**options)
    if weights is not None:
        load_weights(model, weights, name=name)
    return model


def input_size(name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images that the named network was designed for."""
    return _entry(name).input_size


def _entry(name: str) -> _Entry:
    if name in _MODELS:
        return _MODELS[name]
    near = difflib.get_close_matches(str(name), _MODELS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"no model is named {name!r}: {hint}fastnets.list_models() names all {len(_MODELS)}")


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """resnet18 before resnet101: runs of digits compare as numbers."""
    parts: list[tuple[int, int, str]] = []
    for is_number, run in _runs(name):
        parts.append((0, int(run), "") if is_number else (1, 0, run))
    return parts


def _runs(name: str) -> list[tuple[bool, str]]:
    runs: list[tuple[bool, str]] = []
    for character in name:
        if runs and runs[-1][0] == character.isdecimal():
            runs[-1] = (runs[-1][0], runs[-1][1] + character)
        else:
            runs.append((character.isdecimal(), character))
    return runs
