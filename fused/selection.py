"""Choosing by measurement: ``optimize(select="measure")`` and ``fastnets tune``.

The rewritten network runs once on the example inputs. Where a fused op that is left to "auto" has to choose
(``dispatch.preferred``), every candidate is judged against the stock composition in float64 and then timed in
its place, on the tensors that are there, until one is clearly the fastest. Where none is, the simplest of
those that may be the fastest is taken: the stock composition before a vendor's call before a kernel of ours.
Layers of equal (bucketed) shape are measured once, and what was measured earlier is read from the store.

Then the whole network with its choices is timed beside stock, and stays stock unless it is clearly faster.

A network in training mode is timed as a whole only, forward and backward.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastnets.fused import dispatch, packing
from fastnets.fused.check import CheckReport, check, compare_outputs
from fastnets.fused.choices import NETWORK, Choice, Store, device_name
from fastnets.fused.measure import Comparison, Ratio, Samples, is_out_of_memory, measure

__all__ = ["BUDGET_SECONDS", "Calls", "LayerChoice", "Selection", "select"]

BUDGET_SECONDS = 90.0  # of one network, where nothing else is asked for
_NETWORK_SHARE = 0.35  # of the budget, for the whole network beside stock
_LAYER_SECONDS = 3.0  # of rounds, at most, for one layer
_ALIKE = 0.02  # medians this close are a tie that more rounds need not tell apart
_CANDIDATES = {
    "cpu": ("reference", "library"),
    "cuda": dispatch.SIMPLEST_FIRST,
}  # Triton's CPU is an interpreter

Tell = Callable[[str, str, int, int], None]
"""Called with (phase, what, step, steps), for progress displays."""


@dataclass
class LayerChoice:
    """What one distinct layer shape of a network runs, and why.

    source: "measured" (now), "stored" (measured before), or "not measured" where the budget was spent or
    there is one candidate only; the heuristic then goes on choosing. refused: candidates whose answers were
    wrong, and how wrong.
    """

    op: str
    dtype: str
    shape: str
    calls: int
    source: str = "not measured"
    backend: str = "auto"
    confidence: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> dispatch.Key:
        return self.op, self.dtype, self.shape


@dataclass
class Selection:
    """What was found for one network on one device; printable.

    ratio: how many times faster than stock the whole network is, None where it was not measured.
    keeps_stock: whether the network is to stay stock. interrupted: by Ctrl-C; what is here is complete.
    """

    device: str
    layers: list[LayerChoice] = field(default_factory=list)
    ratio: Ratio | None = None
    keeps_stock: bool = False
    reason: str = ""
    seconds: float = 0.0
    interrupted: bool = False

    def __str__(self) -> str:
        lines = [f"{self.device}: {len(self.layers)} distinct layers"]
        for layer in self.layers:
            times = ", ".join(f"{name} {t * 1e6:.0f} µs" for name, t in layer.seconds.items())
            sure = f" ({layer.confidence:.0%} sure)" if layer.seconds else ""
            lines.append(f"  {layer.op} {layer.dtype} {layer.shape} ×{layer.calls}: {layer.backend}{sure}, "
                         f"{layer.source}{': ' if times else ''}{times}")  # fmt: skip
            lines += [f"    {name} refused: {why}" for name, why in layer.refused.items()]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """One line on the whole network."""
        what = "stock is kept" if self.keeps_stock else "the fused network is taken"
        figure = "" if self.ratio is None else f", {self.ratio} of stock's speed"
        return f"{what}{figure}" + (f": {self.reason}" if self.reason else "")


def select(
    stock: nn.Module,
    fast: nn.Module,
    arguments: tuple,
    *,
    budget: float | None = BUDGET_SECONDS,
    again: bool = False,
    tell: Tell | None = None,
) -> Selection:
    """Measure what ``fast``, the rewritten form of ``stock``, should run for inputs like ``arguments``.

    The choices are in force when this returns, and in the store for later processes. Neither network's
    weights or statistics change. In a distributed job rank 0 measures, and all ranks take what it found.

    budget: seconds, None for no limit. Layers that it does not reach keep the heuristic's choice.
    again: measure also what the store knows.

    Raises what stock raises for ``arguments``; ``ValueError`` for a budget of 0 and sharded networks.
    """
    if budget is not None and not budget > 0:
        raise ValueError(
            f"budget={budget:g}: nothing can be measured in no time; give seconds, or leave it out"
        )
    refuse_sharded(stock)
    device = _device_of(stock)

    def here() -> Selection:
        return _Selector(stock, fast, arguments, device, budget, again, tell or (lambda *_: None)).run()

    found = _decided_by_rank_0(here)
    dispatch.adopt(device, {layer.key: layer.backend for layer in found.layers if layer.backend != "auto"})
    packing.bump()  # calls that were prepared by another choice
    return found


def refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter and hasattr(parameter, "placements"):
            raise ValueError(
                f"select='measure': {name} is sharded (DTensor), and one rank alone cannot run the network; "
                "optimize it before it is sharded"
            )


def _device_of(model: nn.Module) -> torch.device:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _decided_by_rank_0(decide: Callable[[], Selection]) -> Selection:
    """``decide()``, on rank 0 alone where there are several, and what it gave on all of them."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return decide()
    message: list[Selection | Exception | None] = [None]
    if distributed.get_rank() == 0:
        try:
            message[0] = decide()
        except Exception as error:  # the others wait: they have to be told
            distributed.broadcast_object_list(
                [RuntimeError(f"rank 0: {type(error).__name__}: {error}")], src=0
            )
            raise
    distributed.broadcast_object_list(message, src=0)
    if isinstance(message[0], Exception):
        raise message[0]
    return message[0]


class _Selector:
    """The measuring of one network; see the top of this file."""

    def __init__(self, stock, fast, arguments, device, budget, again, tell: Tell):
        self.stock, self.fast, self.arguments = stock, fast, arguments
        self.device, self.tell = device, tell
        self.start = time.perf_counter()
        self.end = None if budget is None else self.start + budget
        self.budget = budget
        self.store = Store()
        self.name = device_name(device)
        self.known = {} if again else {choice[:3]: choice for choice in self.store.read(self.name)}
        self.found = Selection(self.name)

    def run(self) -> Selection:
        training = any(m.training for m in self.stock.modules())
        try:
            if training:
                self._judge_network(_training_step)
            else:
                with torch.inference_mode():
                    self.stock(*self.arguments)  # what stock refuses is refused here, in its own words
                self._choose_layers()
                self._judge_network(_inference)
        except KeyboardInterrupt:
            self.found.interrupted = True
        self.found.seconds = time.perf_counter() - self.start
        return self.found

    def left(self, share: float = 1.0) -> float | None:
        """Seconds left of a share of the budget, counted from the start; None without a limit."""
        if self.end is None:
            return None
        return self.start + share * self.budget - time.perf_counter()

    # --- the layers -----------------------------------------------------------------------------------------

    def _choose_layers(self) -> None:
        arguments = self._as_run()
        with torch.inference_mode():
            survey = _Survey()
            packing.bump()
            with survey, packing.transient():
                self.fast(*arguments)
            self.found.layers = list(survey.layers.values())
            for layer in self.found.layers:
                self._recall(layer)
            unknown = sum(layer.source == "not measured" for layer in self.found.layers)
            if unknown:
                packing.bump()
                with _InPlace(self, unknown):
                    self.fast(*arguments)

    def _as_run(self) -> tuple:
        """The arguments as the layers see them: a whole network may run its batch in parts."""
        with torch.inference_mode():
            self.fast(*self.arguments)  # learns how large the parts may be
            packing.bump()
            with dispatch.decisions() as made:
                self.fast(*self.arguments)
        seen = max((decision.batch for decision in made), default=0)
        whole = {len(t) for t in pytree.tree_leaves(self.arguments) if isinstance(t, Tensor) and t.dim()}
        if len(self.arguments) != 1 or len(whole) != 1 or not 0 < seen < max(whole):
            return self.arguments
        return (self.arguments[0][:seen],)

    def _recall(self, layer: LayerChoice) -> None:
        choice = self.known.get(layer.key)
        if choice is not None:
            layer.source, layer.backend = "stored", choice.backend
            layer.confidence, layer.seconds = choice.confidence, choice.seconds

    def measure_layer(self, layer: LayerChoice, calls: dict[str, Callable[[], object]], exact) -> None:
        """Judge and time the candidates of one layer, and keep what was found."""
        right = {name: call for name, call in calls.items() if self._is_right(layer, name, calls, exact)}
        if len(right) < 2:
            layer.backend, layer.confidence = next(iter(right)), 1.0
            self._keep(layer)
            return
        comparison = measure(
            right,
            device=self.device,
            rounds=40,
            visit_seconds=0.01,
            max_seconds=self._layer_seconds(),
            max_warmup_seconds=5.0,
            enough=is_clear,
        )
        if comparison.interrupted:
            raise KeyboardInterrupt
        measured = [samples for samples in comparison.samples.values() if samples.times]
        if not measured:
            layer.refused.update({name: s.failure or "no time" for name, s in comparison.samples.items()})
            return
        layer.backend = simplest_of_the_fastest(comparison, tuple(right))
        layer.confidence = comparison.chance_fastest(layer.backend)
        layer.seconds = {samples.name: samples.median for samples in measured}
        self._keep(layer)

    def _layer_seconds(self) -> float:
        left = self.left(1 - _NETWORK_SHARE)
        waiting = sum(layer.source == "not measured" for layer in self.found.layers)
        return _LAYER_SECONDS if left is None else max(0.0, min(_LAYER_SECONDS, left / max(1, waiting)))

    def _is_right(self, layer: LayerChoice, name: str, calls: dict, exact: Callable[[], object]) -> bool:
        if name == "reference":
            return True  # it defines the op
        try:
            report = compare_outputs(calls["reference"](), calls[name](), exact())
        except dispatch.UnsupportedByBackend:
            return False
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return self._refuse(layer, name, "out of memory")
        return report.ok or self._refuse(layer, name, _why(report))

    def _refuse(self, layer: LayerChoice, name: str, why: str) -> bool:
        layer.refused[name] = why
        warnings.warn(
            f"fastnets: {layer.op} {layer.dtype} {layer.shape}: {name} is refused: {why}", stacklevel=2
        )
        return False

    def _keep(self, layer: LayerChoice) -> None:
        layer.source = "measured"
        self.store.write(self.name, [Choice(*layer.key, layer.backend, layer.confidence, layer.seconds)])

    # --- the whole network ----------------------------------------------------------------------------------

    def _judge_network(self, step_of: Callable) -> None:
        """Whether the network with its choices is faster than stock; stock is kept where it is not."""
        key = NETWORK, *self._digest()
        layers_known = all(layer.source == "stored" for layer in self.found.layers)
        if layers_known and self.found.layers and (choice := self.known.get(key)):
            ratio = choice.seconds["stock"] / choice.seconds["fused"]
            self.found.ratio = Ratio(ratio, choice.seconds["low"], choice.seconds["high"])
            self._conclude(choice.backend == "stock", "stored")
            return
        dispatch.adopt(self.device, {c.key: c.backend for c in self.found.layers if c.backend != "auto"})
        packing.bump()
        self.tell("checking", "the network", 0, 1)
        report = self._check_network()
        if not report.ok:
            self._conclude(True, f"its answers are refused: {_why(report)}")
            return
        steps = {"stock": step_of(self.stock, self.arguments), "fused": step_of(self.fast, self.arguments)}
        comparison = measure(
            steps,
            device=self.device,
            rounds=30,
            visit_seconds=0.02,
            max_seconds=None if self.end is None else max(1.0, self.left()),
            max_warmup_seconds=10.0,
            enough=is_clear,
            observer=lambda phase, name, step, count: self.tell(f"{phase}, network", name, step, count),
        )
        if comparison.interrupted:
            raise KeyboardInterrupt
        ratio = self.found.ratio = comparison.ratio("fused", "stock")
        if ratio is None:
            failures = [f"{s.name}: {s.failure}" for s in comparison.samples.values() if s.failure]
            self._conclude(True, "; ".join(failures) or "too few rounds")
            return
        keeps_stock = not ratio.low > 1
        self._conclude(keeps_stock, "fused is not clearly faster" if keeps_stock else "")
        seconds = {name: comparison.samples[name].median for name in steps}
        chosen = "stock" if keeps_stock else "fused"
        sure = comparison.chance_fastest(chosen)
        row = Choice(*key, chosen, sure, {**seconds, "low": ratio.low, "high": ratio.high})
        self.store.write(self.name, [row])

    def _check_network(self) -> CheckReport:
        report = check(self.stock, self.fast, self.arguments)
        if not report.ok and self.stock.training:
            # Batch statistics of channels-last tensors are further from the truth, by stock's layers, too.
            stock = copy.deepcopy(self.stock).to(memory_format=torch.channels_last)
            report = check(stock, self.fast, pytree.tree_map(_channels_last, self.arguments))
        return report

    def _conclude(self, keeps_stock: bool, reason: str) -> None:
        self.found.keeps_stock, self.found.reason = keeps_stock, reason

    def _digest(self) -> tuple[str, str]:
        """(dtype, shape) of the network's own row: what its layers are, and what it is run on."""
        leaves = [x for x in pytree.tree_leaves(self.arguments) if isinstance(x, Tensor)]
        facts = [[tuple(x.shape) for x in leaves], self.stock.training]
        facts += [[(*layer.key, layer.calls) for layer in self.found.layers]]
        facts += [[(name, tuple(p.shape)) for name, p in self.stock.named_parameters()]]
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        dtypes = {str(x.dtype).removeprefix("torch.") for x in leaves}
        return " ".join(sorted(dtypes)), f"{type(self.stock).__name__} {digest}"


def _inference(model: nn.Module, arguments: tuple) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode():
            return model(*arguments)

    return step


def _training_step(model: nn.Module, arguments: tuple) -> Callable[[], None]:
    """Forward and backward of a copy, whose statistics may move; there is no optimizer to tell apart."""
    twin = copy.deepcopy(model)

    def step() -> None:
        twin.zero_grad(set_to_none=True)
        with torch.enable_grad():
            outputs = [
                y for y in pytree.tree_leaves(twin(*arguments)) if isinstance(y, Tensor) and y.requires_grad
            ]
            torch.autograd.backward([y.float().square().mean() for y in outputs])

    return step


def _channels_last(x: object) -> object:
    is_image = isinstance(x, Tensor) and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last) if is_image else x


def _why(report: CheckReport) -> str:
    return report.problems[0] if report.problems else f"error ratio {report.error_ratio:.3g}"


# --- when a choice is clear ---------------------------------------------------------------------------------


def is_clear(comparison: Comparison) -> bool:
    """Whether more rounds need not tell the fastest variant: every other one is clearly slower, or its ratio
    to it is known to be a tie."""
    measured = [samples for samples in comparison.samples.values() if samples.times]
    if len(measured) < 2:
        return True
    best = min(measured, key=lambda samples: samples.median)
    for ratio in _behind(comparison, best, measured).values():
        if ratio is None:
            return False
        if not (ratio.high < 1 or (ratio.low > 1 - _ALIKE and ratio.high < 1 + _ALIKE)):
            return False
    return True


def simplest_of_the_fastest(comparison: Comparison, simplest_first: tuple[str, ...]) -> str:
    """The first of the names that is not clearly slower than the one with the lowest median."""
    measured = [samples for samples in comparison.samples.values() if samples.times]
    best = min(measured, key=lambda samples: samples.median)
    behind = _behind(comparison, best, measured)
    for name in simplest_first:
        if name == best.name:
            return name
        if name in behind and (behind[name] is None or behind[name].high >= 1):
            return name
    return best.name


def _behind(comparison: Comparison, best: Samples, measured: list[Samples]) -> dict[str, Ratio | None]:
    """Of every variant but the best: how many times as fast as the best it is."""
    return {s.name: comparison.ratio(s.name, best.name, resamples=500) for s in measured if s is not best}


# --- the calls of a network ---------------------------------------------------------------------------------


def _is_selectable(func: torch._ops.OpOverload, args: tuple) -> bool:
    """Whether this is an op of ours that was left to "auto", and changes none of its arguments."""
    if func.namespace != "fastnets" or func._schema.arguments[-1].name != "backend":
        return False
    changes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    return not changes and len(args) == len(func._schema.arguments) and args[-1] == "auto"


class Calls(TorchDispatchMode):
    """Hands every selectable call that has to choose to ``decided``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler to keep it away from a mode: two seconds and 70 MiB."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if kwargs or not _is_selectable(func, args):
            return func(*args, **(kwargs or {}))
        with dispatch.decisions() as made:
            result = func(*args)
        return result if not made else self.decided(func, args, made[0], result)

    def decided(self, func, args: tuple, decision: dispatch.Decision, result: object) -> object:
        raise NotImplementedError


class _Survey(Calls):
    """Lists the distinct layers and how often each is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[dispatch.Key, LayerChoice] = {}

    def decided(self, func, args, decision, result):
        self.layers.setdefault(decision[:3], LayerChoice(*decision[:3], calls=0)).calls += 1
        return result


class _InPlace(Calls):
    """Measures each layer that is not known yet where it stands, on the tensors that are there."""

    def __init__(self, selector: _Selector, unknown: int):
        super().__init__()
        self.selector, self.unknown = selector, unknown
        self.waiting = {layer.key: layer for layer in selector.found.layers if layer.source == "not measured"}

    def decided(self, func, args, decision, result):
        layer = self.waiting.pop(decision[:3], None)
        if layer is None:
            return result
        selector = self.selector
        left = selector.left(1 - _NETWORK_SHARE)
        if left is not None and left <= 0:
            return result
        step = self.unknown - len(self.waiting) - 1
        selector.tell("layers", f"{layer.op} {layer.shape}", step, self.unknown)
        wanted = _CANDIDATES.get(decision.device.type, ("reference",))
        names = [name for name in decision.candidates if name in wanted]
        if len(names) > 1:
            calls = {name: _call(func, (*args[:-1], name)) for name in names}
            selector.measure_layer(layer, calls, _in_float64(func, args))
        return result


def _call(func: Callable, args: tuple) -> Callable[[], object]:
    return lambda: func(*args)


def _in_float64(func: Callable, args: tuple) -> Callable[[], object]:
    def exact() -> object:
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args[:-1]]
        with _plain():
            return func(*wide, "reference")

    return exact


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
