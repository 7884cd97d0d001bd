"""fastnets: the networks you have, faster on the GPU you have.

    import fastnets
    model = fastnets.optimize(torchvision.models.resnet50(weights="DEFAULT").eval())

The public names are looked up when they are first used: importing fastnets imports neither Triton nor a
kernel, and touches no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastnets.creation import create_model
    from fastnets.fused.attention import attention
    from fastnets.fused.check import check
    from fastnets.fused.dispatch import backend
    from fastnets.fused.explain import explain
    from fastnets.fused.memory import retain_memory
    from fastnets.fused.optimize import optimize, restore
    from fastnets.fused.packing import refresh
    from fastnets.models import list_models

# public name -> the module that defines it
_HOME = {
    "attention": "fastnets.fused.attention",
    "backend": "fastnets.fused.dispatch",
    "check": "fastnets.fused.check",
    "create_model": "fastnets.creation",
    "explain": "fastnets.fused.explain",
    "list_models": "fastnets.models",
    "optimize": "fastnets.fused.optimize",
    "refresh": "fastnets.fused.packing",
    "restore": "fastnets.fused.optimize",
    "retain_memory": "fastnets.fused.memory",
}
_SUBPACKAGES = ("bench", "fused", "kernels", "models")

__all__ = [
    "attention",
    "backend",
    "check",
    "create_model",
    "explain",
    "list_models",
    "optimize",
    "refresh",
    "restore",
    "retain_memory",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value  # later look-ups skip this function
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastnets.{name}")
    raise AttributeError(f"module 'fastnets' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBPACKAGES})
