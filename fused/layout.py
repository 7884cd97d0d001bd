"""Memory format as the network's own code sees it.

Fused convolutions return channels-last tensors where stock layers keep the layout of their input. Operators
do not care, but code may look: ``x.view(n, -1)`` raises on a channels-last map, ``x.stride()`` reports it. So
inside rewritten graphs ``view`` becomes ``reshape``, and where a tensor reaches code that the rewriting does
not see, :func:`restore_layout` gives it the layout that stock would have had there.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

# Names by which Python code can tell one layout from another, or hands tensors to code that might.
_OBSERVING_NAMES = frozenset(
    [
        "view",
        "view_as",
        "stride",
        "is_contiguous",
        "as_strided",
        "as_strided_",
        "data_ptr",
        "storage",
        "untyped_storage",
        "storage_offset",
        "resize_",
        "set_",
        "apply",
        "numpy",
        "to_dlpack",
        "from_dlpack",
        "__dlpack__",
        "__cuda_array_interface__",
    ]
)
_OBSERVING_METHODS = frozenset(
    [
        "stride",
        "is_contiguous",
        "as_strided",
        "as_strided_",
        "data_ptr",
        "storage",
        "untyped_storage",
        "storage_offset",
        "resize_",
        "set_",
        "numpy",
        "dim_order",
        "is_set_to",
    ]
)
_SAME_VALUES_ANY_LAYOUT = {"view": "reshape", "view_as": "reshape_as"}
_VIEW_METHODS = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "view_as",
        "reshape_as",
        "chunk",
        "split",
        "movedim",
        "swapaxes",
        "unbind",
    ]
)
_VIEW_FUNCTIONS = frozenset(
    [operator.getitem, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze]
    + [torch.unsqueeze, torch.chunk, torch.split, torch.movedim, torch.swapaxes, torch.unbind]
)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)
_DROPOUT_FUNCTIONS = frozenset(
    getattr(torch.nn.functional, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
)
_SETUP = ("__init__", "init_weights", "_init_weights", "reset_parameters")  # does not run in a forward
_CALL_DEPTH = 3  # how far the scan for observing names follows a class's helper functions


class LayoutError(Exception):
    """A graph looks at strides in a way that no rewriting can hide; the message names it."""


def is_channels_last(x: Tensor) -> bool:
    """Whether operators would take ``x`` [N, C, H, W] for channels-last: PyTorch's own rule, from strides."""
    if x.stride(1) == 0:
        return False
    smallest = 0
    for dim in (1, 3, 2, 0):
        size, stride = x.size(dim), x.stride(dim)
        if size == 0 or stride < smallest or (dim == 0 and smallest == x.stride(1)):
            return False
        smallest = stride * size if size > 1 else stride
    return True


def restore_layout(value: object, *region_inputs: object) -> object:
    """``value`` in the layout that stock gives it: contiguous, unless a region's input is channels-last.

    value: anything; only 4-D tensors change, and are copied only where they are not contiguous already.
    """
    if not isinstance(value, Tensor) or value.dim() != 4 or value.is_contiguous():
        return value
    if not value.is_contiguous(memory_format=torch.channels_last):
        return value
    for x in region_inputs:
        if isinstance(x, Tensor) and x.dim() == 4 and is_channels_last(x):
            return value
    return value.contiguous()


def restore_layout_of_all(values: object, *region_inputs: object) -> object:
    """:func:`restore_layout` for every tensor in a nest of tuples, lists and dicts."""
    if isinstance(values, Tensor):
        return restore_layout(values, *region_inputs)
    return pytree.tree_map(lambda value: restore_layout(value, *region_inputs), values)


def hide_layout(
    graph: fx.Graph,
    root: nn.Module,
    *,
    restore_outputs: bool,
    observing: Callable[[nn.Module], bool],
    as_stock: Callable[[fx.Node], bool] = lambda node: False,
    training: bool = False,
) -> int:
    """Edit ``graph`` so that no code outside it sees a layout that stock would not have shown.

    root: the module that the graph's paths start from. restore_outputs: the graph's caller is not rewritten,
    so results go back in stock's layout; the graph's own inputs are then in stock's layout and say which
    that is. observing: whether a called module looks at the layout of its inputs. as_stock: whether a node's
    value has stock's layout whatever that of its inputs. training: dropout draws its noise in the order of
    memory, and so looks, too.

    Returns the number of changes. Raises :class:`LayoutError` for a graph that reads strides itself.
    """
    changes = 0
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        if node.op == "call_method":
            if node.target in _OBSERVING_METHODS:
                raise LayoutError(f"its forward calls Tensor.{node.target}()")
            if node.target in _SAME_VALUES_ANY_LAYOUT and not _reinterprets_dtype(node):
                node.target = _SAME_VALUES_ANY_LAYOUT[node.target]
                changes += 1
        elif node.op == "call_function":
            if getattr(node.target, "__name__", "") in ("as_strided", "from_dlpack"):
                raise LayoutError(f"its forward calls {node.target.__name__}()")
            if not _is_torch_function(node.target) or (training and node.target in _DROPOUT_FUNCTIONS):
                changes += _restore_arguments(graph, node, inputs if restore_outputs else [], as_stock)
        elif node.op == "call_module":
            module = root.get_submodule(node.target)
            if observing(module) or (training and isinstance(module, _DROPOUTS)):
                changes += _restore_arguments(graph, node, inputs if restore_outputs else [], as_stock)
        elif node.op == "output" and restore_outputs:
            changes += _restore_arguments(graph, node, inputs, as_stock)
    return changes


def _reinterprets_dtype(node: fx.Node) -> bool:
    return bool(node.kwargs) or any(isinstance(arg, torch.dtype) for arg in node.args)


def _is_torch_function(target: Callable) -> bool:
    module = getattr(target, "__module__", None) or type(target).__module__
    return module.split(".")[0] in ("torch", "_operator", "builtins", "math", "fastnets", "torchvision")


def _restore_arguments(
    graph: fx.Graph, consumer: fx.Node, region_inputs: list[fx.Node], as_stock: Callable[[fx.Node], bool]
) -> int:
    """Bring the consumer's tensors to stock's layout, below the views through which it would see it."""
    changes = 0
    for node in list(consumer.all_input_nodes):
        reader, base = consumer, node
        while _is_view(base) and base.all_input_nodes:
            reader, base = base, base.all_input_nodes[0]
        if base.op == "get_attr" or base in region_inputs or base.target is restore_layout:
            continue
        if as_stock(base):
            continue
        with graph.inserting_after(base):
            restored = graph.call_function(restore_layout, (base, *region_inputs))
        reader.replace_input_with(base, restored)
        changes += 1
    return changes


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _VIEW_METHODS
    return node.op == "call_function" and node.target in _VIEW_FUNCTIONS


# --- what classes that are not rewritten may look at --------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def is_stock(cls: type) -> bool:
    """Whether the class comes with PyTorch, all its bases, too. Those accept every layout.

    PyTorch itself derives classes from a user's, for FSDP and for parametrizations: these are not stock.
    """
    return all(
        base.__module__.split(".")[0] in ("torch", "builtins", "typing", "abc") for base in cls.__mro__
    )


@functools.lru_cache(maxsize=4096)
def names_read_by(cls: type[nn.Module]) -> frozenset[str]:
    """The attribute and global names in the code of a module class, and in the functions which that calls."""
    names: set[str] = set()
    seen: set[types.CodeType] = set()
    for base in cls.__mro__:
        if is_stock(base):
            continue
        for name, member in vars(base).items():
            if name in _SETUP:
                continue
            for function in _functions_of(member):
                _collect_names(function, names, seen, _CALL_DEPTH)
    return frozenset(names)


def may_observe_layout(cls: type[nn.Module]) -> bool:
    """Whether code of this class might see the layout of a tensor. PyTorch's own classes never do."""
    return not is_stock(cls) and not _OBSERVING_NAMES.isdisjoint(names_read_by(cls))


def _functions_of(member: object) -> Iterator[types.FunctionType]:
    if isinstance(member, property):
        yield from (f for f in (member.fget, member.fset) if isinstance(f, types.FunctionType))
        return
    member = getattr(member, "__func__", member)  # staticmethod, classmethod
    while isinstance(member, types.FunctionType):
        yield member
        member = getattr(member, "__wrapped__", None)


def _collect_names(function: types.FunctionType, names: set[str], seen: set, depth: int) -> None:
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        if code in seen:
            continue
        seen.add(code)
        names.update(code.co_names)
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        if depth == 0:
            continue
        for name in code.co_names:
            called = function.__globals__.get(name)
            if isinstance(called, types.FunctionType) and called.__module__.split(".")[0] != "torch":
                _collect_names(called, names, seen, depth - 1)
