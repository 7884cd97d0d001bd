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

import contextlib
import copyreg
import functools
import inspect
import itertools
import linecache
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import packing, whole_forward
from fastnets.fused.activation import recognise
from fastnets.fused.capture import (
    Captured,
    CaptureError,
    capture,
    has_hooks,
    is_dropout,
    is_dropout_class,
    never_drops,
    required_arguments,
)
from fastnets.fused.chains import Fusion, Left
from fastnets.fused.concatenation import grow_in_place
from fastnets.fused.conv_pool import join_pools
from fastnets.fused.cuda_graphs import forget, replayed
from fastnets.fused.depthwise_norm import join_depthwise_norms
from fastnets.fused.excited_conv import join_excited
from fastnets.fused.fuse import fuse, is_layer
from fastnets.fused.handing_down import THEN_ADD, finish
from fastnets.fused.known_forwards import KnownForward, known_forward
from fastnets.fused.layout import (
    LayoutError,
    hide_layout,
    is_stock,
    may_observe_layout,
    names_read_by,
    restore_layout_of_all,
)
from fastnets.fused.linear_chain import join_linear_chains
from fastnets.fused.memory import in_chunks
from fastnets.fused.ownership import run_in_sequence
from fastnets.fused.patterns import is_batch_norm, is_convolution, join_preactivations, mark_dying_residuals
from fastnets.fused.response_norm_pool import join_response_norms
from fastnets.fused.shortcut_conv import join_shortcuts
from fastnets.fused.training_graph import link, shows_input
from fastnets.fused.transformer_patterns import (
    ending_in_addition,
    is_elementary,
    is_linear,
    is_linear_result,
    is_norm,
)

_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"_modules"}
_GRAPH_HEADER = re.compile(r"^def forward\(", re.MULTILINE)
_WRAP_STATEMENT = re.compile(r"^torch\.fx\.wrap\(.*\)\n", re.MULTILINE)
_STRUCTURE = ("_fn_children", "_fn_layers_")  # names of constants that are compared by value
_serial = itertools.count()


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


# --- writing the forward ------------------------------------------------------------------------------------


def rewrite_variants(module: nn.Module, variants: dict[Condition, Variant], recipe: Recipe) -> None:
    """Fuse and hide layouts in every captured graph, and write its source. Works on each graph once."""
    done: set[int] = set()
    for condition, variant in variants.items():
        if variant.captured is None or id(variant) in done:
            continue
        done.add(id(variant))
        graph = variant.captured.graph
        try:
            variant.fusions, variant.left = fuse(graph, module, recipe.backend, recipe.keep_stock)
            variant.changes = hide_layout(
                graph,
                module,
                restore_outputs=recipe.restores_outputs,
                observing=observes_layout,
                as_stock=lambda node: is_linear_result(node, module),
                training=condition.training,
            )
        except LayoutError as error:
            variant.captured, variant.reason = None, str(error)
            variant.fusions = ()
            continue
        if condition.training:
            link(graph, recipe.save)
        else:
            modules = dict(module.named_modules(remove_duplicate=False))
            variant.fusions = join_preactivations(graph, modules, variant.fusions)
            variant.fusions = join_excited(graph, modules, variant.fusions)
            variant.fusions = join_depthwise_norms(graph, modules, variant.fusions)
            variant.fusions = join_pools(graph, modules, variant.fusions)
            variant.fusions = join_response_norms(graph, modules, variant.fusions)
            variant.fusions = join_linear_chains(graph, modules, variant.fusions)
            variant.fusions += grow_in_place(graph, recipe.backend)
            variant.overwrites = mark_dying_residuals(graph, modules)
            variant.fusions = join_shortcuts(graph, modules, variant.fusions)
        variant.source, variant.namespace = _source_of(graph)
        if (adding := ending_in_addition(graph, module)) is not None:
            variant.source_then_add, more = _source_of(adding)
            variant.namespace.update(more)


def _source_of(graph: fx.Graph) -> tuple[str, dict]:
    code = graph.python_code("self")
    return _WRAP_STATEMENT.sub("", code.src).strip(), dict(code.globals)


class _Writer:
    """Puts the variants together into the source of one class's ``forward``."""

    def __init__(self, module: nn.Module, variants: dict[Condition, Variant], recipe: Recipe):
        self.module = module
        self.variants = variants
        self.recipe = recipe
        self.stock_forward = type(module).forward
        self.signature = inspect.signature(self.stock_forward)
        self.namespace: dict[str, object] = {"_fn_stock": self.stock_forward, "_fn_Tensor": Tensor}
        self.functions: dict[str, str] = {}  # source of a variant's function -> its name
        self.then_add = False

    def write(self) -> str:
        self_name, *parameters = self.signature.parameters.values()
        declared, passed, guards = [self_name.name], [self_name.name], []
        defaults: dict[str, str] = {}  # argument -> the test that it was left out
        star = False
        for p in parameters:
            default = ""
            if p.default is not p.empty:
                name = f"_fn_default_{p.name}"
                self.namespace[name] = p.default
                default = f"={name}"
                same = "==" if type(p.default) in (int, float, str, tuple) else "is"
                guards.append(f"{p.name} {same} {name}")
                defaults[p.name] = guards[-1]
            if p.kind is p.VAR_POSITIONAL:
                star = True
                declared.append(f"*{p.name}")
                passed.append(f"*{p.name}")
                guards.append(f"not {p.name}")
            elif p.kind is p.VAR_KEYWORD:
                declared.append(f"**{p.name}")
                passed.append(f"**{p.name}")
                guards.append(f"not {p.name}")
            elif p.kind is p.KEYWORD_ONLY:
                if not star:
                    declared.append("*")
                    star = True
                declared.append(p.name + default)
                passed.append(f"{p.name}={p.name}")
            else:
                declared.append(p.name + default)
                passed.append(p.name)
        last_positional_only = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
        if last_positional_only:
            declared.insert(len(last_positional_only) + 1, "/")
        try:
            self.arguments = [self_name.name, *required_arguments(self.stock_forward)]
        except CaptureError:  # then nothing was captured either; the stock forward is only called
            self.arguments = declared[:1]
        self.stock_call = f"_fn_stock({', '.join(passed)})"
        if self.recipe.restores_outputs:
            self.namespace["_fn_restore"] = restore_layout_of_all
            inputs = "".join(f", {name}" for name in self.arguments[1:])
            self.stock_call = f"_fn_restore({self.stock_call}{inputs})"
        for path in sorted({p for v in self.variants.values() for p in v.held}):
            name = f"_fn_layers_{path.replace('.', '_')}"
            self.namespace[name] = layers_of(self.module.get_submodule(path))
            self.namespace["_fn_layers_of"] = layers_of
            guards.append(f"_fn_layers_of({self._path(path)}) == {name}")
        self.guards, self.defaults = guards, defaults
        lines = self._lines()
        if len(self.functions) == 1 and len(lines) == 1 and "_fn_graph_0(" in lines[0] and not self._adds():
            return next(iter(self.functions)) + "\n"  # one graph for all cases: it is the forward
        bodies = ["\n".join([f"def forward({', '.join(declared)}):", *lines])]
        if self._adds():
            bodies.append(self._write_then_add(declared, passed))
        graphs = [_GRAPH_HEADER.sub(f"def {name}(", text, count=1) for text, name in self.functions.items()]
        return "\n\n\n".join([*graphs, *bodies]) + "\n"

    def _adds(self) -> bool:
        return any(variant.source_then_add for variant in self.variants.values())

    def _lines(self) -> list[str]:
        """The body: a branch for each set of arguments that may be given, the stock forward for others."""
        lines, required = [], self.arguments
        for given in sorted({c.given for c in self.variants} - {()}):
            left_out = [guard for guard in self.guards if guard not in map(self.defaults.get, given)]
            tests = [*(f"isinstance({name}, _fn_Tensor)" for name in given), *left_out]
            self.arguments = [*required, *given]
            conditions = [c for c in self.variants if c.given == given]
            lines += [f"    if {' and '.join(tests)}:", *self._branch(conditions, "        ")]
        self.arguments = required
        if self.guards:
            lines += [f"    if not ({' and '.join(self.guards)}):", f"        return {self.stock_call}"]
        return lines + self._branch([c for c in self.variants if not c.given], "    ")

    def _write_then_add(self, declared: list[str], passed: list[str]) -> str:
        """The forward that scales its result and adds a residual, see ``fused.handing_down``."""
        self.namespace["_fn_finish"] = finish
        operands = ["_fn_residual", "_fn_scale"]
        call = f"{self.arguments[0]}.forward({', '.join(passed[1:])})"
        self.stock_call = f"_fn_finish({call}, {', '.join(operands)})"
        self.then_add = True
        header = f"def {THEN_ADD}({', '.join([declared[0], *operands, *declared[1:]])}):"
        return "\n".join([header, *self._lines()])

    def _branch(self, conditions: list[Condition], indent: str) -> list[str]:
        """Lines that return what the one condition that holds asks for."""
        for test, split in (
            (self._test_training, lambda c: c.training),
            (self._test_kind, lambda c: c.kind is Tensor),
            (self._test_intact, lambda c: c.intact),
        ):
            yes = [c for c in conditions if split(c)]
            no = [c for c in conditions if not split(c)]
            if not yes or not no:
                continue
            when_yes, when_no = self._branch(yes, indent + "    "), self._branch(no, indent)
            if [line.strip() for line in when_yes] == [line.strip() for line in when_no]:
                return when_no
            return [f"{indent}if {test(conditions)}:", *when_yes, *when_no]
        return self._call(conditions[0], indent)

    def _call(self, condition: Condition, indent: str) -> list[str]:
        variant = self.variants[condition]
        source = variant.source_then_add if self.then_add else variant.source
        if variant.captured is None or not source:
            return [f"{indent}return {self.stock_call}"]
        name = self.functions.get(source)
        if name is None:
            name = self.functions[source] = f"_fn_graph_{len(self.functions)}"
        arguments = [*self.arguments, *(("_fn_residual", "_fn_scale") if self.then_add else ())]
        call = f"return {name}({', '.join(arguments)})"
        if condition.kind is list:
            return [f"{indent}if type({self.arguments[1]}) is list:", f"{indent}    {call}",
                    f"{indent}return {self.stock_call}"]  # fmt: skip
        return [f"{indent}{call}"]

    def _test_training(self, conditions: list[Condition]) -> str:
        return f"{self.arguments[0]}.training"

    def _test_kind(self, conditions: list[Condition]) -> str:
        return " and ".join(f"isinstance({name}, _fn_Tensor)" for name in self.arguments[1:]) or "True"

    def _test_intact(self, conditions: list[Condition]) -> str:
        captured = self.variants[next(c for c in conditions if c.intact)].captured
        self.namespace.update(_fn_intact=is_intact, _fn_passes=passes_through)
        tests = []
        for path in captured.inlined:
            child = self.module.get_submodule(path)
            name = _children_name(path)
            self.namespace[name] = children_of(child)
            tests.append(f"_fn_intact({self._path(path)}, {name})")
        tests += [f"_fn_passes({self._path(path)})" for path in captured.bypassed]
        return " and ".join(tests)

    def _path(self, path: str) -> str:
        expression = self.arguments[0]
        for part in path.split(".") if path else ():
            expression = f"{expression}.{part}" if part.isidentifier() else f'getattr({expression}, "{part}")'
        return expression


def _children_name(path: str) -> str:
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
    writer = _Writer(module, variants, recipe)
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


# --- and back -----------------------------------------------------------------------------------------------


def blueprint_of(cls: type) -> Blueprint | None:
    """The blueprint of a generated class, or of the generated class that ``cls`` was derived from."""
    return getattr(cls, "_fastnets", None) if issubclass(cls, Rewritten) else None


def without_rewrite(cls: type) -> type:
    """The class without the generated one in its ancestry: FSDP and parametrizations derive from whatever
    class they find."""
    if not issubclass(cls, Rewritten):
        return cls
    if "_fastnets" in vars(cls):
        return cls._fastnets.stock_class
    key = ("without", cls)
    stock = _classes.get(key)
    if stock is None:
        attributes = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        stock = _classes[key] = type(cls)(
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
        is_intact(module.get_submodule(path), blueprint.scope[_children_name(path)])
        for path in captured.inlined
    ) and all(passes_through(module.get_submodule(path), evaluating=True) for path in captured.bypassed)
