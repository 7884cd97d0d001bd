"""The models by name: ``register_model``, ``list_models``, ``create_model``, and what to feed them."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastnets.models.checkpoint import load_weights

__all__ = ["create_model", "example_inputs", "input_size", "list_models", "register_model"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    input_size: tuple[int, ...]
    vocabulary: int | None
    inputs: int


_MODELS: dict[str, _Entry] = {}


def register_model(
    *, input_size: tuple[int, ...] = (3, 224, 224), vocabulary: int | None = None, inputs: int = 1
) -> Callable[[Builder], Builder]:
    """Decorates a function that builds a network; the function's name becomes the model's.

    input_size: the shape of one sample that the network was designed for: (C, H, W) of an image, (L,
    features) of a sequence, (L,) of a text. vocabulary: of texts, how many different tokens
    there are. inputs: how many tensors of that kind a forward takes.
    The function takes ``num_classes`` with the network's own default, where it classifies, and its further
    options by name.
    """

    def register(build: Builder) -> Builder:
        if build.__name__ in _MODELS:
            raise ValueError(f"a model named {build.__name__!r} is registered already")
        _MODELS[build.__name__] = _Entry(build, input_size, vocabulary, inputs)
        return build

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern (``"resnet*"``), sorted, digits as numbers."""
    if not isinstance(pattern, str):
        raise TypeError(f"list_models: pattern must be a str such as 'resnet*', got {pattern!r}")
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
    for LeNet; sequence models have none). weights: a checkpoint's path (``.pth``, ``.pt``, ``.safetensors``)
    or a state dict. options: the architecture's own, such as ``width_mult`` of ``mobilenet_v2``.

    Raises ``ValueError`` for an unknown name, naming the near ones; ``CheckpointError`` (a ``ValueError``)
    for weights that do not fit; ``TypeError`` for an option that the architecture does not have.
    """
    entry = _entry(name)
    if num_classes is not None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"{name}: num_classes must be a positive int, got {num_classes!r}")
        options["num_classes"] = num_classes
    try:
        model = entry.build(**options)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in options:
            raise
        raise TypeError(
            f"{name} has no option {unknown[1]!r}{_options_of(entry.build, unknown[1])}"
        ) from None
    if weights is not None:
        load_weights(model, weights, name=name)
    return model


def input_size(name: str) -> tuple[int, ...]:
    """The shape of one sample that the named network was designed for: (C, H, W) where it takes images."""
    return _entry(name).input_size


def example_inputs(
    name: str, batch_size: int = 1, *, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Random inputs for the named network's forward: standard normal, or token ids (int64) for texts."""
    entry = _entry(name)
    shape = (batch_size, *entry.input_size)

    def draw() -> Tensor:
        if entry.vocabulary is None:
            return torch.randn(shape, generator=generator)
        return torch.randint(entry.vocabulary, shape, generator=generator)

    return tuple(draw() for _ in range(entry.inputs))


def _entry(name: str) -> _Entry:
    if name in _MODELS:
        return _MODELS[name]
    near = difflib.get_close_matches(str(name), _MODELS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"no model is named {name!r}: {hint}fastnets.list_models() names all {len(_MODELS)}")


def _options_of(build: Callable[..., nn.Module], unknown: str) -> str:
    """What to give in place of an unknown option, as far as the network's class tells."""
    if unknown == "pretrained":
        return ": give weights=, a checkpoint's path or a state dict"
    own = inspect.signature(typing.get_type_hints(build)["return"]).parameters.values()
    known = [p.name for p in own if p.kind is p.KEYWORD_ONLY]
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return hint + (f" (it has: {', '.join(known)})" if known else "")


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
