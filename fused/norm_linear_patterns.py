"""Norms that one linear layer reads, and who makes what they read, in the captured graphs of inference.

    [linear → [activation] → [scale] → add →] norm → linear → ...

The norm becomes the linear layer's, see ``fused.norm_linear``; and the layer that makes the norm's input,
where it adds a residual, is asked for the statistics of its rows, so that nobody has to read them for that.
"""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import Tensor, fx, nn

from fastnets.fused.chains import may_write_between, sole_readers
from fastnets.fused.handing_down import call_then_add
from fastnets.fused.layer_norm import call_layer_norm
from fastnets.fused.multihead_attention import call_norm_then_add
from fastnets.fused.norm_linear import asks_for_statistics, call_norm_linear
from fastnets.fused.transformer_patterns import as_vector, call_linear_scale_add


def call_linear_for_norm(
    linear: nn.Linear,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    activation: str,
    negative_slope: float,
    backend: str,
    reader: tuple[nn.Module, nn.Linear, nn.Module | None, str],
    *,
    norm: nn.Module | None = None,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``call_linear_scale_add``, and the statistics of the result's rows where ``reader`` (a norm, the linear
    layer at whose head it is, and that one's activation) has use for them; else None."""
    vector, plain = as_vector(scale, linear.out_features)
    if plain and asks_for_statistics(reader, x, residual, backend):
        return call_norm_linear(
            norm, linear, act, x, residual, activation, negative_slope, vector, backend,
            statistics=statistics, keep=True,
        )  # fmt: skip
    y = call_linear_scale_add(
        linear, act, x, residual, scale, activation, negative_slope, backend, norm=norm, statistics=statistics
    )
    return y, None


def join_norms(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """Let linear layers normalise what they load where they alone read a norm's result.

    For graphs of inference, after all other patterns; returns the fusions, which say so.
    """
    fusions = _join_attentions(graph, modules, fusions)
    joined = []
    for node, norm in sole_readers(graph, call_linear_scale_add, 2, call_layer_norm):
        layer, x, before, _ = norm.args
        if before is not None or norm.kwargs or node.kwargs or norm in node.args[3:5]:
            continue
        if may_write_between(norm, node):
            continue
        node.args = (*node.args[:2], x, *node.args[3:])
        node.kwargs = {"norm": layer}
        graph.erase_node(norm)
        joined.append(node)
        fusions = _say_joined(fusions, layer.target, node.args[0].target, node.args[5])
    for node in joined:
        _ask_for_statistics(graph, node)
    return fusions


def _join_attentions(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """The same for self-attention that adds, whose projection is the reader."""
    for node, norm in sole_readers(graph, call_then_add, 3, call_layer_norm):
        mha, residual, scale, *inputs = node.args
        layer, x, before, backend = norm.args
        if len(inputs) != 3 or set(inputs) != {norm} or before is not None or norm.kwargs:
            continue
        if not isinstance(modules[mha.target], nn.MultiheadAttention) or norm in (residual, scale):
            continue
        if norm in node.kwargs.values() or may_write_between(norm, node):
            continue
        with graph.inserting_before(node):
            arguments = (layer, mha, residual, scale, x, backend)
            both = graph.call_function(call_norm_then_add, arguments, dict(node.kwargs))
            y = graph.call_function(operator.getitem, (both, 0))
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        graph.erase_node(norm)
        fusions = _say_joined(fusions, layer.target, mha.target)
    return fusions


def _say_joined(fusions: tuple, norm: str, reader: str, activation: str = "none") -> tuple:
    return tuple(
        replace(f, joins=reader, activation=activation)
        if f.family == "norm" and f.path("norm") == norm
        else f
        for f in fusions
    )


def _ask_for_statistics(graph: fx.Graph, node: fx.Node) -> None:
    """Let the layer that makes the input of a norm give the statistics of its rows with it."""
    made = node.args[2]
    if not isinstance(made, fx.Node) or may_write_between(made, node):
        return
    attention = made.args[0] if made.target is operator.getitem else None
    if isinstance(attention, fx.Node) and attention.target is call_norm_then_add:
        if made.args[1] == 0 and attention.args[2] is not None:
            attention.kwargs = {**attention.kwargs, "reader": _reader(graph, node, attention)}
            with graph.inserting_before(made):
                statistics = graph.call_function(operator.getitem, (attention, 1))
            node.kwargs = {**node.kwargs, "statistics": statistics}
        return
    if made.target is not call_linear_scale_add or made.args[3] is None:
        return
    reader = _reader(graph, node, made)
    with graph.inserting_before(made):
        both = graph.call_function(call_linear_for_norm, (*made.args, reader), dict(made.kwargs))
        y, statistics = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
    made.replace_all_uses_with(y)
    node.kwargs = {**node.kwargs, "statistics": statistics}
    graph.erase_node(made)


def _reader(graph: fx.Graph, node: fx.Node, before: fx.Node) -> tuple:
    """The modules of a joined norm and layer, which the graph gets further down, and the activation."""
    linear, act, *_ = node.args
    with graph.inserting_before(before):
        parts = [None if p is None else graph.get_attr(p.target) for p in (node.kwargs["norm"], linear, act)]
    return (*parts, node.args[5])
