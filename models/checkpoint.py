"""Weights from a file or a state dict into a network, with errors that say what was found and what to do.

A network whose checkpoints go by several names for the same tensors (torchvision's, timm's, Hugging Face's)
lists the other ones in its class attribute ``key_styles``; such a checkpoint is renamed before it is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["CheckpointError", "KeyStyle", "load_weights", "read_checkpoint"]

# Training scripts save the state dict beside the optimizer's under one of these names.
WRAPPERS = ("state_dict", "model_state_dict", "model")
# Put before every key by DistributedDataParallel and by torch.compile.
PREFIXES = ("module.", "_orig_mod.")
MOST_KEYS_LISTED = 10


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the network."""


@dataclass(frozen=True)
class KeyStyle:
    """The names another library gives to a network's tensors.

    library: what errors call it. names: pairs (theirs, ours) of how keys begin, ``{}`` for an index of a
    layer; the first pair that fits counts, and of several for one of ours the first is what errors quote. A
    pair with ours None drops the key. convert: takes (network, our key, their tensor) and returns our tensor,
    where the values differ as well as the names.
    """

    library: str
    names: tuple[tuple[str, str | None], ...]
    convert: Callable[[nn.Module, str, Tensor], Tensor] | None = None

    def ours(self, key: str) -> str | None:
        """Our name for their key: None where it is to be dropped, the key itself where no pair fits."""
        return _renamed(key, self._to_ours)

    def theirs(self, key: str) -> str:
        """Their name for our key."""
        return _renamed(key, self._to_theirs) or key

    @cached_property
    def _to_ours(self) -> list[tuple[re.Pattern, str | None]]:
        return [(_beginning(theirs), ours) for theirs, ours in self.names]

    @cached_property
    def _to_theirs(self) -> list[tuple[re.Pattern, str]]:
        return [(_beginning(ours), theirs) for theirs, ours in self.names if ours is not None]


def load_weights(
    model: nn.Module, weights: str | os.PathLike | Mapping[str, Tensor], *, name: str | None = None
) -> None:
    """Copies weights into a network, in the network's dtype and on its device.

    weights: a path (``.pth``, ``.pt``, ``.safetensors``) or a state dict, plain or as a training script
    wraps it, with the network's own keys or those of one of its ``key_styles``. name: what errors call the
    network; its class if not given.

    Raises ``CheckpointError`` where the weights cannot be read or do not fit. The network is then untouched.
    """
    name = name or type(model).__name__
    if isinstance(weights, str | os.PathLike):
        source = str(Path(weights))
        found = read_checkpoint(weights)
    elif isinstance(weights, Mapping):
        source, found = "the given state dict", weights
    else:
        raise TypeError(f"{name}: weights must be a path or a state dict, got {type(weights).__name__}")
    state = _plain_state_dict(found, source)
    style = _style(model, state)
    if style is not None:
        state = _in_our_names(model, state, style)
    misfit = _misfit(model, state, style)
    if misfit:
        raise CheckpointError(f"{source} does not fit {name}: {misfit}")
    # Checked above; strict would refuse checkpoints from before BatchNorm counted its batches.
    model.load_state_dict(state, strict=False)


def read_checkpoint(path: str | os.PathLike) -> object:
    """What a checkpoint file holds, read on the CPU and without running any code in it."""
    path = Path(path)
    if not path.is_file():
        fact = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {fact}: give the path of a .pth, .pt or .safetensors file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises five kinds here, none of which names the file
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch checkpoint: {_diagnosis(path, error)}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path} needs the safetensors package: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, and OSError for an empty file
        raise CheckpointError(f"{path} cannot be read as safetensors: {_diagnosis(path, error)}") from error


def _diagnosis(path: Path, error: Exception) -> str:
    """What the file is, as far as its first bytes tell, and what to do about it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    again = "download or save it again"
    if size == 0:
        return f"it is empty; {again}"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights; run `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return f"it is a web page, not the weights; {again}"
    if "Unsupported global" in str(error) or "Unsupported class" in str(error):
        return (
            "it holds pickled objects where tensors were expected; save `model.state_dict()`, not the model"
        )
    if head.startswith(b"PK"):
        return f"it has {size:,} bytes and its end is missing or damaged; {again}"
    reason = [*str(error).strip().splitlines(), type(error).__name__][0]
    return f"it has {size:,} bytes and begins with {head[:16]!r} ({reason}); {again}"


def _plain_state_dict(found: object, source: str) -> dict[str, Tensor]:
    """The state dict itself: out of its wrapper, keys without the prefixes of DDP and torch.compile."""
    if isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        for wrapper in WRAPPERS:
            if isinstance(found.get(wrapper), Mapping):
                return _plain_state_dict(found[wrapper], source)
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(found).__name__}, not a state dict: save `model.state_dict()`"
        )
    strays = [key for key, value in found.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strays or not found:
        fact = f"holds values that are not tensors ({_some(strays)})" if strays else "holds no tensors"
        raise CheckpointError(f"{source} {fact}, so it is not a state dict: save `model.state_dict()`")
    state = dict(found)
    for prefix in PREFIXES * 2:  # either may have been put outside the other
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if hasattr(found, "_metadata") and state.keys() == found.keys():
        return found  # keeps the module versions that load_state_dict looks up
    return state


def _beginning(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))


def _renamed(key: str, pairs: list[tuple[re.Pattern, str | None]]) -> str | None:
    for beginning, other in pairs:
        match = beginning.match(key)
        if match:
            return None if other is None else other.format(*match.groups()) + key[match.end() :]
    return key


def _style(model: nn.Module, state: Mapping[str, Tensor]) -> KeyStyle | None:
    """Whose names a state dict uses: those with which most of the network's own are found and, where that is
    equal, the fewest others; None for ours.
    """
    own = model.state_dict().keys()

    def fit(keys: set[str]) -> tuple[int, int]:
        return len(own & keys), -len(keys - own)

    best, most = None, fit(set(state))
    for style in getattr(model, "key_styles", ()):
        renamed = fit({style.ours(key) for key in state} - {None})
        if renamed > most:
            best, most = style, renamed
    return best


def _in_our_names(model: nn.Module, state: Mapping[str, Tensor], style: KeyStyle) -> dict[str, Tensor]:
    own = model.state_dict()
    renamed = {style.ours(key): value for key, value in state.items()}
    renamed.pop(None, None)
    if style.convert is not None:
        # Only what has the right shape: the rest is about to be refused.
        for key in own.keys() & renamed.keys():
            if own[key].shape == renamed[key].shape:
                renamed[key] = style.convert(model, key, renamed[key])
    return renamed


def _misfit(model: nn.Module, state: Mapping[str, Tensor], style: KeyStyle | None = None) -> str | None:
    """How a state dict differs from the network's own, and the likely remedy; ``None`` where it fits.

    style: the one the state dict was renamed from; keys are quoted as they stand in the checkpoint.
    """
    own = model.state_dict()
    # Checkpoints from before PyTorch 0.4.1 have no batch counts; BatchNorm then starts at zero.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [(key, state[key].shape, own[key].shape) for key in own if key in state]
    mis_shaped = [(key, found, wanted) for key, found, wanted in shapes if found != wanted]
    if not (missing or unexpected or mis_shaped):
        return None
    quoted = style.theirs if style else str
    room = MOST_KEYS_LISTED
    facts = []
    for label, keys in (
        ("missing", [quoted(key) for key in missing]),
        ("unexpected", [quoted(key) for key in unexpected]),
        (
            "mis-shaped",
            [f"{quoted(key)} {list(found)} for {list(wanted)}" for key, found, wanted in mis_shaped],
        ),
    ):
        if keys:
            facts.append(f"{len(keys)} {label} ({_some(keys, room)})" if room else f"{len(keys)} {label}")
            room = max(0, room - len(keys))
    return "; ".join(facts) + f". {_remedy(own, missing, unexpected, mis_shaped)}"


def _remedy(own: Mapping[str, Tensor], missing: list, unexpected: list, mis_shaped: list) -> str:
    if not missing and not unexpected:
        classes = {found[0] for _, found, _ in mis_shaped if len(found)}
        last_layer = {key.rpartition(".")[0] for key, _, _ in mis_shaped} == {
            list(own)[-1].rpartition(".")[0]
        }
        if last_layer and len(classes) == 1:
            return f"It was trained for another number of classes: pass num_classes={classes.pop()}."
    if len(missing) == sum(not key.endswith("num_batches_tracked") for key in own):
        return "No key matches: these are another network's weights, or their keys carry another prefix."
    return "These are another network's or variant's weights; fastnets.list_models() names the variants."


def _some(keys: list, most: int = MOST_KEYS_LISTED) -> str:
    more = f", and {len(keys) - most:,} more" if len(keys) > most else ""
    return ", ".join(map(str, keys[:most])) + more
