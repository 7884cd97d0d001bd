"""What the forwards of one container are captured under, and how its generated class remembers that.

A container's forward is captured under every condition that makes a difference, see ``Condition`` and the top
of ``fused.swap``. Here is what the captured graphs, and the class that is generated from them, are known by.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused.activation import recognise
from fastnets.fused.capture import (
    Captured,
    CaptureError,
    capture,
    has_hooks,
    is_dropout,
    is_dropout_class,
    never_drops,
)
from fastnets.fused.chains import Fusion, Left
from fastnets.fused.fuse import is_layer
from fastnets.fused.known_forwards import known_forward
from fastnets.fused.layout import (
    is_stock,
    may_observe_layout,
)
from fastnets.fused.patterns import is_batch_norm, is_convolution
from fastnets.fused.transformer_patterns import (
    is_elementary,
)


@dataclass(frozen=True)
class Recipe:
    """How a container was rewritten: enough to do it again after unpickling or a change of its structure.

    Attributes:
        backend: what the fused calls run on.
        save: how much a training step saves for its backward, see ``optimize``.
        restores_outputs: the caller is not rewritten, so results go out in stock's layout.
        keep_stock: paths, from the container, of layers that are not to be fused.
        gives_between_blocks: the container is a plain Sequential, whose blocks may overwrite what they get.
        given: sets of arguments that have a default and are given as tensors, as callers do.
        splits_batches: the container is a whole network, whose batches may be split (``fused.memory``).
        replays: the container is a whole network, replayed from CUDA graphs (``fused.cuda_graphs``).
        example: on the root, shapes of the example inputs given to ``optimize``, for reports.
    """

    backend: str = "auto"
    save: str = "auto"
    restores_outputs: bool = False
    keep_stock: frozenset[str] = frozenset()
    given: tuple[tuple[str, ...], ...] = ()
    gives_between_blocks: bool = False
    splits_batches: bool = False
    replays: bool = False
    example: object = field(default=None, hash=False)


@dataclass(frozen=True)
class Condition:
    """When one captured graph holds."""

    training: bool
    intact: bool
    kind: type
    given: tuple[str, ...] = ()


@dataclass
class Variant:
    """What runs under one condition: a rewritten graph, or stock (``captured`` None) for the ``reason``."""

    captured: Captured | None
    reason: str = ""
    source: str = ""
    source_then_add: str = ""
    namespace: dict = field(default_factory=dict)
    fusions: tuple[Fusion, ...] = ()
    left: tuple[Left, ...] = ()
    changes: int = 0
    overwrites: int = 0
    held: list[str] = field(default_factory=list)


class Blueprint:
    """What a generated class was made from. It pickles as the stock class and the recipe."""

    def __init__(self, stock_class: type[nn.Module], recipe: Recipe):
        self.stock_class = stock_class
        self.recipe = recipe
        self.generated: type[nn.Module] | None = None
        self.variants: dict[Condition, Variant] = {}
        self.source = ""
        self.hides_layout = True
        self.overwrites = False
        self.keeps_private = False
        self.scope: dict[str, object] = {}

    def __reduce__(self):
        return Blueprint, (self.stock_class, self.recipe)

    def __deepcopy__(self, memo) -> Blueprint:
        return self


# --- capturing all variants of one container ----------------------------------------------------------------


def ends_in_layers(sequential: nn.Module) -> bool:
    """Whether a Sequential begins or ends with something that may fuse with what stands around it."""
    children = list(sequential.children())
    for child in children[:1] + children[-1:]:
        if is_layer(child) or is_elementary(child) or recognise(child) is not None:
            return True
        if is_sequential(child) and ends_in_layers(child):
            return True
    return False


def is_convolution_unit(module: nn.Module) -> bool:
    """Whether a container holds nothing but one convolution and what may follow it: a norm, an activation."""
    layers = list(module.children())
    convolutions = [child for child in layers if is_convolution(child)]
    return (
        len(convolutions) == 1
        and not module._parameters
        and not module._buffers
        and all(
            child is convolutions[0]
            or is_batch_norm(child)
            or type(child) is nn.Identity
            or recognise(child) is not None
            for child in layers
        )
    )


def is_sequential(module: nn.Module) -> bool:
    """An nn.Sequential with the stock forward (which a rewritten one stands for, too)."""
    cls = without_rewrite(type(module))
    return issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward


def _forward_to_go_through(module: nn.Module) -> Callable | None:
    """The forward of a child that its caller's graph goes through; None for children that it calls."""
    if has_hooks(module):
        return None
    if is_sequential(module):
        return nn.Sequential.forward if ends_in_layers(module) else None
    return without_rewrite(type(module)).forward if is_elementary(module) else None


def _units_within(module: nn.Module) -> Iterator[nn.Module]:
    """The units of one convolution that the forward may call, in Sequentials or not, as far as their own
    forwards can be captured: code that does more, or writes somewhere, is called."""
    for child in module.children():
        if is_sequential(child):
            yield from _units_within(child)
        elif is_convolution_unit(child):
            with contextlib.suppress(CaptureError):
                capture(child, training=False, inline=None)
                yield child


def _through_units(units: set[nn.Module], module: nn.Module) -> Callable | None:
    """As ``_forward_to_go_through``, and through units of one convolution: what stands around them may be one
    call with the convolution."""
    if has_hooks(module):
        return None
    if module in units:
        return without_rewrite(type(module)).forward
    if is_sequential(module) and any(child in units for child in list(module.children())[-1:]):
        return nn.Sequential.forward
    return _forward_to_go_through(module)


def capture_variants(module: nn.Module, given: tuple[str, ...] = ()) -> dict[Condition, Variant]:
    """Capture the forward under every condition that makes a difference. ``module`` has its stock class.

    given: arguments with a default that are tensors in these calls.
    """
    variants: dict[Condition, Variant] = {}
    if known_forward(type(module)) is not None:
        return variants
    through_units = functools.partial(_through_units, set(_units_within(module)))
    for training in (False, True):
        inline = _forward_to_go_through if training else through_units
        kinds = [Tensor]
        for kind in kinds:
            inlining = _variant(module, training, inline, kind, given)
            intact, broken = (Condition(training, whole, kind, given) for whole in (True, False))
            variants[intact] = variants[broken] = inlining
            captured = inlining.captured
            if captured is not None and (captured.inlined or captured.bypassed):
                variants[broken] = _variant(module, training, None, kind, given)
            if kind is Tensor and not given and (captured is None or captured.asks_type):
                kinds.append(list)
    return variants


def _variant(
    module: nn.Module, training: bool, inline: Callable | None, kind: type, given: tuple[str, ...]
) -> Variant:
    try:
        captured = capture(module, training=training, inline=inline, input_kind=kind, given=given)
    except CaptureError as error:
        return Variant(None, str(error))
    held = _held(module, captured)
    if kind is list and len([n for n in captured.graph.nodes if n.op == "placeholder"]) != 1:
        return Variant(None, "its forward takes several arguments, not all of them tensors")
    return Variant(captured, held=held)


def tensors_given(call: fx.Node, module: nn.Module) -> tuple[str, ...]:
    """The arguments with a default that a call in a graph gives ``module`` as values of the graph."""
    parameters = list(inspect.signature(without_rewrite(type(module)).forward).parameters.values())[1:]
    named = dict(zip((p.name for p in parameters), call.args)) | dict(call.kwargs)
    return tuple(
        p.name for p in parameters if p.default is not p.empty and isinstance(named.get(p.name), fx.Node)
    )


def arguments_that_may_be_given(cls: type[nn.Module]) -> list[str]:
    """Names of the arguments of the forward that are left out by None."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return [p.name for p in parameters if p.default is None]


def observes_layout(module: nn.Module) -> bool:
    """Whether a rewritten caller must give ``module`` its inputs in stock's layout."""
    blueprint = blueprint_of(type(module))
    return not blueprint.hides_layout if blueprint is not None else may_observe_layout(type(module))


# --- what a graph takes for granted -------------------------------------------------------------------------


def children_name(path: str) -> str:
    """What the scope of a generated class calls the children that a graph was captured with."""
    return f"_fn_children_{path.replace('.', '_')}"


def children_of(module: nn.Module) -> tuple:
    """Names and classes of a module's children."""
    return tuple(module._modules), tuple(map(type, module._modules.values()))


def layers_of(module: nn.Module) -> tuple:
    """Names of a module's children, and classes of those that hold no others."""
    children = module._modules
    return tuple(children), tuple([None if m is None or m._modules else type(m) for m in children.values()])


def _held(module: nn.Module, captured: Captured) -> list[str]:
    """Paths of the lists and dicts of modules that a graph reaches into ("" for a Sequential's own)."""
    paths = {}
    for node in captured.graph.nodes:
        if node.op == "call_module":
            parts = node.target.split(".")
            for i in range(len(parts)):
                paths[".".join(parts[:i])] = None
    kinds = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return [p for p in paths if p not in captured.inlined and isinstance(module.get_submodule(p), kinds)]


def is_intact(sequential: nn.Module, children: tuple) -> bool:
    """Whether going through ``sequential`` still equals calling it."""
    return not (has_hooks(sequential) or _has_any_global_hook()) and children_of(sequential) == children


def passes_through(module: nn.Module, evaluating: bool = False) -> bool:
    """Whether calling ``module`` would still return its input."""
    if has_hooks(module) or _has_any_global_hook():
        return False
    if type(module) is nn.Identity:
        return True
    return is_dropout(module) and (evaluating or not module.training or never_drops(module))


# --- from classes to what they were made from ---------------------------------------------------------------


def blueprint_of(cls: type) -> Blueprint | None:
    """The blueprint of a generated class, or of the generated class that ``cls`` was derived from."""
    return getattr(cls, "_fastnets", None)


_stock_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def without_rewrite(cls: type) -> type:
    """The class without the generated one in its ancestry: FSDP and parametrizations derive from whatever
    class they find."""
    if blueprint_of(cls) is None:
        return cls
    if "_fastnets" in vars(cls):
        return cls._fastnets.stock_class
    stock = _stock_classes.get(cls)
    if stock is None:
        attributes = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        stock = _stock_classes[cls] = type(cls)(
            cls.__name__, tuple(map(without_rewrite, cls.__bases__)), attributes
        )
    return stock


_KNOWN_CODE = ("torch", "fastnets", "_operator", "operator", "builtins", "math")


def runs_known_code(module: nn.Module) -> bool:
    """Whether a call of this module alone, in evaluation mode, runs no code but PyTorch's and ours."""
    cls = type(module)
    blueprint = blueprint_of(cls)
    if blueprint is None and (is_stock(cls) or is_dropout_class(cls)):
        return True
    if blueprint is None:  # nothing in it was there to fuse
        found = [v for condition, v in capture_variants(module).items() if not condition.training]
    elif not blueprint.variants:  # a forward that we have written, see known_forwards and give_between_blocks
        return "_fastnets" in vars(cls)
    else:
        found = variants_in_force(module)
    graphs = [variant.captured.graph for variant in found if variant.captured is not None]
    functions = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return bool(graphs) and all((f.__module__ or "").split(".")[0] in _KNOWN_CODE for f in functions)


def variants_in_force(module: nn.Module) -> list[Variant]:
    """The captured graphs that a call in evaluation mode would choose among, as things are now."""
    blueprint = blueprint_of(type(module))
    found = []
    for condition, variant in blueprint.variants.items():
        if condition.training or not condition.intact or variant.captured is None:
            continue
        if not _goes_through(module, blueprint, variant.captured):
            variant = blueprint.variants[replace(condition, intact=False)]
        if variant.captured is not None:
            found.append(variant)
    return found


def _goes_through(module: nn.Module, blueprint: Blueprint, captured: Captured) -> bool:
    return all(
        is_intact(module.get_submodule(path), blueprint.scope[children_name(path)])
        for path in captured.inlined
    ) and all(passes_through(module.get_submodule(path), evaluating=True) for path in captured.bypassed)
