"""All patterns over one captured graph: which modules are layers that may fuse, and who looks for them."""

from __future__ import annotations

from torch import fx, nn

from fastnets.fused.chains import Memory, name_of
from fastnets.fused.excite_patterns import ExciteFinder
from fastnets.fused.layout import LayoutError
from fastnets.fused.patterns import ConvFinder, is_batch_norm, is_convolution
from fastnets.fused.rope_patterns import RopeFinder
from fastnets.fused.transformer_patterns import TransformerFinder, is_attention, is_linear, is_norm


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that a fused call may stand for: what ``filter_fn`` is asked about."""
    kinds = (is_convolution, is_batch_norm, is_linear, is_norm, is_attention)
    return any(is_kind(module) for is_kind in kinds)


def fuse(graph: fx.Graph, root: nn.Module, backend: str, keep_stock: frozenset[str] = frozenset()) -> tuple:
    """Rewrite ``graph`` in place.

    root: the module that paths start from. backend: what the fused calls are to run on. keep_stock: paths of
    layers that stay as they are.

    Returns ``(fusions, left)``, tuples of ``chains.Fusion`` and ``chains.Left``. Raises ``LayoutError`` for a
    graph whose meaning depends on the layout of its tensors.
    """
    memory = Memory(graph, dict(root.named_modules(remove_duplicate=False)))
    kinds = (ConvFinder, RopeFinder, TransformerFinder, ExciteFinder)
    finders = [kind(graph, root, backend, keep_stock, memory) for kind in kinds]
    for finder in finders:
        finder.fuse()
    memory.forget()
    if (node := memory.write_seen_through_reshape()) is not None:
        raise LayoutError(f"{name_of(node)} writes in place to a tensor that its forward has reshaped")
    for finder in finders:
        finder.note_leftovers()
    return tuple(f for finder in finders for f in finder.fusions), tuple(
        left for finder in finders for left in finder.left
    )
