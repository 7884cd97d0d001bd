"""Containers of PyTorch's own whose forward no graph can hold, and what runs in their place.

Their code asks about types, modes and masks at every call, and calls one C++ function for a whole layer in
inference. Ours is written by hand, in ``multihead_attention`` and ``transformer``: one function per class,
which drop-in modules and rewritten networks share.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastnets.fused import dispatch
from fastnets.fused.activation import recognise, recognise_call
from fastnets.fused.chains import Fusion
from fastnets.fused.handing_down import THEN_ADD
from fastnets.fused.multihead_attention import attend, attend_then_add
from fastnets.fused.transformer import (
    run_decoder,
    run_decoder_layer,
    run_encoder,
    run_encoder_layer,
)


@dataclass(frozen=True)
class KnownForward:
    """``run(module, *arguments of the stock forward, backend)``; ``then_add`` likewise, see
    ``handing_down``. ``methods``: those of the stock class that ``run`` stands for."""

    run: Callable
    methods: tuple[str, ...] = ("forward",)
    then_add: Callable | None = None

    def source(self, stock_forward: Callable) -> str:
        """The generated methods of a class."""
        declared, passed = [], []
        for p in inspect.signature(stock_forward).parameters.values():
            declared.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
            passed.append(p.name)
        arguments = ", ".join([*passed, "_fn_backend"])
        text = f"def forward({', '.join(declared)}):\n    return _fn_run({arguments})\n"
        if self.then_add is not None:
            first, rest = declared[0], declared[1:]
            header = ", ".join([first, "_fn_residual", "_fn_scale", *rest])
            arguments = ", ".join([passed[0], "_fn_residual", "_fn_scale", *passed[1:], "_fn_backend"])
            text += f"\n\ndef {THEN_ADD}({header}):\n    return _fn_then_add({arguments})\n"
        return text

    def scope(self, backend: str) -> dict[str, object]:
        backend = "auto" if backend == dispatch.UNFOLDED else backend
        return {"_fn_run": self.run, "_fn_then_add": self.then_add, "_fn_backend": backend}


_KNOWN: dict[type[nn.Module], KnownForward] = {
    nn.MultiheadAttention: KnownForward(attend, then_add=attend_then_add),
    nn.TransformerEncoderLayer: KnownForward(run_encoder_layer, ("forward", "_sa_block", "_ff_block")),
    nn.TransformerDecoderLayer: KnownForward(
        run_decoder_layer, ("forward", "_sa_block", "_mha_block", "_ff_block")
    ),
    nn.TransformerEncoder: KnownForward(run_encoder),
    nn.TransformerDecoder: KnownForward(run_decoder),
}


def known_forward(cls: type[nn.Module]) -> KnownForward | None:
    """What we have for modules of this class, which may be derived but not change what is stood for."""
    for stock, known in _KNOWN.items():
        if issubclass(cls, stock) and cls.__call__ is nn.Module.__call__:
            same = all(getattr(cls, name) is getattr(stock, name) for name in known.methods)
            return known if same else None
    return None


def fusions_of(module: nn.Module) -> tuple[Fusion, ...]:
    """The fused calls in the forward of ``module``, where it runs one of the above; for reports."""
    cls = type(module)
    ours = "_fastnets" in vars(cls) and known_forward(cls._fastnets.stock_class) is not None
    if not ours and not cls.__module__.startswith("fastnets.fused."):
        return ()
    if isinstance(module, nn.MultiheadAttention):
        return (Fusion("attention", "attention", (("attention", ""),)),)
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        return () if module.norm is None else (_norm("norm"),)
    if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return ()
    activation = module.activation
    is_module = isinstance(activation, nn.Module)
    known = recognise(activation) if is_module else recognise_call(activation, (), {})
    name = "none" if known is None else known[0]
    act = (("act", "activation"),) if is_module and known is not None else ()
    first = Fusion("linear", f"linear+{name}" if known else "linear", (("linear", "linear1"), *act), name)
    norms = [_norm(f"norm{i}") for i in (1, 2, 3) if hasattr(module, f"norm{i}")]
    if module.norm_first and isinstance(module, nn.TransformerEncoderLayer):
        norms = [_norm("norm1", "self_attn"), _norm("norm2", "linear1", name if known else "none")]
    return first, Fusion("linear", "linear+add", (("linear", "linear2"),)), *norms


def _norm(path: str, joins: str = "", activation: str = "none") -> Fusion:
    return Fusion("norm", "layer_norm", (("norm", path),), activation, joins)
