"""Giving one container instance the rewritten forward: a generated subclass of its class, and back.

The generated class differs from the stock class in its methods only. Nothing is registered and no attribute
is added, so types, ``state_dict`` keys, hooks and pickles stay what they were. Its forward picks, at every
call, among graphs captured under different conditions, and runs the stock forward where none of them holds:

* ``training``: the forward may read ``self.training``;
* *intact*: a graph that goes through child Sequentials, or past children that return their input, holds as
  long as those carry no hooks and still have the children they had; else a graph that calls them takes over;
* the kind of the inputs, where the forward asks for it;
* arguments that have a default must be left at it, but for those that a rewritten caller is known to give
  (*given*), which must be tensors.
"""

from __future__ import annotations

import copyreg
import inspect
import itertools
import linecache
import weakref

from torch import Tensor, nn

from fastnets.fused import packing, whole_forward
from fastnets.fused.activation import recognise
from fastnets.fused.capture import (
    CaptureError,
    has_hooks,
    is_dropout,
    is_dropout_class,
)
from fastnets.fused.cuda_graphs import forget, replayed
from fastnets.fused.forward_source import Writer, rewrite_variants
from fastnets.fused.handing_down import THEN_ADD
from fastnets.fused.known_forwards import KnownForward, known_forward
from fastnets.fused.layout import (
    is_stock,
    may_observe_layout,
    names_read_by,
)
from fastnets.fused.memory import in_chunks
from fastnets.fused.ownership import run_in_sequence
from fastnets.fused.patterns import is_batch_norm, is_convolution
from fastnets.fused.training_graph import shows_input
from fastnets.fused.transformer_patterns import (
    is_elementary,
    is_linear,
    is_norm,
)
from fastnets.fused.variants import (
    Blueprint,
    Condition,
    Recipe,
    Variant,
    blueprint_of,
    capture_variants,
    is_sequential,
    observes_layout,
    runs_known_code,
    without_rewrite,
)

_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"_modules"}
_STRUCTURE = ("_fn_children", "_fn_layers_")  # names of constants that are compared by value
_serial = itertools.count()


# --- the generated class ------------------------------------------------------------------------------------


class Rewritten:
    """First base of every generated class: a stock container that runs rewritten graphs."""

    _fastnets: Blueprint

    def __init_subclass__(cls, **options) -> None:
        """Keep registries of subclasses, which the stock class may have, free of generated classes."""

    def train(self, mode: bool = True):
        packing.bump()
        whole_forward.forget(self)
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        packing.bump()
        forget(self)  # and free what its graphs read, which may be on its way to another device
        whole_forward.forget(self)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        packing.bump()
        whole_forward.forget(self)
        return super()._load_from_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        if name in _MODULE_INTERNALS or name == "__class__" or isinstance(value, Tensor):
            super().__setattr__(name, value)
            if name in self.__dict__ and isinstance(value, Tensor):
                packing.renew()  # a tensor that is no parameter or buffer
            return
        modules = self.__dict__.get("_modules", {})
        known = name in modules or name in names_read_by(self._fastnets.stock_class)
        before = modules.get(name)
        old = self.__dict__.get(name)
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) or before is not None:
            stale = known and _role(before) != _role(value)
        else:
            stale = name == "_modules" or (known and old is not value)
        if stale:
            rewrite_again(self)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        rewrite_again(self)

    def __reduce_ex__(self, protocol: int):
        make, arguments, *rest = super().__reduce_ex__(max(protocol, 2))
        if make is not copyreg.__newobj__ or "_fastnets" not in vars(arguments[0]):
            return make, arguments, *rest
        return _instantiate, (self._fastnets, *arguments[1:]), *rest


def _role(module: object) -> object:
    """What a graph takes a child for: two children of one role may replace each other under it."""
    if not isinstance(module, nn.Module):
        return type(module)
    if is_sequential(module):
        return module
    return (
        is_convolution(module),
        is_batch_norm(module),
        is_linear(module),
        is_norm(module),
        is_elementary(module),
        recognise(module),
        is_dropout(module),
        observes_layout(module),
    )


def _instantiate(blueprint: Blueprint, *arguments: object) -> nn.Module:
    """A bare instance for copies and pickles to fill in."""
    cls = blueprint.generated
    if cls is None:  # unpickled: the forward is made again when the state has arrived
        stock = blueprint.stock_class
        cls = type(stock)(stock.__name__, (_Unpickled, stock), {"_fastnets": blueprint})
    return cls.__new__(cls, *arguments)


class _Unpickled(Rewritten):
    """A rewritten container whose state is not there yet."""

    def __setattr__(self, name: str, value: object) -> None:
        super(Rewritten, self).__setattr__(name, value)

    def __setstate__(self, state: object) -> None:
        blueprint = self._fastnets
        self.__class__ = blueprint.stock_class
        self.__setstate__(state)
        rewrite(self, blueprint.recipe)


_classes: weakref.WeakValueDictionary[tuple, type] = weakref.WeakValueDictionary()


def install(module: nn.Module, variants: dict[Condition, Variant], recipe: Recipe) -> bool:
    """Give ``module`` a class that runs the rewritten ``variants``; False where that would change nothing."""
    known = known_forward(type(module))
    if known is not None:
        return _install_known(module, known, recipe)
    rewrite_variants(module, variants, recipe)
    captured = [v for v in variants.values() if v.captured is not None]
    if not recipe.restores_outputs and not any(v.fusions or v.changes for v in captured):
        return False
    stock = type(module)
    writer = Writer(module, variants, recipe)
    source = writer.write()
    # fx names the globals of different graphs alike when they are the same object.
    for variant in captured:
        for name, value in variant.namespace.items():
            if writer.namespace.setdefault(name, value) is not value:
                return False
    key = (stock, source, recipe, tuple((n, id(v)) for n, v in sorted(writer.namespace.items())
                                        if not n.startswith(_STRUCTURE)),
           tuple(v for n, v in sorted(writer.namespace.items()) if n.startswith(_STRUCTURE)))  # fmt: skip
    cls = _classes.get(key)
    if cls is None:
        cls = _generate(stock, source, writer.namespace, variants, recipe)
        _classes[key] = cls
    module.__class__ = cls
    return True


def _install_known(module: nn.Module, known: KnownForward, recipe: Recipe) -> bool:
    """Give one of PyTorch's own containers, which cannot be captured, the forward that we have for it."""
    if recipe.keep_stock - {""}:
        return False
    stock, recipe = type(module), Recipe(backend=recipe.backend, replays=recipe.replays)
    cls = _classes.get((stock, recipe))
    if cls is None:
        cls = _generate(stock, known.source(stock.forward), known.scope(recipe.backend), {}, recipe)
        _classes[(stock, recipe)] = cls
    module.__class__ = cls
    return True


def give_between_blocks(module: nn.Module) -> bool:
    """Let a plain Sequential of rewritten blocks hand each the tensor that only it will read."""
    if type(module) is not nn.Sequential or has_hooks(module):
        return False
    blueprints = [blueprint_of(type(child)) for child in module]
    if not any(b is not None and b.overwrites for b in blueprints):
        return False
    cls = _classes.get(("sequence",))
    if cls is None:
        source = "def forward(self, input):\n    return _fn_run_in_sequence(self, input)\n"
        namespace, recipe = {"_fn_run_in_sequence": run_in_sequence}, Recipe(gives_between_blocks=True)
        cls = _generate(nn.Sequential, source, namespace, {}, recipe)
        _classes[("sequence",)] = cls
    module.__class__ = cls
    return True


def _generate(
    stock, source: str, namespace: dict, variants: dict[Condition, Variant], recipe: Recipe
) -> type:
    filename = f"<fastnets {stock.__module__}.{stock.__qualname__} #{next(_serial)}>"
    scope = dict(namespace)
    exec(compile(source, filename, "exec"), scope)
    linecache.cache[filename] = (
        len(source),
        None,
        source.splitlines(keepends=True),
        filename,
    )  # for tracebacks
    forward = scope["forward"]
    signature = inspect.signature(stock.forward)
    forward.__annotations__ = {
        p.name: p.annotation for p in signature.parameters.values() if p.annotation is not p.empty
    }
    if signature.return_annotation is not signature.empty:
        forward.__annotations__["return"] = signature.return_annotation
    forward.__doc__ = stock.forward.__doc__
    forward.__module__, forward.__qualname__ = stock.__module__, stock.forward.__qualname__
    blueprint = Blueprint(stock, recipe)
    blueprint.variants, blueprint.source = variants, source
    blueprint.hides_layout = hides_layout(stock, variants)
    blueprint.scope = scope
    blueprint.overwrites = any(variant.overwrites for variant in variants.values())
    blueprint.keeps_private = bool(variants) and all(
        variant.captured is not None and not shows_input(variant.captured.graph)
        for condition, variant in variants.items()
        if condition.training and condition.intact and condition.kind is Tensor
    )
    attributes = {}
    if THEN_ADD in scope:
        attributes[THEN_ADD] = scope[THEN_ADD]
    if recipe.splits_batches:
        forward = in_chunks(
            forward, lambda cls: issubclass(cls, Rewritten) or is_stock(cls) or is_dropout_class(cls)
        )
        forward = whole_forward.by_program(forward, runs_known_code)
    if recipe.replays:
        forward = replayed(forward)
    attributes |= {
        "forward": forward,
        "_fastnets": blueprint,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    blueprint.generated = type(stock)(stock.__name__, (Rewritten, stock), attributes)
    return blueprint.generated


def hides_layout(stock: type[nn.Module], variants: dict[Condition, Variant]) -> bool:
    """Whether no tensor's layout is seen in ``stock``'s forward, whichever way a call goes."""
    if not may_observe_layout(stock):
        return True
    parameters = list(inspect.signature(stock.forward).parameters.values())[1:]
    optional = any(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )
    return not optional and all(v.captured is not None for v in variants.values())


def rewrite(module: nn.Module, recipe: Recipe) -> bool:
    """Capture, rewrite and install, for one module that has its stock class. False leaves it as it is."""
    if recipe.gives_between_blocks:
        return give_between_blocks(module)
    variants = capture_variants(module)
    for given in recipe.given:
        variants |= capture_variants(module, given)
    if variants and all(v.captured is None for v in variants.values()) and not recipe.restores_outputs:
        return False
    try:
        return install(module, variants, recipe)
    except CaptureError:
        return False


def rewrite_again(module: nn.Module) -> None:
    """Rewrite a container whose structure has changed."""
    packing.renew()
    blueprint = module._fastnets
    back = without_rewrite(type(module))
    directly = "_fastnets" in vars(type(module))
    module.__class__ = back
    if directly:
        rewrite(module, blueprint.recipe)
