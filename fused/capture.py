"""Capturing the forward of one container as an fx graph, with its children as calls.

A graph stands for the forward only under stated conditions: the container's ``training`` flag, arguments
that have defaults left at them, inputs that are tensors (or one list of them) where the forward asks.
Everything that a graph cannot express (control flow on values, state written by the forward, random numbers
drawn in Python, tensors made on the spot, grad or autocast modes switched inside, autograd functions) makes
the capture fail with a reason, and the container stays stock.
"""

from __future__ import annotations

import copy
import inspect
import operator
import random
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnets.fused.batch_norm import has_hooks

_PLAIN_COLLECTIONS = (tuple, list, dict, torch.Size, fx.immutable_collections.immutable_list)
_PLAIN_COLLECTIONS += (fx.immutable_collections.immutable_dict,)
_NOT_FORWARDS = ("torch", "inspect", "typing", "copy", "dataclasses")  # code that asks for reasons of its own
# Return their input in evaluation; (package, class) for those of other libraries.
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_FOREIGN_DROPOUTS = (
    ("torchvision", "StochasticDepth"),
    ("timm", "DropPath"),
    ("fastnets", "StochasticDepth"),  # of models/, which this folder does not import
)


class CaptureError(Exception):
    """The forward cannot be captured; the message says why, as the end of a sentence about the container."""


@dataclass
class Captured:
    """A graph of a container's forward, and what it took for granted.

    Attributes:
        graph: placeholders are the arguments without a default; modules appear by their path.
        inlined: paths of the children (Sequentials, layer scales) that the graph goes through instead of
            calling them.
        bypassed: paths of the children that return their input (nn.Identity; dropout that drops nothing).
        asks_type: the forward asked whether an input is a tensor.
    """

    graph: fx.Graph
    inlined: list[str] = field(default_factory=list)
    bypassed: list[str] = field(default_factory=list)
    asks_type: bool = False


def is_dropout(module: nn.Module) -> bool:
    """Whether ``module`` is a stock layer that returns its input in evaluation mode."""
    return is_dropout_class(type(module))


def is_dropout_class(cls: type[nn.Module]) -> bool:
    """``is_dropout`` of the modules of a class."""
    return cls in _DROPOUTS or (cls.__module__.split(".")[0], cls.__name__) in _FOREIGN_DROPOUTS


def never_drops(dropout: nn.Module) -> bool:
    """Whether a dropout returns its input in training, too: its probability is zero."""
    return getattr(dropout, "p", getattr(dropout, "drop_prob", None)) == 0


def capture(
    module: nn.Module,
    *,
    training: bool,
    inline: Callable[[nn.Module], Callable | None] | None,
    input_kind: type = Tensor,
    given: tuple[str, ...] = (),
) -> Captured:
    """The graph of ``module``'s forward with the given ``training`` flag.

    inline: the forward of a child that the graph is to go through, None for a child to call; without
    ``inline`` every child is called, nn.Identity too. input_kind: what the inputs are, ``Tensor`` or
    ``list``. given: names of arguments with a default that are tensors all the same. Raises
    :class:`CaptureError`; ``module`` is as it was then, too.
    """
    before = _State(module)
    flag = module.training
    module.__dict__["training"] = training
    numbers = random.getstate()
    try:
        tracer = _Tracer(inline, input_kind, given)
        with torch.enable_grad(), _NoTensorWork():
            tracer.modes = _active_modes()
            graph = tracer.trace(module)
    except CaptureError:
        raise
    except Exception as error:  # whatever a forward raises when it is fed proxies
        raise CaptureError(f"its forward cannot be traced: {_first_line(error)}") from error
    finally:
        changed = before.restore_if_changed()
        module.__dict__["training"] = flag
    if changed:
        raise CaptureError(f"its forward writes to the module ({', '.join(changed)})")
    if random.getstate() != numbers:
        random.setstate(numbers)
        raise CaptureError("its forward draws random numbers in Python")
    return Captured(graph, list(tracer.inlined), list(tracer.bypassed), tracer.asks_type)


def required_arguments(forward: Callable) -> list[str]:
    """Names of the arguments after ``self`` that a call must give. CaptureError where one is keyword-only."""
    names = []
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise CaptureError(f"its forward requires the keyword argument {parameter.name!r}")
        names.append(parameter.name)
    return names


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _active_modes() -> tuple:
    """The modes that a graph does not record: a node made under other ones cannot be captured."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


class _NoTensorWork(TorchDispatchMode):
    """Refuses operations on real tensors: their results would be frozen into the graph."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise CaptureError(f"its forward computes with tensors of its own ({func})")


class _State:
    """A module's own attributes, lists and dicts among them by content, to be compared and put back."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.attributes = dict(module.__dict__)
        self.contents = {
            name: copy.copy(value)
            for name, value in self.attributes.items()
            if type(value) in (list, dict, set)
        }

    def restore_if_changed(self) -> list[str]:
        """Names of the attributes that changed since; all are as they were afterwards."""
        now = self.module.__dict__
        changed = [n for n in {**self.attributes, **now} if n != "training" and not self._same(n, now)]
        if changed:
            for name, content in self.contents.items():
                value = self.attributes[name]
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
            now.clear()
            now.update(self.attributes)
        return changed

    def _same(self, name: str, now: dict) -> bool:
        if name not in now or name not in self.attributes or now[name] is not self.attributes[name]:
            return False
        if name not in self.contents:
            return True
        old, new = self.contents[name], now[name]
        if isinstance(new, dict):
            return list(map(id, old)) == list(map(id, new)) and [*map(id, old.values())] == [
                *map(id, new.values())
            ]
        return (
            sorted(map(id, old)) == sorted(map(id, new))
            if isinstance(new, set)
            else (list(map(id, old)) == list(map(id, new)))
        )


class _Proxy(fx.Proxy):
    """A proxy that answers ``isinstance`` for inputs as the assumed kind, and notes that it was asked."""

    @property
    def __class__(self):
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker.split(".")[0] in _NOT_FORWARDS or asker.startswith("fastnets.fused"):
            return _Proxy
        if self.node.op != "placeholder":
            raise CaptureError("its forward depends on the type of an intermediate value")
        self.tracer.asks_type = True
        return self.tracer.input_kind


def _in_place(operation: Callable) -> Callable:
    """``operation`` (``operator.iadd``, ...) as a function of its own.

    fx has no proxies for the in-place operators: Python would fall back to ``x = x + y``, which is another
    thing where somebody else sees ``x``. Its code for ``operator.iadd`` itself rebinds a variable that may
    be read later, which is wrong for numbers.
    """

    def run(x, y):
        return operation(x, y)

    run.__name__ = run.__qualname__ = operation.__name__
    return run


# Python's method -> the function that stands for it in graphs.
IN_PLACE_OPERATORS = {
    f"__{name}__": _in_place(getattr(operator, name))
    for name in (
        *("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul"),
        *("ior", "ipow", "irshift", "isub", "itruediv", "ixor"),
    )
}
iadd = IN_PLACE_OPERATORS["__iadd__"]


def _record(function: Callable) -> Callable:
    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name, _function in IN_PLACE_OPERATORS.items():
    setattr(_Proxy, _name, _record(_function))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self, inline: Callable[[nn.Module], Callable | None] | None, input_kind: type, given: tuple[str, ...]
    ):
        super().__init__()
        self.given = given
        self.inline = inline
        self.input_kind = input_kind
        self.inlined: dict[str, None] = {}
        self.bypassed: dict[str, None] = {}
        self.asks_type = False
        self.modes: tuple = ()

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        names = required_arguments(root_fn)
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in (*names, *self.given)]

        def forward(root, *inputs):
            return root_fn(root, *inputs[: len(names)], **dict(zip(self.given, inputs[len(names) :])))

        return (forward if self.given else root_fn), [self.root, *inputs]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        if _active_modes() != self.modes:
            raise CaptureError("its forward switches grad mode, autocast or checkpointing, or calls an "
                               "autograd function")  # fmt: skip
        return super().create_node(kind, target, args, kwargs, name, None)

    def create_arg(self, a):
        if type(a) is _Proxy:
            return a.node
        if (
            isinstance(a, (tuple, list, dict))
            and type(a) not in _PLAIN_COLLECTIONS
            and not hasattr(a, "_fields")
        ):
            raise CaptureError(f"its forward builds a {type(a).__name__}")
        own = isinstance(a, nn.Parameter) or not isinstance(a, Tensor)
        if not own and not any(a is buffer for buffer in self.root.buffers()):
            raise CaptureError("its forward uses a tensor that is neither parameter nor buffer")
        if isinstance(a, types.FunctionType):
            raise CaptureError("its forward passes a function on")
        return super().create_arg(a)

    def call_module(self, m, forward, args, kwargs):
        path = self.path_of_module(m)
        if self.inline is not None and not kwargs and len(args) == 1:
            through = self.inline(m)
            if through is not None:
                self.inlined[path] = None
                return through(m, *args)
            if self._returns_input(m):
                self.bypassed[path] = None
                return args[0]
        return self.create_proxy("call_module", path, args, kwargs)

    def _returns_input(self, m: nn.Module) -> bool:
        if has_hooks(m):
            return False
        return type(m) is nn.Identity or (is_dropout(m) and (not self.root.training or never_drops(m)))
