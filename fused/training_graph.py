"""What fused calls in the graph of a training forward may leave to each other.

Both rest on who reads a value, which a graph of one container tells:

* a batch norm's result that one convolution alone reads stays pending, to be computed there
  (``defers``, see ``conv_training.Pending``);
* a value that a convolution and others read goes to the others through the convolution (``forks``), whose
  input gradient then adds theirs without a pass of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from fastnets.fused.batch_norm import call_bn_add_act
from fastnets.fused.conv import call_conv_bn_act

_X = {call_conv_bn_act: 3, call_bn_add_act: 2}  # position of x; the residual comes next


def link(graph: fx.Graph, writes: Callable[[fx.Node], bool], save: str) -> int:
    """Mark what may be deferred or forked in a graph of fused calls, and how much is to be saved.

    writes: whether a node writes to its first operand. Returns the number of marks.
    """
    marks = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _X:
            continue
        if _may_stay_pending(node):
            node.kwargs = {**node.kwargs, "defers": True}
            marks += 1
        if node.target is call_conv_bn_act:
            if save != "auto":
                node.kwargs = {**node.kwargs, "save": save}
            marks += _fork(graph, node, writes)
    return marks


def _may_stay_pending(node: fx.Node) -> bool:
    first = _X[node.target]
    residual = node.args[first + 1]
    bn = node.args[first - 2]
    readers = list(node.users)
    return (
        bn is not None
        and residual is None
        and len(readers) == 1
        and readers[0].op == "call_function"
        and readers[0].target is call_conv_bn_act
        and readers[0].args[_X[call_conv_bn_act]] is node
        and readers[0].args[_X[call_conv_bn_act] + 1] is not node
    )


def _fork(graph: fx.Graph, node: fx.Node, writes: Callable[[fx.Node], bool]) -> int:
    """Let the later readers of a convolution's input read it from the convolution."""
    x = node.args[_X[call_conv_bn_act]]
    residual = node.args[_X[call_conv_bn_act] + 1]
    if not isinstance(x, fx.Node) or x is residual:
        return 0
    order = {n: i for i, n in enumerate(graph.nodes)}
    readers = list(x.users)
    later = [r for r in readers if order[r] > order[node]]
    # Modules might write in place, which views that a function returns do not allow.
    if not later or any(writes(r) or r.op == "call_module" for r in readers):
        return 0
    node.kwargs = {**node.kwargs, "forks": True}
    with graph.inserting_after(node):
        result = graph.call_function(operator.getitem, (node, 0))
        passed_on = graph.call_function(operator.getitem, (node, 1))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in (result, passed_on))
    for reader in later:
        reader.replace_input_with(x, passed_on)
    return 1
