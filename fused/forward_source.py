"""Writing the forward of a generated class: captured graphs, fused, and the choice among them at a call."""

from __future__ import annotations

import inspect
import re

from torch import Tensor, fx, nn

from fastnets.fused.capture import (
    CaptureError,
    required_arguments,
)
from fastnets.fused.concatenation import grow_in_place
from fastnets.fused.conv_pool import join_pools
from fastnets.fused.depthwise_norm import join_depthwise_norms
from fastnets.fused.excited_conv import join_excited
from fastnets.fused.fuse import fuse
from fastnets.fused.handing_down import THEN_ADD, finish
from fastnets.fused.layout import (
    LayoutError,
    hide_layout,
    restore_layout_of_all,
)
from fastnets.fused.linear_chain import join_linear_chains
from fastnets.fused.norm_linear_patterns import join_norms
from fastnets.fused.patterns import join_preactivations, mark_dying_residuals
from fastnets.fused.response_norm_pool import join_response_norms
from fastnets.fused.shortcut_conv import join_shortcuts
from fastnets.fused.shuffled_conv import join_shuffles
from fastnets.fused.training_graph import link
from fastnets.fused.transformer_patterns import (
    ending_in_addition,
    is_linear_result,
)
from fastnets.fused.variants import (
    Condition,
    Recipe,
    Variant,
    children_name,
    children_of,
    is_intact,
    layers_of,
    observes_layout,
    passes_through,
)

_GRAPH_HEADER = re.compile(r"^def forward\(", re.MULTILINE)
_WRAP_STATEMENT = re.compile(r"^torch\.fx\.wrap\(.*\)\n", re.MULTILINE)


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
            variant.fusions = join_shuffles(graph, modules, variant.fusions)
            variant.fusions += grow_in_place(graph, recipe.backend)
            variant.overwrites = mark_dying_residuals(graph, modules)
            variant.fusions = join_shortcuts(graph, modules, variant.fusions)
            variant.fusions = join_norms(graph, modules, variant.fusions)
        variant.source, variant.namespace = _source_of(graph)
        if (adding := ending_in_addition(graph, module)) is not None:
            variant.source_then_add, more = _source_of(adding)
            variant.namespace.update(more)


def _source_of(graph: fx.Graph) -> tuple[str, dict]:
    code = graph.python_code("self")
    return _WRAP_STATEMENT.sub("", code.src).strip(), dict(code.globals)


class Writer:
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
            name = children_name(path)
            self.namespace[name] = children_of(child)
            tests.append(f"_fn_intact({self._path(path)}, {name})")
        tests += [f"_fn_passes({self._path(path)})" for path in captured.bypassed]
        return " and ".join(tests)

    def _path(self, path: str) -> str:
        expression = self.arguments[0]
        for part in path.split(".") if path else ():
            expression = f"{expression}.{part}" if part.isidentifier() else f'getattr({expression}, "{part}")'
        return expression
