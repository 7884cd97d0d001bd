"""``optimize`` and ``restore``: a whole network's containers rewritten, and given back their stock classes.

``optimize`` works in three steps: capture every container that can be captured, from the leaves up; decide,
from the root down, where stock's memory format must be visible; then fuse and swap classes, again from the
leaves up. See ``capture``, ``layout``, ``patterns`` and ``swap`` for each.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastnets.fused import cuda_graphs as graphs
from fastnets.fused import dispatch, packing
from fastnets.fused.conv_training import SAVES
from fastnets.fused.fuse import is_layer
from fastnets.fused.known_forwards import known_forward
from fastnets.fused.layout import is_stock, may_observe_layout, names_read_by
from fastnets.fused.packing import refresh
from fastnets.fused.patterns import is_convolution
from fastnets.fused.swap import Rewritten, give_between_blocks, hides_layout, install
from fastnets.fused.variants import (
    Recipe,
    arguments_that_may_be_given,
    blueprint_of,
    capture_variants,
    is_sequential,
    tensors_given,
    without_rewrite,
)

__all__ = ["optimize", "refresh", "restore"]

MODES = ("auto", "inference", "training")
_SELECT = ("heuristic", "measure", "shipped")


def optimize(
    model: nn.Module,
    example_inputs: object = None,
    *,
    mode: str = "auto",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    select: str = "heuristic",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    inplace: bool = False,
    strict: bool = False,
    cuda_graphs: bool = False,
    save: str = "auto",
) -> nn.Module:
    """The network with fused layers: same weights, same ``state_dict``, same answers.

    Args:
        model: any network. Containers whose forward cannot be captured stay stock; what is inside them does
            not.
        example_inputs: a tensor, or a tuple of positional arguments. Their shapes are kept for reports.
        mode: "auto" fuses whatever ``model.training`` allows at the time of each call. "inference" is "auto"
            with the layers' weights packed as early as possible. "training" never folds or packs weights, so
            that layers in evaluation mode run the reference composition where nothing else is asked for.
        dtype: convert floating-point parameters and buffers to it.
        backend: "auto", "triton", "library" or "reference".
        select: "heuristic" runs what was measured to be the fastest on this device before, and the shipped
            heuristic's choice elsewhere. "measure" measures what is not known yet (see ``fused.selection``;
            about a minute and a half at most), and leaves the network stock, with a warning, where its fused
            form is not clearly faster on ``example_inputs``, which it needs. "shipped" uses no measurement.
        filter_fn: called as ``filter_fn(layer, name)`` with each convolution, linear layer, batch, layer and
            RMS norm, and nn.MultiheadAttention; False keeps that layer stock.
        inplace: rewrite ``model`` itself instead of a copy.
        strict: raise where a convolution, linear layer or attention, or what follows one, could not be fused.
        cuda_graphs: in inference on CUDA, launch the whole forward at once: one CUDA graph is captured for
            each kind of input, up to eight, the second time it comes (see ``fused.cuda_graphs`` for what must
            not change meanwhile). Elsewhere, on the CPU for one, calls run as without it.
        save: what a training step keeps for its backward. "auto" keeps the inputs and outputs of
            convolutions, as stock does; "less" only the outputs, and normalises them again for the weights'
            gradients.

    Returns:
        The optimized network; ``model`` itself where ``inplace`` is set. Inner containers may hand each other
        (and hooks on them) channels-last tensors; what the network returns has stock's layout. With
        ``FASTNETS_DISABLE=1`` in the environment the stock network, in ``dtype`` where that is given.

    Raises:
        TypeError, ValueError: for arguments that make no sense, and, with ``strict``, for layers that were
            not fused. ``model`` is then as it was. With ``select="measure"`` also what the stock network
            raises for ``example_inputs``.
    """
    _validate(model, mode, dtype, backend, select, filter_fn, save)
    for name, flag in (("inplace", inplace), ("strict", strict), ("cuda_graphs", cuda_graphs)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    arguments_of(example_inputs)
    if dispatch.DISABLED:
        stock = restore(model if inplace else copy.deepcopy(model))
        return stock if dtype is None else stock.to(dtype=dtype)
    if select == "measure":
        if example_inputs is None:
            raise ValueError(
                "select='measure' needs example_inputs: give the inputs that the network will be run on"
            )
        rewritten = functools.partial(
            optimize,
            mode=mode,
            dtype=dtype,
            backend=backend,
            filter_fn=filter_fn,
            strict=strict,
            cuda_graphs=cuda_graphs,
            save=save,
        )
        return _optimize_by_measurement(model, example_inputs, rewritten, dtype, inplace)
    if mode == "training" and backend == "auto":
        backend = dispatch.UNFOLDED
    if select == "shipped" and backend == "auto":
        backend = dispatch.UNMEASURED
    with torch.inference_mode(False):
        undo = None
        if inplace:
            undo = [(m, type(m)) for m in model.modules() if isinstance(m, Rewritten)]
        fast = model if inplace else copy.deepcopy(model)
        restore(fast)
        recipe = Recipe(
            backend=backend, save=save, replays=cuda_graphs, example=_shapes_of(example_inputs)
        )  # fmt: skip
        try:
            _rewrite_network(fast, recipe, filter_fn)
            if cuda_graphs and not _replays(fast):
                raise ValueError(f"cuda_graphs=True: the forward of {type(fast).__name__} is not one that "
                                 "fastnets can rewrite; leave it False and use torch.cuda.graph")  # fmt: skip
            if strict:
                _check_strict(fast)
        except BaseException:
            if inplace:
                restore(fast)
                for module, cls in undo:
                    module.__class__ = cls
            raise
        if dtype is not None:
            fast.to(dtype=dtype)
        _weights_to_channels_last(fast)
    packing.bump()
    return fast


def _replays(model: nn.Module) -> bool:
    blueprint = blueprint_of(type(model))
    return blueprint is not None and blueprint.recipe.replays


def _optimize_by_measurement(model, example_inputs, rewritten, dtype, inplace) -> nn.Module:
    """What ``optimize`` returns for ``select="measure"``; ``rewritten`` is ``optimize`` without it."""
    from fastnets.fused.selection import refuse_sharded, select

    refuse_sharded(model)
    with torch.inference_mode(False):
        stock = model if not inplace and dtype is None else copy.deepcopy(model)
        if dtype is not None:
            stock.to(dtype=dtype)
        if any(isinstance(m, Rewritten) for m in stock.modules()):
            stock = restore(copy.deepcopy(stock))
    arguments = arguments_of(example_inputs)
    if dtype is not None:
        arguments = pytree.tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, arguments
        )
    fast = rewritten(model, arguments, inplace=inplace)
    found = select(stock, fast, arguments)
    if found.interrupted:
        if inplace:
            restore(fast)
        raise KeyboardInterrupt
    if found.keeps_stock:
        warnings.warn(f"fastnets.optimize(select='measure'): {found.verdict}", stacklevel=4)
        restore(fast)
    return fast


def restore(model: nn.Module) -> nn.Module:
    """Give ``model`` back its stock classes, in place, with its current weights. Returns ``model``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastnets.restore expects an nn.Module, got {type(model).__name__}")
    graphs.forget(model)
    for module in model.modules():
        if isinstance(module, Rewritten):
            module.__class__ = without_rewrite(type(module))
    packing.bump()
    return model


def _validate(model, mode, dtype, backend, select, filter_fn, save) -> None:
    if not isinstance(model, nn.Module):
        what = type(model).__name__
        if isinstance(model, type):
            what = f"the class {model.__name__}; pass an instance of it"
        elif isinstance(model, str):
            what = f"the str {model!r}; fastnets.create_model({model!r}) builds a network by its name"
        raise TypeError(f"fastnets.optimize expects an nn.Module, got {what}")
    dispatch.validate_backend(backend)
    _one_of("mode", mode, MODES)
    _one_of("select", select, _SELECT)
    _one_of("save", save, SAVES)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    if filter_fn is not None and not _takes_two(filter_fn):
        what = "one that does not take two arguments" if callable(filter_fn) else type(filter_fn).__name__
        raise TypeError(f"filter_fn must be callable as filter_fn(module, name), got {what}")


def _takes_two(function: object) -> bool:
    try:
        inspect.signature(function).bind(None, "")
    except ValueError:  # it has no signature that can be read
        return True
    except TypeError:
        return False
    return True


def arguments_of(example_inputs: object) -> tuple | None:
    """``example_inputs`` as a tuple of positional arguments; None where none are given.

    Raises ``TypeError`` where they are sizes or text: a shape in a tensor's place is a common slip.
    """
    if example_inputs is None:
        return None
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not arguments or all(isinstance(x, (int, float, str)) for x in pytree.tree_leaves(arguments)):
        raise TypeError(
            f"example_inputs={example_inputs!r} holds no tensor: give one, such as torch.randn(1, 3, 64, 64),"
            " or a tuple of the arguments that the network is called with"
        )
    return arguments


def _one_of(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument}={value!r} is not known{hint} (one of: {', '.join(allowed)})")


def _shapes_of(example_inputs: object) -> object:
    """``example_inputs`` as (arguments, spec) with every tensor replaced by its shape and dtype."""
    arguments = arguments_of(example_inputs)
    if arguments is None:
        return None
    leaves, spec = pytree.tree_flatten(arguments)
    return tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else None for x in leaves), spec


# --- the three steps ----------------------------------------------------------------------------------------


def _rewrite_network(model: nn.Module, recipe: Recipe, filter_fn: Callable | None) -> None:
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    heads = [m for m in names if is_layer(m)]
    if not heads:
        return
    excluded = {m for m in heads if filter_fn is not None and not filter_fn(m, names[m])}
    network = _Network(model)
    for module, variants in network.captured.items():
        own = replace(
            recipe,
            restores_outputs=module in network.restores_outputs,
            keep_stock=_paths_of(module, excluded),
            given=tuple(network.given.get(module, ())),
            splits_batches=module is model,
            replays=recipe.replays and module is model,
            example=recipe.example if module is model else None,
        )
        install(module, variants, own)
    for module in model.modules():
        give_between_blocks(module)


def _paths_of(container: nn.Module, modules: set[nn.Module]) -> frozenset[str]:
    if not modules:
        return frozenset()
    return frozenset(p for p, m in container.named_modules(remove_duplicate=False) if m in modules)


class _Network:
    """What is known about the containers of a network before any of them is rewritten.

    Attributes:
        captured: container -> its variants, children before their parents.
        restores_outputs: the containers that must return stock's layout: the root, and those whose parent's
            code might look at it.
    """

    def __init__(self, model: nn.Module):
        self.parents: dict[nn.Module, list[nn.Module | None]] = {model: [None]}
        order: list[nn.Module] = []
        self._visit(model, order)
        self.fusible = self._containers_of_layers(order)
        self.captured = {m: capture_variants(m) for m in order if self._worth_capturing(m)}
        self.given: dict[nn.Module, list[tuple[str, ...]]] = {}
        for module in reversed(order):  # callers first: what they are given, they may hand on
            if self.captured.get(module) and not all(c in self.captured for c in self.parents[module]):
                for name in arguments_that_may_be_given(type(module)):  # nobody knows how it is called
                    self._capture_with(module, (name,))
            self._capture_what_is_given(module)
        self.restores_outputs = {m for m in self.captured if self._must_restore(m, model)}

    def _capture_what_is_given(self, caller: nn.Module) -> None:
        """Capture children for the arguments that ``caller`` gives them although they have a default."""
        for variant in list(self.captured.get(caller, {}).values()):
            nodes = () if variant.captured is None else variant.captured.graph.nodes
            for node in nodes:
                child = caller.get_submodule(node.target) if node.op == "call_module" else None
                if self.captured.get(child):
                    self._capture_with(child, tensors_given(node, child))

    def _capture_with(self, module: nn.Module, given: tuple[str, ...]) -> None:
        if not given or given in self.given.setdefault(module, []):
            return
        variants = capture_variants(module, given)
        if any(variant.captured is not None for variant in variants.values()):
            self.given[module].append(given)
            self.captured[module] |= variants

    def _visit(self, module: nn.Module, order: list[nn.Module]) -> None:
        """Record parents, and append to ``order`` children first."""
        for child in module.children():
            seen = child in self.parents
            self.parents.setdefault(child, []).append(module)
            if not seen:
                self._visit(child, order)
        order.append(module)

    @staticmethod
    def _containers_of_layers(order: list[nn.Module]) -> set[nn.Module]:
        """The modules that are, or hold, a layer; of users' own, also those with parameters or attention."""
        found: set[nn.Module] = set()
        for module in order:
            own = not is_stock(type(module)) and (bool(module._parameters) or attends(type(module)))
            if own or is_layer(module) or any(c in found for c in module.children()):
                found.add(module)
        return found

    def _worth_capturing(self, module: nn.Module) -> bool:
        cls = type(module)
        if isinstance(module, torch.jit.ScriptModule) or _only_holds(module) or "forward" in module.__dict__:
            return False
        if known_forward(cls) is not None:
            return True
        if is_stock(cls) and not is_sequential(module):
            return False
        if cls.__call__ is not nn.Module.__call__:
            return False
        alone = next(module.children(), None) is None and (is_stock(cls) or is_layer(module))
        holds_layers = module in self.fusible and not alone
        return holds_layers or may_observe_layout(cls)

    def _hides_layout(self, module: nn.Module) -> bool:
        """Whether children of ``module`` may return any layout to it."""
        cls = type(module)
        if module in self.captured:
            return hides_layout(cls, self.captured[module])
        return (
            not may_observe_layout(cls)
            and (not is_stock(cls) or is_sequential(module))
            and ("forward" not in module.__dict__)
        )

    def _must_restore(self, module: nn.Module, root: nn.Module) -> bool:
        if module is root:
            return True
        if not self._hides_layout(module):
            return False  # it is given stock's layout by its children, and keeps it
        return any(self._looks(parent, module) for parent in self._callers(module))

    def _callers(self, module: nn.Module) -> list[nn.Module]:
        """The nearest ancestors that have a forward of their own."""
        callers = []
        for parent in self.parents[module]:
            if parent is None:
                continue
            callers += self._callers(parent) if _only_holds(parent) and parent in self.parents else [parent]
        return callers

    def _looks(self, caller: nn.Module, module: nn.Module) -> bool:
        if not self._hides_layout(caller):
            return True
        # Code further up may call it past its parent, as in self.backbone.layer1(x).
        ancestors = list(self._callers(caller))
        names = {name for parent in self.parents[module] if parent is not None
                 for name, child in parent.named_children() if child is module}  # fmt: skip
        while ancestors:
            ancestor = ancestors.pop()
            if not self._hides_layout(ancestor) and not names.isdisjoint(names_read_by(type(ancestor))):
                return True
            ancestors += self._callers(ancestor)
        return False


def attends(cls: type[nn.Module]) -> bool:
    """Whether code of the class calls PyTorch's attention."""
    return "scaled_dot_product_attention" in names_read_by(cls)


def _only_holds(module: nn.Module) -> bool:
    """Whether this is a plain list or dict of modules, which nobody calls."""
    cls = type(module)
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and cls.forward in (
        nn.ModuleList.forward,
        nn.ModuleDict.forward,
        nn.Module.forward,
    )


def _weights_to_channels_last(model: nn.Module) -> None:
    """Lay out the weights of fused convolutions on CUDA as the kernels read them. Values stay."""
    for module in model.modules():
        if is_convolution(module) and type(module.weight) is nn.Parameter and module.weight.is_cuda:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _check_strict(model: nn.Module) -> None:
    from fastnets.fused.explain import explain

    rows = [row for row in explain(model).rows if row.counts and not row.fused]
    if rows:
        listed = "\n".join(f"  {row.path}: {row.reason}" for row in rows)
        raise ValueError(
            f"{len(rows)} layers cannot be fused:\n{listed}\nUse strict=False to leave them as stock."
        )
