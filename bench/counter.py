"""The dispatch mode behind ``fastnets.bench.traffic``: watches one run and records what each op moves."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from fastnets.bench.passes import Cost, bind, cost_of, nbytes, tensors_in
from fastnets.fused import dispatch
from fastnets.fused.saved import SavedBytes

__all__ = ["Counter", "Moved", "Record", "Traffic", "following_modules", "mebibytes"]

ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Moved:
    """What one op, one layer or the whole run moved: bytes, FLOPs, launches, and how many ops that were."""

    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0
    launches: int = 0
    ops: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.flops + other.flops,
            self.launches + other.launches,
            self.ops + other.ops,
        )


@dataclass(frozen=True)
class Record:
    """One op that moved something. ``layer`` is a module path, "" outside of any named module."""

    op: str
    layer: str
    moved: Moved
    in_backward: bool


@dataclass
class Traffic:
    """The count of one run: its ops in order, and the bytes that were kept for the backward pass.

    ``saved_bytes``: the distinct memory that autograd saved, parameters and buffers left out.
    """

    records: list[Record] = field(default_factory=list)
    saved_bytes: int = 0

    @property
    def total(self) -> Moved:
        return sum((record.moved for record in self.records), Moved())

    @property
    def bytes(self) -> int:
        return self.total.bytes

    @property
    def bytes_read(self) -> int:
        return self.total.bytes_read

    @property
    def bytes_written(self) -> int:
        return self.total.bytes_written

    @property
    def flops(self) -> int:
        return self.total.flops

    @property
    def launches(self) -> int:
        return self.total.launches

    @property
    def by_op(self) -> dict[str, Moved]:
        """Totals by op, the greatest first; Triton kernels as ``triton.NAME``."""
        sums = _sums((record.op, record.moved) for record in self.records)
        return dict(sorted(sums.items(), key=lambda item: -item[1].bytes))

    @property
    def by_layer(self) -> dict[str, Moved]:
        """Totals by module path, in the order of execution."""
        return self.grouped(0)

    def grouped(self, depth: int) -> dict[str, Moved]:
        """Totals by the first ``depth`` parts of the module path (0: the whole path)."""
        return _sums((_cut(record.layer, depth), record.moved) for record in self.records)

    def __str__(self) -> str:
        total = self.total
        read, written = mebibytes(total.bytes_read), mebibytes(total.bytes_written)
        facts = [
            f"{mebibytes(total.bytes)} MiB ({read} read, {written} written)",
            f"{total.launches} launches",
            f"{total.flops / 1e9:.2f} GFLOP",
        ]
        if self.saved_bytes:
            facts.append(f"{mebibytes(self.saved_bytes)} MiB saved for backward")
        return ", ".join(facts)


class Counter(TorchDispatchMode):
    """Sees every op below autograd, and records what it moves."""

    def __init__(self, model: nn.Module | None):
        super().__init__()
        self.traffic = Traffic()
        self.paused = False
        self.names: dict[nn.Module, str] = {}
        self.owners: dict[int, str] = {}
        self.running: list[str] = []  # paths of the modules that are being called
        self.owner: str | None = None  # layer of the fused op that is being run
        self.layer_of_node: dict[int, str] = {}  # by autograd's sequence number
        self.kept = SavedBytes(model)
        if model is not None:
            for path, module in model.named_modules():
                self.names[module] = path
                for parameter in module.parameters(recurse=False):
                    self.owners.setdefault(parameter.untyped_storage()._cdata, path)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        body = dispatch.body_of(func)
        if body is not None:
            return self.run_fused(body, func, args, kwargs)
        with self.owned(self.owner or self.owner_below(args)):
            self.remember_node()
            # Ops that are compositions of others come here whole in inference mode.
            if _is_composition(func):
                with self:
                    return func.decompose(*args, **kwargs)
            result = _call(func, args, kwargs)
            cost = cost_of(func, args, kwargs, result)
            if cost.launches:
                self.record(_name(func), cost, _flops(func, args, kwargs, result))
        return result

    @contextlib.contextmanager
    def owned(self, layer: str | None) -> Iterator[None]:
        """What runs inside the block belongs to ``layer``; None: to the module that runs it."""
        outer, self.owner = self.owner, layer
        try:
            yield
        finally:
            self.owner = outer

    def owner_below(self, args: tuple) -> str | None:
        """The layer whose parameter a container's forward uses without calling the layer."""
        running = self.running[-1] if self.running else ""
        owner = None if torch._C._current_autograd_node() is not None else self.owner_of(args)
        return owner if owner is not None and owner.startswith(f"{running}." if running else "") else None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Everything that this thread runs inside the block is counted."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_slow_transformer())
            stack.enter_context(following_modules(self))
            stack.enter_context(_launches(self))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.saved, lambda tensor: tensor))
            attention = stack.enter_context(_AttentionAsOne(self))
            stack.enter_context(attention.in_functional())
            stack.enter_context(self)
            yield

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside the block is not counted."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def run_fused(self, body: Callable, func, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        layer = self.owner or self.owner_of(args) or self.layer()
        outermost = self.owner is None
        with self.owned(layer):
            if outermost:
                # An autograd.Function calls the op with gradients off, and its own node made before.
                self.remember_node(any(t.requires_grad for t in tensors_in(args)))
            positional = [
                *args,
                *(kwargs.get(a.name, a.default_value) for a in func._schema.arguments[len(args) :]),
            ]
            with self:
                return body(*positional)

    def record(self, op: str, cost: Cost, flops: int) -> None:
        moved = Moved(cost.read, cost.written, flops, cost.launches, 1)
        in_backward = torch._C._current_autograd_node() is not None
        self.traffic.records.append(Record(op, self.layer(), moved, in_backward))

    def layer(self) -> str:
        if self.owner is not None:
            return self.owner
        node = torch._C._current_autograd_node()
        if node is None:
            return self.running[-1] if self.running else ""
        variable = getattr(node, "variable", None)  # of the nodes that accumulate a parameter's gradient
        if variable is not None:
            return self.owner_of((variable,)) or ""
        return self.layer_of_node.get(node._sequence_nr(), "")

    def remember_node(self, recorded: bool = False) -> None:
        """Notes whose backward the newest autograd node is.

        An op's node is made just before the op is dispatched, so the first op that sees a node is its own.
        ``recorded``: there is a node although gradients are off.
        """
        if (recorded or torch.is_grad_enabled()) and torch._C._current_autograd_node() is None:
            self.layer_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, self.layer())

    def owner_of(self, args: tuple) -> str | None:
        for tensor in tensors_in(args):
            if tensor.layout is torch.strided:
                path = self.owners.get(tensor.untyped_storage()._cdata)
                if path is not None:
                    return path
        return None

    def saved(self, tensor: Tensor) -> Tensor:
        """Autograd's pack hook."""
        if not self.paused:
            self.kept.add(tensor)
            self.traffic.saved_bytes = self.kept.total
        return tensor


class _AttentionAsOne(TorchFunctionMode):
    """Keeps attention one op where PyTorch would take it apart, as it does on meta tensors.

    The mode sees calls of the function itself. Calls from inside ``torch.nn.functional``, whose own
    functions run with the mode off, go through the name there, which ``in_functional`` replaces.
    """

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch._C._nn.scaled_dot_product_attention or self.counter.paused:
            return func(*args, **kwargs)
        return self.attention(func, *args, **kwargs)

    @contextlib.contextmanager
    def in_functional(self) -> Iterator[None]:
        stock = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = functools.partial(self.attention, stock)
        try:
            yield
        finally:
            torch.nn.functional.scaled_dot_product_attention = stock

    def attention(self, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        counter = self.counter
        operands = [t for t in (query, key, value, attn_mask) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
            if not query.is_meta or query.dim() != 4 or options.get("enable_gqa"):
                return func(query, key, value, attn_mask, dropout_p, is_causal, **options)
            if attn_mask is not None:
                with counter.pause():
                    attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
            # A kernel with a backward of its own, so that the gradient is one op too.
            op = torch.ops.aten._scaled_dot_product_efficient_attention
            return op(query, key, value, attn_mask, True, dropout_p, is_causal, scale=options.get("scale"))[0]
        with counter.pause():
            result = func(query, key, value, attn_mask, dropout_p, is_causal, **options)
        # Q·K and weights·V, for every query of every head.
        flops = 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        counter.record(ATTENTION, Cost(sum(map(nbytes, operands)), nbytes(result), 1), flops)
        return result


@contextlib.contextmanager
def _launches(counter: Counter) -> Iterator[None]:
    """Triton kernels, which PyTorch's dispatcher does not see."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from fastnets.kernels.launch import observe_launches

    def on_launch(launch) -> None:
        if not counter.paused:
            cost = Cost(sum(map(nbytes, launch.reads)), sum(map(nbytes, launch.writes)), 1)
            counter.record(f"triton.{launch.name}", cost, launch.flops)

    with observe_launches(on_launch):
        yield


@contextlib.contextmanager
def following_modules(counter: Counter) -> Iterator[None]:
    """Follows which module is being called. Not by hooks: a fused layer with hooks would run stock."""
    call = nn.Module.__call__

    def followed(module, *args, **kwargs):
        path = counter.names.get(module)
        if path is None:
            return call(module, *args, **kwargs)
        counter.running.append(path)
        try:
            return call(module, *args, **kwargs)
        finally:
            counter.running.pop()

    nn.Module.__call__ = followed
    try:
        yield
    finally:
        nn.Module.__call__ = call


@contextlib.contextmanager
def _slow_transformer() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# Vendors' fused convolutions, by the names of their input and weight. torch.utils.flop_counter has no formula
# for them, nor have they all got a meta kernel.
_FUSED_CONVOLUTIONS = {
    "aten::cudnn_convolution_relu": ("self", "weight"),
    "aten::cudnn_convolution_add_relu": ("self", "weight"),
    "mkldnn::_convolution_pointwise": ("X", "W"),
    "mkldnn::_convolution_pointwise_": ("X", "W"),
}


@functools.cache
def _is_composition(func: torch._ops.OpOverload) -> bool:
    """Whether the op is nothing but other ops, on every device."""
    name = func.name()
    return func._can_decompose() and not any(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        for key in ("CPU", "CUDA", "CompositeExplicitAutograd")
    )


def _call(func, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Runs the op; a convolution on meta tensors gives the layout that the device would give."""
    name = func._schema.name
    names = _FUSED_CONVOLUTIONS.get(name, ("input", "weight") if name == "aten::convolution" else None)
    if names is None or not tensors_in(args)[0].is_meta:
        return func(*args, **kwargs)
    arguments = bind(func, args, kwargs)
    x, weight = (arguments[operand] for operand in names)
    if name == "aten::convolution":
        result = func(*args, **kwargs)
    else:
        geometry = (arguments[option] for option in ("stride", "padding", "dilation"))
        result = torch.ops.aten.convolution(x, weight, None, *geometry, False, [0, 0], arguments["groups"])
    # cuDNN and oneDNN answer in channels-last where either operand is; the meta kernel knows neither.
    if x.dim() == 4 and any(
        torch._prims_common.suggest_memory_format(t) == torch.channels_last for t in (x, weight)
    ):
        result = result.contiguous(memory_format=torch.channels_last)
    return result


# Products with the vendor's epilogue, which have no formula of PyTorch's: those without.
_FLOPS_OF = {torch.ops.aten._addmm_activation: torch.ops.aten.addmm}


def _flops(func, args: tuple, kwargs: Mapping[str, Any], result: Any) -> int:
    packet = func._overloadpacket
    formula = flop_registry.get(_FLOPS_OF.get(packet, packet))
    if formula is not None:
        return formula(*args, **kwargs, out_val=result)
    fused = _FUSED_CONVOLUTIONS.get(func._schema.name)
    if fused is None:
        return 0
    x, weight = (bind(func, args, kwargs)[name] for name in fused)
    return conv_flop_count(x.shape, weight.shape, result.shape)


def _name(func: torch._ops.OpOverload) -> str:
    return func._schema.name.replace("::", ".")


def _sums(items: Iterable[tuple[str, Moved]]) -> dict[str, Moved]:
    sums: dict[str, Moved] = {}
    for key, moved in items:
        sums[key] = sums.get(key, Moved()) + moved
    return sums


def _cut(path: str, depth: int) -> str:
    return ".".join(path.split(".")[:depth]) if depth else path


def mebibytes(size: int) -> str:
    """A number of bytes for people: MiB with one decimal."""
    return f"{size / 2**20:,.1f}"
