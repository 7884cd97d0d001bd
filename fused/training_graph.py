"""What fused calls in the graph of a training forward may leave to each other.

Both rest on who reads a value, which a graph of one container tells:

* a batch norm's result that one convolution alone reads stays pending, to be computed there
  (``defers``, see ``conv_training.Pending``);
* a value that a convolution and others read goes to the others through the convolution (``forks``), whose
  input gradient then adds theirs without a pass of its own;
* a convolution through which all readers of the forward's input read it may finish that input's gradient for
  the block below (``sole``, see ``conv_training``); from one called module to the next, the graph passes on
  that nobody else reads what it hands over (``call_on_private``).
"""

from __future__ import annotations

import operator

from torch import fx

from fastnets.fused.batch_norm import call_bn_add_act
from fastnets.fused.chains import writes
from fastnets.fused.conv import call_conv_bn_act
from fastnets.fused.layout import restore_layout
from fastnets.fused.ownership import call_on_private
from fastnets.fused.patterns import call_bn_iadd_act, call_conv_bn_iadd_act

# Position of x; the residual comes next.
_X = {call_conv_bn_act: 3, call_conv_bn_iadd_act: 4, call_bn_add_act: 2, call_bn_iadd_act: 3}
_CONVOLUTIONS = (call_conv_bn_act, call_conv_bn_iadd_act)


def link(graph: fx.Graph, save: str) -> int:
    """Mark what may be deferred or forked in a graph of fused calls, and how much is to be saved.

    Returns the number of marks.
    """
    marks = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _X:
            marks += _link_call(graph, node, save)
        if node.op == "call_module" and _hands_over(node):
            with graph.inserting_before(node):
                module = graph.get_attr(node.target)
                call = graph.call_function(call_on_private, (module, node.args[0]))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    return marks


def _link_call(graph: fx.Graph, node: fx.Node, save: str) -> int:
    marks = 0
    if _may_stay_pending(node):
        node.kwargs = {**node.kwargs, "defers": True}
        marks += 1
    if node.target in _CONVOLUTIONS and save != "auto":
        node.kwargs = {**node.kwargs, "save": save}
    if node.target is call_conv_bn_act:
        marks += _fork(graph, node)
        x = node.args[_X[node.target]]
        if isinstance(x, fx.Node) and x.op == "placeholder" and readers_of(x) == [node]:
            node.kwargs = {**node.kwargs, "sole": True}
    return marks


def _hands_over(node: fx.Node) -> bool:
    """Whether the node calls a module on the graph's input or on what another call of a module made, and
    nothing else reads that."""
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    made = node.args[0]
    called = made.op in ("call_module", "placeholder") or made.target is call_on_private
    return called and readers_of(made) == [node]


def shows_input(graph: fx.Graph) -> bool:
    """Whether a linked graph calls a module on its input otherwise than by ``call_on_private``: it might keep
    it."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return any(r.op == "call_module" for node in inputs for r in node.users)


def _may_stay_pending(node: fx.Node) -> bool:
    first = _X[node.target]
    residual = node.args[first + 1]
    bn = node.args[first - 2]
    if bn is None or residual is not None or len(node.users) != 1:
        return False
    reader = next(iter(node.users))
    if reader.op != "call_function" or reader.target not in _CONVOLUTIONS:
        return False
    x, added = reader.args[_X[reader.target] :][:2]
    return x is node and added is not node


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Who reads the values of ``node``, and not its layout alone."""
    return [r for r in node.users if r.target is not restore_layout or r.args[0] is node]


def _goes_out(node: fx.Node) -> bool:
    return node.op == "output" or node.target is restore_layout


def _fork(graph: fx.Graph, node: fx.Node) -> int:
    """Let the later readers of a convolution's input read it from the convolution."""
    x = node.args[_X[call_conv_bn_act]]
    residual = node.args[_X[call_conv_bn_act] + 1]
    if not isinstance(x, fx.Node) or x is residual:
        return 0
    order = {n: i for i, n in enumerate(graph.nodes)}
    readers = readers_of(x)
    # The caller may ask for the gradient of what it is given: all of it, not what the other readers add.
    later = [r for r in readers if order[r] > order[node] and not _goes_out(r)]
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
